"""Levels over time, the cutting of the trajectory and the sharing of steps."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from transport import Interval, PatchSchedule, expert_parts


def random_schedules(count: int, max_levels: int = 6) -> list[PatchSchedule]:
    rng = random.Random(0)
    return [
        PatchSchedule(tuple(sorted(rng.uniform(0.01, 0.99) for _ in range(rng.randrange(max_levels)))))
        for _ in range(count)
    ]


# -- Edges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "edges"), [(1, ()), (2, (0.5,)), (3, (0.5, 0.75)), (4, (0.5, 0.75, 0.875))])
def test_default_edges_are_the_papers(levels: int, edges: tuple[float, ...]):
    schedule = PatchSchedule.default(levels)
    assert schedule == PatchSchedule(edges)
    assert schedule.num_levels == levels
    assert schedule.edges == (0.0, *edges, 1.0)


def test_edges_of_any_number_type_are_kept_as_floats():
    expected = PatchSchedule((0.25, 0.5))
    assert PatchSchedule([0.25, 0.5]) == expected
    assert PatchSchedule(np.array([0.25, 0.5])) == expected
    assert PatchSchedule(torch.tensor([0.25, 0.5])) == expected


@pytest.mark.parametrize(
    "edges",
    [(0.0,), (1.0,), (-0.1,), (1.5,), (0.5, 0.5), (0.75, 0.5), (float("nan"),), (0.5, float("inf")), (0.5, 0.0)],
)
def test_edges_that_do_not_ascend_within_the_unit_interval_are_refused(edges: object):
    with pytest.raises(ValueError, match="ascend strictly between 0 and 1"):
        PatchSchedule(edges)


@pytest.mark.parametrize("edges", ["0.5", ("0.5",), ("a",), (None,), None, 0.5, ((0.5, 0.75),)])
def test_edges_that_are_no_numbers_are_refused(edges: object):
    with pytest.raises(ValueError, match="must be numbers"):
        PatchSchedule(edges)


@pytest.mark.parametrize("levels", [0, -1])
def test_a_schedule_without_levels_is_refused(levels: int):
    with pytest.raises(ValueError, match="at least one level"):
        PatchSchedule.default(levels)


# -- Levels of times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edges", [(), (0.5,), (0.5, 0.75), (0.1, 0.3, 0.7)])
def test_level_counts_the_edges_already_passed(edges: object, dtype: torch.dtype):
    t = torch.linspace(0, 1, 1001, dtype=dtype)
    bounds = torch.tensor(edges, dtype=dtype)
    expected = [sum(bool(time > edge) for edge in bounds) for time in t]
    assert PatchSchedule(edges).level_at(t).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edges", [(0.5,), (0.5, 0.75), (0.1, 0.3, 0.7)])
def test_exactly_on_an_edge_the_level_is_the_coarser(edges: object, dtype: torch.dtype):
    on = torch.tensor(edges, dtype=dtype)  # 0.1 and 0.7 are rounded: they must still count as on the edge
    after = torch.nextafter(on, torch.ones_like(on))
    assert PatchSchedule(edges).level_at(on).tolist() == list(range(len(edges)))
    assert PatchSchedule(edges).level_at(after).tolist() == list(range(1, len(edges) + 1))


# -- The trajectory cut into intervals -----------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
def test_intervals_cover_the_way_and_cross_nothing(backwards: bool):
    rng = random.Random(1)
    for schedule in random_schedules(200):
        ends = rng.choice([(0.0, 1.0), tuple(sorted((rng.random(), rng.random()))), (1e-3, 1 - 1e-3)])
        start, stop = reversed(ends) if backwards else ends
        breakpoints = [rng.uniform(-0.2, 1.2) for _ in range(rng.randrange(4))]
        pieces = schedule.intervals(start, stop, breakpoints)

        assert pieces[0].start == start
        assert pieces[-1].stop == stop
        assert all(a.stop == b.start for a, b in pairwise(pieces))
        assert sum(piece.length for piece in pieces) == pytest.approx(abs(stop - start))
        for level, a, b in pieces:
            low, high = min(a, b), max(a, b)
            assert low < high
            assert schedule.edges[level] <= low
            assert high <= schedule.edges[level + 1]
            assert not any(low < cut < high for cut in breakpoints)
            assert (a < b) != backwards
        # Nothing else is cut: one piece more for each cut strictly inside.
        inside = {cut for cut in (*schedule.level_edges, *breakpoints) if min(ends) < cut < max(ends)}
        assert len(pieces) == len(inside) + 1


def test_a_breakpoint_on_an_edge_cuts_once():
    expected = [Interval(0, 0.0, 0.5), Interval(1, 0.5, 1.0)]
    assert PatchSchedule((0.5,)).intervals(0.0, 1.0, (0.5, 0.5, 0.0, 1.0)) == expected


# -- Sharing of steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("breakpoints", [(), (0.2, 0.6, 0.65, 0.9)])
def test_steps_are_shared_in_proportion_to_the_levels(breakpoints: tuple[float, ...]):
    rng = random.Random(2)
    for schedule in random_schedules(300):
        intervals = schedule.intervals(0.0, 1.0, breakpoints)
        total = rng.choice([len(intervals), len(intervals) + 1, rng.randint(len(intervals), 300)])
        shares = schedule.share_steps(total, intervals)

        assert sum(shares) == total
        assert min(shares) >= 1
        steps, least, length = [0] * schedule.num_levels, [0] * schedule.num_levels, [0.0] * schedule.num_levels
        for interval, share in zip(intervals, shares, strict=True):
            steps[interval.level] += share
            least[interval.level] += 1
            length[interval.level] += interval.length
        quotas = [total * part for part in length]
        if all(quota >= low for quota, low in zip(quotas, least, strict=True)):
            assert all(abs(got - quota) < 1 for got, quota in zip(steps, quotas, strict=True))
        else:  # a short level takes more than its share, which nobody else may gain from
            assert all(got <= max(low, quota + 1) for got, low, quota in zip(steps, least, quotas, strict=True))
        # Within a level in proportion again.
        for interval, share in zip(intervals, shares, strict=True):
            quota = steps[interval.level] * interval.length / length[interval.level]
            others = [i for i in intervals if i.level == interval.level and i != interval]
            if all(steps[i.level] * i.length / length[i.level] >= 1 for i in (interval, *others)):
                assert abs(share - quota) < 1


@pytest.mark.parametrize(
    ("edges", "total", "shares"),
    [
        ((), 50, [50]),
        ((0.5,), 50, [25, 25]),
        ((0.5, 0.75), 50, [25, 13, 12]),
        ((0.5, 0.75), 3, [1, 1, 1]),
        ((0.98,), 10, [9, 1]),
    ],
)
def test_familiar_numbers_of_steps_are_shared_as_one_would(edges: object, total: int, shares: list[int]):
    schedule = PatchSchedule(edges)
    assert schedule.share_steps(total, schedule.intervals(0.0, 1.0)) == shares
    # Going back visits the levels in the other order; ties may fall to the other neighbour.
    back = schedule.share_steps(total, schedule.intervals(1.0, 0.0))[::-1]
    assert sum(back) == total
    assert all(abs(a - b) <= 1 for a, b in zip(shares, back, strict=True))


def test_a_number_per_level_is_taken_as_it_is():
    schedule = PatchSchedule((0.5, 0.75))
    assert schedule.share_steps((4, 2, 9), schedule.intervals(0.0, 1.0)) == [4, 2, 9]
    assert schedule.share_steps([4, 2, 9], schedule.intervals(1.0, 0.0)) == [9, 2, 4]
    # A breakpoint splits a level's own number, 0.5..0.55 and 0.55..0.75 in the ratio 1 : 4.
    assert schedule.share_steps((4, 10, 9), schedule.intervals(0.0, 1.0, (0.55,))) == [4, 2, 8, 9]
    # A way that misses a level leaves its number unused.
    assert schedule.share_steps((4, 2, 9), schedule.intervals(0.0, 0.7)) == [4, 2]


def test_as_many_steps_as_intervals_always_suffice():
    schedule = PatchSchedule((0.5, 0.75))
    intervals = schedule.intervals(0.0, 1.0, (0.8, 0.9))  # three pieces in a level that is due only a quarter
    assert schedule.share_steps(5, intervals) == [1, 1, 1, 1, 1]


def test_steps_may_be_kept_back_from_the_finest_level():
    schedule = PatchSchedule((0.5,))
    intervals = schedule.intervals(0.0, 0.9)
    assert schedule.share_steps(10, intervals, reserve=1) == [5, 4]
    assert schedule.share_steps((5, 5), intervals, reserve=1) == [5, 4]


@pytest.mark.parametrize("steps", [np.int64(12), torch.tensor(12)])
def test_integers_of_other_libraries_count(steps: object):
    schedule = PatchSchedule((0.5,))
    assert schedule.share_steps(steps, schedule.intervals(0.0, 1.0)) == [6, 6]


@pytest.mark.parametrize("steps", [2, 1, 0, -5, (1, 0, 1), (3, 3, -1)])
def test_too_few_steps_are_refused(steps: object):
    schedule = PatchSchedule((0.5, 0.75))
    with pytest.raises(ValueError, match="at least one step each"):
        schedule.share_steps(steps, schedule.intervals(0.0, 1.0))


@pytest.mark.parametrize("steps", [(), (5,), (5, 5), (5, 5, 5, 5)])
def test_a_wrong_number_of_numbers_is_refused(steps: object):
    schedule = PatchSchedule((0.5, 0.75))
    with pytest.raises(ValueError, match=f"{len(steps)} numbers of steps for 3 level"):
        schedule.share_steps(steps, schedule.intervals(0.0, 1.0))


@pytest.mark.parametrize("steps", [10.0, 10.5, (5, 5.5, 5), "50", None, float("nan")])
def test_steps_that_are_no_whole_numbers_are_refused(steps: object):
    schedule = PatchSchedule((0.5, 0.75))
    with pytest.raises(ValueError, match="whole numbers"):
        schedule.share_steps(steps, schedule.intervals(0.0, 1.0))


# -- Experts -------------------------------------------------------------------------------------------------------


def test_an_expert_gets_the_patch_sizes_that_its_interval_meets():
    rng = random.Random(1)
    for _ in range(200):
        times = [number / 50 for number in range(1, 50)]
        level_edges, expert_edges = (sorted(rng.sample(times, rng.randrange(5))) for _ in range(2))  # some are the same
        parts = expert_parts(level_edges, expert_edges)
        assert [part.interval for part in parts] == list(pairwise((0.0, *expert_edges, 1.0)))
        sizes = list(pairwise((0.0, *level_edges, 1.0)))
        for (start, stop), inside, patches in parts:
            met = [index for index, (low, high) in enumerate(sizes) if max(low, start) < min(high, stop)]
            assert list(patches) == met
            assert inside == tuple(edge for edge in level_edges if start < edge < stop)
        cuts = sorted({*level_edges, *expert_edges})
        assert [edge for part in parts for edge in (part.interval[0], *part.level_edges)] == [0.0, *cuts]


@pytest.mark.parametrize("edges", [(0.5, 0.4), (0.5, 0.5), (0.0,), (1.0,), (-0.5,)])
def test_experts_whose_edges_do_not_ascend_are_refused(edges: tuple[float, ...]):
    with pytest.raises(ValueError, match="expert edges must ascend strictly between 0 and 1"):
        expert_parts((), edges)


def test_a_level_between_an_experts_edge_and_one_of_the_patch_sizes_lasts_for_a_while():
    assert len(expert_parts((0.5,), (0.5,))) == 2
    for edge in (0.5 + 1e-9, 0.4995):
        with pytest.raises(ValueError, match="nothing is left to train"):
            expert_parts((0.5,), (edge,))
