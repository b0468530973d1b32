"""The dataset of latents: read from latent files in any order."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from data.autoencoder import Autoencoder, LatentSpace, Scaling
from data.latent_files import MAX_CLASSES, SIZES, Shard, digest, settings_of, shard_files, version_of
from data.sizes import SizeRule, draw_version
from transport import randn

STATISTICS = "latents_stats.pt"  # mean and std (1, C, 1, 1) of a data set, where LightningDiT keeps them
OPEN_FILES = 256  # per process; systems commonly allow 1024


class LatentShards(Dataset):
    """Latents from a folder of latent files, scaled for the network.

    Samples are read from the files one by one: nothing is held in memory, pickled or copied to workers. Memory maps
    would not do: a page once touched, and up to 2 MB around it, counts as this process's memory from then on.

    Args:
        path:        the folder
        autoencoder: the autoencoder of --vae, if given
        image_size:  side of the images, to be checked

    Attributes:
        vae:         name of the autoencoder; None if neither the files nor --vae name it
        image_size:  side of the images; None if the autoencoder is unknown
        sizes:       rule of sizes, where the files hold many; None else
        scaling:     conversion between the autoencoder's latents and the network's inputs

    Raises:
        FileNotFoundError: if there are no latent files.
        ValueError: if they are damaged, do not belong together, or are not of this autoencoder or image size; if they
            do not name their scaling, and neither latents_stats.pt nor an autoencoder gives it.
    """

    kind = "latents"
    value_step = None  # latents are continuous

    def __init__(
        self,
        path: str | Path,
        autoencoder: Autoencoder | None = None,
        image_size: int | None = None,
    ) -> None:
        shards = [Shard.read(file) for file in shard_files(path)]
        if not shards:
            raise FileNotFoundError(f"{path} holds no latent files (*.safetensors)")
        first, metadata = shards[0], settings_of(shards[0])
        for shard in shards:
            same_shape = shard.shape == first.shape or ("index" in shard.begins and shard.shape[0] == first.shape[0])
            if not same_shape or (shard.dtype, set(shard.begins)) != (first.dtype, set(first.begins)):
                raise ValueError(f"the latent files {first.path} and {shard.path} hold tensors of different kinds")
            if settings_of(shard) != metadata:
                raise ValueError(f"the latent files {first.path} and {shard.path} were made with different settings")
        planned = metadata.get("shards", str(len(shards)))
        if planned != str(len(shards)):
            raise ValueError(f"{path} holds {len(shards)} of {planned} shards: finish extract_latents.py")
        self.image_shape, self.sizes = first.shape, None
        self.has_deviation = "latents_std" in first.begins
        self._dtype = first.dtype
        self._shards = [replace(shard, metadata={}) for shard in shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        self._versions = _read_versions(shards) if "index" in first.begins else None
        if not len(self):
            raise ValueError(f"the latent files in {path} are empty")
        self._files: dict[int, BinaryIO] = {}

        space = autoencoder if isinstance(autoencoder, LatentSpace) else None
        if space is not None and space.channels != first.shape[0]:
            raise ValueError(
                f"{path} holds latents of {first.shape[0]} channels, those of {space.name} have {space.channels}: "
                "give --vae the autoencoder that made them"
            )
        if metadata:
            try:
                self.vae = metadata["autoencoder"]
                self.scaling = Scaling.from_dict({name: json.loads(metadata[name]) for name in ("shift", "scale")})
                self.image_size, self.num_classes = int(metadata["image_size"]), int(metadata["num_classes"])
                if not 0 < self.num_classes <= MAX_CLASSES:
                    raise ValueError(f"{self.num_classes} classes")
                if not self.scaling.apply(torch.ones(1, *first.shape)).isfinite().all():
                    raise ValueError(f"{self.scaling}")
                if self._versions is not None:
                    rule = {name: int(metadata[name]) for name in SIZES}
                    side = self.image_size // int(metadata["factor"])
                    self.sizes, self.image_shape = SizeRule(**rule), (first.shape[0], side, side)
            except (KeyError, ValueError, TypeError, RuntimeError) as error:  # of json, int and torch
                raise ValueError(f"the latent file {first.path} is damaged: its metadata cannot be read") from error
            side = self.image_shape[-1]
            same = space and space.scaling == self.scaling and space.factor * side == self.image_size
            if autoencoder is not None and not same:
                raise ValueError(f"{path} holds latents of {self.vae}, not of {autoencoder.name}: leave --vae out")
        else:
            self.vae, self.scaling = None, _statistics(Path(path)) or (space and space.scaling)
            self.image_size, self.num_classes = None, None
            if self.scaling is None:
                raise ValueError(
                    f"the latent files in {path} do not say how they are scaled, and there is no {STATISTICS}: "
                    "give --vae the autoencoder that made them"
                )
            if isinstance(self.scaling.shift, tuple) and len(self.scaling.shift) != first.shape[0]:
                channels = len(self.scaling.shift)
                raise ValueError(f"{path}/{STATISTICS} has {channels} channels, the shards have {first.shape[0]}")
        labels = self._read_labels(min(self.num_classes or MAX_CLASSES, MAX_CLASSES))
        self.num_classes = self.num_classes or int(labels.max()) + 1
        self._labels_digest = digest(labels)
        if space is not None:  # it may have moved, or decode the same latents, as mse decodes ema's
            self.vae, self.image_size = space.name, space.factor * self.image_shape[-1]
        if image_size is not None and self.sizes is not None:
            raise ValueError(f"{path} holds latents of many sizes, not of one: give images, or leave --image-size out")
        if image_size is not None and self.image_size not in (None, image_size):
            raise ValueError(
                f"{path} holds latents of {self.image_size}x{self.image_size} images: "
                f"leave --image-size {image_size} out, or extract them at that size"
            )

    def take_sizes(self, sizes: SizeRule) -> None:
        """Take the crop probability of a rule of sizes; the files have the sizes (ValueError if of another rule)."""
        if self.sizes is None:
            raise ValueError("these latents are of one size: leave --max-tokens out, or extract them with --max-tokens")
        for name in SIZES[:2]:
            if getattr(sizes, name) != getattr(self.sizes, name):
                flag = {"max_tokens": "--max-tokens", "multiple": "--size-multiple"}[name]
                raise ValueError(f"these latents were extracted with {flag} {getattr(self.sizes, name)}: leave it out")
        self.sizes = replace(self.sizes, crop_probability=sizes.crop_probability)

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._versions is None else self._versions.shape[1]

    def _read_labels(self, bound: int) -> np.ndarray:
        """Labels (N,) int64 of all files; ValueError if one is negative, or not below the bound."""
        parts = []
        for shard in self._shards:
            labels = np.fromfile(shard.path, np.int64, shard.rows, offset=shard.begins["labels"])
            wrong = np.flatnonzero((labels < 0) | (labels >= bound))
            if len(wrong):
                raise ValueError(
                    f"the latent file {shard.path} has the label {labels[wrong[0]]} in row {wrong[0]}: labels "
                    f"count from 0 and are below {bound:,}"
                )
            parts.append(labels)
        return np.concatenate(parts)

    def identity(self) -> dict[str, Any]:
        """See AnyDataset; of the latents only number, shape and type count, so that none is read."""
        shards = [
            os.fsencode(os.path.basename(shard.path)) + f" {shard.rows} {shard.shape} {shard.dtype}\n".encode()
            for shard in self._shards
        ]
        return {
            "kind": self.kind,
            "images": len(self),
            "num_classes": self.num_classes,
            "names": digest(*shards, " ".join(sorted(self._shards[0].begins)).encode()),
            "labels": self._labels_digest,
            "scaling": json.loads(json.dumps(asdict(self.scaling))),
        }

    # -- Reading ------------------------------------------------------------------------------------------------

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Scaled latents (C, h, w) and label; see `load_many`."""
        latents, labels = self.load_many([index], None if generator is None else [generator])
        return latents[0], int(labels[0])

    def load_many(
        self, indices: Sequence[int], generators: Sequence[torch.Generator] | None = None
    ) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]:
        """Scaled latents (n, C, h, w) float32 and labels (n,) int64; each independent of the others.

        Latents of many sizes are a list of n tensors (C, h, w).

        Args:
            generators: one per sample; it draws if the sample is mirrored, then from the posterior where the files
                hold its deviation. None for `latents` as stored: the posterior's mean, or LightningDiT's draw.

        Raises:
            OSError: if a file cannot be read, or has changed since the dataset was opened.
        """
        versions = [draw_version(generator, self.sizes) for generator in generators or ()] or [(False, False)]
        mirrored, square = (np.broadcast_to(version, len(indices)) for version in zip(*versions, strict=True))
        if self._versions is None:
            return self._load_rows(np.asarray(indices), mirrored, generators)
        whole, cropped = self._versions[:, indices]
        rows = np.where(square & (cropped >= 0), cropped, whole)
        parts = [
            self._load_rows(rows[i : i + 1], mirrored[i : i + 1], None if generators is None else [generators[i]])
            for i in range(len(rows))
        ]
        return [latents[0] for latents, _ in parts], torch.cat([labels for _, labels in parts])

    def _load_rows(
        self, rows: np.ndarray, mirrored: np.ndarray, generators: Sequence[torch.Generator] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (n, C, h, w) and labels (n,) in these rows of all files, which have one size."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        rows = (rows - self._starts[shards]).tolist()
        shards = shards.tolist()
        names = ["latents_flip" if flip else "latents" for flip in mirrored]
        draws = self.has_deviation and generators is not None
        wanted = [self._places(shards, rows, names)]
        if draws:
            wanted += [self._places(shards, rows, [f"{name}_std" for name in names])]
        shape = self._shards[shards[0]].shape
        if hasattr(os, "posix_fadvise"):  # on Linux: prefetch all at once, not one after the other
            for shard, begin in itertools.chain(*wanted):
                descriptor = self._file(shard).fileno()
                with contextlib.suppress(OSError):  # reading reports errors
                    os.posix_fadvise(descriptor, begin, self._row_bytes(shape), os.POSIX_FADV_WILLNEED)
        z = self._latents(wanted[0], shape)
        if draws:
            z += self._latents(wanted[1], shape).mul_(randn(z.shape, generators))
        places = [(k, self._shards[k].begins["labels"] + 8 * row) for k, row in zip(shards, rows, strict=True)]
        labels = self._bytes(places, 8).view(torch.int64).flatten()
        for k in set(shards):
            if version_of(self._file(k)) != self._shards[k].version:
                path = self._shards[k].path
                raise OSError(f"the latent file {path} has been changed since it was opened: start again")
        return self.scaling.apply(z), labels

    def _places(self, shards: list[int], rows: list[int], names: list[str]) -> list[tuple[int, int]]:
        """File number and first byte of these rows of these tensors."""
        return [
            (k, self._shards[k].begins[name] + row * self._row_bytes(self._shards[k].shape))
            for k, row, name in zip(shards, rows, names, strict=True)
        ]

    def _row_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one sample's latents."""
        return math.prod(shape) * self._dtype.itemsize

    def _latents(self, places: list[tuple[int, int]], shape: tuple[int, ...]) -> torch.Tensor:
        """The latents (n, C, h, w) at these places, as float32."""
        stored = self._bytes(places, self._row_bytes(shape)).view(self._dtype)
        return stored.view(len(places), *shape).float()

    def _bytes(self, places: list[tuple[int, int]], size: int) -> torch.Tensor:
        """(n, size) uint8 from these places.

        Raises:
            OSError: if a file cannot be read there.
        """
        buffer = np.empty((len(places), size), np.uint8)
        for row, (shard, begin) in zip(buffer, places, strict=True):
            descriptor, path = self._file(shard).fileno(), self._shards[shard].path
            try:
                read = os.preadv(descriptor, [row], begin)
            except OSError as error:  # which does not name the file
                raise OSError(f"cannot read the shard {path}: {error.strerror}") from error
            if read != size:
                raise OSError(f"the latent file {path} has become shorter since it was opened: start again")
        return torch.from_numpy(buffer)

    def _file(self, shard: int) -> BinaryIO:
        """The opened file; each process opens its own."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open(self._shards[shard].path, "rb", buffering=0)  # noqa: SIM115
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}


def _read_versions(shards: Sequence[Shard]) -> np.ndarray:
    """Rows (2, N) of the images over all files: of each one's own aspect ratio, and of its square version or -1.

    Raises:
        ValueError: if images are there twice, or as squares alone.
    """
    start, numbers = 0, []
    images = sum(shard.rows + len(json.loads(shard.metadata.get("skipped", "[]"))) for shard in shards)  # at most
    for shard in shards:
        found = np.fromfile(shard.path, np.int64, shard.rows, offset=shard.begins["index"])
        if ((found < 0) | (found >= images)).any():
            raise ValueError(
                f"the latent file {shard.path} is damaged: it numbers an image beyond the {images} there are"
            )
        numbers.append((found, start + np.arange(shard.rows), shard.metadata.get("square") == "1"))
        start += shard.rows
    versions = np.full((2, 1 + max((int(found.max(initial=0)) for found, _, _ in numbers), default=0)), -1, np.int64)
    for found, rows, square in numbers:
        versions[int(square), found] = rows
    whole, cropped = versions >= 0
    if whole.sum() + cropped.sum() != start or (cropped & ~whole).any():
        raise ValueError(f"the latent files beside {shards[0].path} are damaged: their images are not those of one set")
    return versions[:, whole]


def _statistics(path: Path) -> Scaling | None:
    """x = (z - mean) / std with the numbers that LightningDiT keeps beside its latent files."""
    file = path / STATISTICS
    if not file.exists():
        return None
    try:
        statistics = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (statistics[name].double().flatten() for name in ("mean", "std"))
        if not (mean.isfinite() & (1 / std).isfinite()).all():
            raise ValueError("a deviation is 0, or a number is not finite")
        return Scaling(tuple(mean.tolist()), tuple((1 / std).tolist()))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(
            f"cannot read {file}: looked for tensors 'mean' and 'std', one finite number per channel"
        ) from error
