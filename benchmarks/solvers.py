"""Error of every ODE solver against the evaluations that it takes.

    python -m benchmarks.solvers
    python -m benchmarks.solvers --ckpt results/demo --out solvers.png

Cases: a Gaussian mixture, whose velocity is known in closed form, on every path with 1, 2 and 3 levels (one field in
all levels: what an edge costs is the restart alone); and with --ckpt a trained network under guidance. The error is the
root mean square distance from the ODE's exact solution. An evaluation is one call of the field, guided or not. The
tables have every method, the plot those that one chooses between.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.recipes import open_network
from benchmarks.timing import ZeroField, add_device_arg, machine, open_device, table
from pipeline import EvaluationCounter
from runtime.errors import run_script, user_input
from runtime.files import complete_file
from runtime.rng import sample_generators
from train_utils import ArgumentParser, finite_float, positive_int, some_text
from transport import (
    PATHS,
    Guidance,
    PatchSchedule,
    Sampler,
    Transport,
    create_transport,
)
from transport.paths import like
from transport.solvers import FIXED_METHODS, RUNGE_KUTTA_ADAPTIVE

METHODS = tuple(method for method in FIXED_METHODS if method != "fixed_adams")  # another name of implicit_adams
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)

SAMPLES, MODES, DIMENSIONS = 200, 5, 8  # of the mixture
IMAGES = 20  # of the network
REFERENCE_STEPS = 200  # of rk4, for the solution of the network that the others miss

# The plot's methods: label, colour (Okabe and Ito's, told apart by colour-blind people too) and marker.
PLOTTED = {
    "euler": ("euler, 1 evaluation per step", "#999999", "s"),
    "heun2": ("heun2, 2 per step", "#E69F00", "^"),
    "dpmpp_2m": ("dpmpp_2m, 1 per step", "#56B4E9", "D"),
    "ab2": ("ab2 (default), 1 per step", "#D55E00", "o"),
}


def build_parser() -> ArgumentParser:
    """Flags of this benchmark."""
    parser = ArgumentParser(prog="solvers.py", description="Error of every ODE solver by evaluations.")
    text = "evaluations that the fixed-step methods may take"
    parser.add_argument("--nfe", type=positive_int, nargs="+", default=[6, 10, 20, 30, 50, 100], metavar="N", help=text)
    add_network_args(parser)
    parser.add_argument("--out", type=some_text, default="solvers.png", help="the plot: error against evaluations")
    add_device_arg(parser)
    return parser


def add_network_args(parser: ArgumentParser) -> None:
    """Add the flags of a trained network."""
    text = "a trained network too: a run's folder, a checkpoint, or a network of benchmarks/quality.py"
    parser.add_argument("--ckpt", type=some_text, help=text)
    text = "guidance of the network: one scale, or one per level (default: 1.5, with --ckpt)"
    parser.add_argument("--cfg-scales", "--cfg-scale", type=finite_float, nargs="+", metavar="W", help=text)


# ---------------------------------------------------------------------------------------------------------------
# Cases


class GaussianMixture:
    """The exact velocity of data from sum_k N(mean_k, std_k^2) / K, of mean square 1: the same in every level.

    Along a path each mode stays Gaussian, N(alpha mean_k, alpha^2 std_k^2 + sigma^2), and given x_t and the mode the
    data and the noise are linear in x_t; their expectations are averages over the modes' posterior.
    """

    num_classes = 0

    def __init__(self, path: str, num_levels: int, device: torch.device) -> None:
        self.path, self.num_levels = PATHS[path], num_levels
        mean = torch.randn(MODES, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.std = torch.linspace(0.1, 0.4, MODES, dtype=torch.float64)[:, None].to(device)
        self.mean = mean.to(device) * ((1 - self.std.square().mean()) / mean.square().mean()).sqrt()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        """Velocity (N, D) at x (N, D) and t (N,)."""
        c = self.path.coefficients(like(t, x[:, None]))
        variance = (c.alpha * self.std) ** 2 + c.sigma**2  # (N, K, 1)
        deviation = x[:, None] - c.alpha * self.mean  # (N, K, D)
        log_likelihood = -0.5 * (deviation.square() / variance + variance.log()).sum(-1, keepdim=True)
        data = self.mean + c.alpha * self.std**2 / variance * deviation
        noise = c.sigma / variance * deviation
        return (log_likelihood.softmax(1) * (c.d_alpha * data + c.d_sigma * noise)).sum(1)


@dataclass(frozen=True)
class Point:
    """Outcome of one solver."""

    nfe: int  # evaluations it took
    error: float  # RMS over samples and dimensions

    def text(self, nfe: float | None = None) -> str:
        """Error, and the evaluations where they are not `nfe`; '-' where there were too few steps."""
        if self is REFUSED:
            return "-"
        return f"{self.error:.1e}" if self.nfe == nfe else f"{self.error:.1e} @{self.nfe}"


REFUSED = Point(0, math.nan)  # fewer steps than intervals


@dataclass(frozen=True)
class Case:
    """A field, its starting points, and the exact solutions."""

    name: str
    transport: Transport
    field: Callable[..., torch.Tensor]  # guided or not
    x0: torch.Tensor
    y: torch.Tensor | None
    reference: torch.Tensor

    def solve(self, method: str, **settings: object) -> Point:
        """Evaluations and error of one solver."""
        counter = EvaluationCounter(self.field)
        try:
            x1 = Sampler(self.transport).sample_ode(counter, self.x0, method=method, y=self.y, **settings)
        except ValueError:
            return REFUSED
        return Point(round(counter.nfe(len(x1))), (x1 - self.reference).square().mean().sqrt().item())


def mixture_case(path: str, num_levels: int, device: torch.device) -> Case:
    """The mixture, in double precision; its reference is a method of order 8 with tolerances of 1e-10."""
    transport = create_transport(path, level_edges=PatchSchedule.default(num_levels).level_edges)
    field = GaussianMixture(path, num_levels, device)
    generators = sample_generators(0, range(SAMPLES))
    x0 = transport.noise.sample((SAMPLES, DIMENSIONS), generators, device, torch.float64)
    reference = Sampler(transport).sample_ode(field, x0, method="dopri8", atol=1e-10, rtol=1e-10)
    name = f"mixture, {path}, {num_levels} level{'s' if num_levels > 1 else ''}"
    return Case(name, transport, field, x0, None, reference)


def network_case(ckpt: str, scales: Sequence[float], device: torch.device) -> Case:
    """The network of a checkpoint in single precision, in which its reference is solved too."""
    pipe = open_network(Path(ckpt)).to(device)
    model, transport = pipe.model, pipe.transport
    field = Guidance(tuple(scales)).of(model)
    field.num_classes = model.num_classes  # as a network has them, for the counter
    generators = sample_generators(0, range(IMAGES))
    x0 = transport.noise.sample((IMAGES, model.in_channels, *model.input_size), generators, device)
    y = torch.arange(IMAGES, device=device) % model.num_classes
    reference = Sampler(transport).sample_ode(field, x0, method="rk4", num_steps=REFERENCE_STEPS, y=y)
    name = f"{pipe.name}, {transport.path.name}, guidance {' '.join(f'{scale:g}' for scale in scales)}"
    return Case(name, transport, field, x0, y, reference)


# ---------------------------------------------------------------------------------------------------------------
# Measurements

Points = Mapping[tuple[str, float], Point]  # by method, and by evaluations or the tolerance of an adaptive method


def steps_within(case: Case, method: str, nfe: int) -> int:
    """The most steps of a fixed-step method that take no more evaluations than `nfe`, tried on a field of zeros."""
    steps = nfe
    while True:
        counter = EvaluationCounter(ZeroField(case.field.num_levels))
        try:
            Sampler(case.transport).sample_ode(counter, torch.zeros(1, 1), method=method, num_steps=steps)
        except ValueError:  # fewer steps than intervals: the case refuses them too
            return steps
        taken = round(counter.nfe(1))
        if taken <= nfe:
            return steps
        steps = max(min(steps - 1, steps * nfe // taken), 0)


def measure(case: Case, nfe: Sequence[int]) -> Points:
    """Solve a case by every method."""
    jobs = [*product(METHODS, nfe), *product(RUNGE_KUTTA_ADAPTIVE, TOLERANCES)]
    points = {}
    for method, setting in tqdm(jobs, desc=case.name, leave=False, disable=not sys.stderr.isatty()):
        if method in METHODS:
            points[method, setting] = case.solve(method, num_steps=steps_within(case, method, setting))
        else:
            points[method, setting] = case.solve(method, atol=setting, rtol=setting)
    return points


# ---------------------------------------------------------------------------------------------------------------
# Tables


def errors_table(points: Points, title: str, methods: Sequence[str], settings: Sequence[float]) -> str:
    """A row per method, a column per setting; '@' where a method takes another number of evaluations."""
    lines = [[title, *(f"{setting:g}" for setting in settings)]]
    for method in methods:
        lines.append([method, *(points[method, setting].text(setting) for setting in settings)])
    return table(lines)


def geometric_mean(results: Sequence[Points], method: str, nfe: int) -> Point:
    """Geometric mean of a method's errors over cases; REFUSED where one of them refuses it."""
    points = [points[method, nfe] for points in results]
    if REFUSED in points:
        return REFUSED
    return Point(points[0].nfe, math.exp(sum(math.log(point.error) for point in points) / len(points)))


# ---------------------------------------------------------------------------------------------------------------
# The plot


def plot(panels: Mapping[str, Points], nfe: Sequence[int], path: str) -> None:
    """Plot error against evaluations of the methods in PLOTTED, a panel per title."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for method, (label, color, marker) in PLOTTED.items():
            found = [points[method, number] for number in nfe if points[method, number] is not REFUSED]
            numbers, errors = [point.nfe for point in found], [point.error for point in found]
            width = 2.6 if method == "ab2" else 1.6
            axis.loglog(numbers, errors, label=label, color=color, marker=marker, linewidth=width, markersize=6)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("evaluations of the velocity field")
        axis.set_xticks(nfe, map(str, nfe))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.35)
    axes[0].set_ylabel("RMS error of the samples")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


# ---------------------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace) -> None:
    """Print the tables and save the plot."""
    device, nfe = open_device(args.device), sorted(set(args.nfe))
    print(f"{machine(device)}; {SAMPLES} samples of {MODES} modes in {DIMENSIONS} dimensions")
    with user_input():
        networks = [network_case(args.ckpt, args.cfg_scales or [1.5], device)] if args.ckpt else []
    mixtures = [mixture_case(*case, device) for case in product(PATHS, (1, 2, 3))]
    results = {}
    for case in (*mixtures, *networks):
        points = results[case.name] = measure(case, nfe)
        print(f"\n{case.name}\n{errors_table(points, 'evaluations', METHODS, nfe)}")
        print(f"\n{errors_table(points, 'tolerance', RUNGE_KUTTA_ADAPTIVE, TOLERANCES)}", flush=True)

    exact = [results[case.name] for case in mixtures]
    means = {(method, number): geometric_mean(exact, method, number) for method, number in product(METHODS, nfe)}
    title = f"{len(mixtures)} Gaussian mixtures, geometric mean"
    print(f"\n{title}\n{errors_table(means, 'evaluations', METHODS, nfe)}")
    plot({title: means} | {f"Network: {case.name}": results[case.name] for case in networks}, nfe, args.out)
    print(f"\n{args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.cfg_scales and not args.ckpt:
        parser.error("--cfg-scales has no effect without --ckpt")
    run(args)


if __name__ == "__main__":
    run_script(main)
