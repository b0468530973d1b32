"""Error of a solver by evaluations, for equal steps, shifted ones and those of the measured grid (--step-grid auto).

    python -m benchmarks.grids
    python -m benchmarks.grids --ckpt results/demo

Cases are those of benchmarks/solvers.py: Gaussian mixtures, whose velocity is known in closed form, on every path, and
with --ckpt a trained network under guidance. The error is the root mean square distance from the ODE's exact solution.
Grids are measured on other noise than that of the errors. The last column asks whether 20 evaluations of a grid are
as good as 30 of equal steps: its error there over theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch

from benchmarks.solvers import Case, Point, add_network_args, mixture_case, network_case, steps_within
from benchmarks.timing import add_device_arg, machine, open_device, table
from pipeline import GRID_SAMPLES
from runtime.errors import run_script, user_input
from runtime.rng import Stream, sample_generators
from train_utils import ArgumentParser
from transport import PATHS, Sampler, shifted_grid
from transport.grids import Grid

METHODS = ("ab2", "dpmpp_2m", "heun2")
NFE = (10, 20, 30, 50)
SHIFTS = (0.3, 0.5, 2.0)  # LightningDiT (arXiv:2501.01423) samples with 0.3


def measured_grid(case: Case, method: str) -> Grid:
    """The grid of --step-grid auto for a case."""
    shape, generators = (GRID_SAMPLES, *case.x0.shape[1:]), sample_generators(0, range(GRID_SAMPLES), Stream.GRID)
    x0 = case.transport.noise.sample(shape, generators, case.x0.device, case.x0.dtype)
    y = None if case.y is None else torch.arange(GRID_SAMPLES, device=x0.device) % case.field.num_classes
    return Sampler(case.transport).measure_grid(case.field, x0, method, y)


def grids_for(case: Case, method: str) -> dict[str, Grid | None]:
    """The grids that are compared, by name."""
    shifted = {f"shift {shift:g}": shifted_grid(shift) for shift in SHIFTS}
    return {"uniform": None, **shifted, "auto": measured_grid(case, method)}


def rows_of(method: str, points: Mapping[tuple[str, int], Point]) -> list[list[str]]:
    """A row of the table per grid."""
    names = list(dict.fromkeys(name for name, _ in points))
    rows = []
    for name in names:
        ratio = points[name, 20].error / points["uniform", 30].error
        rows.append([f"{method}, {name}", *(points[name, nfe].text(nfe) for nfe in NFE), f"{ratio:.2f}"])
    return rows


def measure(case: Case) -> str:
    """The table of a case."""
    lines = [["evaluations", *map(str, NFE), "20 to uniform's 30"]]
    for method in METHODS:
        points = {}
        for (name, grid), nfe in product(grids_for(case, method).items(), NFE):
            points[name, nfe] = case.solve(method, num_steps=steps_within(case, method, nfe), grid=grid)
        lines += rows_of(method, points)
    return table(lines)


def build_parser() -> ArgumentParser:
    """Flags of this benchmark."""
    parser = ArgumentParser(prog="grids.py", description="Error of solvers by evaluations, for grids of steps.")
    add_network_args(parser)
    add_device_arg(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.cfg_scales and not args.ckpt:
        parser.error("--cfg-scales has no effect without --ckpt")
    device = open_device(args.device)
    print(machine(device))
    with user_input():
        networks = [network_case(args.ckpt, args.cfg_scales or [1.5], device)] if args.ckpt else []
    for case in (*networks, *(mixture_case(*kind, device) for kind in product(PATHS, (1, 2, 3)))):
        print(f"\n{case.name}\n{measure(case)}", flush=True)


if __name__ == "__main__":
    run_script(main)
