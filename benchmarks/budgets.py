"""Quality against cost: SiT, a pyramid, and an elastic one at many budgets, with cheap guidance and measured steps.

    python -m benchmarks.budgets cifar10-32x32.zip --image-size 16 --steps 1000

Trains three small networks in pixels at equal arithmetic, as benchmarks/quality.py does and in the same folder, and
draws the same noise and labels with each setting, all guided by one scale. A setting has a Frechet distance (with its
standard error) and a class accuracy in a classifier's features, GMACs and seconds per image. The reference is SiT with
the most steps of heun2: the last lines say which setting is the cheapest whose distance is no larger than the
reference's by more than its standard error, and what it saves.

An elastic network's edges follow from the velocity errors of its levels on images that it has not seen. Measured steps
are those of --step-grid auto. Everything is resumable: networks and measurements are kept in --out, the table goes to
OUT/budgets.md, the plot to OUT/budgets.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_utils as cli
from benchmarks.guidance import draw
from benchmarks.quality import Judge, held_out_scores, mean_and_error, once, open_judge
from benchmarks.recipes import Data, VelocityNetwork, add_training_args, open_study, train_run
from benchmarks.timing import machine, time_in_turns
from pipeline import Pipeline
from runtime.errors import run_script
from runtime.files import complete_file
from runtime.logs import save_grid
from transport import ODE, Guidance, LevelErrors
from transport.budgets import BINS

TIMED_IMAGES = 10
NETWORKS = {"sit": "SiT-T/2", "ppf2-equal-cost": "PPF-T-2", "ppf2-elastic-equal-cost": "PPF-T-2, elastic"}

# ---------------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class Setting:
    """One way to draw images.

    Args:
        series:     what it is a point of
        network:    recipe of the network
        method:     of the solver
        num_steps:  of the solver
        budget:     share of the finest level's arithmetic; None for the edges of training
        null_level: of guidance; None for the sample's level
        until:      time at which guidance ends
        measured:   the steps are those of --step-grid auto
    """

    series: str
    network: str
    method: str
    num_steps: int
    budget: float | None = None
    null_level: int | None = None
    until: float | None = None
    measured: bool = False

    def __str__(self) -> str:
        words = [NETWORKS[self.network], f"{self.num_steps} {'measured ' * self.measured}steps of {self.method}"]
        if self.budget is not None:
            words.append(f"budget {self.budget:g}")
        if self.null_level is not None:
            words.append(f"null level {self.null_level}")
        if self.until is not None:
            words.append(f"guided until {self.until:g}")
        return ", ".join(words)


BUDGETS = (1.0, 0.8, 0.6, 0.4, 0.3)  # the last is less than the coarsest level takes with null level 0
ELASTIC = partial(Setting, network="ppf2-elastic-equal-cost", method="ab2")
REFERENCE = Setting("SiT, heun2", "sit", "heun2", 50)
SETTINGS = (
    *(replace(REFERENCE, num_steps=steps) for steps in (50, 25, 10)),
    *(Setting("SiT, ab2", "sit", "ab2", steps) for steps in (50, 25, 12, 8)),
    *(Setting("pyramid, ab2", "ppf2-equal-cost", "ab2", steps) for steps in (50, 25, 12, 8)),
    *(ELASTIC("elastic", num_steps=25, budget=budget) for budget in BUDGETS),
    *(ELASTIC("elastic, null level", num_steps=25, budget=budget, null_level=0) for budget in BUDGETS[:4]),
    *(ELASTIC("elastic, guided until 0.5", num_steps=25, budget=budget, until=0.5) for budget in (1.0, 0.6)),
    *(
        ELASTIC("elastic, null level until 0.5", num_steps=25, budget=budget, null_level=0, until=0.5)
        for budget in BUDGETS[:4]
    ),
    *(ELASTIC("elastic, measured steps", num_steps=steps, budget=0.6, measured=True) for steps in (25, 12, 8)),
    *(ELASTIC("elastic, fewer steps", num_steps=steps, budget=0.6) for steps in (12, 8)),
    *(ELASTIC("elastic, null level, fewer steps", num_steps=steps, budget=0.6, null_level=0) for steps in (12, 8, 6)),
    *(ELASTIC("everything", num_steps=steps, budget=0.6, null_level=0, measured=True) for steps in (12, 8, 6)),
)
SERIES = tuple(dict.fromkeys(setting.series for setting in SETTINGS))


@torch.no_grad()
def level_errors(network: VelocityNetwork, data: Data, number: int) -> LevelErrors:
    """Velocity errors of every level in every tenth of t, on so many images that no network has seen."""
    x1, y = data.batch(torch.arange(data.num_training, data.num_training + number))
    generator, sums = torch.Generator().manual_seed(1), np.zeros((network.num_levels, BINS))
    x0, u = torch.randn(x1.shape, generator=generator), torch.rand(number, generator=generator)
    for tenth in range(BINS):
        t = (tenth + u) / BINS
        x = network.transport.path.interpolate(x0, x1, t)
        for level in range(network.num_levels):
            sums[level, tenth] = (network(x, t, y, level=level) - (x1 - x0)).square().flatten(1).mean(1).sum()
    return LevelErrors(sums, np.full_like(sums, number))


# ---------------------------------------------------------------------------------------------------------------
# Measurements


class Study:
    """Networks of one seed, and what was measured of them; kept in a folder.

    Args:
        seed:   of the networks' training and of the samples
        data:   the images
        judge:  scores samples
        folder: of the networks and the measurements
        args:   of the command
    """

    def __init__(self, seed: int, data: Data, judge: Judge, folder: Path, args: argparse.Namespace) -> None:
        self.seed, self.data, self.judge, self.folder, self.args = seed, data, judge, folder, args
        self.file = folder / "budgets.json"
        self._pipes: dict[str, Pipeline] = {}

    def key(self, name: str) -> str:
        """Name of a network among the measurements."""
        return f"{name} seed {self.seed} steps {self.args.steps}"

    def pipeline(self, name: str) -> Pipeline:
        """A recipe's trained network, which predicts the velocity at all levels."""
        if name not in self._pipes:
            args = self.args
            network = train_run(name, self.seed, args.steps, self.data, self.folder, args.batch_size, args.lr)
            errors = None
            if network.transport.schedule.elastic:
                make = partial(level_errors, network, self.data, args.num_held_out)
                errors = LevelErrors(**once(self.file, f"{self.key(name)} level errors", lambda: make().as_dict()))
            self._pipes[name] = Pipeline(network.inner, network.transport, name=NETWORKS[name], level_errors=errors)
        return self._pipes[name]

    def prepare(self, setting: Setting) -> tuple[Pipeline, ODE, Guidance]:
        """The network at the setting's budget, its solver and its guidance; a grid is measured once for all budgets."""
        pipe, solver = self.pipeline(setting.network), ODE(setting.method, setting.num_steps)
        interval = None if setting.until is None else (0.0, setting.until)
        guidance = Guidance(self.args.guidance, interval=interval, null_level=setting.null_level)
        if setting.measured:
            key = f"{self.key(setting.network)} grid {setting.method} {guidance}"
            solver = replace(solver, grid=once(self.file, key, lambda: pipe.step_grid(solver, guidance)))
        if setting.budget is not None:
            pipe = pipe.at_budget(setting.budget, solver, guidance)
        return pipe, solver, guidance

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Scores and GMACs of a setting."""
        number, name = self.args.num_samples, setting.network
        key = f"{self.key(name)} {number} samples guidance {self.args.guidance:g} {setting}"
        return once(self.file, key, partial(self._measure, setting))

    def _measure(self, setting: Setting) -> dict[str, Any]:
        pipe, solver, guidance = self.prepare(setting)
        images, labels, cost = draw(pipe, "cfg", solver, guidance, self.args.num_samples, self.seed)
        shown = labels[:100].argsort(stable=True)  # a row for each class
        name = f"{setting}-{self.seed}".replace(", ", "-").replace(" ", "-").replace("/", "-")
        save_grid(images[shown].float() / 127.5 - 1, self.folder / f"{name}.png", len(shown) // self.data.num_classes)
        edges = list(pipe.transport.schedule.level_edges)
        return {**self.judge(images, labels), "gmacs": cost.gmacs(len(images)), "edges": edges}

    def seconds(self, settings: Sequence[Setting]) -> dict[Setting, float]:
        """Seconds per image of each setting, which take turns; costs do not depend on weights."""

        def make() -> list[float]:
            calls = {}
            for setting in settings:
                pipe, solver, guidance = self.prepare(setting)
                calls[setting] = partial(draw, pipe, "cfg", solver, guidance, TIMED_IMAGES)
            taken = time_in_turns(calls, self.args.repeats, torch.device("cpu"), "seconds")
            return [taken[setting].median / TIMED_IMAGES for setting in settings]

        key = f"seconds {self.args.steps} {self.args.guidance:g} {'; '.join(map(str, settings))}"
        return dict(zip(settings, once(self.file, key, make), strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Tables

Results = Mapping[Setting, Sequence[Mapping[str, Any]]]  # of each seed


def distance_of(results: Results, setting: Setting) -> tuple[float, float]:
    """Distance of a setting with its standard error: over seeds if there are several, else over draws."""
    scores = results[setting]
    distances = [score["distance"] for score in scores]
    if len(scores) == 1:
        return distances[0], scores[0]["distance_error"]
    return float(np.mean(distances)), float(np.std(distances, ddof=1) / len(scores) ** 0.5)


def cheapest(results: Results, costs: Mapping[Setting, float], among: Sequence[Setting]) -> Setting:
    """The setting of the lowest cost whose distance is at most the reference's plus its standard error."""
    distance, error = distance_of(results, REFERENCE)
    return min((s for s in among if distance_of(results, s)[0] <= distance + error), key=costs.__getitem__)


def table(results: Results, real: Mapping[str, float], seconds: Mapping[Setting, float]) -> str:
    """Markdown of all settings, then what each series saves at the reference's distance."""
    gmacs = {setting: float(np.mean([score["gmacs"] for score in scores])) for setting, scores in results.items()}
    columns = ["setting", "edge", "distance", "class accuracy", "GMACs per image", "s per image"]
    lines = [
        f"Held-out images: distance {real['distance']:.3f}, class accuracy {real['accuracy']:.3f}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|---|---|---|---:|---:|",
    ]
    for setting, scores in results.items():
        edges = ", ".join(f"{np.mean(edge):.2f}" for edge in zip(*(score["edges"] for score in scores), strict=True))
        distance = mean_and_error([s["distance"] for s in scores], [s["distance_error"] for s in scores])
        cells = [str(setting), edges, distance, mean_and_error([s["accuracy"] for s in scores])]
        taken = f"{seconds[setting]:.3f}" if setting in seconds else ""
        lines.append("| " + " | ".join([*cells, f"{gmacs[setting]:.2f}", taken]) + " |")
    if REFERENCE not in results or any(setting not in seconds for setting in results):
        return "\n".join(lines) + "\n"
    lines += ["", f"As good as {REFERENCE}, within its standard error, at the least cost:", ""]
    lines += ["| series | setting | distance | GMACs saved | seconds saved |", "|---|---|---|---|---|"]
    for series in dict.fromkeys(setting.series for setting in results):
        among = [setting for setting in results if setting.series == series]
        try:
            best = cheapest(results, seconds, among)
        except ValueError:  # none is as good
            closest = min(among, key=lambda setting: distance_of(results, setting)[0])
            lines.append(f"| {series} | none; the best is {closest} | {distance_of(results, closest)[0]:.3f} | | |")
            continue
        saved = gmacs[REFERENCE] / gmacs[best], seconds[REFERENCE] / seconds[best]
        cells = [series, str(best), f"{distance_of(results, best)[0]:.3f}", *(f"{factor:.1f}x" for factor in saved)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Distance against GMACs per image, a line for each series; a band around the reference's distance."""
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    colors = colormaps["tab20"].colors
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, series in enumerate(dict.fromkeys(setting.series for setting in results)):
        points = []
        for setting, scores in results.items():
            if setting.series == series:
                points.append((np.mean([score["gmacs"] for score in scores]), *distance_of(results, setting)))
        gmacs, distances, errors = zip(*sorted(points), strict=True)
        style = {
            "marker": "osv^D*PXhd<>"[number],
            "color": colors[(2 * number + number // 10) % 20],
            "capsize": 2,
            "linewidth": 1,
        }
        axes.errorbar(gmacs, distances, errors, label=series, **style)
    if REFERENCE in results:
        distance, error = distance_of(results, REFERENCE)
        axes.axhspan(distance - error, distance + error, color="grey", alpha=0.2)
    axes.set(xscale="log", xlabel="GMACs per image", ylabel="Frechet distance")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---------------------------------------------------------------------------------------------------------------
# The command


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.budgets", description="Quality against cost, in pixels.")
    add_training_args(parser)
    add = parser.add_argument
    add("--series", nargs="+", choices=SERIES, default=list(SERIES), metavar="SERIES", help="of: " + "; ".join(SERIES))
    add("--seeds", type=cli.natural_int, nargs="+", default=[0], help="seeds of training and samples")
    add(
        "--steps",
        type=cli.positive_int,
        default=1000,
        help="optimizer steps of SiT; the pyramids make 1.6 times as many",
    )
    add("--guidance", type=cli.positive_float, default=2.5, metavar="SCALE", help="guidance scale")
    add("--num-samples", type=cli.number(int, 20), default=500, help="samples of each setting")
    add("--num-held-out", type=cli.positive_int, default=500, help="images of the levels' velocity errors")
    add("--classifier-epochs", type=cli.positive_int, default=4, help="epochs of the classifier's training")
    add("--repeats", type=cli.natural_int, default=5, help="timed draws of each setting; 0: no seconds")
    add("--out", type=Path, default=Path("results/quality"), help="folder, which may be that of benchmarks/quality.py")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study with these command-line arguments."""
    args = build_parser().parse_args(argv)
    data, folder = open_study(args)
    judge = open_judge(data, folder, args.classifier_epochs)
    real = held_out_scores(judge, data, args.num_samples, folder)
    settings = [setting for setting in SETTINGS if setting.series in args.series]
    results: dict[Setting, list[dict[str, Any]]] = {setting: [] for setting in settings}
    for seed in args.seeds:
        study = Study(seed, data, judge, folder, args)
        for setting in settings:
            results[setting].append(study.measure(setting))
            print(f"seed {seed}, {setting}: {results[setting][-1]['distance']:.3f}", flush=True)
    seconds = Study(args.seeds[0], data, judge, folder, args).seconds(settings) if args.repeats else {}
    with complete_file(folder / "budgets.md") as temporary:
        temporary.write_text(f"{table(results, real, seconds)}\n{machine(torch.device('cpu'))}\n")
    plot(results, folder / "budgets.png")
    print((folder / "budgets.md").read_text())


if __name__ == "__main__":
    run_script(main)
