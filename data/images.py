"""Image files, and the datasets that are folders or zip archives of them: RGB, cropped to squares or to many sizes."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.latent_files import MAX_CLASSES, digest
from data.sizes import SizeRule, cover_and_crop, draw_version

# Errors of a disk or a network drive, not of the image.
DISK_ERRORS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}

# Bytes of an image in an archive, packed or not: 44 million pixels that nothing compresses.
LARGEST_IMAGE = 2**27

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF's tags


# ---------------------------------------------------------------------------------------------------------------
# One image


class UnreadableImage(OSError):
    """An image file that is damaged, missing, or none; the message names it."""


def printable(name: str) -> str:
    """A name for messages: on one line, with escapes for bytes that do not decode."""
    return name if name.isprintable() else ascii(name)[1:-1]


def read_rgb(file: BinaryIO) -> Image.Image:
    """Read an image file as 8-bit RGB.

    The pixels are those stored, as in ADM: the first of several frames, without Exif's rotation and without
    transparency. 16-bit grey values v become round(v / 257).

    Raises:
        ValueError: if the values are floats or integers of unknown range.
        Exception: of nearly any kind, from Pillow, if the file is damaged or no image.
    """
    with Image.open(file) as opened:
        opened.load()
        return opened.convert("RGB") if opened.mode[0] not in "FI" else _rgb_of_wide_grey(opened)


def _rgb_of_wide_grey(image: Image.Image) -> Image.Image:
    """RGB of an image in mode I;16 and its kind, I or F, whose values Pillow would clip to bytes."""
    wide = image.mode.startswith("I;16")
    if image.format == "TIFF":
        tags = image.tag_v2  # Pillow does not rescale 12 bits, nor invert images where 0 is white
        wide = wide and tags.get(BITS_PER_SAMPLE) == (16,) and tags.get(PHOTOMETRIC) == 1
    elif image.mode == "I":  # the mode of 16 bits in older versions of Pillow, and in PGM
        wide = image.format in ("PNG", "PPM")
    if not wide:
        raise ValueError(f"in Pillow's mode {image.mode} it is unknown which value is white: save it with 8 bits")
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def center_crop_arr(image: Image.Image, image_size: int) -> np.ndarray:
    """ADM's centre crop: halve with a box filter while twice too large, then bicubic, then crop.

    Args:
        image:      RGB image of any size
        image_size: side S of the square

    Returns:
        (S, S, 3) uint8. Source: guided-diffusion (arXiv:2105.05233).
    """
    return cover_and_crop(image, image_size, image_size)


# ---------------------------------------------------------------------------------------------------------------
# Many images


class PackedStrings:
    """Many byte strings in one array: of a list, each worker process would copy every page that it reads."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.ends = np.cumsum([0, *map(len, names)])
        self.bytes = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes()


class ImageDataset(Dataset, ABC):
    """RGB images in [-1, 1]; the base of image folders and archives.

    Args:
        names:       of the images
        labels:      their class numbers
        num_classes: number of classes
        image_size:  side of the squares that they are cropped to
    """

    kind = "images"
    value_step = 2 / 255

    def __init__(
        self,
        names: Sequence[bytes],
        labels: Sequence[int],
        num_classes: int,
        image_size: int,
    ) -> None:
        self.names = PackedStrings(names)
        self.labels = np.asarray(labels, np.int64)
        self.num_classes = num_classes
        self.sizes: SizeRule | None = None
        self.image_size = image_size
        self.image_shape = (3, image_size, image_size)

    def __len__(self) -> int:
        return len(self.labels)

    def take_sizes(self, sizes: SizeRule) -> None:
        """Keep the aspect ratio of the images, instead of cropping all to squares."""
        self.sizes, self.image_size, self.image_shape = sizes, sizes.square, (3, sizes.square, sizes.square)

    def identity(self) -> dict[str, Any]:
        """See AnyDataset; classes and images are known by the names of their folders and files."""
        return {
            "kind": self.kind,
            "images": len(self),
            "num_classes": self.num_classes,
            "names": digest(self.names.ends, self.names.bytes),
            "labels": digest(self.labels),
        }

    @abstractmethod
    def image_name(self, index: int) -> str:
        """Name of an image in messages."""

    @abstractmethod
    def open_image(self, index: int) -> BinaryIO:
        """The file of an image."""

    def is_disk_error(self, error: Exception) -> bool:
        """Tell errors that concern a whole disk or archive from those of one image."""
        return isinstance(error, OSError) and error.errno in DISK_ERRORS

    def unreadable(self, index: int, error: Exception) -> OSError:
        """The exception to raise after this error at an image: UnreadableImage, or OSError if the disk failed."""
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no image"
        kind = OSError if self.is_disk_error(error) else UnreadableImage
        return kind(f"cannot read the image {self.image_name(index)}: {printable(' '.join(reason.split()))}")

    def load(
        self, index: int, generator: torch.Generator | None = None, square: bool = False
    ) -> tuple[torch.Tensor, int]:
        """Image (3, H, W) and label; with a generator, mirrored half of the time.

        H and W are the image size, or follow from the rule of sizes: those of the image's own aspect ratio, or the
        square's.

        Args:
            index:     number of the image
            generator: draws if it is mirrored, and which version of many sizes it is; None for no augmentation
            square:    the version where nothing is drawn; images without a square version have but one

        Raises:
            UnreadableImage: if the file cannot be read as one.
            OSError: if the disk cannot be read.
        """
        try:
            with self.open_image(index) as file:
                image = read_rgb(file)
        except Exception as error:  # at damaged files Pillow raises SyntaxError, struct.error, MemoryError, ...
            raise self.unreadable(index, error) from error
        mirrored, square = (False, square) if generator is None else draw_version(generator, self.sizes)
        height, width = self.size_of(image.size, square)
        pixels = cover_and_crop(image, height, width)
        if mirrored:
            pixels = pixels[:, ::-1]
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        return tensor.float() / 127.5 - 1, int(self.labels[index])

    def stored_size(self, index: int) -> tuple[int, int]:
        """Width and height of the image in its file, read from the header alone (exceptions as of `load`)."""
        try:
            with self.open_image(index) as file, Image.open(file) as opened:
                return opened.size
        except Exception as error:  # as in load
            raise self.unreadable(index, error) from error

    def size_of(self, image_size: tuple[int, int], square: bool) -> tuple[int, int]:
        """Size (H, W) that an image of this width and height gets, as the square version or not."""
        if self.sizes is None or (square and self.sizes.has_square(*image_size)):
            return self.image_size, self.image_size
        return self.sizes.size_of(*image_size)


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
        self.root = os.path.join(folder.root, "")
        names = [os.fsencode(file.removeprefix(self.root)) for file in files]
        super().__init__(names, labels, len(folder.classes), image_size)

    def path_of(self, index: int) -> str:
        """Path of an image's file."""
        return self.root + os.fsdecode(self.names[index])

    def image_name(self, index: int) -> str:
        """The file's path."""
        return printable(self.path_of(index))

    def is_disk_error(self, error: Exception) -> bool:
        """As in the base class, and a missing root folder, which is an unmounted drive."""
        return super().is_disk_error(error) or (isinstance(error, FileNotFoundError) and not os.path.isdir(self.root))

    def open_image(self, index: int) -> BinaryIO:
        """The file of an image."""
        return open(self.path_of(index), "rb")


class ImageArchive(ImageDataset):
    """A zip archive of images, stored or deflated, in the order of their names.

    Labels are those of dataset.json, {"labels": [[name, class number], ...]} (the format of StyleGAN and EDM), where
    null labels make a single class. Without that file each folder is a class, in alphabetical order.

    Args:
        path:       the archive
        image_size: side of the square in pixels; None for that of the first image

    Raises:
        ValueError: if the file is no such archive.
        UnreadableImage: if the size is that of the first image, and this cannot be read.
    """

    def __init__(self, path: str | Path, image_size: int | None = None) -> None:
        self.path = str(path)
        self._file: BinaryIO | None = None
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {entry.filename: entry for entry in archive.infolist() if _is_image(entry.filename)}
                described = [name for name in archive.namelist() if PurePosixPath(name).name == "dataset.json"]
                description = _read_description(archive, min(described, key=len), len(entries)) if described else b""
        except Exception as error:  # zipfile raises half a dozen kinds at a damaged one
            raise ValueError(f"{path} cannot be read as a zip archive: {str(error) or type(error).__name__}") from error
        if not entries:
            raise ValueError(f"{path} holds no images: looked for {', '.join(IMG_EXTENSIONS)} files")
        names = sorted(entries)
        for name in names:
            stored = entries[name].compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if not stored or entries[name].flag_bits & 1:
                raise ValueError(f"{path}/{name} is encrypted, or neither stored nor deflated: pack the archive anew")
        self.described = bool(described)  # labels are those of dataset.json
        if self.described:
            folder = min(described, key=len).removesuffix("dataset.json")
            labels = _json_labels(description, [name.removeprefix(folder) for name in names], f"{path}/dataset.json")
        else:
            labels = _folder_labels(names, str(path))
        # Offset, packed size, size, CRC: all that is needed to read an image without the archive's directory.
        numbers = [
            (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC)
            for entry in map(entries.__getitem__, names)
        ]
        if not all(0 <= number < 2**62 for entry in numbers for number in entry):
            raise ValueError(f"{path} is damaged: its directory holds sizes that no file has")
        self.entries = np.array(numbers, np.int64)
        self.deflated = np.array([entries[name].compress_type == zipfile.ZIP_DEFLATED for name in names])
        super().__init__([name.encode() for name in names], labels, max(labels) + 1, image_size or 0)
        if image_size is None:
            image_size = min(self.stored_size(0))
            self.image_size, self.image_shape = image_size, (3, image_size, image_size)

    def identity(self) -> dict[str, Any]:
        """See AnyDataset; the archive knows a CRC of every image."""
        return super().identity() | {"names": digest(self.names.ends, self.names.bytes, self.entries[:, 3])}

    def image_name(self, index: int) -> str:
        """The archive and the name in it."""
        return printable(f"{self.path}/{self.names[index].decode()}")

    def is_disk_error(self, error: Exception) -> bool:
        """Any error of the operating system: it concerns the archive, and so all images."""
        return isinstance(error, OSError) and error.errno is not None

    def open_image(self, index: int) -> BinaryIO:
        """The bytes of an image, as a file.

        Raises:
            OSError, ValueError, zlib.error: if they contradict the archive's directory, or are too many.
        """
        begin, packed, size, crc = self.entries[index].tolist()
        if max(packed, size) > LARGEST_IMAGE:
            raise ValueError(f"it has {max(packed, size):,} bytes, more than {LARGEST_IMAGE:,}")
        if self._file is None:  # each process its own
            self._file = open(self.path, "rb")  # noqa: SIM115
        descriptor = self._file.fileno()
        # A local header has 30 bytes, the last four of which tell the lengths of the name and the extras that follow.
        lengths = os.pread(descriptor, 4, begin + 26)
        begin += 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        data = os.pread(descriptor, packed, begin)
        if self.deflated[index]:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(
                data, size + 1
            )  # one byte more than it should have, at most
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("the archive is damaged there, or has changed since it was opened")
        return io.BytesIO(data)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}


def _is_image(name: str) -> bool:
    """Tell images by their extension; macOS adds files whose names start with a dot."""
    return name.lower().endswith(IMG_EXTENSIONS) and not PurePosixPath(name).name.startswith(".")


def _read_description(archive: zipfile.ZipFile, name: str, images: int) -> bytes:
    """Read dataset.json (ValueError if it is larger than so many images could make it)."""
    size = archive.getinfo(name).file_size
    if size > LARGEST_IMAGE + 1024 * images:
        raise ValueError(f"its {name} has {size:,} bytes for {images:,} images")
    return archive.read(name)


def _json_labels(text: bytes, names: list[str], source: str) -> list[int]:
    """Labels of an archive's images from its dataset.json, whose names are relative to its own folder."""
    try:
        listed = json.loads(text).get("labels")
        labels = None if listed is None else dict(listed)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'{source} is not {{"labels": [[name, class number], ...]}}: {error}') from error
    if labels is None:
        return [0] * len(names)
    for name in names:
        if type(labels.get(name)) is not int or labels[name] < 0:
            found = f", but {labels[name]}" if name in labels else ""
            raise ValueError(f"{source} has no class number for {name}{found}")
        if labels[name] >= MAX_CLASSES:
            raise ValueError(f"{source} puts {name} into class {labels[name]}: there are at most {MAX_CLASSES:,}")
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
