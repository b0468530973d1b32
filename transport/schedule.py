"""The schedule: levels over time, and steps over levels (PPFlow, arXiv:2506.23543, section 3.1)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import NamedTuple

import torch

from transport.grids import Grid, shares_at
from transport.times import strata


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
        level_edges:   interior times at which the patch size changes, ascending; () is a single level. Of an elastic
                       schedule they may coincide, with each other and with 0 and 1: levels without time are left out
        elastic:       probability P that training draws a sample's level from all levels: see `sample_levels`
        expert_levels: numbers of levels of the experts that share the time; () is one network

    Raises:
        ValueError: if the edges are not ascending numbers strictly between 0 and 1, or the rest does not fit them.
    """

    level_edges: tuple[float, ...] = ()
    elastic: float = 0.0
    expert_levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        edges = _ascending(self.level_edges, "level edges", strictly=not self.elastic)
        object.__setattr__(self, "level_edges", edges)
        object.__setattr__(self, "expert_levels", tuple(self.expert_levels))
        if not 0 <= self.elastic <= 1:
            raise ValueError(f"elastic is a probability, from 0 to 1, got {self.elastic:g}")
        if self.expert_levels and (sum(self.expert_levels) != self.num_levels or min(self.expert_levels) < 1):
            count = sum(self.expert_levels)
            raise ValueError(
                f"experts of {list(self.expert_levels)} levels, but the edges make {self.num_levels}: give {count - 1} "
                "level edge(s)"
            )
        if self.elastic and max(map(len, self.experts)) == 1:
            raise ValueError("elastic levels need a network with several, and this has one: leave elastic out")

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

    @property
    def experts(self) -> list[range]:
        """The levels of each expert, from noise to data; of one network all."""
        stops = list(accumulate(self.expert_levels or (self.num_levels,)))
        return [range(start, stop) for start, stop in pairwise((0, *stops))]

    @property
    def levels_at_ends(self) -> tuple[range, range]:
        """The levels that are trained at the noisy end of time, and at the clean end."""
        last = self.num_levels - 1
        return (self.experts[0], self.experts[-1]) if self.elastic else (range(1), range(last, last + 1))

    def level_at(self, t: torch.Tensor) -> torch.Tensor:
        """Levels of times t (N,); exactly on an edge the coarser one, as in PPFlow's code."""
        edges = torch.tensor(self.level_edges, dtype=t.dtype, device=t.device)
        return torch.bucketize(t, edges)

    def sample_levels(self, t: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw the levels (N,) of training at times t (N,), which `Transport.sample_times` stratified.

        With probability 1 - P a sample has the level of its time, with P = elastic any of the L levels of its expert,
        all alike. So where times have the density p(t), level l sees them with a density in proportion to

            p(t) (1 - P + P / L)    on its own interval,
            p(t) P / L              elsewhere in its expert's interval.

        Each single sample is drawn so, whatever the others are; together they are stratified: over the batch, over
        time, and nearly so over each contiguous slice of the batch. With P = 0 nothing is drawn.
        """
        own = self.level_at(t)
        if not self.elastic:
            return own
        stratum, jitter = strata(len(t), generator, base=3)  # times have base 2
        u = (stratum + jitter.double()) / len(t)
        u = u.to(own.device)
        mates = [levels for levels in self.experts for _ in levels]  # the levels of each level's expert
        first = torch.tensor([levels.start for levels in mates], device=own.device)[own]
        count = torch.tensor([len(levels) for levels in mates], device=own.device)[own]
        anyone = first + (u / self.elastic * count).long().minimum(count - 1)
        return torch.where(u < self.elastic, anyone, own)

    def training_shares(self, own: Sequence[float]) -> list[float]:
        """Shares of the levels among samples of which the share own[l] has a time of level l: see `sample_levels`."""
        shares = []
        for levels in self.experts:
            together = sum(own[level] for level in levels)
            shares += [(1 - self.elastic) * own[level] + self.elastic * together / len(levels) for level in levels]
        return shares

    def not_trained(self, other: PatchSchedule) -> list[Interval]:
        """Times of another schedule's levels at which training with this one did not have them."""
        if self.elastic:
            return []
        pieces = []
        for level in range(self.num_levels):
            (low, high), (start, stop) = (each.edges[level : level + 2] for each in (self, other))
            pieces += [Interval(level, start, min(stop, low)), Interval(level, max(start, high), stop)]
        return [piece for piece in pieces if piece.start < piece.stop]

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
            if absent := [level for level, ends in enumerate(pairwise(self.edges)) if ends[0] == ends[1]]:
                raise ValueError(
                    f"level {absent[0]} has no time for its steps: give one number of steps for all levels"
                )
            per_level = dict(enumerate((*counts[:-1], counts[-1] - reserve)))
        else:
            raise ValueError(f"{len(counts)} numbers of steps for {self.num_levels} level(s)")
        steps = {}
        for level, group in pieces.items():
            own = least if per_level[level] >= least * len(group) else 1
            shares = _share(per_level[level], [length(interval) for interval in group], [own] * len(group), note)
            steps.update(zip(group, shares, strict=True))
        return [steps[interval] for interval in intervals]


def _ascending(edges: Sequence[float], what: str, strictly: bool = True) -> tuple[float, ...]:
    """Edges as numbers (ValueError if they do not ascend between 0 and 1); `what` names them."""
    try:
        interior = tuple(math.fsum([edge]) for edge in edges)  # unlike float(), refuses text
    except TypeError:
        raise ValueError(f"{what} must be numbers, got {edges!r}") from None
    pairs = list(pairwise((0.0, *interior, 1.0)))
    if any(not (low < high if strictly else low <= high) for low, high in pairs):
        raise ValueError(f"{what} must ascend {'strictly ' * strictly}between 0 and 1, got {interior}")
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
