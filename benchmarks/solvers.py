"""How much error does a solver leave for how many evaluations?

    python -m benchmarks.solvers
    python -m benchmarks.solvers --ckpt results/demo --out solvers.png

Cases: a Gaussian mixture, whose velocity is known in closed form, on every path with 1, 2 and 3 levels (one field in
all levels: what an edge costs is the restart alone); and with --ckpt a trained network under guidance. The error is the
root mean square distance from the ODE's exact solution. An evaluation is one call of the field, guided or not. The last
tables give more or fewer steps to the finest level at equal cost.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from tqdm import tqdm
from UNKNOWN import guided

from benchmarks.timing import machine, open_device, table
from runtime.errors import run_script, user_input
from runtime.files import complete_file
from train_utils import ArgumentParser, add_cfg_args, natural_int, positive_int, some_text
from transport import PATHS, PatchSchedule, Sampler, Transport, create_transport, sample_generators
from transport.paths import like
from transport.solvers import FIXED_METHODS, RUNGE_KUTTA_ADAPTIVE
from weights.pretrained import load_pretrained

METHODS = tuple(method for method in FIXED_METHODS if method != "fixed_adams")  # another name of implicit_adams
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
SPLIT_METHODS, SPLIT_NFE = ("ab2", "heun2"), (20, 50)
SPLITS = (0.5, 0.75, 1.0, 1.25, 1.5)  # steps of the finest level, over those in proportion to its length
HIGHLIGHTED = ("ab2", "dpmpp_2m", "heun2")  # in the plot


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="solvers.py", description="Error of every ODE solver by evaluations.")
    parser.add_argument("--nfe", type=positive_int, nargs="+", default=[6, 10, 20, 30, 50, 100], metavar="N",
                        help="evaluations that the fixed-step methods may take")  # fmt: skip
    parser.add_argument("--samples", type=positive_int, default=200, help="samples of the mixture")
    parser.add_argument("--dimensions", type=positive_int, default=8, help="of the mixture")
    parser.add_argument("--modes", type=positive_int, default=5, help="of the mixture")
    parser.add_argument("--ckpt", type=some_text, help="a trained network too: a run's folder or a checkpoint")
    parser.add_argument("--images", type=positive_int, help="samples of the network (default: 20)")
    parser.add_argument("--reference-steps", type=positive_int, metavar="STEPS",
                        help="of rk4, for the solution of the network that the others miss (default: 200)")  # fmt: skip
    parser.add_argument("--seed", type=natural_int, default=0, help="seed of mixture and noise")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--out", type=some_text, default="solvers.png", help="the plot: error against evaluations")
    add_cfg_args(parser, None, "default: 1.5, with --ckpt")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with flags refused that would have no effect."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("images", "reference_steps", "cfg_scales", "cfg_channels", "cfg_interval"):
        if getattr(args, name) and not args.ckpt:
            parser.error(f"--{name.replace('_', '-')} has no effect without --ckpt")
    args.cfg_scales, args.images = args.cfg_scales or [1.5], args.images or 20
    args.reference_steps, args.nfe = args.reference_steps or 200, sorted(set(args.nfe))
    return args


# ---------------------------------------------------------------------------------------------------------------
# Cases


class GaussianMixture:
    """The exact velocity of data from sum_k N(mean_k, std_k^2) / K, of mean square 1: the same in every level.

    Along a path each mode stays Gaussian, N(alpha mean_k, alpha^2 std_k^2 + sigma^2), and given x_t and the mode the
    data and the noise are linear in x_t; their expectations are averages over the modes' posterior.
    """

    def __init__(
        self, path: str, num_levels: int, modes: int, dimensions: int, seed: int, device: torch.device
    ) -> None:
        self.path, self.num_levels = PATHS[path], num_levels
        generator = torch.Generator().manual_seed(seed)
        mean = torch.randn(modes, dimensions, generator=generator, dtype=torch.float64)
        self.std = torch.linspace(0.1, 0.4, modes, dtype=torch.float64)[:, None].to(device)
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


class Counted:
    """A network that counts its calls."""

    def __init__(self, model: Callable[..., torch.Tensor], num_levels: int, num_classes: int = 0) -> None:
        self.model, self.num_levels, self.num_classes = model, num_levels, num_classes
        self.calls = 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        self.calls += 1
        return self.model(x, t, y=y, level=level)


@dataclass(frozen=True)
class Point:
    """What a solver leaves."""

    nfe: int  # evaluations it took
    error: float  # RMS over samples and dimensions

    def text(self, nfe: int | None = None) -> str:
        """The error, and the evaluations where they are not `nfe`; '-' where there were too few steps."""
        if self is REFUSED:
            return "-"
        return f"{self.error:.1e}" if self.nfe == nfe else f"{self.error:.1e} @{self.nfe}"


REFUSED = Point(0, math.nan)  # fewer steps than intervals


@dataclass(frozen=True)
class Case:
    """A field, where it is started, and where it leads."""

    name: str
    transport: Transport
    counter: Counted
    field: Callable[..., torch.Tensor]  # the counted network, guided or not
    x0: torch.Tensor
    y: torch.Tensor | None
    costs: tuple[float, ...]  # of an evaluation of each level
    reference: torch.Tensor

    def solve(self, method: str, **settings: object) -> Point:
        """Evaluations and error of one solver."""
        self.counter.calls = 0
        try:
            x1 = Sampler(self.transport).sample_ode(self.field, self.x0, method=method, y=self.y, **settings)
        except ValueError:
            return REFUSED
        return Point(self.counter.calls, (x1 - self.reference).square().mean().sqrt().item())


@dataclass(frozen=True)
class Results:
    """A case's points, by method and evaluations, and by adaptive method and tolerance."""

    case: Case
    fixed: dict[tuple[str, int], Point]
    adaptive: dict[tuple[str, float], Point]


def mixture_case(path: str, num_levels: int, args: argparse.Namespace, device: torch.device) -> Case:
    """The mixture, in double precision; its reference is a method of order 8 with tolerances of 1e-10."""
    transport = create_transport(path, level_edges=PatchSchedule.default(num_levels).level_edges)
    counter = Counted(GaussianMixture(path, num_levels, args.modes, args.dimensions, args.seed, device), num_levels)
    generators = sample_generators(args.seed, range(args.samples))
    x0 = transport.noise.sample((args.samples, args.dimensions), generators, device, torch.float64)
    reference = Sampler(transport).sample_ode(counter, x0, method="dopri8", atol=1e-10, rtol=1e-10)
    name = f"mixture, {path}, {num_levels} level{'s' if num_levels > 1 else ''}"
    return Case(name, transport, counter, counter, x0, None, (1.0,) * num_levels, reference)


def network_case(args: argparse.Namespace, device: torch.device) -> Case:
    """The network of --ckpt in single precision, in which its reference is solved too."""
    pretrained = load_pretrained(args.ckpt)
    model = pretrained.model.to(device).eval().requires_grad_(False)
    transport = create_transport(**pretrained.transport)
    counter = Counted(model, model.num_levels, model.num_classes)
    counter.in_channels = model.in_channels
    field = guided(counter, args)
    generators = sample_generators(args.seed, range(args.images))
    x0 = transport.noise.sample((args.images, model.in_channels, *model.input_size), generators, device)
    y = torch.arange(args.images, device=device) % model.num_classes
    reference = Sampler(transport).sample_ode(field, x0, method="rk4", num_steps=args.reference_steps, y=y)
    scales = " ".join(f"{scale:g}" for scale in args.cfg_scales)
    name = f"{pretrained.name}, {transport.path.name}, guidance {scales}"
    costs = tuple(float(model.macs(level)) for level in range(model.num_levels))
    return Case(name, transport, counter, field, x0, y, costs, reference)


# ---------------------------------------------------------------------------------------------------------------
# Measurements


def steps_within(case: Case, method: str, nfe: int) -> int:
    """The most steps of a fixed-step method that take no more evaluations than `nfe`, tried on a field of zeros."""
    zero = Counted(lambda x, t, y, level: torch.zeros_like(x), case.counter.num_levels)
    zero.breakpoints = getattr(case.field, "breakpoints", ())
    x0, steps = torch.zeros(1, 1), nfe
    while True:
        zero.calls = 0
        try:
            Sampler(case.transport).sample_ode(zero, x0, method=method, num_steps=steps)
        except ValueError:  # fewer steps than intervals: the case refuses them too
            return steps
        if zero.calls <= nfe:
            return steps
        steps = max(min(steps - 1, steps * nfe // zero.calls), 0)


def splits(schedule: PatchSchedule, costs: Sequence[float], num_steps: int) -> list[tuple[int, ...]]:
    """Steps per level of about the same cost: SPLITS times those in proportion for the finest, the rest shared."""
    fair = schedule.share_steps(num_steps, schedule.intervals(0.0, 1.0))
    coarse = sum(steps * cost for steps, cost in zip(fair[:-1], costs[:-1], strict=True))
    found = []
    for factor in SPLITS:
        finest = round(factor * fair[-1])
        scale = 1 - (finest - fair[-1]) * costs[-1] / coarse
        split = (*(round(steps * scale) for steps in fair[:-1]), finest)
        if min(split) > 0 and split not in found:
            found.append(split)
    return found


def measure(case: Case, nfe: Sequence[int]) -> Results:
    """Solve a case by every method."""
    jobs = [*product(METHODS, nfe), *product(RUNGE_KUTTA_ADAPTIVE, TOLERANCES)]
    fixed, adaptive = {}, {}
    for method, setting in tqdm(jobs, desc=case.name, leave=False, disable=not sys.stderr.isatty()):
        if method in METHODS:
            fixed[method, setting] = case.solve(method, num_steps=steps_within(case, method, setting))
        else:
            adaptive[method, setting] = case.solve(method, atol=setting, rtol=setting)
    return Results(case, fixed, adaptive)


# ---------------------------------------------------------------------------------------------------------------
# The tables


def errors_table(results: Results, nfe: Sequence[int]) -> str:
    """A row per method, a column per number of evaluations; '@' where a method takes another number."""
    lines = [["method", *map(str, nfe)]]
    for method in METHODS:
        lines.append([method, *(results.fixed[method, number].text(number) for number in nfe)])
    return table(lines)


def adaptive_table(results: Results) -> str:
    """A row per adaptive method, a column per tolerance: error and evaluations."""
    lines = [["tolerance", *(f"{tolerance:.0e}" for tolerance in TOLERANCES)]]
    for method in RUNGE_KUTTA_ADAPTIVE:
        lines.append([method, *(results.adaptive[method, tolerance].text() for tolerance in TOLERANCES)])
    return table(lines)


def splits_table(case: Case, nfe: int) -> str:
    """Error by how the steps are shared out between the levels."""

    def weigh(steps: Sequence[int]) -> float:
        return sum(number * cost for number, cost in zip(steps, case.costs, strict=True))

    schedule, lines = case.transport.schedule, [["method", "steps", "cost", "error"]]
    for method in SPLIT_METHODS:
        num_steps = steps_within(case, method, nfe)
        fair = schedule.share_steps(num_steps, schedule.intervals(0.0, 1.0))
        for split in splits(schedule, case.costs, num_steps):
            cost = weigh(split) / weigh(fair)
            point = case.solve(method, num_steps=split)
            lines.append([method, "+".join(map(str, split)), f"{cost:.2f}", point.text(point.nfe)])
    return table(lines)


def summary(mixtures: Sequence[Results], networks: Sequence[Results], nfe: int) -> str:
    """Errors at one number of evaluations: the mixtures' geometric mean (nan: not all solved), the network's."""
    lines = [["method", "mixtures", *(f"{results.case.name}" for results in networks)]]
    for method in METHODS:
        errors = [results.fixed[method, nfe].error for results in mixtures]
        mean = math.exp(sum(map(math.log, errors)) / len(errors))
        lines.append([method, f"{mean:.1e}", *(results.fixed[method, nfe].text(nfe) for results in networks)])
    return table(lines)


# ---------------------------------------------------------------------------------------------------------------
# The plot


def plot(results: Sequence[Results], path: str) -> None:
    """Error against evaluations, a panel per case; fixed-step methods in colour, adaptive ones dotted."""
    from matplotlib.figure import Figure  # slow to import

    columns = 3
    rows = math.ceil(len(results) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, found in zip(axes, results, strict=False):
        for index, method in enumerate(METHODS):
            points = [(p.nfe, p.error) for (name, _), p in found.fixed.items() if name == method]
            width = 2.4 if method in HIGHLIGHTED else 1.2
            axis.loglog(
                *zip(*points, strict=True), "o-", label=method, color=f"C{index}", markersize=3, linewidth=width
            )
        for marker, method in zip("x+123", RUNGE_KUTTA_ADAPTIVE, strict=False):
            points = [(p.nfe, p.error) for (name, _), p in found.adaptive.items() if name == method]
            axis.loglog(*zip(*points, strict=True), f"{marker}:", label=method, color="0.3", linewidth=0.8)
        axis.set_title(found.case.name)
        numbers = sorted({nfe for _, nfe in found.fixed})
        axis.set_xlim(0.8 * numbers[0], 4 * numbers[-1])
        axis.set_xticks(numbers, map(str, numbers))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3, which="both")
    for axis in axes[len(results) :]:
        axis.remove()
    figure.supxlabel("evaluations")
    figure.supylabel("RMS error")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def run(args: argparse.Namespace) -> None:
    """Print the tables and save the plot."""
    device = open_device(args.device)
    print(f"{machine(device)}; {args.samples} samples of {args.modes} modes in {args.dimensions} dimensions")
    mixtures = [mixture_case(*case, args, device) for case in product(PATHS, (1, 2, 3))]
    with user_input():
        networks = [network_case(args, device)] if args.ckpt else []
    results = []
    for case in (*mixtures, *networks):
        results.append(measure(case, args.nfe))
        print(f"\n{case.name}\n{errors_table(results[-1], args.nfe)}\n\n{adaptive_table(results[-1])}", flush=True)
    for nfe in args.nfe:
        text = summary(results[: len(mixtures)], results[len(mixtures) :], nfe)
        print(f"\nAll cases, {nfe} evaluations (mixtures: geometric mean)\n{text}", flush=True)
    for case in (*mixtures, *networks):
        if case.transport.schedule.num_levels > 1:
            for nfe in SPLIT_NFE:
                print(
                    f"\n{case.name}, {nfe} evaluations shared out between the levels\n{splits_table(case, nfe)}",
                    flush=True,
                )
    plot(results, args.out)
    print(f"\n{args.out}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    run(parse(argv))


if __name__ == "__main__":
    run_script(main)
