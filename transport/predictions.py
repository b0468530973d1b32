"""The prediction of a network at each level, and each predicted quantity as a combination of data and noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from transport.paths import Coefficients

PREDICTIONS = ("velocity", "noise", "score", "data")


def predictions_of(prediction: str | Sequence[str], num_levels: int) -> tuple[str, ...]:
    """The network's output at each level, coarsest first.

    Args:
        prediction: one of PREDICTIONS for all levels, or one per level: ("data", "velocity") or "data velocity"

    Raises:
        ValueError: if one is unknown, or their number is neither one nor that of the levels.
    """
    predictions = tuple(prediction.split(" ") if isinstance(prediction, str) else prediction)
    for each in predictions:
        if each not in PREDICTIONS:
            raise ValueError(f"unknown prediction {each!r}; choose one of {', '.join(PREDICTIONS)}")
    if len(predictions) not in (1, num_levels):
        raise ValueError(
            f"{len(predictions)} predictions for {num_levels} level(s): give one, or one per level, coarsest first"
        )
    return predictions * num_levels if len(predictions) == 1 else predictions


class LinearRow(NamedTuple):
    """scale * quantity = a x_1 + b x_0: each quantity is one row of a linear system in (x_1, x_0)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor

    def determinant(self, c: Coefficients) -> torch.Tensor:
        """The determinant of this row and the path's as a system; up to its sign the n of transport/weights.py."""
        return c.alpha * self.b - c.sigma * self.a


def target_row(quantity: str, c: Coefficients) -> LinearRow:
    """The row of a quantity. The score -x_0 / sigma is scaled by sigma, so that it is finite at sigma = 0."""
    zero, one = torch.zeros_like(c.alpha), torch.ones_like(c.alpha)
    rows = {
        "velocity": LinearRow(c.d_alpha, c.d_sigma, one),
        "noise": LinearRow(zero, one, one),
        "score": LinearRow(zero, -one, c.sigma),
        "data": LinearRow(one, zero, one),
    }
    return rows[quantity]
