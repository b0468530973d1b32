"""Stores for the many samples of sample_ddp.py until all are there, and the .npz made of them.

A sample is stored complete or not at all, with its log-density where that was asked for. It is found again by its
number, so that processes, batches and interruptions leave no trace.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from runtime.files import complete_file
from transport import bits_per_dim

PNGS_PER_FOLDER = 1000
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # the last twelve bytes of every whole PNG file
NATS = "log-density in nats"  # key of a PNG file's text


class SampleStore(ABC):
    """Samples by their number: an array, such as pixels (H, W, 3) uint8, and optionally a log-density in nats."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def present(self, num_samples: int) -> set[int]:
        """Numbers below num_samples whose sample is there and whole."""

    @abstractmethod
    def write(self, indices: Sequence[int], samples: np.ndarray, nats: Sequence[float] | None) -> None:
        """Store samples (N, ...) under their numbers, with their log-densities (N,)."""

    @abstractmethod
    def read(self, index: int) -> tuple[np.ndarray, float | None]:
        """One sample and its log-density (ValueError if it is damaged)."""


class PngStore(SampleStore):
    """A PNG file for each sample, a thousand to a folder; the log-density is text in the file."""

    def path(self, index: int) -> Path:
        return self.folder / f"{index // PNGS_PER_FOLDER:03d}" / f"{index:06d}.png"

    def present(self, num_samples: int) -> set[int]:
        return {index for index in range(num_samples) if _is_whole_png(self.path(index))}

    def write(self, indices: Sequence[int], samples: np.ndarray, nats: Sequence[float] | None) -> None:
        for row, index in enumerate(indices):
            text = PngInfo()
            if nats is not None:
                text.add_text(NATS, repr(nats[row]))
            with complete_file(self.path(index)) as temporary:
                Image.fromarray(samples[row]).save(temporary, pnginfo=text)

    def read(self, index: int) -> tuple[np.ndarray, float | None]:
        try:
            with Image.open(self.path(index)) as image:
                nats = image.text.get(NATS)
                return np.asarray(image), None if nats is None else float(nats)
        except (OSError, SyntaxError) as error:  # what Pillow raises for flipped bits
            raise ValueError(f"{self.path(index)} is damaged: remove it and run the command again") from error


def _is_whole_png(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-len(PNG_END), 2)
            return file.read() == PNG_END
    except OSError:  # not there, or shorter than its end
        return False


class ShardStore(SampleStore):
    """One small .npz for each batch; no files of single images.

    Args:
        key: name of the samples' array in these files
    """

    def __init__(self, folder: Path, key: str = "pixels") -> None:
        super().__init__(folder)
        self.key = key
        self._where: dict[int, tuple[Path, int]] = {}
        self._loaded: tuple[Path, dict[str, np.ndarray]] | None = None

    def present(self, num_samples: int) -> set[int]:
        self._where = {}
        for path in sorted((self.folder / "shards").glob("[0-9]*.npz")):
            try:
                with np.load(path) as shard:
                    indices = shard["index"].tolist()
                    if zipfile.ZipFile(path).testzip() is not None:
                        continue
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                continue  # made again
            self._where.update({index: (path, row) for row, index in enumerate(indices)})
        return {index for index in self._where if index < num_samples}

    def write(self, indices: Sequence[int], samples: np.ndarray, nats: Sequence[float] | None) -> None:
        path = self.folder / "shards" / f"{indices[0]:06d}-{indices[-1]:06d}-{len(indices)}.npz"
        extra = {} if nats is None else {"nats": np.array(nats)}
        with complete_file(path) as temporary:
            np.savez(temporary, index=np.array(indices), **{self.key: samples}, **extra)

    def read(self, index: int) -> tuple[np.ndarray, float | None]:
        path, row = self._where[index]
        if self._loaded is None or self._loaded[0] != path:
            with np.load(path) as shard:
                self._loaded = path, dict(shard)
        shard = self._loaded[1]
        return shard[self.key][row], float(shard["nats"][row]) if "nats" in shard else None


def write_npz(path: Path, store: SampleStore, labels: Sequence[int]) -> tuple[str, list[float | None]]:
    """Stream the samples into an .npz, a shard in memory at most: arr_0 (N, ...) in sample order, as ADM writes it.

    Args:
        labels: classes of the N samples, for arr_1 (N,) int64

    Returns:
        shape and type of the array, to be read, and the samples' log-densities, None where they have none.

    Raises:
        ValueError: if a sample is damaged, or not of the first one's shape and type.
    """
    shape, dtype = _shape_and_type(store.read(0)[0])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (len(labels), *shape)}
    nats = []
    with complete_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for index in tqdm(range(len(labels)), desc="npz", unit="sample"):
                sample, value = store.read(index)
                if _shape_and_type(sample) != (shape, dtype):
                    raise ValueError(
                        f"{store.folder}: sample {index} is {sample.shape} {sample.dtype}, and the first {shape} "
                        f"{dtype}: remove that folder"
                    )
                file.write(np.ascontiguousarray(sample).tobytes())
                nats.append(value)
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
    return f"{header['shape']} {dtype}", nats


def _shape_and_type(array: np.ndarray) -> tuple[tuple[int, ...], np.dtype]:
    return array.shape, array.dtype


def write_likelihoods(path: Path, nats: Iterable[float], dimensions: int) -> str:
    """Save log-densities as an .npz: nats (N,) and bits_per_dim (N,), in sample order; returns a line about them."""
    nats = np.array(list(nats))
    bits = bits_per_dim(torch.from_numpy(nats), dimensions).numpy()
    with complete_file(path) as temporary:
        np.savez(temporary, nats=nats, bits_per_dim=bits)
    return f"saved {path}: mean {nats.mean():.2f} nats, {bits.mean():.4f} bits per dimension"
