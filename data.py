"""Datasets, and the order in which training sees them.

What a path holds decides: the bundled digits, a folder or zip archive of images, or latents made of them (latents.py).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from autoencoder import Autoencoder
from latents import LatentShards, draw_flip, shard_files
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


class Names:
    """Many strings in one array: a list of them is copied to every worker process, page by page as it is looked at."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


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


# What Pillow and zlib raise at files that are damaged, or no images.
READ_ERRORS = (OSError, ValueError, zlib.error, Image.DecompressionBombError)


class UnreadableImage(OSError):
    """An image file that is damaged, or none; the message names it."""


class ImageDataset(Dataset, ABC):
    """RGB images in [-1, 1], cropped to squares: what image folders and archives have in common."""

    kind = "images"
    value_step = 2 / 255

    def __init__(self, names: Sequence[str], labels: Sequence[int], num_classes: int, image_size: int) -> None:
        self.names = Names(names)
        self.labels = np.asarray(labels, np.int64)
        self.num_classes = num_classes
        self.image_size = image_size
        self.image_shape = (3, image_size, image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def image_name(self, index: int) -> str:
        """What to call an image in messages."""
        return self.names[index]

    @abstractmethod
    def open_image(self, index: int) -> BinaryIO:
        """The file of an image."""

    def unreadable(self, index: int, error: Exception) -> UnreadableImage:
        """What to raise for an image whose reading failed so."""
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else error
        return UnreadableImage(f"cannot read the image {self.image_name(index)}: {reason}")

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Image (3, S, S) and label; with a generator, mirrored half of the time.

        Raises:
            UnreadableImage: if the file cannot be read as one.
        """
        try:
            with self.open_image(index) as file, Image.open(file) as opened:
                image = opened.convert("RGB")
        except READ_ERRORS as error:
            raise self.unreadable(index, error) from error
        pixels = center_crop_arr(image, self.image_size)
        if generator is not None and draw_flip(generator):
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return tensor.float() / 127.5 - 1, int(self.labels[index])


class ImageFolderDataset(ImageDataset):
    """A folder with one sub-folder per class (the layout of ImageNet).

    Args:
        path:       the folder
        image_size: side of the square in pixels

    Raises:
        FileNotFoundError: if the folder has no class folders, or one without images.
    """

    def __init__(self, path: str | Path, image_size: int) -> None:
        folder = ImageFolder(str(path))
        files, labels = zip(*folder.samples, strict=True)
        super().__init__(files, labels, len(folder.classes), image_size)

    def open_image(self, index: int) -> BinaryIO:
        """The file of an image."""
        return open(self.names[index], "rb")


class ImageArchive(ImageDataset):
    """A zip archive of images, stored or deflated, in the order of their names.

    Labels are those of dataset.json, {"labels": [[name, class number], ...]} (the format of StyleGAN and EDM), where
    null labels make a single class. Without that file every folder is a class, in alphabetical order.

    Args:
        path:       the archive
        image_size: side of the square in pixels; None for that of the first image

    Raises:
        ValueError: if the file is no such archive.
        UnreadableImage: if its first image tells the size, and cannot be read.
    """

    def __init__(self, path: str | Path, image_size: int | None = None) -> None:
        self.path = str(path)
        self._file: BinaryIO | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist() if _is_image(entry.filename)}
                described = [name for name in archive.namelist() if PurePosixPath(name).name == "dataset.json"]
                description = archive.read(min(described, key=len)) if described else b""
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
            raise ValueError(f"{path} cannot be read as a zip archive: {error}") from error
        if not entries:
            raise ValueError(f"{path} holds no images: looked for {', '.join(IMG_EXTENSIONS)} files")
        names = sorted(entries)
        for name in names:
            stored = entries[name].compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not stored or entries[name].flag_bits & 1:
                raise ValueError(f"{path}/{name} is encrypted, or neither stored nor deflated: pack the archive anew")
        if described:
            folder = min(described, key=len).removesuffix("dataset.json")
            labels = _json_labels(description, [name.removeprefix(folder) for name in names], f"{path}/dataset.json")
        else:
            labels = _folder_labels(names, str(path))
        # Offset, size, whether deflated, CRC: all that is needed to read an image without the archive's directory.
        self.entries = np.array(
            [
                (entry.header_offset, entry.compress_size, entry.compress_type == zipfile.ZIP_DEFLATED, entry.CRC)
                for entry in map(entries.__getitem__, names)
            ],
            np.int64,
        )
        super().__init__(names, labels, max(labels) + 1, image_size or 0)
        if image_size is None:
            try:
                with self.open_image(0) as file, Image.open(file) as first:
                    image_size = min(first.size)
            except READ_ERRORS as error:
                raise self.unreadable(0, error) from error
            self.image_size, self.image_shape = image_size, (3, image_size, image_size)

    def image_name(self, index: int) -> str:
        """The archive and the name in it."""
        return f"{self.path}/{self.names[index]}"

    def open_image(self, index: int) -> BinaryIO:
        """The bytes of an image, as a file."""
        begin, size, deflated, crc = self.entries[index].tolist()
        if self._file is None:  # each process its own
            self._file = open(self.path, "rb")  # noqa: SIM115
        descriptor = self._file.fileno()
        # A local header has 30 bytes, the last four of which tell the lengths of the name and the extras that follow.
        lengths = os.pread(descriptor, 4, begin + 26)
        begin += 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        data = os.pread(descriptor, size, begin)
        if deflated:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        if zlib.crc32(data) != crc:
            raise OSError("the archive is damaged there")
        return io.BytesIO(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}


def _is_image(name: str) -> bool:
    """Whether an archive's file is an image; names with a dot in front are what macOS adds."""
    return name.lower().endswith(IMG_EXTENSIONS) and not PurePosixPath(name).name.startswith(".")


def _json_labels(text: bytes, names: list[str], source: str) -> list[int]:
    """Labels of an archive's images out of its dataset.json, whose names start where it lies itself."""
    try:
        listed = json.loads(text).get("labels")
        labels = None if listed is None else dict(listed)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{source} is not {{"labels": [[name, class number], ...]}}: {error}') from error
    if labels is None:
        return [0] * len(names)
    for name in names:
        if type(labels.get(name)) is not int or labels[name] < 0:
            found = f", but {labels[name]}" if name in labels else ""
            raise ValueError(f"{source} has no class number for {name}{found}")
    return [labels[name] for name in names]


def _folder_labels(names: list[str], source: str) -> list[int]:
    """Labels of an archive without dataset.json: the folders below the one that holds everything."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    while folders[0] and all(folder[:1] == folders[0][:1] for folder in folders):
        folders = [folder[1:] for folder in folders]
    classes = sorted({folder[:1] for folder in folders})
    if len(classes) > 1 and classes[0] == ():
        raise ValueError(f"{source} has neither dataset.json nor a class folder for {names[folders.index(())]}")
    numbers = {folder: number for number, folder in enumerate(classes)}
    return [numbers[folder[:1]] for folder in folders]


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
