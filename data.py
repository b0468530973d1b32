"""Datasets, and the order in which training sees them.

What a path holds decides: the bundled digits, a folder or zip archive of images (images.py), or latents made of them
(latents.py).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS

from autoencoder import Autoencoder
from images import ImageArchive, ImageFolderDataset
from latents import LatentShards, digest, draw_flip, shard_files
from transport import sample_generators

# Streams of random numbers: the same (seed, number) in another stream draws other numbers.
SHUFFLE, AUGMENTATION = 1, 2

# ---------------------------------------------------------------------------------------------------------------
# Datasets


class AnyDataset(Protocol):
    """A list of (x, label) with random access.

    A dataset may also have load_many(indices, generators), which gives (n, C, H, W) and labels (n,) at once.
    """

    kind: str  # "digits", "images" (both with values in [-1, 1]) or "latents" (as the network sees them)
    num_classes: int
    image_shape: tuple[int, ...]  # of what load gives, (C, H, W)
    image_size: int | None  # side of the images; of latents, that of the images they were made of, where known
    value_step: float | None  # distance of neighbouring pixel values, for bits per dimension; None for latents

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """One x (C, H, W) float32 and its label; the generator decides what is random about it, None for nothing."""
        ...

    def identity(self) -> dict[str, Any]:
        """Identify what training sees, wherever it lies, in values that JSON has: equal for data that have not changed.

        "kind", "images" (their number), "num_classes", "names" (digest of what there is), "labels" (digest); of latents
        also "scaling". Nothing but labels is read for it.
        """
        ...


class Digits(Dataset):
    """The 1797 handwritten 8x8 digits that scikit-learn ships; 17 grey levels."""

    kind = "digits"
    num_classes = 10
    image_shape = (1, 8, 8)
    image_size = 8
    value_step = 2 / 16

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        self.labels = torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Image (1, 8, 8) and label; a mirrored digit is no digit, so nothing is augmented."""
        return self.images[index], int(self.labels[index])

    def identity(self) -> dict[str, Any]:
        """See AnyDataset; the images are so small that their values stand for their names."""
        names, labels = digest(self.images.numpy()), digest(self.labels.numpy())
        classes = self.num_classes
        return {"kind": self.kind, "images": len(self), "num_classes": classes, "names": names, "labels": labels}


LOOKED_FOR = (
    "the word 'digits', a folder of *.safetensors shards with latents, a zip archive of images, "
    "or a folder with one sub-folder per class"
)


def open_dataset(path: str, image_size: int | None = None, autoencoder: Autoencoder | None = None) -> AnyDataset:
    """The dataset that a path holds.

    Args:
        path:        --data-path
        image_size:  side of the images; None for the dataset's own (folders of images 256)
        autoencoder: that of --vae, where it is given: what LightningDiT's shards are scaled by

    Raises:
        FileNotFoundError: if the path does not exist or holds nothing to train on.
        ValueError: if it is damaged, or cannot give images of that size.
    """
    if path == "digits":
        if image_size not in (None, Digits.image_size):
            raise ValueError(f"digits are 8x8: leave --image-size {image_size} out")
        return Digits()
    if not Path(path).exists():
        raise FileNotFoundError(f"--data-path {path} does not exist: looked for {LOOKED_FOR}")
    if not Path(path).is_dir():
        if not zipfile.is_zipfile(path):
            raise ValueError(f"--data-path {path} is a file, but no zip archive: looked for {LOOKED_FOR}")
        return ImageArchive(path, image_size)
    if shard_files(path):
        return LatentShards(path, autoencoder, image_size)
    try:
        return ImageFolderDataset(path, 256 if image_size is None else image_size)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"--data-path {path}: looked for {LOOKED_FOR} ({', '.join(IMG_EXTENSIONS)} files): {reason}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------
# Order


class TrainingStream(Dataset):
    """An endless sequence of samples: item p is a function of (seed, p), whatever the workers, ranks or restarts.

    Every epoch is a fresh permutation, so each image comes once per epoch; positions run on across epochs.
    """

    def __init__(self, dataset: AnyDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)  # the last one used

    def index(self, position: int) -> int:
        """Which of the dataset's images is at a position of the run."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            (generator,) = sample_generators(self.seed, [epoch], SHUFFLE)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.dataset), generator=generator).numpy()
        return int(self._permutation[offset])

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        (generator,) = sample_generators(self.seed, [position], AUGMENTATION)
        return self.dataset.load(self.index(position), generator)

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Items (n, C, H, W) and labels (n,) at these positions; the DataLoader asks for a batch this way."""
        if not hasattr(self.dataset, "load_many"):
            return tuple(default_collate([self[position] for position in positions]))
        generators = sample_generators(self.seed, positions, AUGMENTATION)
        return self.dataset.load_many([self.index(position) for position in positions], generators)


def posterior_generators(seed: int, positions: Sequence[int]) -> list[torch.Generator]:
    """What draws the posterior noise of images that are encoded on the fly: the generators that latent shards use.

    With it, training on images and on their shards sees the same latents at the same positions.
    """
    generators = sample_generators(seed, positions, AUGMENTATION)
    for generator in generators:
        draw_flip(generator)  # load drew it
    return generators


class StepSampler(Sampler[list[int]]):
    """Positions of this rank's part of each global batch: one list per step, from `start` up to `stop`."""

    def __init__(self, start: int, stop: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.steps = range(start, stop)
        self.global_batch_size = global_batch_size
        self.local = global_batch_size // world_size
        self.offset = rank * self.local

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.global_batch_size + self.offset
            yield list(range(first, first + self.local))


def training_loader(
    dataset: AnyDataset, seed: int, sampler: StepSampler, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches (n, C, H, W) and labels (n,), one per step of the sampler."""
    return DataLoader(
        TrainingStream(dataset, seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=as_it_is,
    )


def as_it_is(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream gives whole batches; a lambda could not be sent to workers."""
    return batch
