"""Step grids: where in time a solver's steps lie.

A grid is a plain tuple of ascending times (0, ..., 1) at equal shares of the steps: grid[i] is the time by which the
share i / (len(grid) - 1) of them was taken, and between two of these times steps are equal. (0, 1) are equal steps, and
N + 1 times are the ends of N steps. Edges of levels stay ends of steps, wherever the grid has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

Grid = tuple[float, ...]

KNOTS = 64  # of grids that are made here: more than the steps of a level that one would take
LEAST_DENSITY = 0.1  # of a measured grid's steps over the mean: what 64 samples say of quiet times is not worth more


def checked_grid(grid: Sequence[float]) -> Grid:
    """The grid as numbers (ValueError unless it ascends from 0 to 1)."""
    times = tuple(float(time) for time in grid)
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(not low < high for low, high in pairwise(times)):
        raise ValueError(f"a step grid ascends strictly from 0 to 1, got {times}")
    return times


def shares_at(grid: Grid, times: Sequence[float]) -> list[float]:
    """Shares of the steps that were taken by these times."""
    return np.interp(times, grid, np.linspace(0, 1, len(grid))).tolist()


def steps_between(grid: Grid, start: float, stop: float, num_steps: int) -> list[float]:
    """Ends of the steps from start to stop, in either direction: equal shares of the grid."""
    first, last = shares_at(grid, (start, stop))
    times = np.interp(np.linspace(first, last, num_steps + 1), np.linspace(0, 1, len(grid)), grid).tolist()
    return [start, *times[1:-1], stop]


def shifted_grid(shift: float) -> Grid:
    """The grid of noise levels sigma = s u / (1 + (s - 1) u), equal steps in u (SD3, arXiv:2403.03206, equation 23).

    Args:
        shift: s; above 1 there are more steps near noise, below 1 near data

    Raises:
        ValueError: if it is not above 0.
    """
    if not shift > 0:
        raise ValueError(f"the shift of a step grid must be above 0, got {shift}")
    u = np.linspace(1, 0, KNOTS + 1)
    return checked_grid(((1 - u) / (1 + (shift - 1) * u)).tolist())  # t = 1 - sigma


def equidistributed(times: Sequence[float], errors: Sequence[float], order: int) -> Grid:
    """The grid whose steps all have the same local error (equidistribution; de Boor, 1974).

    A step h of a method of order p has the local error E(t) h^(p+1). It is the same for all steps, and the sum of N of
    them is the least, where their density is in proportion to E^(1/(p+1)).

    Args:
        times:  ends of windows, ascending; what they leave out of [0, 1] is as the nearest window
        errors: local error that the method made in each window
        order:  p
    """
    lengths = np.diff(times)
    density = np.array(errors) ** (1 / (order + 1)) / lengths
    mean = (density * lengths).sum() / lengths.sum()
    density = np.maximum(density, LEAST_DENSITY * mean) if mean > 0 else np.ones_like(density)
    ends = [0.0, *times[1:-1], 1.0]
    taken = np.array([0.0, *accumulate(density * np.diff(ends))])
    grid = np.interp(np.linspace(0, 1, KNOTS + 1), taken / taken[-1], ends)
    return checked_grid([0.0, *(round(time, 6) for time in grid[1:-1].tolist()), 1.0])
