"""Gaussians of features and the Fréchet distance between them: FID, sFID and FD are this number of other features.

Sums are kept in float64: in float32 the covariance of features whose mean is five deviations from 0 is 1e-4 off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist


class Gaussian(NamedTuple):
    """mean (d,) and covariance (d, d), float64 on the CPU."""

    mean: torch.Tensor
    covariance: torch.Tensor

    @property
    def dimensions(self) -> int:
        return len(self.mean)


class Moments:
    """Number, sum and sum of outer products of features that arrive in batches.

    Args:
        dimensions: d of the features
        device:     where the sums are kept; the CPU instead of a device without float64
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        device = torch.device("cpu") if device.type == "mps" else device
        self.count = 0
        self.sum = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor) -> None:
        """Add features (n, d) of any floating type, on any device."""
        features = features.to(self.sum.device).double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def __add__(self, other: Moments) -> Moments:
        """Moments of the features of both."""
        total = Moments(len(self.sum), self.sum.device)
        total.count = self.count + other.count
        total.sum = self.sum + other.sum.to(self.sum.device)
        total.outer = self.outer + other.outer.to(self.sum.device)
        return total

    def __sub__(self, part: Moments) -> Moments:
        """Moments of the features without those of a part of them."""
        rest = Moments(len(self.sum), self.sum.device)
        rest.count = self.count - part.count
        rest.sum, rest.outer = self.sum - part.sum, self.outer - part.outer
        return rest

    def reduce(self) -> None:
        """Add the moments of all processes, on each of them. Collective."""
        if not dist.is_initialized():
            return
        packed = torch.cat([self.sum.new_tensor([self.count]), self.sum, self.outer.flatten()])
        dist.all_reduce(packed)
        self.count = round(packed[0].item())
        self.sum, outer = packed[1:].split([len(self.sum), self.outer.numel()])
        self.outer = outer.view_as(self.outer)

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance (ValueError for fewer than two features)."""
        if self.count < 2:
            raise ValueError(f"a covariance takes two images or more, and there is {self.count}")
        mean = self.sum / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean.cpu(), covariance.cpu())


# ---------------------------------------------------------------------------------------------------------------
# Fréchet distance


class FrechetDistance:
    """The squared Fréchet distance |m - m_r|^2 + tr S + tr S_r - 2 tr (S S_r)^(1/2) to a reference (m_r, S_r).

    With S_r = F F^T the last trace is the sum of the roots of F^T S F's eigenvalues (Heusel et al., arXiv:1706.08500,
    eq. 6). Eigenvalues of symmetric matrices are exact to rounding; roots of matrices that are nearly singular are not.

    Raises:
        ValueError: if the numbers are not finite, or not of the same dimension.
    """

    def __init__(self, reference: Gaussian) -> None:
        self.reference = _checked(reference)
        values, vectors = torch.linalg.eigh(self.reference.covariance)
        self.factor = vectors * values.clamp(min=0).sqrt()  # (d, d)

    def __call__(self, samples: Gaussian) -> float:
        samples = _checked(samples)
        if samples.dimensions != self.reference.dimensions:
            raise ValueError(
                f"statistics of {samples.dimensions} and of {self.reference.dimensions} features cannot be compared: "
                "both sides must come from the same extractor"
            )
        eigenvalues = torch.linalg.eigvalsh(self.factor.T @ samples.covariance @ self.factor)
        # Where there are fewer images than features most are zero but for rounding, of which the root would be large.
        eigenvalues = eigenvalues[eigenvalues > 4 * torch.finfo(torch.float64).eps * eigenvalues[-1]].clamp(min=0)
        traces = samples.covariance.trace() + self.reference.covariance.trace() - 2 * eigenvalues.sqrt().sum()
        return max(0.0, ((samples.mean - self.reference.mean).square().sum() + traces).item())  # but for rounding


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance between two Gaussians; see FrechetDistance."""
    return FrechetDistance(b)(a)


def _checked(gaussian: Gaussian) -> Gaussian:
    mean, covariance = (values.double().cpu() for values in gaussian)
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("features are not finite, so there is no distance: are the network's weights damaged?")
    return Gaussian(mean, covariance)


# ---------------------------------------------------------------------------------------------------------------
# Bias and error


def chunk_numbers(count: int, chunks: int) -> np.ndarray:
    """Number of the chunk that each of `count` images belongs to (count,): random, of equal sizes, always the same.

    Chunks of consecutive images would hold some of the classes only, in files that are sorted by class.
    """
    return np.random.default_rng(0).permutation(count) % chunks


def distance_at_infinity(chunks: Sequence[Moments], distance: FrechetDistance) -> float:
    """The distance that infinitely many images would have.

    The distance of N images is larger by c / N, where c depends on the model. Distances of the first chunk, of the
    first two, and so on are fitted against 1 / N, and the line is read at 0 (Chong and Forsyth, arXiv:1911.07023).
    """
    total, inverse, distances = chunks[0], [], []
    for number, chunk in enumerate(chunks):
        total = total + chunk if number else chunk
        inverse.append(1 / total.count)
        distances.append(distance(total.gaussian()))
    return float(np.polyfit(inverse, distances, 1)[1])


def distance_error(chunks: Sequence[Moments], distance: FrechetDistance) -> float:
    """Standard error of the distance over draws of the samples, by the jackknife that leaves out a chunk at a time."""
    total = sum(chunks[1:], chunks[0])
    distances = np.array([distance((total - chunk).gaussian()) for chunk in chunks])
    return float(np.sqrt((len(chunks) - 1) * distances.var()))
