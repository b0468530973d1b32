"""Samples of one shape, a tensor (N, ...), or of many shapes, a list of N tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Samples = torch.Tensor | Sequence[torch.Tensor]


def kind_of(samples: Samples) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the samples."""
    first = samples if isinstance(samples, torch.Tensor) else samples[0]
    return first.device, first.dtype


def to(samples: Samples, device: torch.device) -> Samples:
    """The samples on a device, without waiting for it."""
    if isinstance(samples, torch.Tensor):
        return samples.to(device, non_blocking=True)
    return [sample.to(device, non_blocking=True) for sample in samples]


def by_shape(samples: Sequence[torch.Tensor], numbers: Iterable[int] | None = None) -> list[list[int]]:
    """Numbers of the samples of each shape, of all samples or of those with these numbers."""
    groups: dict[torch.Size, list[int]] = {}
    for number in range(len(samples)) if numbers is None else numbers:
        groups.setdefault(samples[number].shape, []).append(number)
    return list(groups.values())


def split_by_shape(samples: Samples, members: torch.Tensor) -> list[torch.Tensor]:
    """Numbers (n,) of samples in parts of one shape; no numbers are one part."""
    if isinstance(samples, torch.Tensor) or not len(members):
        return [members]
    return [torch.tensor(part) for part in by_shape(samples, members.tolist())]


def take(samples: Samples, members: torch.Tensor) -> torch.Tensor:
    """The samples (n, ...) with these numbers, which have one shape."""
    if isinstance(samples, torch.Tensor):
        return samples[members]
    return torch.stack([samples[number] for number in members.tolist()] or [samples[0]])[: len(members)]
