"""Images of one side of an evaluation, whatever holds them."""

from __future__ import annotations

import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.datasets import Digits
from data.images import ImageArchive, ImageDataset, ImageFolderDataset, read_rgb
from data.latent_files import MAX_CLASSES, digest
from metrics.arrays import StoredArray, open_npz
from runtime.logs import to_uint8
from runtime.rng import label_of
from runtime.sample_store import PngStore

DECODERS = 4  # threads that decode pictures
HEAD = 2**20  # bytes at the beginning of a file that count in its identity

LOOKED_FOR = (
    "an .npz with arr_0 (N, H, W, 3) uint8, a folder of pictures, a zip archive of pictures, a folder of "
    "sample_ddp.py's samples, or the word 'digits'"
)


# ---------------------------------------------------------------------------------------------------------------
# Images


class Images(ABC):
    """N images of one size, RGB.

    Attributes:
        source:     path, for messages
        image_size: (H, W)
        labels:     (N,) int64 classes; None where they are unknown
        settings:   the settings.json of samples that sample_ddp.py made; None for other images
    """

    def __init__(
        self,
        source: str,
        number: int,
        image_size: tuple[int, int],
        labels: np.ndarray | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        if number < 2:
            raise ValueError(f"{source} holds {number} image{'s' * (number != 1)}: a distribution needs 2 or more")
        self.source, self.image_size, self.labels, self.settings = source, image_size, labels, settings
        self._number = number

    def __len__(self) -> int:
        return self._number

    @abstractmethod
    def identity(self) -> str:
        """A digest that changes with the images; cheap, so it is of names, sizes, times and the first bytes."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Images (n, H, W, 3) uint8; ascending numbers are read fastest.

        Raises:
            ValueError, OSError: if one is damaged, or of another size than the first; the message names it.
        """


class ArrayImages(Images):
    """Images in arrays of .npz files.

    Args:
        arrays: (n, H, W, 3) uint8, or (n, H, W, 1)
        places: (N, 2) int: for each image the array and the row in it; None for all rows in order

    Raises:
        ValueError: if an array holds something else.
    """

    def __init__(
        self,
        source: str,
        arrays: Sequence[StoredArray],
        places: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        for array in arrays:
            _check_images(array)
            if array.shape[1:3] != arrays[0].shape[1:3]:
                sizes = [f"{held.source} holds images of {_size(held.shape[1:3])}" for held in (arrays[0], array)]
                raise ValueError(f"{', '.join(sizes)}: all must have one size")
        if places is None:
            places = np.concatenate([_rows_of(k, array.shape[0]) for k, array in enumerate(arrays)])
        super().__init__(source, len(places), arrays[0].shape[1:3], labels, settings)
        self._arrays, self._places = list(arrays), places

    def identity(self) -> str:
        files = [array.path for array in self._arrays]
        return digest(b"array", _state_of(files), _head_of(files[0]), self._places)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        images = np.empty((len(indices), *self.image_size, 3), np.uint8)
        numbers, rows = self._places[np.asarray(indices, np.int64)].reshape(-1, 2).T
        for number in np.unique(numbers):
            here = numbers == number
            images[here] = self._arrays[number].rows(rows[here])  # grey is broadcast
        return images


def _check_images(array: StoredArray) -> None:
    """Refuse an array that is not of images (ValueError)."""
    array.check()
    shape, dtype = array.shape, array.dtype
    if len(shape) != 4 or shape[3] not in (1, 3) or min(shape[1:]) < 1:
        raise ValueError(f"{array.source} is {shape} {dtype}, not images (N, H, W, 3)")
    if dtype != np.uint8:
        raise ValueError(f"{array.source} is {dtype}, not uint8: save round(127.5 * (x + 1)) of x in [-1, 1]")


def _rows_of(number: int, count: int) -> np.ndarray:
    return np.stack([np.full(count, number), np.arange(count)], axis=1)


class PictureImages(Images):
    """Image files in a folder or a zip archive, decoded by `read_rgb`; none is resized.

    Args:
        pictures: the files
        files:    paths of all that is read, for the identity

    Raises:
        ValueError, OSError: if the first one cannot be read.
    """

    def __init__(
        self,
        source: str,
        pictures: ImageDataset,
        files: Sequence[Path],
        labels: np.ndarray | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self._pictures, self._files = pictures, files
        self.image_size = None  # so that the first one is compared with none
        super().__init__(source, len(pictures), self._decode(0).shape[:2], labels, settings)

    def identity(self) -> str:
        names = self._pictures.names
        return digest(b"pictures", names.ends, names.bytes, _state_of(self._files), _head_of(self._files[0]))

    def read(self, indices: Sequence[int]) -> np.ndarray:
        images = np.empty((len(indices), *self.image_size, 3), np.uint8)
        with ThreadPoolExecutor(DECODERS) as pool:
            for row, image in enumerate(pool.map(self._decode, map(int, indices))):
                images[row] = image
        return images

    def _decode(self, index: int) -> np.ndarray:
        """Pixels (H, W, 3)."""
        try:
            with self._pictures.open_image(index) as file:
                pixels = np.asarray(read_rgb(file))
        except Exception as error:  # at damaged files Pillow raises SyntaxError, struct.error, MemoryError, ...
            raise self._pictures.unreadable(index, error) from error
        if self.image_size not in (None, pixels.shape[:2]):
            first, other = self._pictures.image_name(0), self._pictures.image_name(index)
            raise ValueError(
                f"{first} is {_size(self.image_size)} and {other} {_size(pixels.shape[:2])}: all images must have "
                "one size; evaluate.py resizes none"
            )
        return pixels


class PictureFolder(ImageFolderDataset):
    """The files of these names in a folder; sub-folders are no classes."""

    def __init__(self, path: Path, names: Sequence[bytes]) -> None:
        self.root = os.path.join(path, "")
        ImageDataset.__init__(self, names, [0] * len(names), 1, 0)


class DigitImages(Images):
    """The 1797 digits of scikit-learn, 8x8, as sample.py draws them."""

    def __init__(self) -> None:
        digits = Digits()
        pixels = to_uint8(digits.images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        self._pixels = pixels.contiguous().numpy()
        super().__init__("digits", len(digits), (8, 8), digits.labels.numpy().astype(np.int64))

    def identity(self) -> str:
        return digest(b"digits", self._pixels)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self._pixels[np.asarray(indices, np.int64)]


def _state_of(files: Sequence[Path]) -> np.ndarray:
    """Sizes and times of the last change in ns, (n, 2)."""
    return np.array([(status.st_size, status.st_mtime_ns) for status in map(os.stat, files)], np.int64)


def _head_of(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _size(shape: Sequence[int]) -> str:
    """An image's size (H, W, ...) as it is written, height first."""
    return f"{shape[0]}x{shape[1]}"


# ---------------------------------------------------------------------------------------------------------------
# What a path holds


def open_images(path: str | Path) -> Images:
    """The images that a path holds; the content decides, as LOOKED_FOR says.

    Raises:
        FileNotFoundError: if the path does not exist, or is a folder without pictures.
        ValueError: if it holds no images, fewer than two, damaged ones, or only a part of a set of samples.
    """
    if str(path) == "digits":
        return DigitImages()
    path = Path(path)
    if path.is_dir():
        settings = _sample_settings(path)
        return _open_pictures(path) if settings is None else _open_samples(path, settings)
    arrays = npz_arrays(path)
    if not arrays:
        archive = ImageArchive(path)
        known = archive.described and archive.num_classes > 1
        return PictureImages(str(path), archive, [path], archive.labels if known else None)
    if "arr_0" not in arrays:
        held = "statistics (mu, sigma) alone" if "mu" in arrays else ", ".join(arrays)
        raise ValueError(f"{path} holds {held}, no images: looked for arr_0 (N, H, W, 3) uint8")
    settings = _sample_settings(path.with_name(path.name.removesuffix(".npz")))
    labels = None
    if "arr_1" in arrays:
        labels = _check_labels(arrays["arr_1"], arrays["arr_0"].shape[:1])
    elif settings is not None:
        labels = _sample_labels(settings, arrays["arr_0"].shape[0])
    return ArrayImages(str(path), [arrays["arr_0"]], labels=labels, settings=settings)


def npz_arrays(path: Path) -> dict[str, StoredArray]:
    """The arrays of a file that is an .npz; none for another zip archive.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither, or damaged.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: looked for {LOOKED_FOR}")
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, and reading one executes the code in it: give the images themselves, or an .npz with "
            "mu and sigma, which numpy.savez writes"
        )
    if path.suffix == ".npz" or zipfile.is_zipfile(path):
        return open_npz(path)
    with open(path, "rb") as file:
        damaged = file.read(4) == b"PK\x03\x04"
    raise ValueError(f"{path} is {'a damaged zip archive' if damaged else 'no images'}: looked for {LOOKED_FOR}")


def _check_labels(array: StoredArray, shape: tuple[int, ...]) -> np.ndarray:
    """Labels (N,) int64 of ADM's arr_1 (ValueError if it holds something else)."""
    if array.shape != shape or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{array.source} is {array.shape} {array.dtype}, not a class number for each image {shape}")
    labels = array.whole().astype(np.int64)
    if len(labels) and not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        raise ValueError(f"{array.source} has labels from {labels.min()} to {labels.max()}: they count from 0")
    return labels


def _open_pictures(path: Path) -> PictureImages:
    """The pictures of a folder and those below it, in the order of their names."""
    names = []
    for folder, below, files in os.walk(path, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if _sample_settings(Path(folder)) is not None:
            raise ValueError(f"{path} holds a set of sample_ddp.py's samples, {folder}: give that folder")
        pictures = [name for name in files if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
        names += [os.path.relpath(os.path.join(folder, name), path) for name in pictures]
    if not names:
        raise FileNotFoundError(f"{path} holds no pictures ({', '.join(IMG_EXTENSIONS)}): looked for {LOOKED_FOR}")
    names.sort()
    return PictureImages(str(path), PictureFolder(path, [*map(os.fsencode, names)]), [path / name for name in names])


# -- Samples of sample_ddp.py ---------------------------------------------------------------------------------------


def _sample_settings(folder: Path) -> dict[str, Any] | None:
    """The settings.json of a set of samples; None for another folder, or none (ValueError if it is damaged)."""
    file = folder / "settings.json"
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return settings if isinstance(settings, dict) and {"checkpoint", "label_sampling"} <= settings.keys() else None


def _sample_labels(settings: Mapping[str, Any], number: int) -> np.ndarray | None:
    """Labels (number,) that sample_ddp.py drew; None where its settings do not say of how many classes."""
    if settings.get("num_classes") is None:
        return None
    drawn = settings["num_classes"], settings["global_seed"], settings["label_sampling"]
    return np.array([label_of(index, *drawn) for index in range(number)], np.int64)


def _open_samples(folder: Path, settings: dict[str, Any]) -> Images:
    """A set of samples, as PNG files or in small .npz files.

    Raises:
        ValueError: if samples are missing, or are latents.
    """
    if "scaling" in settings:
        raise ValueError(f"{folder} holds latents, not images: run sample_ddp.py without --latents")
    if settings.get("png", True):
        store = PngStore(folder)
        indices = {int(file.stem) for file in folder.glob("[0-9]*/[0-9]*.png") if file.stem.isdecimal()}
        _check_complete(folder, indices)
        paths = [store.path(index) for index in range(len(indices))]
        names = [os.fsencode(file.relative_to(folder)) for file in paths]
        labels = _sample_labels(settings, len(paths))
        return PictureImages(str(folder), PictureFolder(folder, names), paths, labels, settings)
    arrays, where = [], {}
    for file in sorted((folder / "shards").glob("[0-9]*.npz")):
        try:
            shard = open_npz(file)
            numbers, pixels = shard["index"].whole().tolist(), shard["pixels"]
        except (ValueError, KeyError):
            continue  # sample_ddp.py makes its samples again, in another file
        where.update({index: (len(arrays), row) for row, index in enumerate(numbers)})
        arrays.append(pixels)
    _check_complete(folder, where)
    places = np.array([where[index] for index in range(len(where))], np.int64)
    return ArrayImages(str(folder), arrays, places, _sample_labels(settings, len(where)), settings)


def _check_complete(folder: Path, indices: Sequence[int] | set[int] | dict[int, Any]) -> None:
    """Refuse a set of samples that is empty, or without some of the numbers below its largest (ValueError)."""
    number = max(indices, default=0) + 1
    if lost := number - len(indices):
        raise ValueError(f"{folder} lacks {lost} of its {number} samples: run the same sample_ddp.py command again")
