"""The pass over images: an extractor's features, on any number of processes, and what is kept of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from metrics.features import Extractor
from metrics.images import Images
from metrics.statistics import Gaussian, Moments, chunk_numbers
from runtime.distributed import Processes

CHUNKS = 10  # parts of the samples from which errors and limits are computed
AHEAD = 2  # batches that are read while one is computed


class FeatureSet(NamedTuple):
    """Everything that metrics know of a set of images; None where it was not asked for or is unknown.

    count:          number of images
    pool:           of `Features.pool`
    spatial:        of `Features.spatial`
    features:       (n, d) float32 in the images' order, on the extractor's device
    probabilities:  (n, K) float32, likewise
    labels:         (n,) int64 classes that were asked for
    pool_chunks:    moments of CHUNKS random parts of the images
    spatial_chunks: likewise
    """

    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    features: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    pool_chunks: Sequence[Moments] = ()
    spatial_chunks: Sequence[Moments] = ()


class Collector:
    """Collects what metrics need of images that come in batches, on any number of processes.

    Args:
        extractor: of the features
        count:     images of all processes together
        metrics:   names, as of metrics.evaluation
        chunks:    parts whose moments are kept apart: CHUNKS for errors and limits, else 1
    """

    def __init__(self, extractor: Extractor, count: int, metrics: Collection[str], chunks: int = 1) -> None:
        self.extractor, self.count = extractor, count
        self._chunk_of = torch.from_numpy(chunk_numbers(count, chunks))
        self._pool = [Moments(extractor.dimensions, extractor.device) for _ in range(chunks)]
        self._spatial = []
        if "sfid" in metrics:
            self._spatial = [Moments(extractor.spatial_dimensions, extractor.device) for _ in range(chunks)]
        self._features = self._probabilities = None
        if "prc" in metrics:
            self._features = torch.zeros(count, extractor.dimensions, device=extractor.device)
        if {"is", "accuracy"} & set(metrics):
            self._probabilities = torch.zeros(count, extractor.num_classes, device=extractor.device)
        self._labels = torch.zeros(count, dtype=torch.int64, device=extractor.device)
        self._labelled = False

    @torch.no_grad()
    def add(self, indices: Sequence[int], images: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add images (n, 3, H, W) uint8.

        Args:
            indices: their numbers below `count`; each occurs once, on any process
            labels:  (n,) their classes
        """
        features = self.extractor(images)
        rows = torch.as_tensor(indices, dtype=torch.int64)
        chunks = self._chunk_of[rows]
        for chunk in chunks.unique().tolist():
            members = (chunks == chunk).to(features.pool.device)
            self._pool[chunk].add(features.pool[members])
            if self._spatial:
                self._spatial[chunk].add(features.spatial[members])
        rows = rows.to(self._labels.device)
        if self._features is not None:
            self._features[rows] = features.pool
        if self._probabilities is not None:
            self._probabilities[rows] = features.probabilities
        if labels is not None:
            self._labels[rows] = labels.to(self._labels)
            self._labelled = True

    def finish(self, processes: Processes) -> FeatureSet | None:
        """The features of all processes, on the main one; None elsewhere. Collective.

        Raises:
            ValueError: if an image is missing, or features are not finite.
        """
        for moments in (*self._pool, *self._spatial):
            moments.reduce()
        found = sum(moments.count for moments in self._pool)
        if found != self.count:
            raise ValueError(f"{found} of {self.count} images came")
        rows = [self._features, self._probabilities, self._labels]
        if dist.is_initialized():
            for tensor in rows:
                if tensor is not None:
                    dist.reduce(tensor, 0)  # every row is zero on all processes but one
        if not processes.is_main:
            return None
        pool, spatial = (sum(part[1:], part[0]).gaussian() if part else None for part in (self._pool, self._spatial))
        if not self._labelled:
            rows[2] = None
        chunks = (self._pool, self._spatial) if len(self._pool) > 1 else ((), ())
        return FeatureSet(self.count, pool, spatial, *rows, *chunks)


def collect(
    images: Images,
    extractor: Extractor,
    processes: Processes,
    metrics: Collection[str],
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    chunks: int = 1,
    description: str = "images",
) -> FeatureSet | None:
    """Compute the features of images, shared among the processes; the main process has them all, others None.

    Args:
        metrics:     names, as of metrics.evaluation
        indices:     ascending numbers of the images to take; None for all
        batch_size:  images a process computes together
        chunks:      as of Collector
        description: of the progress bar

    Raises:
        ValueError, OSError: if an image is damaged.
    """
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    collector = Collector(extractor, len(indices), metrics, chunks)
    batches = [range(start, min(start + batch_size, len(indices))) for start in range(0, len(indices), batch_size)]
    mine = batches[processes.rank :: processes.world_size]
    with tqdm(total=len(indices), unit="image", desc=description, disable=not processes.is_main) as progress:
        for number, (positions, pixels) in enumerate(_read_ahead(images, indices, mine)):
            labels = None if images.labels is None else torch.from_numpy(images.labels[indices[positions]])
            collector.add(positions, torch.from_numpy(pixels).permute(0, 3, 1, 2), labels)
            # The others are about as far.
            progress.update(sum(map(len, batches[number * processes.world_size :][: processes.world_size])))
    return collector.finish(processes)


def _read_ahead(images: Images, indices: np.ndarray, batches: Sequence[range]) -> Iterator[tuple[range, np.ndarray]]:
    """Positions of each batch and its pixels (n, H, W, 3), read on a thread while the ones before are computed."""
    with ThreadPoolExecutor(1) as reader:
        reading: deque[tuple[range, Any]] = deque()
        try:
            for positions in batches:
                reading.append((positions, reader.submit(images.read, indices[positions])))
                if len(reading) > AHEAD:
                    first, pixels = reading.popleft()
                    yield first, pixels.result()
            for first, pixels in reading:
                yield first, pixels.result()
        finally:
            reader.shutdown(cancel_futures=True)
