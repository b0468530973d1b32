"""Networks around a network: one that counts evaluations, the finest level alone, zero."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm


class Wrapper:
    """A network around another one, of which it shows what it has no own version of."""

    SHOWN = (
        *("networks", "num_levels", "num_classes", "in_channels", "input_size", "input_size_of", "parameters", "macs"),
    )

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name not in self.SHOWN:
            raise AttributeError(name)
        return getattr(self.model, name)


class EvaluationCounter(Wrapper):
    """A network that counts its evaluations, level by level, and moves a progress bar.

    Args:
        model:    the network
        progress: updated by one for each call
    """

    def __init__(self, model: Any, progress: tqdm | None = None) -> None:
        super().__init__(model)
        self.progress = progress
        self.rows = [0] * model.num_levels  # samples evaluated at each level; a guided one counts two
        self.together = [0] * model.num_levels  # the same, of the largest evaluation
        self.size: tuple[int, ...] | None = None  # (h, w) of the samples

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        self.rows[level] += len(x)
        self.together[level] = max(self.together[level], len(x))
        self.size = tuple(x.shape[2:])
        if self.progress is not None:
            self.progress.update(1)
        return self.model(x, t, y=y, level=level)

    def nfe(self, num_samples: int) -> float:
        """Network evaluations per sample."""
        return sum(self.rows) / num_samples

    def gmacs(self, num_samples: int) -> float:
        """Billions of multiply-accumulates per sample, for samples of one size."""
        return sum(rows * self.model.macs(level, self.size) for level, rows in enumerate(self.rows)) / num_samples / 1e9


class FinestLevel(Wrapper):
    """A network of one level, which is the finest one of another."""

    num_levels = 1

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        return self.model(x, t, y=y, level=self.model.num_levels - 1)

    def macs(self, level: int, size: tuple[int, int] | None = None) -> int:
        return self.model.macs(self.model.num_levels - 1, size)


class Zero(Wrapper):
    """A network that predicts zero, to count the evaluations of a solver."""

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        return 0 * x  # which has a gradient
