"""The schedule: levels over time, and steps over levels (PPFlow, arXiv:2506.23543, section 3.1)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import torch

from transport.grids import Grid, shares_at


class Interval(NamedTuple):
    """An interval of time on which the field is smooth; start > stop when time runs from data to noise."""

    level: int
    start: float
    stop: float

    @property
    def length(self) -> float:
        return abs(self.stop - self.start)


@dataclass(frozen=True)
class PatchSchedule:
    """Levels over time: level l is active on [edges[l], edges[l + 1]], edges = (0, *level_edges, 1).

    Args:
        level_edges: interior times at which the patch size changes, ascending; () is a single level

    Raises:
        ValueError: if the edges are not ascending numbers strictly between 0 and 1.
    """

    level_edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "level_edges", _ascending(self.level_edges, "level edges"))

    @staticmethod
    def default(num_levels: int) -> PatchSchedule:
        """The paper's edges: (), (0.5,) and (0.5, 0.75); each further level halves the last one again.

        Raises:
            ValueError: if num_levels is below 1.
        """
        if num_levels < 1:
            raise ValueError(f"a schedule has at least one level, got {num_levels}")
        return PatchSchedule(tuple(1 - 0.5**level for level in range(1, num_levels)))

    @property
    def edges(self) -> tuple[float, ...]:
        return (0.0, *self.level_edges, 1.0)

    @property
    def num_levels(self) -> int:
        return len(self.level_edges) + 1

    def level_at(self, t: torch.Tensor) -> torch.Tensor:
        """Levels of times t (N,); exactly on an edge the coarser one, as in PPFlow's code."""
        edges = torch.tensor(self.level_edges, dtype=t.dtype, device=t.device)
        return torch.bucketize(t, edges)

    def intervals(self, start: float, stop: float, breakpoints: Sequence[float] = ()) -> list[Interval]:
        """Cut the trajectory from start to stop at every edge, and at further breakpoints (of guidance, say).

        Invariant: consecutive intervals share an endpoint, none crosses an edge, together they cover the trajectory.
        """
        low, high = min(start, stop), max(start, stop)
        cuts = sorted({low, high, *(cut for cut in (*self.level_edges, *breakpoints) if low < cut < high)})
        pieces = []
        for a, b in pairwise(cuts):
            level = sum(edge <= a for edge in self.level_edges)
            pieces.append(Interval(level, a, b))
        if start > stop:
            pieces = [Interval(level, b, a) for level, a, b in reversed(pieces)]
        return pieces

    def share_steps(
        self,
        num_steps: int | Sequence[int],
        intervals: Sequence[Interval],
        reserve: int = 0,
        grid: Grid | None = None,
        least: int = 1,
    ) -> list[int]:
        """Steps for each interval: in proportion to the levels' lengths, at least one each.

        Args:
            num_steps: steps over the whole trajectory, or one number per level of the schedule
            intervals: pieces of the trajectory, as `intervals` returns them
            reserve:   steps of the finest level to leave out (the last step of an SDE)
            grid:      in proportion to its shares of the steps instead
            least:     steps of each interval, where there are enough for all

        Raises:
            ValueError: if the steps are no whole numbers or too few, or there is not one number per level.
        """
        pieces: dict[int, list[Interval]] = {}
        for interval in intervals:
            pieces.setdefault(interval.level, []).append(interval)
        counts, note = whole_numbers(num_steps), " (the last step apart)" if reserve else ""

        def length(interval: Interval) -> float:
            if grid is None:
                return interval.length
            first, last = shares_at(grid, interval[1:])
            return abs(last - first)

        if isinstance(counts, int):
            least = least if counts - reserve >= least * len(intervals) else 1
            lengths = [sum(map(length, group)) for group in pieces.values()]
            shares = _share(counts - reserve, lengths, [least * len(group) for group in pieces.values()], note)
            per_level = dict(zip(pieces, shares, strict=True))
        elif len(counts) == self.num_levels:
            per_level = dict(enumerate((*counts[:-1], counts[-1] - reserve)))
        else:
            raise ValueError(f"{len(counts)} numbers of steps for {self.num_levels} level(s)")
        steps = {}
        for level, group in pieces.items():
            own = least if per_level[level] >= least * len(group) else 1
            shares = _share(per_level[level], [length(interval) for interval in group], [own] * len(group), note)
            steps.update(zip(group, shares, strict=True))
        return [steps[interval] for interval in intervals]


def _ascending(edges: Sequence[float], what: str) -> tuple[float, ...]:
    """Edges as numbers (ValueError if they do not ascend between 0 and 1); `what` names them."""
    try:
        interior = tuple(math.fsum([edge]) for edge in edges)  # unlike float(), refuses text
    except TypeError:
        raise ValueError(f"{what} must be numbers, got {edges!r}") from None
    if any(not low < high for low, high in pairwise((0.0, *interior, 1.0))):
        raise ValueError(f"{what} must ascend strictly between 0 and 1, got {interior}")
    return interior


class ExpertPart(NamedTuple):
    """An expert's part of time, and of a pyramid."""

    interval: tuple[float, float]
    level_edges: tuple[float, ...]  # within the interval: times at which the expert changes its patch size
    patches: range  # indices of its patch sizes in the pyramid


SHORTEST_LEVEL = 1e-3  # between an expert's edge and one of the patch sizes


def expert_parts(level_edges: Sequence[float], expert_edges: Sequence[float]) -> list[ExpertPart]:
    """Cut time and a pyramid among experts, from noise to data: each gets the patch sizes that its interval meets.

    Args:
        level_edges:  interior times at which the patch size changes
        expert_edges: interior times at which the expert changes; () is one network for all times

    Raises:
        ValueError: if edges do not ascend between 0 and 1, or an expert, or a patch size of it, has nearly no time.
    """
    level_edges, expert_edges = _ascending(level_edges, "level edges"), _ascending(expert_edges, "expert edges")
    for start, stop in pairwise((0.0, *expert_edges, 1.0)):
        if stop - start < SHORTEST_LEVEL:
            raise ValueError(
                f"an expert for t in [{start:g}, {stop:g}] has next to nothing to learn: leave {SHORTEST_LEVEL:g} "
                "between expert edges, 0 and 1"
            )
    for edge, other in product(expert_edges, level_edges):
        if 0 < abs(edge - other) < SHORTEST_LEVEL:
            raise ValueError(
                f"between expert edge {edge!r} and level edge {other!r} nothing is left to train: make them equal, or "
                f"move them {SHORTEST_LEVEL:g} apart"
            )
    parts = []
    for start, stop in pairwise((0.0, *expert_edges, 1.0)):
        first = sum(edge <= start for edge in level_edges)
        inside = tuple(edge for edge in level_edges if start < edge < stop)
        parts.append(ExpertPart((start, stop), inside, range(first, first + len(inside) + 1)))
    return parts


def whole_numbers(num_steps: int | Sequence[int]) -> int | list[int]:
    """Numbers of steps as plain integers (ValueError if they are not whole)."""
    try:
        return operator.index(num_steps)
    except TypeError:
        try:
            return [operator.index(steps) for steps in num_steps]
        except TypeError:
            raise ValueError(f"steps must be whole numbers, got {num_steps!r}") from None


def _share(total: int, weights: Sequence[float], least: Sequence[int], note: str = "") -> list[int]:
    """Split a whole number in proportion to weights (largest remainders), each share at least its `least`."""
    if total < sum(least):
        raise ValueError(f"{total} step(s){note} cannot cover {sum(least)} interval(s): give at least one step each")
    quotas = [total * weight / sum(weights) for weight in weights]
    shares = [max(low, math.floor(quota)) for low, quota in zip(least, quotas, strict=True)]
    while sum(shares) != total:
        # Add to the share furthest below its quota; if the minima sum to too many, take from the one furthest above.
        gap = [quota - share for quota, share in zip(quotas, shares, strict=True)]
        if sum(shares) < total:
            shares[max(range(len(gap)), key=lambda i: gap[i])] += 1
        else:
            shares[min((i for i in range(len(gap)) if shares[i] > least[i]), key=lambda i: gap[i])] -= 1
    return shares
