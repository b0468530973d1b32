"""FiT's sets of latents (github.com/whlzy/FiT), rewritten as latent files of ours.

A set is a folder of sub-folders with one safetensors file per image,

    from_16_to_N              of images of fewer pixels than N tokens hold
    greater_than_N_resize     of larger ones, at their own aspect ratio
    greater_than_N_crop       of the square versions of larger ones, under the same names

(N is 256 or 1024), with latents of sd-vae-ft-ema in 2x2 patches:

    feature  (2, H/16, W/16, 16)   an image and its mirror image, in the order (channel, row, column), times 0.18215
    label    one number            class
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data.autoencoder import SHORT_NAMES, Scaling
from data.latent_files import (
    MAX_CLASSES,
    STORAGE,
    Shard,
    digest,
    latent_metadata,
    settings_of,
    shard_files,
    shard_name,
    write_shard,
)
from data.sizes import SizeRule

SCALING = Scaling(0.0, 0.18215)
CHANNELS, PATCH, FACTOR = 4, 2, 8


def tokens_of_set(path: str | Path) -> int:
    """N of a set (ValueError if the folder is none)."""
    names = [folder.name for folder in Path(path).glob("*") if folder.is_dir()]
    found = {int(match[1]) for name in names if (match := re.fullmatch(r"(?:from_16_to|greater_than)_(\d+).*", name))}
    if len(found) != 1:
        raise ValueError(
            f"{path} is no set of FiT's latents: looked for the folders from_16_to_N, greater_than_N_resize and "
            f"greater_than_N_crop; found {', '.join(sorted(names)) or 'none'}"
        )
    return found.pop()


def read_latents(file: Path) -> torch.Tensor:
    """Latents (2, C, h, w) of an image and its mirror image, unscaled.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        with safe_open(file, "pt") as tensors:
            feature = tensors.get_tensor("feature")
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read FiT's latents {file}: {error}") from error
    if feature.ndim != 4 or feature.shape[0] != 2 or feature.shape[3] != CHANNELS * PATCH**2:
        raise ValueError(f"{file} holds a feature {tuple(feature.shape)}, not (2, h, w, {CHANNELS * PATCH**2})")
    patches = feature.float().unflatten(3, (CHANNELS, PATCH, PATCH))  # (2, rows, columns, C, p, q)
    latents = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return SCALING.invert(latents)


class Stored(NamedTuple):
    """An image of a set: its number, its file and class, rows and columns of its tokens."""

    number: int
    file: Path
    label: int
    size: tuple[int, int]


def describe(number: int, file: Path, tokens: int) -> Stored:
    """Look at an image's file without reading its latents.

    Args:
        tokens: N of the set

    Raises:
        ValueError: if the file is damaged, or does not belong into the set.
    """
    try:
        with safe_open(file, "pt") as tensors:
            _, rows, columns, _ = tensors.get_slice("feature").get_shape()
            label = int(tensors.get_tensor("label"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read FiT's latents {file}: {error}") from error
    if not 0 <= label < MAX_CLASSES:
        raise ValueError(f"{file} has the label {label}: labels count from 0 and are below {MAX_CLASSES:,}")
    if not 0 < rows * columns <= tokens:
        raise ValueError(f"{file} has {rows}x{columns} tokens, in a set of images of at most {tokens}")
    return Stored(number, file, label, (rows, columns))


def parts_of_set(path: Path, tokens: int, shard_size: int) -> Iterator[tuple[bool, list[Stored]]]:
    """Images of one size and version, at most so many, square versions last."""
    folders = [path / f"from_16_to_{tokens}", path / f"greater_than_{tokens}_resize"]
    whole = sorted((file for folder in folders for file in folder.glob("*.safetensors")), key=lambda file: file.name)
    numbers = {file.name: number for number, file in enumerate(whole)}
    if len(numbers) != len(whole):
        raise ValueError(f"{path} has images of one name in {folders[0].name} and {folders[1].name}")
    squares = sorted((path / f"greater_than_{tokens}_crop").glob("*.safetensors"))
    for file in squares:
        if file.name not in numbers:
            raise ValueError(f"{file} is the square version of an image that is not there")
    for square, files in ((False, whole), (True, squares)):
        groups: dict[tuple[int, int], list[Stored]] = {}
        for file in tqdm(files, desc="sizes", unit="file", mininterval=1):
            image = describe(numbers[file.name], file, tokens)
            groups.setdefault(image.size, []).append(image)
        for _, members in sorted(groups.items()):
            for first in range(0, len(members), shard_size):
                yield square, members[first : first + shard_size]


def convert_set(source: str | Path, out: str | Path, dtype: str, shard_size: int) -> int:
    """Write a set of FiT's as latent files, which train.py reads; the same call continues an interrupted one.

    Args:
        source:     folder of the set
        out:        folder to write to
        dtype:      of the stored latents: "fp16", "bf16" or "fp32"
        shard_size: images per file at most

    Returns:
        the number of images.

    Raises:
        ValueError: if the set is damaged or none, or `out` holds other latent files.
        OSError:    if a file cannot be written.
    """
    source, out = Path(source), Path(out)
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is in the set itself: give a folder elsewhere")
    tokens = tokens_of_set(source)
    rule = SizeRule(tokens, multiple=PATCH * FACTOR, token=PATCH * FACTOR)
    parts = list(parts_of_set(source, tokens, shard_size))
    if not parts:
        raise ValueError(f"{source} holds no latents")
    classes = 1 + max(image.label for _, images in parts for image in images)
    metadata = latent_metadata(SHORT_NAMES["ema"], SCALING, FACTOR, rule.square, classes, len(parts), rule)
    names = [f"{image.file.parent.name}/{image.file.name} {image.label}\n" for _, images in parts for image in images]
    metadata |= {"source": digest("".join(names).encode()), "dtype": dtype, "shard_size": str(shard_size)}
    for file in shard_files(out):
        if settings_of(Shard.read(file)) != metadata:
            raise ValueError(f"{out} holds latent files of other data or settings: give another folder")
    with tqdm(total=sum(len(images) for _, images in parts), unit="image", mininterval=1) as progress:
        for number, (square, images) in enumerate(parts):
            if not (out / shard_name(number)).exists():
                read = torch.stack([read_latents(image.file) for image in images]).to(STORAGE[dtype])
                tensors = {"latents": read[:, 0], "latents_flip": read[:, 1]}
                tensors["labels"] = torch.tensor([image.label for image in images])
                tensors["index"] = torch.tensor([image.number for image in images])
                said = {**metadata, "square": str(int(square)), "skipped": json.dumps([])}
                write_shard(out / shard_name(number), tensors, said)
            progress.update(len(images))
    return sum(len(images) for square, images in parts if not square)
