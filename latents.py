"""Latent shards: safetensors files of latents, written by extract_latents.py or by LightningDiT, read at random.

A shard of n samples holds, under the names that LightningDiT uses,

    latents, latents_flip           (n, C, h, w)  unscaled latents z of the images and of their mirror images
    labels                          (n,)          class numbers, int64
    latents_std, latents_flip_std   (n, C, h, w)  standard deviation of the posterior, whose mean `latents` then are

The last two are ours: LightningDiT stores draws from the posterior, and does not look at what it does not know. Our
shards say in their metadata which autoencoder made them and how z becomes the network's x; LightningDiT keeps
latents_stats.pt beside its own instead.
"""

from __future__ import annotations

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

from autoencoder import Autoencoder, LatentSpace, Scaling
from train_utils import complete_file
from transport import randn

FORMAT = "PPFlow latents 1"
STATISTICS = "latents_stats.pt"  # mean and std (1, C, 1, 1) of a data set, where LightningDiT keeps them

STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # --dtype
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # in safetensors' words

OPEN_FILES = 256  # per process; systems commonly allow 1024


def draw_flip(generator: torch.Generator) -> bool:
    """Whether a sample is mirrored: the first number of its generator, for images and latents alike."""
    return torch.rand((), generator=generator).item() < 0.5


# ---------------------------------------------------------------------------------------------------------------
# Files


def shard_files(path: str | Path) -> list[Path]:
    """The shards of a folder in the order of their samples; a name with a dot in front is not finished."""
    return sorted(file for file in Path(path).glob("*.safetensors") if not file.name.startswith("."))


def shard_name(number: int) -> str:
    """Of the shard of that number: names sort like numbers."""
    return f"latents_{number:06d}.safetensors"


def shard_metadata(autoencoder: LatentSpace, image_size: int, num_classes: int, shards: int) -> dict[str, str]:
    """What a shard of ours says about the set it belongs to, of `shards` files."""
    return {
        "format": FORMAT,
        "autoencoder": autoencoder.name,
        **{name: json.dumps(value) for name, value in asdict(autoencoder.scaling).items()},
        "image_size": str(image_size),
        "num_classes": str(num_classes),
        "shards": str(shards),
    }


def write_shard(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a shard: complete under its name, or not there. See the top of this file for the tensors.

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
    """What a shard's header says of it; none of its data."""

    path: str
    rows: int
    shape: tuple[int, ...]  # of one sample's latents, (C, h, w)
    dtype: torch.dtype
    begins: dict[str, int]  # tensors, and where in the file their first byte is
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> Shard:
        """Read the header of a file: its length in 8 bytes, then JSON, then the data (safetensors' format).

        Raises:
            ValueError: if the file is damaged, or holds something else.
        """
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length) if length <= size - 8 else b"")
                metadata = header.pop("__metadata__", {})
                end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"the shard {path} is damaged: its header cannot be read") from error
        if end != size - 8 - length:
            raise ValueError(f"the shard {path} is damaged: it has {size} bytes and should have {8 + length + end}")
        found = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in header.items()}
        names = ["latents", "latents_flip"]
        names += ["latents_std", "latents_flip_std"] if "latents_std" in found else []
        dtype, shape = found.get("latents", ("", ()))
        labels = ("I64", shape[:1])
        if dtype not in DTYPES or len(shape) != 4 or any(found.get(name) != (dtype, shape) for name in names):
            wrong = ", ".join(names) + " of one shape (n, C, h, w) and type fp16, bf16 or fp32"
        elif found.get("labels") != labels:
            wrong = "int64 labels, one for each of the latents"
        else:
            begins = {name: 8 + length + header[name]["data_offsets"][0] for name in (*names, "labels")}
            return cls(str(path), shape[0], shape[1:], DTYPES[dtype], begins, metadata)
        text = "; ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(found.items())) or "nothing"
        raise ValueError(f"{path} is no shard of latents: looked for {wrong}; found {text}")


def settings_of(shard: Shard) -> dict[str, str]:
    """The metadata that all shards of a set have in common (`shard_metadata`); empty for one that is not ours."""
    if shard.metadata.get("format") != FORMAT:
        return {}
    return {name: value for name, value in shard.metadata.items() if name != "skipped"}


# ---------------------------------------------------------------------------------------------------------------
# The dataset


class LatentShards(Dataset):
    """Latents, scaled as the network sees them, from a folder of shards.

    Samples are read out of the files one by one: nothing is held in memory, pickled or copied to workers. Not through
    memory maps: a page once touched, and up to 2 MB around it, counts as this process's memory from then on.

    Args:
        path:        the folder
        autoencoder: the one that --vae names, if it does
        image_size:  side of the images, to be checked

    Attributes:
        vae:         name of the autoencoder; None where neither the shards nor --vae tell
        image_size:  side of the images; None where the autoencoder is unknown
        scaling:     how the autoencoder's latents became the network's, and become its own again

    Raises:
        FileNotFoundError: if there are no shards.
        ValueError: if they are damaged, do not belong together, or are not of this autoencoder or image size; if they
            say nothing of their scaling, have no latents_stats.pt, and no autoencoder is given either.
    """

    kind = "latents"
    value_step = None  # latents are continuous

    def __init__(self, path: str | Path, autoencoder: Autoencoder | None = None, image_size: int | None = None) -> None:
        shards = [Shard.read(file) for file in shard_files(path)]
        if not shards:
            raise FileNotFoundError(f"{path} holds no *.safetensors shards")
        first, metadata = shards[0], settings_of(shards[0])
        for shard in shards:
            if (shard.shape, shard.dtype, set(shard.begins)) != (first.shape, first.dtype, set(first.begins)):
                raise ValueError(f"the shards {first.path} and {shard.path} hold tensors of different kinds")
            if settings_of(shard) != metadata:
                raise ValueError(f"the shards {first.path} and {shard.path} were made with different settings")
        if int(metadata.get("shards", len(shards))) != len(shards):
            raise ValueError(f"{path} holds {len(shards)} of {metadata['shards']} shards: finish extract_latents.py")
        self.image_shape = first.shape
        self.has_deviation = "latents_std" in first.begins
        self._dtype, self._row_bytes = first.dtype, math.prod(first.shape) * first.dtype.itemsize
        self._shards = [replace(shard, metadata={}) for shard in shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in shards)])
        if not len(self):
            raise ValueError(f"the shards in {path} are empty")
        self._files: dict[int, BinaryIO] = {}

        space = autoencoder if isinstance(autoencoder, LatentSpace) else None
        if space is not None and space.channels != first.shape[0]:
            raise ValueError(f"{path} holds latents of {first.shape[0]} channels, those of {space.name} have "
                             f"{space.channels}: give --vae the autoencoder that made them")  # fmt: skip
        if metadata:
            self.vae = metadata["autoencoder"]
            self.scaling = Scaling.from_dict({name: json.loads(metadata[name]) for name in ("shift", "scale")})
            self.image_size, self.num_classes = int(metadata["image_size"]), int(metadata["num_classes"])
            same = space and space.scaling == self.scaling and space.factor * first.shape[-1] == self.image_size
            if autoencoder is not None and not same:
                raise ValueError(f"{path} holds latents of {self.vae}, not of {autoencoder.name}: leave --vae out")
        else:
            self.vae, self.scaling = None, _statistics(Path(path)) or (space and space.scaling)
            self.image_size, self.num_classes = None, self._count_classes()
            if self.scaling is None:
                raise ValueError(f"the shards in {path} do not say how they are scaled, and there is no {STATISTICS}: "
                                 f"give --vae the autoencoder that made them")  # fmt: skip
            if isinstance(self.scaling.shift, tuple) and len(self.scaling.shift) != first.shape[0]:
                raise ValueError(f"{path}/{STATISTICS} has {len(self.scaling.shift)} channels, the shards have "
                                 f"{first.shape[0]}")  # fmt: skip
        if space is not None:  # it may have moved, or be another decoder of the same latents, as mse is of ema's
            self.vae, self.image_size = space.name, space.factor * first.shape[-1]
        if image_size is not None and self.image_size not in (None, image_size):
            raise ValueError(f"{path} holds latents of {self.image_size}x{self.image_size} images: "
                             f"leave --image-size {image_size} out, or extract them at that size")  # fmt: skip

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _count_classes(self) -> int:
        """The largest label and one, for shards that do not say."""
        largest = 0
        for shard in self._shards:
            labels = np.fromfile(shard.path, np.int64, shard.rows, offset=shard.begins["labels"])
            if len(labels) and labels.min() < 0:
                raise ValueError(f"the shard {shard.path} has the label {labels.min()}: labels count from 0")
            largest = max(largest, labels.max(initial=0))
        return int(largest) + 1

    # -- Reading ------------------------------------------------------------------------------------------------

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Scaled latents (C, h, w) and label; see `load_many`."""
        latents, labels = self.load_many([index], None if generator is None else [generator])
        return latents[0], int(labels[0])

    def load_many(
        self, indices: Sequence[int], generators: Sequence[torch.Generator] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled latents (n, C, h, w) float32 and labels (n,) int64; each the same as by itself.

        Args:
            generators: one per sample; it decides whether the sample is mirrored, then draws from the posterior where
                the shards hold its deviation. None for `latents` as they are: the posterior's mean, or
                LightningDiT's draw from it.
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
        if hasattr(os, "posix_fadvise"):  # on Linux the disk is asked for all at once, not for one after the other
            for shard, begin in itertools.chain(*wanted):
                descriptor = self._file(shard).fileno()
                os.posix_fadvise(descriptor, begin, self._row_bytes, os.POSIX_FADV_WILLNEED)
        z = self._latents(wanted[0])
        if draws:
            z += self._latents(wanted[1]).mul_(randn(z.shape, generators))
        places = [(k, self._shards[k].begins["labels"] + 8 * row) for k, row in zip(shards, rows, strict=True)]
        return self.scaling.apply(z), self._bytes(places, 8).view(torch.int64).flatten()

    def _places(self, shards: list[int], rows: list[int], names: list[str]) -> list[tuple[int, int]]:
        """Shard and first byte of these rows of these tensors."""
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
            if os.preadv(self._file(shard).fileno(), [row], begin) != size:
                raise OSError(f"the shard {self._shards[shard].path} has become shorter since it was opened")
        return torch.from_numpy(buffer)

    def _file(self, shard: int) -> BinaryIO:
        """A shard's file; each process opens its own."""
        if shard not in self._files:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = open(self._shards[shard].path, "rb", buffering=0)  # noqa: SIM115
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}}


def _statistics(path: Path) -> Scaling | None:
    """x = (z - mean) / std with the numbers that LightningDiT keeps beside its shards."""
    file = path / STATISTICS
    if not file.exists():
        return None
    try:
        statistics = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (statistics[name].double().flatten() for name in ("mean", "std"))
        return Scaling(tuple(mean.tolist()), tuple((1 / std).tolist()))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        raise ValueError(f"cannot read {file}: looked for tensors 'mean' and 'std', one number per channel") from error
