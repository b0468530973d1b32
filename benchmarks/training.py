"""Time and memory of a training step.

    python -m benchmarks.training --model PPF-B-2 PPF-B-3
    python -m benchmarks.training --model PPFiT-S-3 --sections sizes --batch-size 16

Sections (--sections):
    ratio     a step beside one of SiT with the same batch: is the time saved that the arithmetic saves?
    levels    a batch of each level alone: ms per step, images per second, model FLOPs utilisation
    passes    ways of running a mixed batch: a pass per level, one pass for all levels, packed rows with a dense mask
    parts     the share of a step that is not forward and backward
    memory    activations and peak, beside SiT's and beside packed rows with a dense mask
    variants  activation checkpointing and compilation
    sizes     images of many sizes beside squares, and beside rows padded to the longest (only on request)
    profile   the operators that take most time (only on request)

Everything that is compared is timed in turns within one run; medians count. MFU is the model's own FLOPs, 3 forward
passes, per second over the device's peak.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.steps import TRAINING_MACS, WAYS, Step, measure_memory
from benchmarks.timing import (
    RATES,
    Bench,
    at_most,
    baseline,
    build_parser,
    open_bench,
    print_sections,
    profile_of,
    table,
)
from data.datasets import open_dataset
from data.latent_files import FORMAT
from data.order import StepSampler, training_loader
from data.sizes import SizeRule
from models import MODELS
from runtime.errors import UserError, run_script
from runtime.logs import RunLog, StepMeter
from runtime.rng import draw_step

TIME_TARGET = 1.05  # time ratio over GMACs ratio, at most
SIZES_TARGET = 1.10  # time per MAC over that of squares, at most
PARTS_TARGET = 0.05  # of a step
LOG_EVERY = 100  # train.py's default
COLUMNS = ("GMACs", "ms/step", *RATES)

# (width, height) of images in the proportions of ImageNet's, whose most frequent aspect ratios are 4:3 and 3:2.
IMAGES = [(500, 375)] * 7 + [(500, 333)] * 4 + [(375, 500)] * 2 + [(333, 500), (500, 500), (500, 281)]
MAX_TOKENS = 256


def megabytes(size: int | None) -> str:
    """Bytes as text, in MB; '-' where they are not known."""
    return "-" if size is None else f"{size / 1e6:.0f}"


# ---------------------------------------------------------------------------------------------------------------
# Time


def cells(step: Step, seconds: float) -> tuple[str, ...]:
    """Cells of COLUMNS: GMACs per sample and forward pass, milliseconds, and rates."""
    gmacs = step.macs / TRAINING_MACS / step.bench.batch / 1e9
    return f"{gmacs:.2f}", f"{seconds * 1e3:.1f}", *step.bench.rates(step.macs, step.bench.batch, seconds)


def ratio(bench: Bench) -> Iterator[str]:
    """Compare models with their SiT."""
    names = dict.fromkeys([*map(baseline, bench.models), *bench.models])
    steps = {name: Step(name, bench, compiled=bench.compiled) for name in names}
    seconds = bench.time(steps, "ratio")
    lines, worst = [("step of a mixed batch", *COLUMNS, "time/SiT", "GMACs/SiT", "time/GMACs")], 0.0
    for name, step in steps.items():
        sit, time = baseline(name), seconds[name].median
        slower, work = time / seconds[sit].median, step.macs / steps[sit].macs
        lines.append((name, *cells(step, time), f"{slower:.3f}", f"{work:.3f}", f"{slower / work:.3f}"))
        worst = max(worst, slower / work)
    yield f"{table(lines)}\n{at_most(worst, TIME_TARGET)} times the GMACs' ratio: at most {worst:.3f}"


def levels(bench: Bench) -> Iterator[str]:
    """Compare the levels of each model, each with the whole batch to itself."""
    for name in bench.models:
        step = Step(name, bench, compiled=bench.compiled)
        calls = {level: partial(step.run_as, "separate", level=level) for level in range(step.model.num_levels)}
        lines = [(f"{name}, level", "tokens", *COLUMNS)]
        for level, seconds in bench.time(calls, "levels").items():
            row = cells(step.change("separate", level=level), seconds.median)
            lines.append((f"{level}", f"{step.model.num_tokens(level)}", *row))
        yield table(lines)


def passes(bench: Bench) -> Iterator[str]:
    """Compare the ways of running one mixed batch of each model, with the same weights."""
    for name in bench.models:
        step = Step(name, bench, compiled=bench.compiled)
        seconds = bench.time({way: partial(step.run_as, way) for way in WAYS}, "passes")
        lines = [(f"{name}, {'+'.join(map(str, step.samples))} samples", "ms/step", "ratio", "activations MB")]
        for way in WAYS:
            time, kept = seconds[way].median, step.change(way).kept()
            lines.append((way, f"{time * 1e3:.1f}", f"{time / seconds['separate'].median:.3f}", megabytes(kept)))
        yield table(lines)


# ---------------------------------------------------------------------------------------------------------------
# Many sizes


def image_sizes(number: int) -> list[tuple[int, int]]:
    """Sizes (H, W) in latent pixels of so many images, as --max-tokens chooses them, in a fixed random order."""
    order = torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0)).tolist()
    rule = SizeRule(MAX_TOKENS)
    sizes = [rule.size_of(*IMAGES[order[index % len(order)]]) for index in range(number)]
    return [(height // 8, width // 8) for height, width in sizes]


def sizes(bench: Bench) -> Iterator[str]:
    """Compare a batch of many sizes and levels with squares, and with rows padded to the longest."""
    for name in bench.models:
        if MODELS[name].get("position") != "rope":
            raise UserError(f"the section sizes takes models of any size, as PPFiT-S-2, and {name} knows one alone")
        yield sizes_of(Step(name, bench), name)


def sizes_of(step: Step, name: str) -> str:
    """Table of steps with the same weights: squares of the finest level alone with as many tokens come first."""
    square = step.model.input_size
    mixed, squares = step.draw(image_sizes(step.bench.batch)), step.draw([square] * step.bench.batch)
    step.batch, finest = mixed, step.model.num_levels - 1
    number = max(1, round(step.tokens / step.model.num_tokens(finest)))
    runs = {
        "squares, finest level alone": (step.draw([square] * number, finest), "joint"),
        "squares, all levels": (squares, "joint"),
        "many sizes, all levels": (mixed, "joint"),
        "many sizes, padded with a mask": (mixed, "padded"),
    }
    seconds = step.bench.time({run: partial(step.run_on, *how) for run, how in runs.items()}, "sizes")
    lines, ratios = [(f"{name}, a step of", "samples", "groups", "tokens", "GMACs", "ms/step", "time/GMACs")], {}
    for run, (batch, _) in runs.items():
        step.batch = batch
        ratios[run] = seconds[run].median / step.macs
        shown = ratios[run] / next(iter(ratios.values()))
        groups = len(set(zip(step.levels, batch.sizes, strict=True)))
        numbers = f"{len(batch.sizes)}", f"{groups}", f"{step.tokens}", f"{step.macs / 1e9:.1f}"
        lines.append((run, *numbers, f"{seconds[run].median * 1e3:.1f}", f"{shown:.3f}"))
    squares_ratio, _, ours, padded = ratios.values()
    return (
        f"{table(lines)}\n{at_most(ours / squares_ratio, SIZES_TARGET)} times what the GMACs cost in squares: "
        f"{ours / squares_ratio:.3f}; padded rows take {padded / ours:.2f} times as long"
    )


# ---------------------------------------------------------------------------------------------------------------
# Parts


def parts(bench: Bench) -> Iterator[str]:
    """Time each part of train.py's step by itself, with the functions that it calls."""
    for name in bench.models:
        with tempfile.TemporaryDirectory() as folder:
            yield parts_of(Step(name, bench, compiled=bench.compiled), name, Path(folder))


def parts_of(step: Step, name: str, folder: Path) -> str:
    """Table of the parts of a step; latents and a log are written to the folder."""
    step()
    step.backward()  # gradients for the optimizer and the norm
    batch, device = step.bench.batch, step.bench.device
    settings = {"seed": 0, "batch_size": batch, "dropout": 0.1}
    shape = (step.model.in_channels, *step.model.input_size)
    numbers = iter(range(10**9))

    def draw() -> None:
        number = next(numbers)
        positions = range(number * batch, (number + 1) * batch)
        for tensor in draw_step(number, positions, shape, step.transport, **settings):
            tensor.to(device, non_blocking=True)

    write_latents(folder / "latents.safetensors", max(1000, batch), shape)
    sampler = StepSampler(0, 10**6, batch)
    loader = iter(training_loader(open_dataset(str(folder)), 0, sampler, 0, pin_memory=device.type == "cuda"))

    def load() -> None:
        for tensor in next(loader):
            tensor.to(device, non_blocking=True)

    log = RunLog(folder, 0, {})
    meter = StepMeter(step.model.num_levels, batch, device)
    ones, level = torch.ones(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)
    terms = {"loss": ones, "velocity_error": ones, "level": level}

    def write_record() -> None:
        meter.add_losses(terms)
        meter.step_done(1.0)
        log.record(meter.record(next(numbers), 1e-4, epoch=1.0))

    calls = {
        "forward and backward": step.backward,
        "gradient norm": step.norm,
        "AdamW": step.optimizer.step,
        "EMA": step.update_ema,
        "random numbers": draw,
        "data, without workers": load,
        "log": write_record,
    }
    seconds = {part: taken.median for part, taken in step.bench.time(calls, "parts").items()}
    seconds["log"] /= LOG_EVERY
    total = sum(seconds.values())
    lines = [(f"{name}, part of a step", "ms", "share")]
    lines += [
        (part, f"{taken * 1e3:.2f}", f"{taken / total:.2%}") for part, taken in (*seconds.items(), ("all", total))
    ]
    share = 1 - seconds["forward and backward"] / total
    return f"{table(lines)}\nbesides forward and backward: {share:.2%}, {at_most(share, PARTS_TARGET)}"


def write_latents(path: Path, samples: int, shape: Sequence[int]) -> None:
    """Write random latents and labels as extract_latents.py does."""
    names = ("latents", "latents_flip", "latents_std", "latents_flip_std")
    tensors = {name: torch.randn(samples, *shape).half() for name in names}
    metadata = {"format": FORMAT, "autoencoder": "random", "shift": "0.0", "scale": "0.18215"}
    metadata |= {"image_size": "256", "num_classes": "1000"}
    save_file(tensors | {"labels": torch.randint(1000, (samples,))}, path, metadata)


# ---------------------------------------------------------------------------------------------------------------
# Memory


def memory(bench: Bench) -> Iterator[str]:
    """Compare models with their SiT and with packed rows."""
    lines, kept = [("memory of a step", "way", "activations MB", "peak MB", "activations/SiT")], {}
    sits = [(name, "separate") for name in dict.fromkeys(map(baseline, bench.models))]
    for name, way in (*sits, *((name, way) for name in bench.models for way in WAYS)):
        used = measure_memory(name, bench, way)
        kept.setdefault(name, used.kept)
        share = used.kept / kept[baseline(name)]
        lines.append((name, way, megabytes(used.kept), megabytes(used.peak), f"{share:.3f}"))
    yield table(lines)


def variants(bench: Bench) -> Iterator[str]:
    """Compare each model with and without activation checkpointing and compilation."""
    for name in bench.models:
        torch.compiler.reset()  # what an earlier section has compiled
        steps = {compiled: Step(name, bench, compiled=compiled) for compiled in (False, True)}
        kinds = {
            "eager": (False, False),
            "eager, checkpointing": (True, False),
            "compiled": (False, True),
            "compiled, checkpointing": (True, True),
        }
        calls = {kind: partial(steps[compiled].run_as, "joint", again) for kind, (again, compiled) in kinds.items()}
        seconds = bench.time(calls, "variants")
        lines = [(f"{name}, variant", "first s", "ms/step", "ratio", "activations MB", "peak MB")]
        for kind, (first, time) in seconds.items():
            used = measure_memory(name, bench, "joint", *kinds[kind])
            times = f"{first:.1f}", f"{time * 1e3:.1f}", f"{time / seconds['eager'].median:.3f}"
            lines.append((kind, *times, megabytes(used.kept), megabytes(used.peak)))
        yield table(lines)


# ---------------------------------------------------------------------------------------------------------------
# The run


def profiles(bench: Bench) -> Iterator[str]:
    """Profile a step of each model."""
    for name in bench.models:
        yield profile_of(Step(name, bench, compiled=bench.compiled), bench.device, f"{name}, training step")


SECTIONS = {
    "ratio": ratio,
    "levels": levels,
    "passes": passes,
    "parts": parts,
    "memory": memory,
    "variants": variants,
    "sizes": sizes,
    "profile": profiles,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    args = build_parser("training.py", "Time and memory of training steps.", list(SECTIONS)).parse_args(argv)
    print_sections(args.sections, SECTIONS, open_bench(args))


if __name__ == "__main__":
    run_script(main)
