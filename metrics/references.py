"""Files of statistics: the mean and covariance of the features of a set of images, ADM's, EDM's and ours."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metrics.arrays import StoredArray
from metrics.images import Images, npz_arrays
from runtime.files import complete_file

BLOCK = 64  # images that are copied at once
TEXTS = {"extractor": "extractor", "extractor_digest": "digest", "resize": "resize"}  # keys of the file, and fields
KINDS = {"num_images": "i", **dict.fromkeys(TEXTS, "U")}  # of their arrays, in numpy's letters


class StoredStatistics(NamedTuple):
    """Mean and covariance of the features of a set of images, and what else its file says.

    mean, covariance:                 (d,) and (d, d) float64 of `Features.pool`
    spatial_mean, spatial_covariance: (d_s,) and (d_s, d_s) float64 of `Features.spatial`; None where it has none
    num_images:                       number of images behind them; None where the file does not say
    extractor, digest, resize:        as of `Extractor`; None where the file does not say, as ADM's and EDM's
    """

    source: str
    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None
    num_images: int | None = None
    extractor: str | None = None
    digest: str | None = None
    resize: str | None = None


def read_statistics(path: str | Path) -> StoredStatistics | None:
    """The statistics in an .npz with mu and sigma, ADM's, EDM's or ours; None for a path that holds images alone.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if the file is damaged, or its arrays are no statistics.
    """
    if str(path) == "digits" or Path(path).is_dir():
        return None
    arrays = npz_arrays(Path(path))
    if "mu" not in arrays:
        return None
    spatial = _moments(arrays, "mu_s", "sigma_s", path) if {"mu_s", "sigma_s"} & arrays.keys() else (None, None)
    said = {name: arrays[name].whole() for name in ("num_images", *TEXTS) if name in arrays}
    if wrong := [name for name, value in said.items() if value.ndim or value.dtype.kind != KINDS[name]]:
        raise ValueError(f"{path}: {wrong[0]} is {said[wrong[0]]}, which no evaluate.py wrote")
    num_images = int(said["num_images"]) if "num_images" in said else None
    texts = [str(said[name]) if name in said else None for name in TEXTS]
    return StoredStatistics(str(path), *_moments(arrays, "mu", "sigma", path), *spatial, num_images, *texts)


def _moments(
    arrays: Mapping[str, StoredArray], mean_name: str, covariance_name: str, path: str | Path
) -> tuple[np.ndarray, np.ndarray]:
    """A mean (d,) and a covariance (d, d) by their names (ValueError if they are none)."""
    if not {mean_name, covariance_name} <= arrays.keys():
        raise ValueError(f"{path} has only one of {mean_name} and {covariance_name}")
    stored = arrays[mean_name], arrays[covariance_name]
    (size, *more), pair = stored[0].shape or (0,), stored[1].shape
    if more or pair != (size, size) or size < 1 or any(array.dtype.kind != "f" for array in stored):
        found = " and ".join(f"{array.shape} {array.dtype}" for array in stored)
        raise ValueError(f"{path}: {mean_name} and {covariance_name} are {found}, not floats (d,) and (d, d)")
    mean, covariance = (array.whole().astype(np.float64) for array in stored)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: {mean_name} or {covariance_name} has values that are not finite")
    if abs(covariance - covariance.T).max() > 1e-5 * abs(covariance).max():
        raise ValueError(f"{path}: {covariance_name} is not symmetric, and so no covariance")
    return mean, covariance


def write_statistics(
    path: str | Path, statistics: StoredStatistics, images: Images | None = None, indices: Sequence[int] = ()
) -> None:
    """Write statistics as an .npz which ADM's and EDM's tools read as well.

    Args:
        statistics:      `source` is not written
        images, indices: numbers of the images that become arr_0, for precision and recall

    Raises:
        ValueError: if the path does not end in .npz, by which others know these files; if an image is damaged.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} does not end in .npz")
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    arrays |= {"mu_s": statistics.spatial_mean, "sigma_s": statistics.spatial_covariance}
    arrays |= {"num_images": statistics.num_images, **{key: getattr(statistics, TEXTS[key]) for key in TEXTS}}
    with complete_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            if array is not None:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        if images is None:
            return
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(indices), *images.image_size, 3)}
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(indices), BLOCK):
                file.write(images.read(indices[start : start + BLOCK]).tobytes())
