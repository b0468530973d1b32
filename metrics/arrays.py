"""Arrays of an .npz, read row by row from where they are in the file: they may be larger than the memory."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.images import printable


class StoredArray:
    """One array of an .npz; made by `open_npz`, which reads headers alone.

    Rows of an array that is stored as it is are read in place. A compressed one is decompressed from its beginning, and
    again when rows are asked for that lie before the last ones: ascending order is the fast one.

    Attributes:
        shape, dtype: of the array, from its header
        source:       file and array, for messages
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        self.path, self._entry = path, entry
        self.source = printable(f"{path}: {entry.filename.removesuffix('.npy')}")
        with archive.open(entry) as member:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            self.shape, self._fortran_order, self.dtype = readers[np.lib.format.read_magic(member)](member)
            self._header = member.tell()
        if min(self.shape, default=0) < 0:
            raise ValueError(f"its shape is {self.shape}")
        self._begin = None if entry.compress_type != zipfile.ZIP_STORED else self._header + _content_begin(path, entry)
        self._version = _version(path)
        self._stream: io.BufferedIOBase | None = None

    def check(self) -> None:
        """Refuse what cannot be read by rows, without unpickling (ValueError)."""
        if self.dtype.hasobject:
            raise ValueError(f"{self.source} holds pickled objects, which may execute code: save an array of numbers")
        if self._fortran_order and len(self.shape) > 1:
            raise ValueError(f"{self.source} is in Fortran's order: save numpy.ascontiguousarray of it")
        expected = self._header + math.prod(self.shape) * self.dtype.itemsize
        if self._entry.file_size != expected:
            raise ValueError(f"{self.source} is damaged: it has {self._entry.file_size} bytes, not {expected}")

    def whole(self) -> np.ndarray:
        """The array, whatever its order.

        Raises:
            ValueError: if it is damaged, or holds objects.
        """
        if self.dtype.hasobject:
            self.check()
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._entry.filename) as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
                member.read(1)  # at the end the CRC is compared
                return array
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError) as error:
            raise ValueError(f"{self.source} is damaged: {error}") from error

    def rows(self, indices: Sequence[int]) -> np.ndarray:
        """These rows, (n, *shape[1:]).

        Raises:
            ValueError: if the file is damaged there.
            OSError: if it cannot be read, or has changed since it was opened.
        """
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        flat = rows.reshape(len(indices), math.prod(self.shape[1:])).view(np.uint8)
        if len(indices) and not 0 <= min(indices) <= max(indices) < self.shape[0]:
            raise IndexError(f"{self.source} has {self.shape[0]} rows")
        if _version(self.path) != self._version:
            raise OSError(f"{self.path} has changed since it was opened: start again")
        if self._begin is None:
            self._decompress(indices, flat)
            return rows
        with open(self.path, "rb", buffering=0) as file:
            for row, index in zip(flat, indices, strict=True):
                file.seek(self._begin + int(index) * row.size)
                if file.readinto(row) != row.size:
                    raise ValueError(f"{self.source} is damaged: the file ends in row {index}")
        return rows

    def _decompress(self, indices: Sequence[int], flat: np.ndarray) -> None:
        """Fill the bytes of rows (n, bytes), in the order in which they are in the file."""
        if self._stream is None:
            self._stream = zipfile.ZipFile(self.path).open(self._entry.filename)  # noqa: SIM115
        for position in np.argsort(indices, kind="stable"):
            try:
                self._stream.seek(self._header + int(indices[position]) * flat.shape[1])
                content = self._stream.read(flat.shape[1])
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise ValueError(f"{self.source} is damaged before row {indices[position] + 1}: {error}") from error
            if len(content) != flat.shape[1]:
                raise ValueError(f"{self.source} is damaged: it ends in row {indices[position]}")
            flat[position] = np.frombuffer(content, np.uint8)


def _content_begin(path: Path, entry: zipfile.ZipInfo) -> int:
    """Position of an entry's content; its local header of 30 bytes ends with the lengths of what follows."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset + 26)
        lengths = file.read(4)
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _version(path: Path) -> tuple[int, int]:
    """Size of a file, and time of its last change in ns."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def open_npz(path: Path) -> dict[str, StoredArray]:
    """The arrays of an .npz by their names; empty for a zip archive without arrays.

    Raises:
        ValueError: if the file is damaged, or no zip archive.
        OSError: if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            return {entry.filename.removesuffix(".npy"): StoredArray(path, archive, entry) for entry in entries}
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy raise half a dozen kinds at a damaged one
        reason = " ".join((str(error) or type(error).__name__).split())
        raise ValueError(f"{path} is damaged, or no .npz: {printable(reason)}") from error
