"""What does a training step cost, in time and memory?

    python -m benchmarks.training --model PPF-B-2 PPF-B-3

Sections (--sections):
    ratio     a step beside one of SiT with the same batch: is the time saved that the arithmetic saves?
    levels    a batch of each level alone: ms per step, images per second, model FLOPs utilisation
    passes    ways of running a mixed batch: a pass per level, one pass for all levels, packed rows with a dense mask
    parts     what a step spends besides forward and backward
    memory    activations and peak, beside SiT's and beside packed rows with a dense mask
    variants  activation checkpointing and compilation

Everything that is compared is timed in turns within one run; medians count. MFU is the model's own FLOPs, 3 forward
passes, per second over the device's peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from UNKNOWN import step_metrics

from benchmarks.data import make_shards
from benchmarks.steps import TRAINING_MACS, WAYS, Setting, Step, measure_memory
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
    seconds_of,
    table,
)
from data.latents import LatentShards
from data.order import StepSampler, training_loader
from models import canonical_name
from runtime.errors import run_script, user_input
from runtime.logs import RunLog
from train import draw_step
from train_utils import ArgumentParser, natural_int, positive_int

SECTIONS = ("ratio", "levels", "passes", "parts", "memory", "variants")
TIME_TARGET = 1.05  # time ratio over GMACs ratio, at most
PARTS_TARGET = 0.05  # of a step
LOG_EVERY = 100  # train.py's default


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="training.py", description="Time and memory of training steps.")
    parser.add_argument("--model", nargs="+", default=["PPF-B-2", "PPF-B-3"], help="names, as in models.py")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="what to measure")
    parser.add_argument("--batch-size", type=positive_int, help="samples per step (default: 4, on CUDA 64)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed steps of each kind; the median counts")
    parser.add_argument("--joint-levels", action=argparse.BooleanOptionalAction, default=True,
                        help="all levels in one pass, as train.py does, or a pass each")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the blocks (of packed rows never)")
    parser.add_argument("--num-workers", type=natural_int, default=0, help="data loading processes of `parts`")
    parser.add_argument("--profile", action="store_true", help="print the operators that take most time of a step")
    add_device_args(parser)
    add_peak_args(parser)
    return parser


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.0f}"


def verdict(good: bool) -> str:
    return "within" if good else "MORE THAN"


# ---------------------------------------------------------------------------------------------------------------
# Time


def rate_cells(step: Step, seconds: float, peak: float) -> tuple[str, ...]:
    """GMACs per sample and pass, ms per step, images per second, TFLOP/s, MFU."""
    flops = 2 * step.macs
    gmacs = step.macs / TRAINING_MACS / step.setting.batch / 1e9
    return (f"{gmacs:.2f}", f"{seconds * 1e3:.1f}", f"{step.setting.batch / seconds:.1f}",
            f"{flops / seconds / 1e12:.3f}", f"{flops / seconds / peak:.1%}")  # fmt: skip


RATE_COLUMNS = ("GMACs", "ms/step", "images/s", "TFLOP/s", "MFU")


def ratio(settings: Sequence[Setting], args: argparse.Namespace, peak: float) -> str:
    """Table of models beside their SiT."""
    names = dict.fromkeys([*(baseline(setting.model) for setting in settings), *(s.model for s in settings)])
    steps = {name: Step(dataclasses.replace(settings[0], model=name)) for name in names}
    seconds = median_seconds(steps, args.repeats, settings[0].device, note="ratio")
    lines = [("step of a mixed batch", *RATE_COLUMNS, "time/SiT", "GMACs/SiT", "time/GMACs")]
    found = []
    for name, step in steps.items():
        sit = baseline(name)
        time, work = seconds[name] / seconds[sit], step.macs / steps[sit].macs
        rates = rate_cells(step, seconds[name], peak)
        lines.append((name, *rates, f"{time:.3f}", f"{work:.3f}", f"{time / work:.3f}"))
        found.append(time / work)
    good = max(found) <= TIME_TARGET
    return f"{table(lines)}\n{verdict(good)} {TIME_TARGET:g} times the GMACs' ratio: at most {max(found):.3f}"


def levels(setting: Setting, args: argparse.Namespace, peak: float) -> str:
    """Table of the levels of one model, each with the whole batch to itself."""
    step = Step(dataclasses.replace(setting, way="separate"))

    def at(level: int) -> Callable[[], None]:
        def call() -> None:
            step.only_level(level)
            step()

        return call

    number = step.model.num_levels
    seconds = median_seconds({level: at(level) for level in range(number)}, args.repeats, setting.device, note="levels")
    lines = [(f"{setting.model}, level", "tokens", *RATE_COLUMNS)]
    for level in range(number):
        step.only_level(level)
        lines.append((f"{level}", f"{step.model.num_tokens(level)}", *rate_cells(step, seconds[level], peak)))
    return table(lines)


def passes(setting: Setting, args: argparse.Namespace) -> str:
    """Table of the ways of running one mixed batch of a model, with the same weights."""
    step = Step(setting)

    def by(way: str) -> Callable[[], None]:
        def call() -> None:
            step.way = way
            step()

        return call

    seconds = median_seconds({way: by(way) for way in WAYS}, args.repeats, setting.device, note="passes")
    lines = [(f"{setting.model}, {'+'.join(map(str, step.samples))} samples", "ms/step", "ratio", "activations MB")]
    for step.way in WAYS:
        time = seconds[step.way]
        kept = megabytes(step.kept())
        lines.append((step.way, f"{time * 1e3:.1f}", f"{time / seconds['separate']:.3f}", kept))
    return table(lines)


# ---------------------------------------------------------------------------------------------------------------
# Parts


def parts(setting: Setting, args: argparse.Namespace) -> str:
    """Table of what train.py does in a step, each part by itself, with the functions that it calls."""
    step = Step(setting)
    step()
    step.backward()  # gradients for the optimizer and the norm
    batch, device = setting.batch, setting.device
    flags = argparse.Namespace(global_batch_size=batch, global_seed=0, class_dropout_prob=0.1)
    shape = (step.model.in_channels, *step.model.input_size)
    numbers = iter(range(10**9))

    def draw() -> None:
        number = next(numbers)
        for tensor in draw_step(number, range(number * batch, (number + 1) * batch), shape, step.transport, flags):
            tensor.to(device, non_blocking=True)

    with tempfile.TemporaryDirectory() as folder:
        shards = LatentShards(make_shards(Path(folder), max(1000, batch), 2, "fp16"))
        sampler = StepSampler(0, 10**6, batch)
        loader = iter(training_loader(shards, 0, sampler, args.num_workers, pin_memory=device.type == "cuda"))

        def load() -> None:
            for tensor in next(loader):
                tensor.to(device, non_blocking=True)

        log = RunLog(Path(folder), 0, {})
        sums = torch.ones(2, step.model.num_levels, device=device)

        def record() -> None:
            log.record(step_metrics(next(numbers), sums, 1.0, 1e-4))

        calls = {
            "forward and backward": step.backward,
            "gradient norm": step.norm,
            "AdamW": step.optimizer.step,
            "EMA": step.update_ema,
            "random numbers": draw,
            f"data, {args.num_workers} workers": load,
            f"log, every {LOG_EVERY} steps": record,
        }
        seconds = median_seconds(calls, args.repeats, device, note="parts")
        loader = None  # its workers end before the files do
    *_, log_line = calls
    seconds[log_line] /= LOG_EVERY
    first, *others = seconds
    total = sum(seconds.values())
    lines = [(f"{setting.model}, part of a step", "ms", "share")]
    lines += [(name, f"{taken * 1e3:.2f}", f"{taken / total:.2%}") for name, taken in seconds.items()]
    lines.append(("all", f"{total * 1e3:.2f}", "100.00%"))
    share = sum(seconds[name] for name in others) / total
    return f"{table(lines)}\nbesides {first}: {share:.2%}, {verdict(share < PARTS_TARGET)} {PARTS_TARGET:.0%}"


# ---------------------------------------------------------------------------------------------------------------
# Memory


def memory(settings: Sequence[Setting]) -> str:
    """Table of models beside their SiT and beside packed rows, each step in a process of its own on the CPU."""
    lines = [("memory of a step", "way", "activations MB", "peak MB", "activations/SiT")]
    plain = [dataclasses.replace(setting, compiled=False) for setting in settings]
    sits = dict.fromkeys(
        dataclasses.replace(setting, model=baseline(setting.model), way="separate") for setting in plain
    )
    kept = {}
    for setting in [*sits, *(dataclasses.replace(each, way=way) for each in plain for way in WAYS)]:
        used = measure_memory(setting)
        kept[setting.model] = kept.get(setting.model, used.kept)
        share = f"{used.kept / kept[baseline(setting.model)]:.3f}"
        lines.append((setting.model, setting.way, megabytes(used.kept), megabytes(used.peak), share))
    return table(lines)


def variants(setting: Setting, args: argparse.Namespace) -> str:
    """Table of a model with and without activation checkpointing and compilation."""
    kinds = [dataclasses.replace(setting, checkpointing=checkpointing, compiled=compiled)
             for compiled in (False, True) for checkpointing in (False, True)]  # fmt: skip
    first, seconds = variant_seconds(kinds, args.repeats)
    lines = [(f"{setting.model}, variant", "first s", "ms/step", "ratio", "activations MB", "peak MB")]
    for kind in kinds:
        name = f"{'compiled' if kind.compiled else 'eager'}{', checkpointing' if kind.checkpointing else ''}"
        time, used = seconds[kind], measure_memory(kind)
        lines.append((name, f"{first[kind]:.1f}", f"{time * 1e3:.1f}", f"{time / seconds[kinds[0]]:.3f}",
                      megabytes(used.kept), megabytes(used.peak)))  # fmt: skip
    return table(lines)


def variant_seconds(kinds: Sequence[Setting], repeats: int) -> tuple[dict[Setting, float], dict[Setting, float]]:
    """Seconds of the first step of each kind, compilation included, and of a later one."""
    torch.compiler.reset()  # what an earlier section has compiled
    steps = {compiled: Step(dataclasses.replace(kinds[0], compiled=compiled)) for compiled in (False, True)}

    def run(kind: Setting) -> Callable[[], None]:
        def call() -> None:
            steps[kind.compiled].model.activation_checkpointing = kind.checkpointing
            steps[kind.compiled]()

        return call

    calls, device = {kind: run(kind) for kind in kinds}, kinds[0].device
    first = {kind: seconds_of(call, device) for kind, call in calls.items()}
    return first, median_seconds(calls, repeats, device, note="variants")


# ---------------------------------------------------------------------------------------------------------------
# The run


def run(args: argparse.Namespace) -> None:
    """Print the tables of the chosen sections."""
    device = open_device(args.device)
    precision = default_precision(args.precision, device)
    batch = args.batch_size or (64 if device.type == "cuda" else 4)
    way = "joint" if args.joint_levels else "separate"
    with user_input():
        names = dict.fromkeys(canonical_name(name) for name in args.model)
    settings = [Setting(name, batch, device, precision, way, compiled=args.compile) for name in names]
    peak, source = peak_flops(args.peak_tflops, precision, device)
    compiled = ", compiled" if args.compile else ""
    print(f"{machine(device)}; {precision}, {batch} samples per step, levels {way}{compiled}, median of "
          f"{args.repeats}; peak {peak / 1e12:.3f} TFLOP/s ({source})", flush=True)  # fmt: skip
    if "ratio" in args.sections:
        print(f"\n{ratio(settings, args, peak)}", flush=True)
    for name, section in (("levels", lambda setting: levels(setting, args, peak)),
                          ("passes", lambda setting: passes(setting, args)),
                          ("parts", lambda setting: parts(setting, args))):  # fmt: skip
        for setting in settings if name in args.sections else ():
            print(f"\n{section(setting)}", flush=True)
    if "memory" in args.sections:
        print(f"\n{memory(settings)}", flush=True)
    for setting in settings if "variants" in args.sections else ():
        print(f"\n{variants(setting, args)}", flush=True)
    for setting in settings if args.profile else ():
        print_profile(Step(setting), device, f"{setting.model}, training step")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_script(main)
