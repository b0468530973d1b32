"""Interpolants x_t = alpha_t x_1 + sigma_t x_0 between noise x_0 (t = 0) and data x_1 (t = 1).

SiT (arXiv:2401.08740), section 2 and table 1. A path is four numbers at each t; everything else follows from them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch


class Coefficients(NamedTuple):
    """alpha_t, sigma_t and their derivatives in t; tensors of the shape of t."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor
    d_sigma: torch.Tensor


class Path(ABC):
    """An interpolant: a subclass defines `name` and `coefficients(t)`, and may override the treatment of its ends."""

    name: str
    regular_at_noise = False  # True where alpha > 0 at t = 0: every quantity is finite there, so no interval is cut
    singular_eps = (1e-3, 1e-3)  # distance from the ends of [0, 1], where one is singular: of training, of sampling

    @abstractmethod
    def coefficients(self, t: torch.Tensor) -> Coefficients:
        """The path's four numbers at times t."""

    @abstractmethod
    def time_at(self, share: torch.Tensor) -> torch.Tensor:
        """Times t at which alpha / (alpha + sigma) is `share`, in [0, 1]: the inverse of `share_at`."""

    def share_at(self, t: torch.Tensor) -> torch.Tensor:
        """alpha / (alpha + sigma) at times t: the time at which Linear has the same ratio of data to noise."""
        alpha, sigma, _, _ = self.coefficients(t)
        return alpha / (alpha + sigma)

    def time_of_snr(self, snr: float) -> float:
        """Time at which the signal-to-noise ratio (alpha / sigma)^2 has a value above 0.

        Where the path is never so noisy (VP), the time is below 0.
        """
        ratio = torch.tensor(snr, dtype=torch.float64, device="cpu").sqrt()
        return self.time_at(ratio / (1 + ratio)).item()

    def interpolate(self, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t for noise x0 (N, ...), data x1 (N, ...) and times t (N,)."""
        alpha, sigma, _, _ = self.coefficients(like(t, x1))
        return alpha * x1 + sigma * x0


class LinearPath(Path):
    """alpha = t, sigma = 1 - t: straight lines (rectified flow)."""

    name = "Linear"

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)

    def time_at(self, share: torch.Tensor) -> torch.Tensor:
        return share


class GVPPath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): alpha^2 + sigma^2 = 1 (generalised variance preserving)."""

    name = "GVP"

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        half_pi = math.pi / 2
        # cos(pi t / 2) as the sine of the rest: exactly 0 at t = 1, and precise close to it.
        alpha, sigma = torch.sin(half_pi * t), torch.sin(half_pi * (1 - t))
        return Coefficients(alpha, sigma, half_pi * sigma, -half_pi * alpha)

    def time_at(self, share: torch.Tensor) -> torch.Tensor:
        return torch.atan2(share, 1 - share) / (math.pi / 2)


class VPPath(Path):
    """The variance-preserving diffusion of Song et al. (arXiv:2011.13456) with beta from 0.1 to 20, time reversed.

    log alpha = -(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2, sigma = sqrt(1 - alpha^2). At t = 0 a
    little of the data is left: alpha = 0.0066. At t = 1 the derivative of sigma is infinite.
    """

    name = "VP"
    regular_at_noise = True
    singular_eps = (1e-5, 1e-3)
    beta_min, beta_max = 0.1, 20.0

    def coefficients(self, t: torch.Tensor) -> Coefficients:
        s, slope = 1 - t, self.beta_max - self.beta_min
        log_alpha = -0.25 * s**2 * slope - 0.5 * s * self.beta_min
        d_log_alpha = 0.5 * s * slope + 0.5 * self.beta_min
        alpha = log_alpha.exp()
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))  # expm1: no cancellation near t = 1
        d_alpha = alpha * d_log_alpha
        return Coefficients(alpha, sigma, d_alpha, -alpha * d_alpha / sigma)

    def time_at(self, share: torch.Tensor) -> torch.Tensor:
        # -2 log alpha = log(1 + (sigma / alpha)^2) is slope / 2 s^2 + beta_min s: its root, without cancellation at 0
        integral = torch.log1p(((1 - share) / share).square())
        slope = self.beta_max - self.beta_min
        return 1 - 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


PATHS: dict[str, Path] = {path.name: path for path in (LinearPath(), GVPPath(), VPPath())}


def like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """View times (N,) so that they broadcast over x (N, ...)."""
    return t.reshape(-1, *[1] * (x.ndim - 1))
