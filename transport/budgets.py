"""Budgets: level edges for a share of the finest level's arithmetic, by the errors that the levels had in training.

A coarse level costs a fraction of a fine one and, while the noise is high, is nearly as good. How long so, training
with elastic levels measures: the error of every level at every time. A budget then is a margin: at each time the
cheapest level is taken whose error is within the margin of the finest one's, and the margin is solved for so that the
trajectory costs what it may. Levels that share one network are compared, never those of different experts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from transport.guidance import Guidance
from transport.sampler import Sampler
from transport.solvers import ODE, SDE
from transport.transport import Model, Transport
from transport.wrappers import EvaluationCounter, Zero

BINS = 10  # of t
TIE = 1e-6  # slope, in parts of the errors' range, by which of equal errors the later one counts as larger
DECIMALS = 4  # of edges
HALVINGS = 40


@dataclass(frozen=True)
class LevelErrors:
    """Mean squared errors of the velocity of each level, by tenths of t, as averages of training have them.

    Args:
        sums:   [level][bin] weighted sums of the errors of samples (n,)
        counts: [level][bin] sums of the weights

    Raises:
        ValueError: if there is not the same number of bins for each level.
    """

    sums: Sequence[Sequence[float]]
    counts: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        for name in ("sums", "counts"):
            object.__setattr__(self, name, tuple(tuple(map(float, row)) for row in getattr(self, name)))
        shapes = [[len(row) for row in table] for table in (self.sums, self.counts)]
        if shapes[0] != shapes[1] or set(shapes[0]) != {BINS}:
            raise ValueError(f"errors of levels are tables of {BINS} columns, got {shapes[0]} and {shapes[1]}")

    @property
    def num_levels(self) -> int:
        return len(self.sums)

    @property
    def means(self) -> list[list[float | None]]:
        """[level][bin] mean errors; None where there were no samples."""
        rows = zip(self.sums, self.counts, strict=True)
        return [[s / n if n else None for s, n in zip(*row, strict=True)] for row in rows]

    @staticmethod
    def joined(parts: Sequence[tuple[LevelErrors | None, int]]) -> LevelErrors | None:
        """The errors of networks' levels, one network after the other; None if no network has any.

        Args:
            parts: the errors of each network, and its number of levels
        """
        if all(errors is None for errors, _ in parts):
            return None
        empty = [[0.0] * BINS]
        tables = [
            (errors.sums, errors.counts) if errors else (levels * empty, levels * empty) for errors, levels in parts
        ]
        return LevelErrors(*([row for table in tables for row in table[which]] for which in (0, 1)))

    def as_dict(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return {name: [list(row) for row in table] for name, table in asdict(self).items()}

    def excess(self, level: int, finest: int) -> tuple[np.ndarray, np.ndarray]:
        """Points (times from 0 to 1, excess) of the line by which a level's error exceeds the finest one's.

        It ascends: isotonic regression of the bins' differences, weighted by their precision.

        Raises:
            ValueError: if no bin has samples of both levels.
        """
        sums, counts = np.array(self.sums)[[level, finest]], np.array(self.counts)[[level, finest]]
        seen = np.flatnonzero(counts.min(0))
        if not len(seen):
            raise ValueError(f"levels {level} and {finest} have not met at any time in training: train longer")
        means, precision = sums[:, seen] / counts[:, seen], 1 / (1 / counts[:, seen]).sum(0)
        rising = ascending(means[0] - means[1], precision)
        times = np.array([0, *(seen + 0.5) / BINS, 1])
        return times, np.array([rising[0], *rising, rising[-1]]) + TIE * (means.max() or 1) * times


def ascending(values: np.ndarray, weights: np.ndarray) -> list[float]:
    """Isotonic regression: the ascending numbers (n,) with the least weighted squared distance from values (n,).

    By its max-min formula (Robertson, Wright and Dykstra, Order Restricted Statistical Inference, 1988), which a few
    bins can afford, and for which an exported pipeline needs no library: number i is the largest over a <= i of the
    least over b >= i of the mean of values a to b.
    """

    def mean(a: int, b: int) -> float:
        return float(np.average(values[a : b + 1], weights=weights[a : b + 1]))

    n = len(values)
    return [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]


def edges_for(
    budget: float,
    errors: LevelErrors,
    experts: Sequence[range],
    starts: Sequence[float],
    cost: Callable[[tuple[float, ...]], float],
    latest: float = 1.0,
) -> tuple[float, ...]:
    """Level edges that cost a share of what the finest level costs alone, as nearly as whole steps allow.

    Args:
        budget:  the share; of several networks, that of each one's finest level
        errors:  of the levels
        experts: the levels of each network that serves a part of time
        starts:  times (0, ..., 1) at which the networks begin, and at which the last one ends
        cost:    arithmetic of a trajectory with some edges
        latest:  time after which the finest level is always taken

    Raises:
        ValueError: if the budget is not between those of the coarsest and the finest level, or as `LevelErrors.excess`.
    """
    excess = {level: errors.excess(level, levels[-1]) for levels in experts for level in levels[:-1]}

    def until(level: int, margin: float) -> float:
        times, values = excess[level]
        return float(np.interp(margin, values, times))

    def edges_at(margin: float) -> tuple[float, ...]:
        edges: list[float] = []
        for levels, (start, stop) in zip(experts, pairwise(starts), strict=True):
            ends = accumulate((until(level, margin) for level in levels[:-1]), max)
            edges += [max(start, min(round(end, DECIMALS), latest, stop)) for end in ends]
            edges.append(stop)
        return tuple(edges[:-1])

    low, high = min(values[0] for _, values in excess.values()), max(values[-1] for _, values in excess.values())
    finest = cost(edges_at(low))
    least = cost(edges_at(high)) / finest
    if not least - 1e-9 <= budget <= 1:
        raise ValueError(
            f"a budget is a share of the finest level's arithmetic, here from {math.ceil(1000 * least) / 1000:g} (the "
            f"coarsest level alone) to 1, got {budget:g}"
        )
    found: dict[tuple[float, ...], float] = {}
    for _ in range(HALVINGS):
        margin = (low + high) / 2
        edges = edges_at(margin)
        if edges not in found:
            found[edges] = cost(edges) / finest
        low, high = (margin, high) if found[edges] > budget else (low, margin)
        if edges_at(low) == edges_at(high):
            break
    for edges in (edges_at(low), edges_at(high)):
        found[edges] = cost(edges) / finest
    return min(found, key=lambda edges: abs(found[edges] - budget))


def at_budget(
    budget: float,
    errors: LevelErrors,
    transport: Transport,
    model: Model,
    solver: ODE | SDE,
    guidance: Guidance,
) -> Transport:
    """The same process with level edges at which a trajectory has a share of the finest level's arithmetic.

    Evaluations are counted by walking a field that is zero, for a sample of the network's own size.

    Args:
        budget:    the share, met within a step of the finest level
        errors:    of the levels in training
        transport: the process, with elastic levels
        model:     the network, which has `num_levels`, `num_classes`, `in_channels`, `input_size` and `macs(level)`
        solver:    of fixed steps, one number for all levels
        guidance:  which costs evaluations too

    Raises:
        ValueError: if the solver has no such number, or as `edges_for`.
    """
    if solver.adaptive or not isinstance(solver.num_steps, int):
        raise ValueError("a budget counts steps: give a method of fixed steps, and one number for all levels")
    schedule = transport.schedule
    starts = [schedule.edges[levels.start] for levels in schedule.experts]
    macs = [model.macs(level) for level in range(schedule.num_levels)]
    latest = 1 - solver.last_step_size if isinstance(solver, SDE) and solver.last_step else 1.0
    nothing, label = torch.zeros(1, model.in_channels, *model.input_size), torch.zeros(1, dtype=torch.long)

    def cost(edges: tuple[float, ...]) -> float:
        counter, increments = EvaluationCounter(Zero(model)), torch.Generator()  # not torch's own, which others use
        Sampler(transport.with_edges(edges)).sample(guidance.of(counter), nothing, solver, label, increments)
        return sum(map(operator.mul, counter.rows, macs))

    return transport.with_edges(edges_for(budget, errors, schedule.experts, [*starts, 1], cost, latest))
