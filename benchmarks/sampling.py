"""Time of guided sampling, and where it goes.

    python -m benchmarks.sampling --model PPF-B-2 PPF-B-3

Sections (--sections):
    speed      from noise to samples with guidance, beside SiT at equal steps, and beside the sum of the evaluations;
               evaluations of each level: ms, images per second, model FLOPs utilisation
    precision  time in fp32, tf32 (CUDA) and bf16, and how far the samples are from those in fp32
    compile    eager and compiled (on CUDA also as CUDA graphs): ms per evaluation, seconds until the first one is done
               (less where the compiler finds its cache of an earlier run: TORCHINDUCTOR_FORCE_DISABLE_CACHES=1)
    profile    the operators that take most time (only on request)

Everything that is compared is timed in turns within one run; medians count. An evaluation here is one call of the
network on a guided batch: each image once with its label and once with the null label.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks.timing import (
    RATES,
    Bench,
    at_most,
    baseline,
    build_parser,
    open_bench,
    print_sections,
    profile_of,
    random_model,
    table,
)
from models import PyramidalPatchDiT
from pipeline import Pipeline
from runtime.errors import run_script, user_input
from runtime.speed import PRECISIONS, use_precision
from train_utils import positive_int
from transport import ODE, Guidance, PatchSchedule, create_transport

METHOD = "heun2"
SCALE = 4.0  # of guidance
SPEED_TARGETS = {2: 1.6, 3: 2.0}  # over SiT, by number of levels
SUM_TARGET = 1.05  # time from noise to samples over that of its evaluations, at most


@dataclass(frozen=True)
class SamplingBench(Bench):
    """Settings of this benchmark's run."""

    steps: int
    trained: PyramidalPatchDiT | None  # the network of --ckpt

    @property
    def solver(self) -> str:
        """The solver in words."""
        return f"{self.steps} steps of {METHOD}"


class Sampling:
    """Calling it goes from noise to samples with guidance; `evaluation` gives the parts.

    Args:
        pipe:  on its device
        bench: batch size and steps

    Raises:
        UserError: if there are fewer steps than levels.
    """

    def __init__(self, pipe: Pipeline, bench: SamplingBench) -> None:
        self.pipe, self.model, self.bench = pipe, pipe.model, bench
        generator = torch.Generator().manual_seed(0)
        shape = (bench.batch, self.model.in_channels, *self.model.input_size)
        self.x0 = torch.randn(shape, generator=generator).to(bench.device)
        self.y = torch.randint(self.model.num_classes, (bench.batch,), generator=generator).to(bench.device)
        with user_input():
            rows = pipe.check(ODE(METHOD, bench.steps), Guidance(SCALE)).rows
        self.evaluations = [number // 2 for number in rows]  # calls of the network, by level
        self.macs = bench.batch * sum(number * self.model.macs(level) for level, number in enumerate(rows))

    def __call__(self) -> torch.Tensor:
        return self.pipe.latents(self.y, ODE(METHOD, self.bench.steps), Guidance(SCALE), x0=self.x0)

    def evaluation(self, level: int) -> Callable[[], None]:
        """One call of the network, as guidance makes it."""
        x, y = torch.cat([self.x0, self.x0]), torch.cat([self.y, torch.full_like(self.y, self.model.num_classes)])
        t = torch.full((len(x),), 0.5, device=x.device)

        def call() -> None:
            with torch.no_grad(), use_precision(self.pipe.precision, self.bench.device):
                self.model(x, t, y, level=level)

        return call


def pipeline_of(model: PyramidalPatchDiT, bench: SamplingBench, precision: str, compiled: bool) -> Pipeline:
    """A model with the published process, as sample.py prepares it."""
    transport = create_transport(level_edges=PatchSchedule.default(model.num_levels).level_edges)
    return Pipeline(model, transport).to(bench.device, precision, compiled)


def random_sampling(name: str, bench: SamplingBench, compiled: bool | None = None) -> Sampling:
    """Sampling with a model of random weights."""
    compiled = bench.compiled if compiled is None else compiled
    return Sampling(pipeline_of(random_model(name, bench.device), bench, bench.precision, compiled), bench)


# ---------------------------------------------------------------------------------------------------------------
# Sections


def speed(bench: SamplingBench) -> Iterator[str]:
    """Compare models with their SiT and with the sum of their evaluations; then levels."""
    names = dict.fromkeys([*map(baseline, bench.models), *bench.models])
    samplings = {name: random_sampling(name, bench) for name in names}
    calls = {}
    for name, sampling in samplings.items():  # what is compared with its parts comes next to them
        calls[name, None] = sampling
        calls |= {(name, level): sampling.evaluation(level) for level in range(sampling.model.num_levels)}
    seconds = {key: taken.median for key, taken in bench.time(calls, "speed").items()}

    lines = [(bench.solver, "evaluations", "s/batch", *RATES, "SiT/time", "SiT/GMACs", "sum s", "time/sum")]
    levels = [("level", "tokens", "GMACs", "ms/evaluation", *RATES)]
    verdicts = []
    for name, sampling in samplings.items():
        whole, sit, model = seconds[name, None], baseline(name), sampling.model
        summed = sum(count * seconds[name, level] for level, count in enumerate(sampling.evaluations))
        faster, less = seconds[sit, None] / whole, samplings[sit].macs / sampling.macs
        rates = bench.rates(sampling.macs, bench.batch, whole)
        ratios = f"{faster:.3f}", f"{less:.3f}", f"{summed:.3f}", f"{whole / summed:.3f}"
        lines.append((name, "+".join(map(str, sampling.evaluations)), f"{whole:.3f}", *rates, *ratios))
        verdicts.append(f"{name}: {whole / summed:.3f} times its evaluations ({at_most(whole / summed, SUM_TARGET)})")
        if target := SPEED_TARGETS.get(model.num_levels):
            verdicts[-1] += f"; {faster:.2f}x SiT ({'at least' if faster >= target else 'LESS THAN'} {target:g}x)"
        for level in range(model.num_levels):
            macs, time = model.macs(level), seconds[name, level]
            rates = bench.rates(2 * bench.batch * macs, bench.batch, time)
            row = f"{model.num_tokens(level)}", f"{macs / 1e9:.2f}", f"{time * 1e3:.1f}"
            levels.append((f"{name} {level}", *row, *rates))
    yield "\n".join([table(lines), *verdicts])
    yield table(levels)


def precisions(bench: SamplingBench) -> Iterator[str]:
    """Compare precisions: time, and the distance of the samples from those in fp32."""
    used = [precision for precision in PRECISIONS if precision != "tf32" or bench.device.type == "cuda"]
    for name in ("--ckpt",) if bench.trained else bench.models:
        model = bench.trained or random_model(name, bench.device)
        samplings = {
            precision: Sampling(pipeline_of(copy.deepcopy(model), bench, precision, bench.compiled), bench)
            for precision in used
        }
        seconds = {precision: taken.median for precision, taken in bench.time(samplings, "precision").items()}
        exact = samplings["fp32"]()
        lines = [(f"{name}, {bench.solver}", "s/batch", "faster", "RMS difference", "of RMS")]
        for precision, time in seconds.items():
            difference = (samplings[precision]() - exact).square().mean().sqrt()
            share = difference / exact.square().mean().sqrt()
            faster = f"{time:.3f}", f"{seconds['fp32'] / time:.3f}"
            lines.append((precision, *faster, f"{difference:.2e}", f"{share:.2%}"))
        yield table(lines)


def compilation(bench: SamplingBench) -> Iterator[str]:
    """Compare each model's levels, eager and compiled."""
    for name in bench.models:
        torch.compiler.reset()  # what an earlier section has compiled
        calls = {}
        for way, compiled in (("eager", False), ("compiled", True)):
            sampling = random_sampling(name, bench, compiled)
            calls |= {(way, level): sampling.evaluation(level) for level in range(sampling.model.num_levels)}
        seconds = bench.time(calls, "compile")
        lines = [(f"{name}, level", "way", "first s", "ms/evaluation", "faster")]
        for (way, level), (first, time) in seconds.items():
            faster = seconds["eager", level].median / time
            lines.append((f"{level}", way, f"{first:.2f}", f"{time * 1e3:.1f}", f"{faster:.3f}"))
        yield table(lines)


def profiles(bench: SamplingBench) -> Iterator[str]:
    """Profile sampling with each model."""
    for name in bench.models:
        yield profile_of(random_sampling(name, bench), bench.device, f"{name}, sampling")


SECTIONS = {"speed": speed, "precision": precisions, "compile": compilation, "profile": profiles}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    parser = build_parser("sampling.py", "Time of guided sampling.", list(SECTIONS))
    parser.add_argument("--steps", type=positive_int, help=f"of {METHOD} (default: 4, on CUDA 50)")
    parser.add_argument("--ckpt", help="weights for `precision`, as sample.py's --ckpt (default: random ones)")
    args = parser.parse_args(argv)
    with user_input():
        trained = Pipeline.load(args.ckpt).model if args.ckpt else None
    bench = open_bench(args)
    trained = trained and trained.to(bench.device)
    steps = args.steps or (50 if bench.device.type == "cuda" else 4)
    print_sections(args.sections, SECTIONS, SamplingBench(**vars(bench), steps=steps, trained=trained))


if __name__ == "__main__":
    run_script(main)
