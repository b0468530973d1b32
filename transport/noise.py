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
