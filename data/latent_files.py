"""Latent files: safetensors of latents, written by extract_latents.py or by LightningDiT.

A latent file of n samples holds, under LightningDiT's names,

    latents, latents_flip           (n, C, h, w)  unscaled latents z of the images and of their mirror images
    labels                          (n,)          class numbers, int64
    latents_std, latents_flip_std   (n, C, h, w)  standard deviation of the posterior, whose mean `latents` then are

The last two are ours: LightningDiT stores draws from the posterior, and ignores unknown tensors. The metadata of our
files name the autoencoder and the scaling from z to the network's x; LightningDiT keeps latents_stats.pt beside its own
files instead.

A set of images of many sizes has files of one size each, with

    index                           (n,)          numbers of the images, int64

and, where an image has a square version too (`SizeRule`), that in another file, whose metadata say "square".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.autoencoder import LatentSpace, Scaling
from data.sizes import SizeRule
from runtime.files import complete_file

FORMAT = "PPFlow latents 1"

STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # --dtype
SIZES = ("max_tokens", "multiple", "token")  # of the rule of sizes, in the metadata
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}  # in safetensors' words

LONGEST_HEADER = 100_000_000  # safetensors' own limit, in bytes

MAX_CLASSES = 1_000_000  # a larger label is damage, and would make an embedding of gigabytes


def digest(*parts: np.ndarray | bytes) -> str:
    """sha256 of arrays and byte strings, in hex; their shapes and types count."""
    sha = hashlib.sha256()
    for part in parts:
        array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else np.ascontiguousarray(part)
        sha.update(f"{array.dtype.str} {array.shape}".encode())
        sha.update(array)
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Files


def shard_files(path: str | Path) -> list[Path]:
    """The latent files of a folder in the order of their samples; a name that starts with a dot is unfinished."""
    return sorted(file for file in Path(path).glob("*.safetensors") if not file.name.startswith("."))


def shard_name(number: int) -> str:
    """File name of latent file `number`, zero-padded so that names sort in order."""
    return f"latents_{number:06d}.safetensors"


def shard_metadata(
    autoencoder: LatentSpace, image_size: int, num_classes: int, shards: int, sizes: SizeRule | None = None
) -> dict[str, str]:
    """Metadata of a latent file of ours: the settings of its set, which has `shards` files."""
    source = autoencoder.name, autoencoder.scaling, autoencoder.factor
    return latent_metadata(*source, image_size, num_classes, shards, sizes)


def latent_metadata(
    autoencoder: str,
    scaling: Scaling,
    factor: int,
    image_size: int,
    num_classes: int,
    shards: int,
    sizes: SizeRule | None,
) -> dict[str, str]:
    """As `shard_metadata`, of an autoencoder that is not here: its name, scaling, and pixels per latent."""
    rule = {}
    if sizes is not None:
        rule = {name: str(getattr(sizes, name)) for name in SIZES} | {"factor": str(factor)}
    return {
        "format": FORMAT,
        "autoencoder": autoencoder,
        **{name: json.dumps(value) for name, value in asdict(scaling).items()},
        "image_size": str(image_size),
        "num_classes": str(num_classes),
        "shards": str(shards),
        **rule,
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
            version = version_of(file)
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
        numbers = [name for name in ("labels", "index") if name == "labels" or name in found]
        if dtype not in DTYPES or len(shape) != 4 or any(found.get(name) != (dtype, shape) for name in names):
            wrong = ", ".join(names) + " of one shape (n, C, h, w) and type fp16, bf16 or fp32"
        elif any(found.get(name) != labels for name in numbers):
            wrong = f"int64 {' and '.join(numbers)}, one for each of the latents"
        else:
            sizes = dict.fromkeys(names, math.prod(shape) * DTYPES[dtype].itemsize)
            sizes |= dict.fromkeys(numbers, 8 * shape[0])
            if min(shape) < 0 or any(places[k][0] < 0 or places[k][1] - places[k][0] != sizes[k] for k in sizes):
                raise ValueError(f"the latent file {path} is damaged: its header contradicts itself")
            begins = {name: 8 + length + places[name][0] for name in (*names, *numbers)}
            return cls(str(path), shape[0], shape[1:], DTYPES[dtype], begins, version, metadata)
        text = "; ".join(f"{name} {dtype} {shape}" for name, (dtype, shape) in sorted(found.items())) or "nothing"
        raise ValueError(f"{path} is no shard of latents: looked for {wrong}; found {text}")


def version_of(file: BinaryIO) -> tuple[int, int]:
    """Size of an opened file, and time of its last change in ns."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def settings_of(shard: Shard) -> dict[str, str]:
    """The metadata that all files of a set share (`shard_metadata`); empty for files that are not ours."""
    if shard.metadata.get("format") != FORMAT:
        return {}
    return {name: value for name, value in shard.metadata.items() if name not in ("skipped", "square")}
