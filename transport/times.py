"""Densities of the times that training draws, as functions of the ratio of data to noise.

A density says how often training sees a noise level, so it is one of the share tau = alpha / (alpha + sigma), which
is t on the Linear path; the other paths reach the same noise levels at other times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch

from transport.paths import Path

TIME_SAMPLINGS = ("uniform", "logit-normal", "cosmap")


class Density(Protocol):
    """A density of tau in [0, 1] by its distribution function and that one's inverse, on float64 tensors."""

    def cdf(self, tau: torch.Tensor) -> torch.Tensor: ...

    def quantile(self, u: torch.Tensor) -> torch.Tensor: ...


class LogitNormal(NamedTuple):
    """log(alpha / sigma) ~ N(mean, std^2): Stable Diffusion 3's (arXiv:2403.03206), and EDM's of -log sigma."""

    mean: float = 0.0
    std: float = 1.0

    def cdf(self, tau: torch.Tensor) -> torch.Tensor:
        return torch.special.ndtr((torch.logit(tau) - self.mean) / self.std)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class CosMap(NamedTuple):
    """Noise levels as of uniform times on the GVP path (arXiv:2403.03206, equation 21)."""

    def cdf(self, tau: torch.Tensor) -> torch.Tensor:
        return torch.atan2(tau, 1 - tau) / (math.pi / 2)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        sine, cosine = torch.sin(math.pi / 2 * u), torch.sin(math.pi / 2 * (1 - u))
        return sine / (sine + cosine)


def density_of(time_sampling: str, time_params: Sequence[float] | None = None) -> Density | None:
    """The density of a name; None for "uniform", which is a density of t itself.

    Args:
        time_sampling: one of TIME_SAMPLINGS
        time_params:   mean and standard deviation of "logit-normal" (default 0 and 1); the others have none

    Raises:
        ValueError: if the name is unknown, or the numbers are not its own.
    """
    if time_sampling not in TIME_SAMPLINGS:
        raise ValueError(f"unknown time sampling {time_sampling!r}; choose one of {', '.join(TIME_SAMPLINGS)}")
    if time_sampling != "logit-normal":
        if time_params is not None:
            raise ValueError(
                f"time_params are those of logit-normal times: leave them out for {time_sampling} ones, or give "
                "time_sampling logit-normal"
            )
        return CosMap() if time_sampling == "cosmap" else None
    if time_params is None:
        return LogitNormal()
    numbers = [float(number) for number in time_params]
    if len(numbers) != 2 or not all(map(math.isfinite, numbers)) or numbers[1] <= 0:
        raise ValueError(f"time_params are a mean and a standard deviation above 0, got {numbers}")
    return LogitNormal(*numbers)


def times_of(u: torch.Tensor, density: Density, path: Path, interval: tuple[float, float]) -> torch.Tensor:
    """Times of uniform numbers u in [0, 1], by the quantile function of the density restricted to the interval."""
    ends = torch.tensor(interval, dtype=torch.float64, device=u.device)
    low, high = density.cdf(path.share_at(ends))
    t = path.time_at(density.quantile(low + u.double() * (high - low)))
    return t.clamp(*interval).to(torch.get_default_dtype())


def mass(density: Density, path: Path, interval: tuple[float, float]) -> float:
    """Probability of the density, which is that of all of [0, 1], to fall into the interval."""
    low, high = density.cdf(path.share_at(torch.tensor(interval, dtype=torch.float64, device="cpu")))
    return (high - low).item()


def probabilities(
    edges: Sequence[float], density: Density | None, path: Path, interval: tuple[float, float]
) -> list[float]:
    """Probability of each piece that the edges cut the interval into, which is that of a time to fall into it."""
    cuts = torch.tensor(edges, dtype=torch.float64).clamp(*interval)
    masses = cuts if density is None else density.cdf(path.share_at(cuts))
    return (masses.diff() / (masses[-1] - masses[0])).tolist()


def strata(
    num_samples: int, generator: torch.Generator | None = None, base: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stratified numbers of [0, 1): (stratum + jitter) / N for each of N samples, every stratum once.

    Each single number is uniform. Every contiguous slice of the samples spreads over [0, 1); numbers of two bases
    spread over the square as Halton's points do.

    Returns:
        the strata (N,), whole numbers below N, and the jitter (N,) in [0, 1).
    """
    device = generator.device if generator is not None else None
    order = torch.tensor(spread_order(num_samples, base), device=device)
    shift = torch.randint(num_samples, (1,), generator=generator, device=device)
    jitter = torch.rand(num_samples, generator=generator, device=device)
    return (order + shift) % num_samples, jitter


@lru_cache
def spread_order(n: int, base: int = 2) -> tuple[int, ...]:
    """A permutation of 0..n-1 whose contiguous slices each spread over the whole range (van der Corput)."""
    digits = 1
    while base**digits < n:
        digits += 1
    inverses = [sum(i // base**k % base * base ** (digits - 1 - k) for k in range(digits)) for i in range(n)]
    rank = {value: position for position, value in enumerate(sorted(inverses))}
    return tuple(rank[value] for value in inverses)
