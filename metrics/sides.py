"""The two sides of an evaluation, and their features: stored, computed, or kept from the time before."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from metrics.arrays import open_npz
from metrics.collection import FeatureSet, collect
from metrics.features import Extractor
from metrics.images import Images, open_images
from metrics.references import StoredStatistics, read_statistics, write_statistics
from metrics.statistics import Gaussian
from runtime.distributed import Processes, broadcast_object
from runtime.errors import note
from runtime.files import complete_file


class Side(NamedTuple):
    """One side of an evaluation: statistics, images, or statistics with some of their images (ADM's references)."""

    source: str
    statistics: StoredStatistics | None
    images: Images | None


def open_side(path: str | Path) -> Side:
    """The statistics and images that a path holds.

    Raises:
        OSError, ValueError: if it holds neither, or something is damaged.
    """
    statistics = read_statistics(path)
    alone = statistics is not None and "arr_0" not in open_npz(Path(path))
    return Side(str(path), statistics, None if alone else open_images(path))


def check_side(side: Side, extractor: Extractor) -> None:
    """Refuse statistics that another extractor made (ValueError)."""
    if side.statistics is None:
        return
    found, wanted = side.statistics, f"--features {extractor.name}"
    if found.digest is None and extractor.name != "inception":
        raise ValueError(
            f"{side.source} does not say of which features its statistics are, so they count as Inception's, not as "
            f"those of {wanted}: give the images, or make statistics with evaluate.py stats"
        )
    if found.digest not in (None, extractor.digest):
        name = found.extractor or "another extractor"
        what = "other weights of it" if name == extractor.name else name
        raise ValueError(
            f"{side.source} has statistics of {what} (digest {found.digest[:8]}), and {wanted} has digest "
            f"{extractor.digest[:8]}: give the images, or make them again with evaluate.py stats"
        )
    if len(found.mean) != extractor.dimensions:
        raise ValueError(
            f"{side.source} has statistics of {len(found.mean)} features, and {wanted} has {extractor.dimensions}"
        )


def compare_sizes(reference: Side, samples: Side, extractor: Extractor) -> str | None:
    """A line about images of different sizes on the two sides; None if they agree.

    Raises:
        ValueError: if the extractor does not bring both to one size.
    """
    if reference.images is None or samples.images is None:
        return None
    sizes = ["x".join(map(str, side.images.image_size)) for side in (reference, samples)]
    if sizes[0] == sizes[1]:
        return None
    found = f"{reference.source} holds images of {sizes[0]} and {samples.source} of {sizes[1]}"
    if extractor.resize == "none":
        raise ValueError(f"{found}: the features of {extractor.name} are of one size; resize one of them")
    return f"{found}; each is resized ({extractor.resize}), so the numbers also tell the resolutions apart"


# ---------------------------------------------------------------------------------------------------------------
# The reference, once


def side_features(
    side: Side,
    extractor: Extractor,
    processes: Processes,
    metrics: Collection[str],
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    chunks: int = 1,
    description: str = "samples",
) -> FeatureSet | None:
    """The features of a side, on the main process; None elsewhere. Images are read only where a metric needs them.

    The arguments are those of `collect`; `check_side` has been called.
    """
    found = None
    if side.images is not None and (side.statistics is None or {"prc", "is", "accuracy"} & set(metrics)):
        found = collect(side.images, extractor, processes, metrics, indices, batch_size, chunks, description)
    return found if side.statistics is None or not processes.is_main else _with_statistics(found, side.statistics)


def reference_features(
    side: Side,
    extractor: Extractor,
    processes: Processes,
    metrics: Collection[str],
    batch_size: int = 64,
    cache: Path | None = None,
) -> FeatureSet | None:
    """The features of the reference, computed once: a cache keeps statistics, and features where a metric needs them.

    Args:
        metrics: those that need the reference are looked at
        cache:   folder; None for no cache

    Returns:
        the features on the main process, None elsewhere. Collective.
    """
    needed = ({"prc"} & set(metrics)) | ({"sfid"} if extractor.spatial_dimensions else set())
    if side.images is None or (side.statistics and "prc" not in needed) or cache is None:
        return side_features(side, extractor, processes, needed, None, batch_size, 1, "reference")
    found = _read_cached(cache, side, extractor, needed) if processes.is_main else None
    if broadcast_object(found is not None):
        return found
    found = side_features(side, extractor, processes, needed, None, batch_size, 1, "reference")
    if processes.is_main:
        try:
            _write_cached(cache, side, extractor, found)
        except OSError as error:
            note(f"the reference's statistics are not kept in {cache}: {error}")
    return found


def _with_statistics(found: FeatureSet | None, statistics: StoredStatistics) -> FeatureSet:
    """Features of images whose distances are those of the stored statistics."""
    pool = Gaussian(torch.from_numpy(statistics.mean), torch.from_numpy(statistics.covariance))
    spatial = None
    if statistics.spatial_mean is not None:
        spatial = Gaussian(torch.from_numpy(statistics.spatial_mean), torch.from_numpy(statistics.spatial_covariance))
    given = FeatureSet(statistics.num_images, pool, spatial)
    if found is None:
        return given
    return given._replace(features=found.features, probabilities=found.probabilities, labels=found.labels)


def as_statistics(features: FeatureSet, extractor: Extractor, source: str) -> StoredStatistics:
    """The statistics of a set of images, to be written."""
    spatial = (None, None) if features.spatial is None else [tensor.numpy() for tensor in features.spatial]
    pool = [tensor.numpy() for tensor in features.pool]
    return StoredStatistics(source, *pool, *spatial, features.count, extractor.name, extractor.digest, extractor.resize)


def _cache_files(cache: Path, side: Side, extractor: Extractor) -> tuple[Path, Path]:
    content = f"{side.images.identity()} {len(side.images)} {extractor.name} {extractor.digest}"
    key = hashlib.sha256(content.encode()).hexdigest()[:32]
    return cache / f"{key}.npz", cache / f"{key}-features.npz"


def _read_cached(cache: Path, side: Side, extractor: Extractor, needed: Collection[str]) -> FeatureSet | None:
    """The features in the cache; None if they are not there, or damaged."""
    statistics_file, features_file = _cache_files(cache, side, extractor)
    try:
        statistics = side.statistics or read_statistics(statistics_file)
        found = _with_statistics(None, statistics)
        if "prc" in needed:
            features = open_npz(features_file)["features"].whole()
            found = found._replace(features=torch.from_numpy(features).to(extractor.device))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        note(f"the reference's statistics are computed again: {error}")
        return None
    note(f"statistics of {side.source} are those in {statistics_file.parent}")
    return found


def _write_cached(cache: Path, side: Side, extractor: Extractor, found: FeatureSet) -> None:
    statistics_file, features_file = _cache_files(cache, side, extractor)
    if found.features is not None:
        with complete_file(features_file) as temporary:
            np.savez(temporary, features=found.features.cpu().numpy())
    if side.statistics is None:
        write_statistics(statistics_file, as_statistics(found, extractor, side.source))
