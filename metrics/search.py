"""The search for settings of sampling: which scales guide best, and at which price (sweep.py).

It knows no network: a setting is given to a function that measures its distance, and what was measured is kept in a
file, so that a search that was killed goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

from runtime.files import complete_file


@dataclass(frozen=True)
class Setting:
    """One way to draw samples.

    Args:
        edges:      interior times at which the level changes
        steps:      over the whole trajectory, or one number per level
        solver:     an ODE method of fixed steps
        scales:     guidance scale of each level, coarsest first; 1 is none
        interval:   guide only for t in (low, high); None for all times
        null_level: level at which the null label is evaluated; None for the sample's own
    """

    edges: tuple[float, ...]
    steps: int | tuple[int, ...]
    solver: str
    scales: tuple[float, ...]
    interval: tuple[float, float] | None = None
    null_level: int | None = None

    def simplest(self) -> Setting:
        """The simplest setting that guides by the same scales at the same times.

        A level of which the interval holds nothing has scale 1, an interval that holds all guided levels is None, and
        so is a null level that is that of all guided samples.
        """
        low, high = self.interval or (0.0, 1.0)
        levels = list(pairwise((0.0, *self.edges, 1.0)))
        scales = tuple(
            scale if max(low, start) < min(high, stop) else 1.0
            for scale, (start, stop) in zip(self.scales, levels, strict=True)
        )
        guided = [level for scale, level in zip(scales, levels, strict=True) if scale != 1]
        cut = any(start < low or high < stop for start, stop in guided)
        matters = any(scale != 1 and self._null_level_of(level) is not None for level, scale in enumerate(scales))
        null_level = self.null_level if matters else None
        return replace(self, scales=scales, interval=self.interval if cut else None, null_level=null_level)

    def up_to(self, level: int) -> tuple[Any, ...]:
        """Everything that the state at the end of a level depends on."""
        settings = self.scales[: level + 1], self.interval, self._null_level_of(level)
        return self.edges, self.steps, self.solver, *settings

    def _null_level_of(self, level: int) -> int | None:
        """The level of the null branch at a level, where it is another one."""
        return self.null_level if self.null_level is not None and self.null_level < level else None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Setting:
        """The inverse of asdict, also after JSON made lists of tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


# ---------------------------------------------------------------------------------------------------------------
# Search


class Space(NamedTuple):
    """The settings to choose among; `scales` has the candidates of each level."""

    edges: Sequence[tuple[float, ...]]
    steps: Sequence[int | tuple[int, ...]]
    solvers: Sequence[str]
    scales: Sequence[Sequence[float]]
    intervals: Sequence[tuple[float, float] | None]
    null_levels: Sequence[int | None] = (None,)

    def starts(self, scales: Sequence[float]) -> list[Setting]:
        """A setting for each combination of edges, steps and solver, with the candidates nearest to these scales."""
        nearest = tuple(
            min(options, key=lambda option: abs(option - scale))
            for options, scale in zip(self.scales, scales, strict=True)
        )
        combinations = product(self.edges, self.steps, self.solvers)
        first = self.intervals[0], self.null_levels[0]
        return [Setting(*combination, nearest, *first) for combination in combinations]

    def directions(self) -> list[Callable[[Setting], list[Setting]]]:
        """The coordinates of guidance, from the coarsest level's scale to the null level: variants of a setting."""

        def scale_of(level: int) -> Callable[[Setting], list[Setting]]:
            def variants(setting: Setting) -> list[Setting]:
                before, after = setting.scales[:level], setting.scales[level + 1 :]
                return [replace(setting, scales=(*before, scale, *after)) for scale in self.scales[level]]

            return variants

        def intervals(setting: Setting) -> list[Setting]:
            return [replace(setting, interval=interval) for interval in self.intervals]

        def null_levels(setting: Setting) -> list[Setting]:
            return [replace(setting, null_level=null_level) for null_level in self.null_levels]

        others = [intervals, null_levels] if len(self.null_levels) > 1 else [intervals]
        return [*(scale_of(level) for level in range(len(self.scales))), *others]


Measure = Callable[[Setting], float]


def descend(start: Setting, directions: Sequence[Callable[[Setting], list[Setting]]], measure: Measure) -> Setting:
    """Move to the best variant in one direction after the other, until a round of them brings nothing more.

    A setting is measured in its simplest form; `measure` is asked for some of them more than once.
    """

    def distance(setting: Setting) -> float:
        return measure(setting.simplest())

    best, quiet = start, 0  # directions since the last move
    while quiet < len(directions):
        for direction in directions:
            variants = [best, *direction(best)]  # the first of equals wins: a move is an improvement
            found = min(variants, key=distance)
            quiet = 0 if distance(found) < distance(best) else quiet + 1
            best = found
            if quiet == len(directions):
                break
    return best


def pareto_front(costs: Sequence[float], distances: Sequence[float]) -> list[int]:
    """Numbers of the points that no other beats in both, by ascending cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda index: (costs[index], distances[index])):
        if math.isfinite(distances[index]) and (not front or distances[index] < distances[front[-1]]):
            front.append(index)
    return front


# ---------------------------------------------------------------------------------------------------------------
# Results


class Result(NamedTuple):
    """A setting that was measured with `num` samples; the distance is infinite where samples were not finite."""

    setting: Setting
    num: int
    distance: float
    nfe: float  # network evaluations per image
    gmacs: float  # per image
    seconds: float


class Results:
    """Results in a file of one JSON record a line, each with what it is valid for.

    Args:
        path:      results.jsonl
        valid_for: weights, reference and all else that a distance depends on besides the setting, in values that JSON
                   has; lines for something else are kept, and do not count
    """

    def __init__(self, path: Path, valid_for: Mapping[str, Any]) -> None:
        self.path, self.valid_for = path, dict(valid_for)
        self._lines: list[str] = []
        self._found: dict[tuple[Setting, int], Result] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = dict(json.loads(line))
                result, valid_for = _from_record(record), record["valid_for"]
            except (ValueError, TypeError, KeyError):  # cut short by a full disk, say: it is measured again
                continue
            self._lines.append(line)
            if valid_for == self.valid_for:
                self._found[result.setting, result.num] = result

    def get(self, setting: Setting, num: int) -> Result | None:
        return self._found.get((setting, num))

    def add(self, result: Result) -> None:
        """Keep a result, in the file as well."""
        distance = result.distance if math.isfinite(result.distance) else None  # JSON has no infinity
        record = {**result._asdict(), "setting": asdict(result.setting), "distance": distance}
        lines = [*self._lines, json.dumps({**record, "valid_for": self.valid_for})]
        with complete_file(self.path) as temporary:
            temporary.write_text("\n".join(lines) + "\n")
        self._lines = lines
        self._found[result.setting, result.num] = result

    def best_first(self, num: int) -> list[Result]:
        """All results of `num` samples by ascending distance."""
        results = (result for result in self._found.values() if result.num == num)
        return sorted(results, key=lambda result: (result.distance, result.gmacs))


def _from_record(record: dict[str, Any]) -> Result:
    fields = {name: record[name] for name in Result._fields}
    distance = math.inf if record["distance"] is None else record["distance"]
    return Result(**fields | {"setting": Setting.from_dict(record["setting"]), "distance": distance})


# ---------------------------------------------------------------------------------------------------------------
# Table and plot


def in_words(setting: Setting, fields: Collection[str] = tuple(Setting.__dataclass_fields__)) -> str:
    """Fields of a setting on one line."""
    words = {
        "scales": f"scales {listed(setting.scales)}",
        "interval": "" if setting.interval is None else f"t {listed(setting.interval, '-')}",
        "null_level": "" if setting.null_level is None else f"null level {setting.null_level}",
        "steps": f"{listed(setting.steps, '+')} steps",
        "solver": setting.solver,
        "edges": f"edges {listed(setting.edges)}" if setting.edges else "",
    }
    return ", ".join(text for name, text in words.items() if name in fields and text)


def listed(values: Any, separator: str = " ") -> str:
    """Numbers in their shortest form."""
    return separator.join(f"{value:g}" for value in (values if isinstance(values, tuple) else (values,)))


def table(name: str, num: int, results: Sequence[Result], full_num: int, refined: Sequence[Result]) -> str:
    """The results as a table in Markdown, best first: those with the larger number of samples, then the others."""
    better = {result.setting: result.distance for result in refined}
    order = sorted(results, key=lambda result: (better.get(result.setting, math.inf), result.distance, result.gmacs))
    null_levels = any(result.setting.null_level is not None for result in results)
    words = ["edges", "steps", "solver", "scales", "interval", *["null level"] * null_levels]
    numbers = ["NFE", "GMACs/image", f"{name} of {num:,}", *[f"{name} of {full_num:,}"] * bool(refined)]
    rows = [[*words, *numbers], [*["---"] * len(words), *["---:"] * len(numbers)]]
    for setting, _, distance, nfe, gmacs, _ in order:
        row = [listed(setting.edges), listed(setting.steps), setting.solver, listed(setting.scales)]
        row += ["" if setting.interval is None else listed(setting.interval)]
        row += ["" if setting.null_level is None else str(setting.null_level)] * null_levels
        row += [f"{nfe:g}", f"{gmacs:.4g}", f"{distance:.4f}"]
        row += [f"{better[setting]:.4f}" if setting in better else ""] * bool(refined)
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def plot(path: Path, name: str, num: int, results: Sequence[Result]) -> None:
    """Draw distances against GMACs per image, and the front: settings that no other beats in both."""
    from matplotlib.figure import Figure  # slow to import

    results = [result for result in results if math.isfinite(result.distance)]
    gmacs, distances = ([getattr(result, field) for result in results] for field in ("gmacs", "distance"))
    front = pareto_front(gmacs, distances)
    varies = {field for field in Setting.__dataclass_fields__ if len({getattr(r.setting, field) for r in results}) > 1}
    figure = Figure(figsize=(8, 5 + 0.2 * len(front)), layout="constrained")
    axes = figure.subplots()
    axes.scatter(gmacs, distances, s=16, color="0.7")
    axes.step([gmacs[i] for i in front], [distances[i] for i in front], where="post", color="C0", linewidth=1)
    for number, index in enumerate(front, start=1):
        at, words = (gmacs[index], distances[index]), in_words(results[index].setting, varies | {"scales"})
        axes.scatter(*at, s=28, color="C0", zorder=3, label=f"{number}: {words}")
        axes.annotate(str(number), at, xytext=(0, -13), textcoords="offset points", ha="center", color="C0")
    axes.set(xlabel="GMACs per image", ylabel=f"{name} of {num:,} samples", xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        for which in (axis.set_major_formatter, axis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")  # 0.5, not 5 x 10^-1
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", fontsize=8, title="best distance for its cost", title_fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
