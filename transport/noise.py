"""The distribution of x_0, and normal numbers from one generator or from one per sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# One generator for a batch, or one for each sample of it.
Generator = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Standard normal numbers of shape (N, ...), drawn on the generator's device and moved to `device`.

    Args:
        generator: one torch.Generator for all, or a sequence of N of them, one per sample

    Raises:
        ValueError: if the number of generators is not N.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return to_device(torch.randn(*shape, generator=generator, device=source, dtype=dtype), device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for a batch of {shape[0]}")
    rows = [torch.randn(tuple(shape[1:]), generator=g, device=g.device, dtype=dtype) for g in generator]
    return to_device(torch.stack(rows), device) if rows else torch.empty(*shape, device=device, dtype=dtype)


def to_device(x: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    """x on the device; None leaves it. Copies to a GPU go through pinned memory: any other copy waits for the GPU."""
    if x.device.type == "cpu" and device is not None and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def rademacher(x: torch.Tensor, generator: Generator = None) -> torch.Tensor:
    """Random signs of the shape, type and device of x (N, ...)."""
    normal = randn(x.shape, generator, x.device, x.dtype)
    return torch.where(normal < 0, -torch.ones_like(x), torch.ones_like(x))


class GaussianNoise:
    """x_0 ~ N(0, I)."""

    def sample(
        self,
        shape: Sequence[int],
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Draw x_0 of shape (N, ...); see `randn` for the generators."""
        return randn(shape, generator, device, dtype)

    def log_prob(self, x0: torch.Tensor) -> torch.Tensor:
        """Log-density of x0 (N, ...) in nats, shape (N,)."""
        dimensions = x0[0].numel()
        return -0.5 * (x0.flatten(1) ** 2).sum(1) - 0.5 * dimensions * math.log(2 * math.pi)


class StudentTNoise:
    """x_0 ~ t_D(0, I), the multivariate Student-t with D degrees of freedom: the noise of PFGM++ (arXiv:2302.04265).

    x_0 = z / sqrt(g) with z ~ N(0, I) and one g ~ chi2_D / D for all values of a sample, which makes the density of the
    paper's perturbation kernel, 1 / (|x_0|^2 + D)^((N + D) / 2) for N values, at r = sigma sqrt(D) with sigma = 1.

    Args:
        dof: D, the degrees of freedom

    Raises:
        ValueError: if D is not a finite number above 0.
    """

    def __init__(self, dof: float) -> None:
        if not 0 < dof < math.inf:
            raise ValueError(f"degrees of freedom must be a finite number above 0, got {dof}")
        self.dof = float(dof)

    def sample(
        self,
        shape: Sequence[int],
        generator: Generator = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Draw x_0 of shape (N, ...); see `randn` for the generators.

        z is GaussianNoise's, and g the quantile of one more number of the same generator: the same seed draws the
        same picture at every D. Nothing waits for a GPU, unless the generator is one of a GPU.
        """
        from scipy import special  # here: exported pipelines of Gaussian noise run without it

        on_gpu = isinstance(generator, torch.Generator) and generator.device.type != "cpu"
        normal = randn(shape, generator, generator.device if on_gpu else "cpu", dtype)
        if generator is None or isinstance(generator, torch.Generator):
            uniform = torch.rand(shape[0], generator=generator, device=normal.device, dtype=torch.float64)
        else:
            draws = [torch.rand(1, generator=g, device=g.device, dtype=torch.float64).cpu() for g in generator]
            uniform = torch.cat(draws) if draws else torch.empty(0, dtype=torch.float64)
        # The upper quantile: a uniform number can be 0, never 1, and 0 makes g infinite and the noise 0.
        g = torch.from_numpy(2 * special.gammainccinv(self.dof / 2, uniform.cpu().numpy()) / self.dof)
        scale = g.rsqrt().reshape(-1, *[1] * (normal.ndim - 1)).to(normal.device)
        return to_device((normal.double() * scale).to(normal.dtype), device)

    def log_prob(self, x0: torch.Tensor) -> torch.Tensor:
        """Log-density of x0 (N, ...) in nats, shape (N,), computed in float64."""
        from scipy import special

        dimensions, half = x0[0].numel(), self.dof / 2
        # log Gamma((N + D) / 2) - log Gamma(D / 2) by the beta function, which loses nothing where D is large
        gammas = float(special.gammaln(dimensions / 2) - special.betaln(half, dimensions / 2))
        constant = gammas - dimensions / 2 * math.log(self.dof * math.pi)
        square = x0.double().flatten(1).square().sum(1)
        return (constant - (half + dimensions / 2) * torch.log1p(square / self.dof)).to(x0.dtype)


def noise_of(
    aug_dim: float | None, predictions: tuple[str, ...], loss_weight: str | None
) -> GaussianNoise | StudentTNoise:
    """The noise of augmented dimension D, if it goes with predictions and weight (ValueError otherwise)."""
    if aug_dim is None or aug_dim == math.inf:
        return GaussianNoise()
    if not aug_dim > 0:
        raise ValueError(f"aug_dim, the D of PFGM++, must be above 0, got {aug_dim}")
    if "score" in predictions:
        raise ValueError("score prediction needs Gaussian noise: leave aug_dim out, or predict velocity, noise or data")
    if loss_weight == "likelihood":
        raise ValueError("likelihood weights need Gaussian noise: leave aug_dim out, or take another loss weight")
    infinite = [prediction for prediction in predictions if prediction != "data"]
    if aug_dim <= 2 and infinite:
        raise ValueError(
            f"with aug_dim {aug_dim:g} the expected loss of {infinite[0]} prediction is infinite: "
            "give an aug_dim above 2, or predict data"
        )
    return StudentTNoise(aug_dim)
