"""The plan of a set of latent files: which images, at which size, are in which file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.images import ImageDataset, UnreadableImage
from runtime.files import complete_file

SIZES_FILE = "sizes.npy"


class StoredSizes(Dataset):
    """Width and height of a dataset's images; (0, 0) for those that cannot be read, which their own turn reports."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            return self.images.stored_size(index)
        except UnreadableImage:
            return 0, 0


def stored_sizes(out: Path, images: ImageDataset, num_workers: int) -> np.ndarray:
    """Width and height (N, 2) of all images; kept in the folder, so that a continued run does not read them again.

    Raises:
        OSError: if the disk cannot be read.
    """
    file = out / SIZES_FILE
    if not file.exists():
        loader = DataLoader(StoredSizes(images), batch_size=256, collate_fn=np.array, num_workers=num_workers)
        progress = tqdm(loader, desc="sizes", unit="batch", mininterval=0.5 if sys.stderr.isatty() else 15)
        sizes = np.concatenate(list(progress))
        with complete_file(file) as temporary:
            np.save(temporary, sizes)
    return np.load(file)


class Part(NamedTuple):
    """The images of one latent file: their size (H, W), their version, their numbers."""

    size: tuple[int, int]
    square: bool
    images: Sequence[int]


def parts_of(images: ImageDataset, sizes: np.ndarray | None, shard_size: int) -> list[Part]:
    """The latent files of a set: one size in each, the images in their order, square versions last.

    Args:
        sizes:      (N, 2) stored width and height; None where all images become squares
        shard_size: images per file at most
    """
    side = images.image_size
    groups: dict[tuple[bool, tuple[int, int]], Sequence[int]] = {(False, (side, side)): range(len(images))}
    if sizes is not None:
        groups = {}
        for square in (False, True):
            for number, (width, height) in enumerate(sizes.tolist()):
                if min(width, height) == 0 and not square:
                    groups.setdefault((False, (side, side)), []).append(number)
                elif not square or images.sizes.has_square(width, height):
                    size = images.size_of((width, height), square)
                    groups.setdefault((square, size), []).append(number)
    return [
        Part(size, square, numbers[first : first + shard_size])
        for (square, size), numbers in sorted(groups.items())
        for first in range(0, len(numbers), shard_size)
    ]
