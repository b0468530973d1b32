"""Latent files: safetensors of latents, written by extract_latents.py or by LightningDiT, read in any order.

A latent file of n samples holds, under LightningDiT's names,

    latents, latents_flip           (n, C, h, w)  unscaled latents z of the images and of their mirror images
    labels                          (n,)          class numbers, int64
    latents_std, latents_flip_std   (n, C, h, w)  standard deviation of the posterior, whose mean `latents` then are

The last two are ours: LightningDiT stores draws from the posterior, and ignores unknown tensors. The metadata of our
files name the autoencoder and the scaling from z to the network's x; LightningDiT keeps latents_stats.pt beside its own
files instead.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import Dataset

from data.autoencoder import Autoencoder, LatentSpace, Scaling
from runtime.files import complete_file
from transport import randn

FORMAT = "PPFlow latents 1"
STATISTICS = "latents_stats.pt"  # mean and std (1, C, 1, 1) of a data set, where LightningDiT keeps them

STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # --dtype
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # in safetensors' words

LONGEST_HEADER = 100_000_000  # safetensors' own limit, in bytes
OPEN_FILES = 256  # per process; systems commonly allow 1024

MAX_CLASSES = 1_000_000  # a larger label is damage, and would make an embedding of gigabytes


def digest(*parts: np.ndarray | bytes) -> str:
    """sha256 of arrays and byte strings, in hex; their shapes and types count."""
    sha = hashlib.sha256()
    for part in parts:
        array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else np.ascontiguousarray(part)
        sha.update(f"{array.dtype.str} {array.shape}".encode())
        sha.update(array)
    return sha.hexdigest()


def draw_flip(generator: torch.Generator) -> bool:
    """Draw if a sample is mirrored, from the first number of its generator, for images and latents alike."""
    return torch.rand((), generator=generator).item() < 0.5


# ---------------------------------------------------------------------------------------------------------------
# Files


def shard_files(path: str | Path) -> list[Path]:
    """The latent files of a folder in the order of their samples; a name that starts with a dot is unfinished."""
    return sorted(file for file in Path(path).glob("*.safetensors") if not file.name.startswith("."))


def shard_name(number: int) -> str:
    """File name of latent file `number`, zero-padded so that names sort in order."""
    return f"latents_{number:06d}.safetensors"


def shard_metadata(autoencoder: LatentSpace, image_size: int, num_classes: int, shards: int) -> dict[str, str]:
    """Metadata of a latent file of ours: the settings of its set, which has `shards` files."""
    return {
        "format": FORMAT,
        "autoencoder": autoencoder.name,
        **{name: json.dumps(value) for name, value in asdict(autoencoder.scaling).items()},
        "image_size": str(image_size),
        "num_classes": str(num_classes),
        "shards": str(shards),
    }


def write_shard(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a latent file, which appears under its name only when complete; the module's docstring lists the tensors.

    Raises:
        OSError: if it cannot be written.
    """
    with complete_file(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors makes files that nobody else may read


@dataclass(frozen=True)
class Shard:
    """The header of a latent file; none of its data."""

    path: str
    rows: int
    shape: tuple[int, ...]  # of one sample's latents, (C, h, w)
    dtype: torch.dtype
    begins: dict[str, int]  # by tensor, the position of its first byte in the file
    version: tuple[int, int]  # size of the file, and time of its last change in ns
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> Shard:
        """Read the header of a file: its length in 8 bytes, then JSON, then the data (safetensors' format).

        Raises:
            ValueError: if the file is damaged, or holds something else.
        """
        with open(path, "rb") as file:
            version = _version(file)
            size, _ = version
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length) if length <= min(size - 8, LONGEST_HEADER) else b"")
                metadata = {name: str(value) for name, value in header.pop("__metadata__", {}).items()}
                found = {
                    name: (str(tensor["dtype"]), tuple(map(int, tensor["shape"]))) for name, tensor in header.items()
                }
                places = {name: tuple(map(int, tensor["data_offsets"])) for name, tensor in header.items()}
                end = max((end for _, end in places.values()), default=0)
            except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
                raise ValueError(f"the latent file {path} is damaged: its header cannot be read") from error
        if end != size - 8 - length:
            expected = 8 + length + end
            raise ValueError(f"the latent file {path} is damaged: it has {size} bytes and should have {expected}")
        names = ["latents", "latents_flip"]
        names += ["latents_std", "latents_flip_std"] if "latents_std" in found else []
        dtype, shape = found.get("latents", ("", ()))
        labels = ("I64", shape[:1])
        if dtype not in DTYPES or len(shape) != 4 or any(found.get(name) != (dtype, shape) for name in names):
            wrong = ", ".join(names) + " of one shape (n, C, h, w) and type fp16, bf16 or fp32"
        elif found.get("labels") != labels:
            wrong = "int64 labels, one for each of the latents"
        else:
            sizes = dict.fromkeys(names, math.prod(shape) * DTYPES[dtype].itemsize) | {"labels": 8 * shape[0]}
            if min(shape) < 0 or any(places[k][0] < 0 or places[k][1] - places[k][0] != sizes[k] for k in sizes):
                raise ValueError(f"the latent file {path} is damaged: its header contradicts itself")
            begins = {name: 8 + length + places[name][0] for name in (*names, "labels")}
            return cls(str(path), shape[0], shape[1:], DTYPES[dtype], begins, version, metadata)
        text = "; ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(found.items())) or "nothing"
        raise ValueError(f"{path} is no shard of latents: looked for {wrong}; found {text}")


def _version(file: BinaryIO) -> tuple[int, int]:
    """Size of an opened file, and time of its last change in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def settings_of(shard: Shard) -> dict[str, str]:
    """The metadata that all files of a set share (`shard_metadata`); empty for files that are not ours."""
    if shard.metadata.get("format") != FORMAT:
        return {}
    return {name: value for name, value in shard.metadata.items() if name != "skipped"}


# ---------------------------------------------------------------------------------------------------------------
# The dataset


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
        scaling:     conversion between the autoencoder's latents and the network's inputs

    Raises:
        FileNotFoundError: if there are no latent files.
        ValueError: if they are damaged, do not belong together, or are not of this autoencoder or image size; if they
            do not name their scaling, and neither latents_stats.pt nor an autoencoder gives it.
    """

    kind = "latents"
    value_step = None  # latents are continuous

    def __init__(self, path: str | Path, autoencoder: Autoencoder | None = None, image_size: int | None = None) -> None:
        shards = [Shard.read(file) for file in shard_files(path)]
        if not shards:
            raise FileNotFoundError(f"{path} holds no latent files (*.safetensors)")
        first, metadata = shards[0], settings_of(shards[0])
        for shard in shards:
            if (shard.shape, shard.dtype, set(shard.begins)) != (first.shape, first.dtype, set(first.begins)):
                raise ValueError(f"the latent files {first.path} and {shard.path} hold tensors of different kinds")
            if settings_of(shard) != metadata:
                raise ValueError(f"the latent files {first.path} and {shard.path} were made with different settings")
        planned = metadata.get("shards", str(len(shards)))
        if planned != str(len(shards)):
            raise ValueError(f"{path} holds {len(shards)} of {planned} shards: finish extract_latents.py")
        self.image_shape = first.shape
        self.has_deviation = "latents_std" in first.begins
        self._dtype, self._row_bytes = first.dtype, math.prod(first.shape) * first.dtype.itemsize
        self._shards = [replace(shard, metadata={}) for shard in shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
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
            except (KeyError, ValueError, TypeError, RuntimeError) as error:  # of json, int and torch
                raise ValueError(f"the latent file {first.path} is damaged: its metadata cannot be read") from error
            same = space and space.scaling == self.scaling and space.factor * first.shape[-1] == self.image_size
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
            self.vae, self.image_size = space.name, space.factor * first.shape[-1]
        if image_size is not None and self.image_size not in (None, image_size):
            raise ValueError(
                f"{path} holds latents of {self.image_size}x{self.image_size} images: "
                f"leave --image-size {image_size} out, or extract them at that size"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

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
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (n, C, h, w) float32 and labels (n,) int64; each independent of the others.

        Args:
            generators: one per sample; it draws if the sample is mirrored, then from the posterior where the files
                hold its deviation. None for `latents` as stored: the posterior's mean, or LightningDiT's draw.

        Raises:
            OSError: if a file cannot be read, or has changed since the dataset was opened.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        rows = (np.asarray(indices) - self._starts[shards]).tolist()
        shards = shards.tolist()
        if generators is None:
            names = ["latents"] * len(rows)
        else:
            names = ["latents_flip" if draw_flip(generator) else "latents" for generator in generators]
        draws = self.has_deviation and generators is not None
        wanted = [self._places(shards, rows, names)]
        if draws:
            wanted += [self._places(shards, rows, [f"{name}_std" for name in names])]
        if hasattr(os, "posix_fadvise"):  # on Linux: prefetch all at once, not one after the other
            for shard, begin in itertools.chain(*wanted):
                descriptor = self._file(shard).fileno()
                with contextlib.suppress(OSError):  # reading reports errors
                    os.posix_fadvise(descriptor, begin, self._row_bytes, os.POSIX_FADV_WILLNEED)
        z = self._latents(wanted[0])
        if draws:
            z += self._latents(wanted[1]).mul_(randn(z.shape, generators))
        places = [(k, self._shards[k].begins["labels"] + 8 * row) for k, row in zip(shards, rows, strict=True)]
        labels = self._bytes(places, 8).view(torch.int64).flatten()
        for k in set(shards):
            if _version(self._file(k)) != self._shards[k].version:
                path = self._shards[k].path
                raise OSError(f"the latent file {path} has been changed since it was opened: start again")
        return self.scaling.apply(z), labels

    def _places(self, shards: list[int], rows: list[int], names: list[str]) -> list[tuple[int, int]]:
        """File number and first byte of these rows of these tensors."""
        size = self._row_bytes
        return [
            (k, self._shards[k].begins[name] + row * size) for k, row, name in zip(shards, rows, names, strict=True)
        ]

    def _latents(self, places: list[tuple[int, int]]) -> torch.Tensor:
        """The latents (n, C, h, w) at these places, as float32."""
        stored = self._bytes(places, self._row_bytes).view(self._dtype)
        return stored.view(len(places), *self.image_shape).float()

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
