"""How fast are samples made, and where does the time go?

    python -m benchmarks.sampling --model PPF-B-2 PPF-B-3

Sections (--sections):
    speed      from noise to samples with guidance, beside SiT at equal steps, and beside the sum of the evaluations;
               evaluations of each level: ms, images per second, model FLOPs utilisation
    precision  time in fp32, tf32 (CUDA) and bf16, and how far the samples are from those in fp32
    compile    eager and compiled (on CUDA also as CUDA graphs): ms per evaluation, seconds until the first one is done
               (less where the compiler finds its cache of an earlier run: TORCHINDUCTOR_FORCE_DISABLE_CACHES=1)

Everything that is compared is timed in turns within one run; medians count. An evaluation here is one call of the
network on a guided batch: each image once with its label and once with the null label.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from UNKNOWN import replay_levels

from benchmarks.timing import (
    add_device_args,
    add_peak_args,
    baseline,
    default_precision,
    machine,
    median_seconds,
    open_device,
    peak_flops,
    print_profile,
    random_model,
    seconds_of,
    table,
)
from models import PyramidalPatchDiT, canonical_name
from runtime.errors import UserError, run_script, user_input
from runtime.speed import PRECISIONS, compile_levels, use_precision
from train_utils import ArgumentParser, positive_int
from transport import ClassifierFreeGuidance, PatchSchedule, Sampler, create_transport
from weights.pretrained import load_pretrained

SECTIONS = ("speed", "precision", "compile")
SCALE = 4.0  # of guidance
SPEED_TARGETS = {2: 1.6, 3: 2.0}  # over SiT, by number of levels
SUM_TARGET = 1.05  # time from noise to samples over that of its evaluations, at most


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="sampling.py", description="Time of guided sampling.")
    parser.add_argument("--model", nargs="+", default=["PPF-B-2", "PPF-B-3"], help="names, as in models.py")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--batch-size", type=positive_int, help="images at a time (default: 4, on CUDA 64)")
    parser.add_argument("--steps", type=positive_int, help="of the solver (default: 4, on CUDA 50)")
    parser.add_argument("--method", default="heun2", help="of the ODE, as sample.py --sampling-method")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed calls of each kind; the median counts")
    parser.add_argument("--compile", action="store_true", help="compile the blocks in `speed` and `precision`")
    parser.add_argument("--cuda-graphs", action="store_true", help="and launch evaluations as CUDA graphs there")
    parser.add_argument("--ckpt", help="weights for `precision`, as sample.py's --ckpt (default: random ones)")
    parser.add_argument("--profile", action="store_true", help="print the operators that take most time of a sampling")
    add_device_args(parser)
    add_peak_args(parser)
    return parser


class Sampling:
    """Calling it goes from noise to samples with guidance; `evaluation` gives the parts.

    Args:
        model: on its device
        batch: images
    """

    def __init__(self, model: PyramidalPatchDiT, batch: int, precision: str, args: argparse.Namespace) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.precision = precision
        self.method, self.steps = args.method, args.steps
        self.sampler = Sampler(create_transport(level_edges=PatchSchedule.default(model.num_levels).level_edges))
        generator = torch.Generator().manual_seed(0)
        shape = (batch, model.in_channels, *model.input_size)
        self.x0 = torch.randn(shape, generator=generator).to(self.device)
        self.y = torch.randint(model.num_classes, (batch,), generator=generator).to(self.device)

    def __call__(self) -> torch.Tensor:
        return self._solve(self.model)

    def _solve(self, model: Callable[..., torch.Tensor]) -> torch.Tensor:
        guided = ClassifierFreeGuidance(model, SCALE, self.model.num_classes)
        with use_precision(self.precision, self.device):
            return self.sampler.sample_ode(guided, self.x0, method=self.method, num_steps=self.steps, y=self.y)

    def evaluations(self) -> Counter[int]:
        """How often the network is called, by level."""
        return self._count()[0]

    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        return sum(samples * self.model.macs(level) for level, samples in self._count()[1].items())

    def _count(self) -> tuple[Counter[int], Counter[int]]:
        calls, samples = Counter(), Counter()

        class Network(nn.Module):
            num_levels = self.model.num_levels

            def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int) -> torch.Tensor:
                calls[level] += 1
                samples[level] += len(x)
                return torch.zeros_like(x)

        self._solve(Network())
        return calls, samples

    def evaluation(self, level: int) -> Callable[[], None]:
        """One call of the network, as guidance makes it."""
        x, y = torch.cat([self.x0, self.x0]), torch.cat([self.y, torch.full_like(self.y, self.model.num_classes)])
        t = torch.full((len(x),), 0.5, device=self.device)

        def call() -> None:
            with torch.no_grad(), use_precision(self.precision, self.device):
                self.model(x, t, y, level=level)

        return call


def prepare(
    model: PyramidalPatchDiT, precision: str, compiled: bool = False, replayed: bool = False
) -> PyramidalPatchDiT:
    """Make a model ready to be evaluated, in place, as sample.py does."""
    model.eval().requires_grad_(False)
    if precision == "bf16":
        model.blocks.bfloat16()
    if compiled:
        compile_levels(model)
    if replayed:
        replay_levels(model)
    return model


def ways(device: torch.device) -> list[tuple[str, dict[str, bool]]]:
    """What `compile` compares: a name, and arguments of `prepare`."""
    both = [("eager", {}), ("compiled", {"compiled": True})]
    if device.type != "cuda":
        return both
    return both + [(f"{name}, CUDA graphs", {**flags, "replayed": True}) for name, flags in both]


# ---------------------------------------------------------------------------------------------------------------
# Sections


def speed(names: Sequence[str], batch: int, precision: str, peak: float, args: argparse.Namespace) -> str:
    """Tables of models beside their SiT, and of their levels."""
    device = open_device(args.device)
    every = dict.fromkeys([*(baseline(name) for name in names), *names])
    models = {name: prepare(random_model(name, device), precision, args.compile, args.cuda_graphs) for name in every}
    samplings = {name: Sampling(model, batch, precision, args) for name, model in models.items()}
    calls = {}
    for name, sampling in samplings.items():  # what is compared with its parts comes next to them
        calls[name, None] = sampling
        calls |= {(name, level): sampling.evaluation(level) for level in range(sampling.model.num_levels)}
    seconds = median_seconds(calls, args.repeats, device, note="speed")

    lines = [(f"{args.steps} steps of {args.method}", "evaluations", "s/batch", "images/s", "TFLOP/s", "MFU",
              "SiT/time", "SiT/GMACs", "sum s", "time/sum")]  # fmt: skip
    verdicts = []
    for name, sampling in samplings.items():
        whole, sit = seconds[name, None], baseline(name)
        count, macs = sampling.evaluations(), sampling.macs()
        summed = sum(number * seconds[name, level] for level, number in count.items())
        faster, less = seconds[sit, None] / whole, samplings[sit].macs() / macs
        lines.append((
            name, "+".join(str(count[level]) for level in range(sampling.model.num_levels)), f"{whole:.3f}",
            f"{batch / whole:.2f}", f"{2 * macs / whole / 1e12:.3f}", f"{2 * macs / whole / peak:.1%}",
            f"{faster:.3f}", f"{less:.3f}", f"{summed:.3f}", f"{whole / summed:.3f}",
        ))  # fmt: skip
        verdicts.append(f"{name}: {whole / summed:.3f} times its evaluations "
                        f"({'within' if whole / summed <= SUM_TARGET else 'MORE THAN'} {SUM_TARGET:g})")  # fmt: skip
        if target := SPEED_TARGETS.get(sampling.model.num_levels):
            verdicts[-1] += f"; {faster:.2f}x SiT ({'at least' if faster >= target else 'LESS THAN'} {target:g}x)"

    levels = [("level", "tokens", "GMACs", "ms/evaluation", "images/s", "TFLOP/s", "MFU")]
    for (name, level), time in seconds.items():
        if level is not None:
            model = samplings[name].model
            flops = 2 * 2 * batch * model.macs(level)
            levels.append((
                f"{name} {level}", f"{model.num_tokens(level)}", f"{model.macs(level) / 1e9:.2f}", f"{time * 1e3:.1f}",
                f"{batch / time:.1f}", f"{flops / time / 1e12:.3f}", f"{flops / time / peak:.1%}",
            ))  # fmt: skip
    return "\n".join([table(lines), *verdicts, "", table(levels)])


def precisions(name: str, model: PyramidalPatchDiT, batch: int, args: argparse.Namespace) -> str:
    """Table of a model's precisions: time, and the distance of the samples from those in fp32."""
    device = next(model.parameters()).device
    used = [precision for precision in PRECISIONS if precision != "tf32" or device.type == "cuda"]
    samplings = {}
    for precision in used:
        ready = prepare(copy.deepcopy(model), precision, args.compile, args.cuda_graphs)
        samplings[precision] = Sampling(ready, batch, precision, args)
    seconds = median_seconds(samplings, args.repeats, device, warmup=1, note="precision")
    exact = samplings["fp32"]()
    size = exact.square().mean().sqrt()
    lines = [(f"{name}, {args.steps} steps of {args.method}", "s/batch", "faster", "RMS difference", "of RMS")]
    for precision, sampling in samplings.items():
        difference = (sampling() - exact).square().mean().sqrt()
        faster = seconds["fp32"] / seconds[precision]
        lines.append((precision, f"{seconds[precision]:.3f}", f"{faster:.3f}", f"{difference:.2e}",
                      f"{difference / size:.2%}"))  # fmt: skip
    return table(lines)


def compilation(name: str, batch: int, precision: str, args: argparse.Namespace) -> str:
    """Table of a model's levels, eager and compiled, on CUDA also as CUDA graphs."""
    device = open_device(args.device)
    torch.compiler.reset()  # what an earlier section has compiled
    first, calls = {}, {}
    for kind, flags in ways(device):
        sampling = Sampling(prepare(random_model(name, device), precision, **flags), batch, precision, args)
        for level in range(sampling.model.num_levels):
            calls[kind, level] = sampling.evaluation(level)
            first[kind, level] = seconds_of(calls[kind, level], device)
    seconds = median_seconds(calls, args.repeats, device, note="compile")
    lines = [(f"{name}, level", "way", "first s", "ms/evaluation", "faster")]
    for (kind, level), time in seconds.items():
        faster = seconds["eager", level] / time
        lines.append((f"{level}", kind, f"{first[kind, level]:.2f}", f"{time * 1e3:.1f}", f"{faster:.3f}"))
    return table(lines)


# ---------------------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace) -> None:
    """Print the tables of the chosen sections."""
    device = open_device(args.device)
    if args.cuda_graphs and device.type != "cuda":
        raise UserError("--cuda-graphs is for CUDA devices: leave it out, or give --device cuda")
    precision = default_precision(args.precision, device)
    batch = args.batch_size or (64 if device.type == "cuda" else 4)
    args.steps = args.steps or (50 if device.type == "cuda" else 4)
    with user_input():
        names = list(dict.fromkeys(canonical_name(name) for name in args.model))
        trained = load_pretrained(args.ckpt).model.to(device) if args.ckpt else None
    peak, source = peak_flops(args.peak_tflops, precision, device)
    print(f"{machine(device)}; {precision}, {batch} images, guidance {SCALE:g}"
          f"{', compiled' if args.compile else ''}{', CUDA graphs' if args.cuda_graphs else ''}, "
          f"median of {args.repeats}; peak {peak / 1e12:.3f} TFLOP/s ({source})", flush=True)  # fmt: skip
    if "speed" in args.sections:
        with user_input():
            print(f"\n{speed(names, batch, precision, peak, args)}", flush=True)
    if "precision" in args.sections:
        for name in [args.ckpt] if trained is not None else names:
            model = random_model(name, device) if trained is None else trained
            with user_input():
                print(f"\n{precisions(name, model, batch, args)}", flush=True)
    for name in names if "compile" in args.sections else ():
        print(f"\n{compilation(name, batch, precision, args)}", flush=True)
    for name in names if args.profile else ():
        model = prepare(random_model(name, device), precision, args.compile, args.cuda_graphs)
        sampling = Sampling(model, batch, precision, args)
        print_profile(sampling, device, f"{name}, sampling")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_script(main)
