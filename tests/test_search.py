"""metrics/search.py: the search by functions whose minimum is known, fronts by brute force, results that last."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from metrics.search import Result, Results, Setting, Space, descend, in_words, pareto_front, plot, table

SCALES = (1.0, 1.5, 2.0, 3.0)
THREE = Space([(0.5, 0.75)], [50], ["ab2"], [SCALES] * 3, [None])


def search(space: Space, distance) -> tuple[Setting, list[Setting]]:
    """The setting that is found, and the settings that were measured, each once."""
    measured: dict[Setting, float] = {}

    def measure(setting: Setting) -> float:
        if setting not in measured:
            measured[setting] = distance(setting)
        return measured[setting]

    (start,) = space.starts((1.0,) * len(space.scales))
    return descend(start, space.directions(), measure), list(measured)


def squares(best: tuple[float, ...], setting: Setting) -> float:
    return sum((a - b) ** 2 for a, b in zip(setting.scales, best, strict=True))


def test_the_minimum_of_a_separable_function_is_found() -> None:
    for best in product(SCALES, repeat=3):
        found, measured = search(THREE, partial(squares, best))
        assert found.scales == best
        assert len(measured) <= len(SCALES) + 2 * (len(SCALES) - 1) + 2 * (
            len(SCALES) - 1
        )  # a round, and one around it


def test_coarse_scales_are_solved_for_once_each() -> None:
    """k coarse and m fine candidates: k + m - 1 settings in a round, and the next one needs no other coarse state."""
    space = Space([(0.5,)], [50], ["ab2"], [(1.0, 1.5, 2.0), (1.0, 2.0, 3.0, 4.0)], [None])
    found, measured = search(space, lambda s: (s.scales[0] - 1.5) ** 2 + (s.scales[1] - 3) ** 2)
    assert found.scales == (1.5, 3.0)
    assert len(measured) == (3 + 4 - 1) + 2
    assert len({setting.up_to(0) for setting in measured}) == 3


def test_scales_that_depend_on_each_other_take_more_rounds() -> None:
    space = Space([(0.5,)], [50], ["ab2"], [SCALES] * 2, [None])
    found, _ = search(space, lambda s: (s.scales[0] - s.scales[1]) ** 2 + 0.5 * (s.scales[0] + s.scales[1] - 4) ** 2)
    assert found.scales == (2.0, 2.0)


def test_an_interval_is_chosen_with_the_scales() -> None:
    space = Space([(0.5,)], [50], ["ab2"], [SCALES] * 2, [None, (0.3, 1.0), (0.6, 0.9)])

    def distance(setting: Setting) -> float:
        return abs(setting.scales[1] - 3) + {None: 2, (0.3, 1.0): 2, (0.6, 0.9): 0}[setting.interval]

    found, _ = search(space, distance)
    assert (found.simplest().scales[1], found.interval) == (3.0, (0.6, 0.9))


def test_settings_that_diverge_are_left_behind() -> None:
    found, _ = search(THREE, lambda s: math.inf if s.scales[0] < 2 else s.scales[0] + s.scales[1] + s.scales[2])
    assert found.scales == (2.0, 1.0, 1.0)


def test_settings_that_guide_alike_are_one() -> None:
    def simplest(scales: tuple[float, ...], interval: tuple[float, float] | None) -> tuple:
        setting = Setting((0.5,), 50, "ab2", scales, interval).simplest()
        return setting.scales, setting.interval

    assert simplest((1, 1), (0.3, 1)) == ((1, 1), None)
    assert simplest((1, 3), (0.3, 1)) == ((1, 3), None)
    assert simplest((2, 3), (0.3, 1)) == ((2, 3), (0.3, 1))
    assert simplest((2, 3), (0.5, 0.9)) == ((1, 3), (0.5, 0.9))
    assert simplest((2, 3), (0.0, 1)) == ((2, 3), None)
    assert simplest((2, 1), (0.0, 0.5)) == ((2, 1), None)


def test_combinations_begin_at_the_candidates_nearest_to_the_published_scales() -> None:
    space = Space([(0.5,), (0.6,)], [20, (10, 30)], ["ab2"], [(1.0, 2.0), (2.0, 4.5)], [None])
    starts = space.starts((1.0, 3.0))
    assert [(start.edges, start.steps) for start in starts] == [*product([(0.5,), (0.6,)], [20, (10, 30)])]
    assert {start.scales for start in starts} == {(1.0, 2.0)}


def test_the_front_has_the_points_that_no_other_dominates() -> None:
    points = np.random.default_rng(0).integers(0, 8, (60, 2)).astype(float)
    costs, distances = points[:, 0].tolist(), [math.inf, *points[1:, 1].tolist()]
    front = {(costs[i], distances[i]) for i in pareto_front(costs, distances)}
    expected = {
        (c, d)
        for c, d in zip(costs, distances, strict=True)
        if not any(x <= c and y <= d and (x, y) != (c, d) for x, y in zip(costs, distances, strict=True))
    }
    assert front == expected
    assert len(pareto_front(costs, distances)) == len(front)


# -- Results -----------------------------------------------------------------------------------------------------

COARSE = Result(Setting((0.5,), (10, 20), "ab2", (1.0, 2.0), (0.3, 1.0)), 100, 2.5, 50.0, 7.0, 1.5)
FINE = Result(Setting((0.5,), 20, "euler", (1.0, 1.0)), 100, math.inf, 20.0, 3.0, 0.5)


def test_results_are_found_again_and_only_for_what_they_are_valid_for(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    results = Results(file, {"weights": "a"})
    results.add(COARSE)
    Results(file, {"weights": "b"}).add(COARSE._replace(distance=9.0))
    Results(file, {"weights": "a"}).add(FINE)
    again = Results(file, {"weights": "a"})
    assert again.best_first(100) == [COARSE, FINE]
    assert again.get(COARSE.setting, 100) == COARSE
    assert again.get(COARSE.setting, 200) is None
    assert Results(file, {"weights": "b"}).best_first(100) == [COARSE._replace(distance=9.0)]
    assert all(json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines())


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    Results(file, {}).add(COARSE)
    Results(file, {}).add(FINE)
    file.write_text(file.read_text()[:-30] + "\n3\n{}\n")
    results = Results(file, {})
    assert results.best_first(100) == [COARSE]
    results.add(FINE)
    assert Results(file, {}).best_first(100) == [COARSE, FINE]


def test_the_table_begins_with_the_best_of_many_samples() -> None:
    other = COARSE._replace(setting=Setting((0.5,), 20, "ab2", (1.0, 3.0)), distance=1.25)
    many = [COARSE._replace(num=500, distance=0.5)]
    lines = table("fid", 100, [COARSE, FINE, other], 500, many).splitlines()
    assert lines[0].endswith("| fid of 100 | fid of 500 |")
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["0.5", "10 20", "ab2", "1 2", "0.3 1", "50", "7", "2.5000", "0.5000"]
    assert "1.2500" in lines[3]
    assert "inf" in lines[4]


def test_the_plot_needs_no_two_settings(tmp_path: Path) -> None:
    plot(tmp_path / "a.png", "fid", 100, [COARSE, FINE])
    assert (tmp_path / "a.png").stat().st_size > 0
    assert in_words(COARSE.setting) == "scales 1 2, t 0.3-1, 10+20 steps, ab2, edges 0.5"
