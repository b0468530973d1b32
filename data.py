"""Datasets, and the order in which training sees them.

A dataset is a list of (image, label): image (C, H, W) float32 in [-1, 1]. It says how many classes it has, the shape of
an image, and the distance between neighbouring pixel values (what bits per dimension are counted in).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from transport import sample_generators

# Streams of random numbers: the same (seed, number) in another stream draws other numbers.
SHUFFLE, AUGMENTATION = 1, 2

# ---------------------------------------------------------------------------------------------------------------
# Datasets


class Digits(Dataset):
    """The 1797 handwritten 8x8 digits that scikit-learn ships; 17 grey levels."""

    num_classes = 10
    image_shape = (1, 8, 8)
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


class ImageFolderDataset(Dataset):
    """A folder with one sub-folder per class (the layout of ImageNet), cropped to squares.

    Args:
        path:       the folder
        image_size: side of the square in pixels

    Raises:
        FileNotFoundError: if the folder has no class folders, or one without images.
    """

    value_step = 2 / 255

    def __init__(self, path: str | Path, image_size: int) -> None:
        self.folder = ImageFolder(str(path))
        self.image_size = image_size
        self.num_classes = len(self.folder.classes)
        self.image_shape = (3, image_size, image_size)

    def __len__(self) -> int:
        return len(self.folder)

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Image (3, S, S) and label; with a generator, mirrored half of the time."""
        file, label = self.folder.samples[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            raise OSError(f"cannot read the image {file}: {error}") from error
        pixels = center_crop_arr(image, self.image_size)
        if generator is not None and torch.rand((), generator=generator) < 0.5:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        return tensor.float() / 127.5 - 1, label


def center_crop_arr(image: Image.Image, image_size: int) -> np.ndarray:
    """ADM's centre crop: halve with a box filter while twice too large, then bicubic, then crop.

    Args:
        image:      RGB image of any size
        image_size: side S of the square

    Returns:
        (S, S, 3) uint8. Source: guided-diffusion (arXiv:2105.05233).
    """
    while min(image.size) >= 2 * image_size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.asarray(image)[top : top + image_size, left : left + image_size]


def open_dataset(path: str, image_size: int | None = None) -> Digits | ImageFolderDataset:
    """The dataset that a path holds: the word "digits", or a folder of class folders.

    Args:
        path:       --data-path
        image_size: side of the images; None for the dataset's own (digits 8, folders 256)

    Raises:
        FileNotFoundError: if the path does not exist or holds no images.
        ValueError: if it cannot give images of that size.
    """
    if path == "digits":
        if image_size not in (None, 8):
            raise ValueError(f"digits are 8x8: leave --image-size {image_size} out")
        return Digits()
    if not Path(path).exists():
        raise FileNotFoundError(f"--data-path {path} does not exist: give 'digits' or a folder of class folders")
    if not Path(path).is_dir():
        raise ValueError(f"--data-path {path} is a file: give 'digits' or a folder of class folders")
    try:
        return ImageFolderDataset(path, 256 if image_size is None else image_size)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"--data-path {path}: looked for one sub-folder per class with {', '.join(IMG_EXTENSIONS)} files: "
            + str(error).splitlines()[0]
        ) from error


# ---------------------------------------------------------------------------------------------------------------
# Order


class TrainingStream(Dataset):
    """An endless sequence of samples: item p is a function of (seed, p), whatever the workers, ranks or restarts.

    Every epoch is a fresh permutation, so each image comes once per epoch; positions run on across epochs.
    """

    def __init__(self, dataset: Digits | ImageFolderDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch, self._permutation = -1, torch.empty(0)  # the last one used

    def _index(self, epoch: int, offset: int) -> int:
        if epoch != self._epoch:
            (generator,) = sample_generators(self.seed, [epoch], SHUFFLE)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.dataset), generator=generator)
        return int(self._permutation[offset])

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        epoch, offset = divmod(position, len(self.dataset))
        (generator,) = sample_generators(self.seed, [position], AUGMENTATION)
        return self.dataset.load(self._index(epoch, offset), generator)


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
    dataset: Digits | ImageFolderDataset, seed: int, sampler: StepSampler, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches (n, C, H, W) and labels (n,), one per step of the sampler."""
    return DataLoader(
        TrainingStream(dataset, seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )
