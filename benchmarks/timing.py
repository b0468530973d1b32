"""The parts that the benchmarks share: flags, devices, clocks, a device's peak rate, random networks, tables."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from models import MODELS, PyramidalPatchDiT, canonical_name, create_model
from runtime.errors import UserError, user_input
from runtime.speed import PRECISIONS, use_precision
from train_utils import ArgumentParser, positive_int

WARMUP = 2  # calls that the median leaves out
PEAK_REPEATS = 10
PROFILED_CALLS = 2
PROFILE_ROWS = 20
ON_REQUEST = ("sizes", "profile")  # the first takes other models

# Dense bf16 matrix products, TFLOP/s, from the vendor's data sheets; the first name that occurs counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "A40": 150,
    "A10": 125,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}


# ---------------------------------------------------------------------------------------------------------------
# A benchmark's run


@dataclass(frozen=True)
class Bench:
    """Settings of a benchmark's run."""

    models: tuple[str, ...]  # canonical names
    batch: int  # samples per call
    repeats: int
    compiled: bool
    device: torch.device
    precision: str
    peak: float  # FLOP/s of the device, of which MFU is a share

    def time(self, calls: Mapping[Any, Callable[[], object]], note: str) -> dict[Any, Seconds]:
        """Time calls in turns."""
        return time_in_turns(calls, self.repeats, self.device, note)

    def rates(self, macs: float, samples: int, seconds: float) -> tuple[str, str, str]:
        """Cells of the columns RATES: samples per second, TFLOP/s and MFU of `macs` multiply-accumulates."""
        flops = 2 * macs / seconds
        return f"{samples / seconds:.2f}", f"{flops / 1e12:.3f}", f"{flops / self.peak:.1%}"


RATES = ("images/s", "TFLOP/s", "MFU")


def build_parser(prog: str, description: str, sections: Sequence[str]) -> ArgumentParser:
    """Flags of a benchmark that times models; ON_REQUEST are sections that are printed only if they are named."""
    parser = ArgumentParser(prog=prog, description=description)
    default = [section for section in sections if section not in ON_REQUEST]
    parser.add_argument("--model", nargs="+", default=["PPF-B-2", "PPF-B-3"], help="names, as in models.py")
    parser.add_argument("--sections", nargs="+", choices=sections, default=default, help="what to measure")
    parser.add_argument("--batch-size", type=positive_int, help="samples per call (default: 4, on CUDA 64)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed calls of each kind; the median counts")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, as train.py and sample.py do")
    parser.add_argument("--precision", choices=PRECISIONS, help="(default: bf16 on CUDA, fp32 on the CPU)")
    add_device_arg(parser)
    return parser


def add_device_arg(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def open_bench(args: argparse.Namespace) -> Bench:
    """Take the device, measure its peak where no data sheet gives it, and print the benchmark's first line."""
    device = open_device(args.device)
    cuda = device.type == "cuda"
    with user_input():
        models = tuple(dict.fromkeys(canonical_name(name) for name in args.model))
    precision, batch = args.precision or ("bf16" if cuda else "fp32"), args.batch_size or (64 if cuda else 4)
    peak, source = peak_flops(precision, device)
    compiled = ", compiled" if args.compile else ""
    print(
        f"{machine(device)}; {precision}{compiled}, {batch} samples, median of {args.repeats}; "
        f"peak {peak / 1e12:.3f} TFLOP/s ({source})",
        flush=True,
    )
    return Bench(models, batch, args.repeats, args.compile, device, precision, peak)


def print_sections(names: Sequence[str], sections: Mapping[str, Callable[[Any], Iterator[str]]], bench: Bench) -> None:
    """Print the tables of the chosen sections, each as soon as it is measured."""
    for name in dict.fromkeys(names):
        for text in sections[name](bench):
            print(f"\n{text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Devices and networks


def open_device(name: str | None) -> torch.device:
    """Return the device of that name, or the fastest there is.

    Raises:
        UserError: if it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def device_name(device: torch.device) -> str:
    """Product name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """Device, torch and threads, for a benchmark's first line."""
    return f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def random_model(name: str, device: torch.device, **overrides: object) -> PyramidalPatchDiT:
    """Create a model whose weights are all random: modulation and heads start at zero, and zeros can be faster."""
    torch.manual_seed(0)
    model = create_model(name, **overrides).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def baseline(name: str) -> str:
    """Name the SiT of a model's size: PPF-B-2 -> SiT-B/2, and for pixels PPF-B-2/16 -> SiT-B/16.

    Raises:
        UserError: if there is none, as for PPFiT-S-2.
    """
    fields = MODELS[name]
    finest = fields["patch_sizes"][-1:] if "input_size" in fields else ((2, 2),)
    single = [known for known, other in MODELS.items() if other == {**fields, "patch_sizes": finest}]
    if not single:
        raise UserError(f"there is no model of a single level to compare {name} with: choose other --sections")
    return single[0]


class ZeroField:
    """A field that is zero: solvers call it as they call a network, so that their evaluations can be counted."""

    num_classes = 0

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        return torch.zeros_like(x)


# ---------------------------------------------------------------------------------------------------------------
# Time


class Seconds(NamedTuple):
    """Durations of one call among several repetitions."""

    first: float  # the very first one, compilation included
    median: float  # of those after the warm-up


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_in_turns(
    calls: Mapping[Any, Callable[[], object]], repeats: int, device: torch.device, note: str = ""
) -> dict[Any, Seconds]:
    """Time each call `repeats` times. They take turns, back and forth, so that noise of the machine hits all alike."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    rounds = WARMUP + repeats
    with tqdm(total=rounds * len(calls), desc=note, leave=False, disable=not sys.stderr.isatty()) as bar:
        for turn in range(rounds):
            for key in calls if turn % 2 == 0 else reversed(calls):
                seconds[key].append(seconds_of(calls[key], device))
                bar.update()
    return {key: Seconds(taken[0], statistics.median(taken[WARMUP:])) for key, taken in seconds.items()}


def peak_flops(precision: str, device: torch.device) -> tuple[float, str]:
    """FLOP/s that utilisation is relative to, and its source: the data sheet, else a product of two large matrices."""
    known = [peak for name, peak in PEAK_TFLOPS.items() if name in device_name(device)]
    if precision == "bf16" and known:
        return known[0] * 1e12, "dense bf16, data sheet"
    side = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    with use_precision("fp32" if precision == "bf16" else precision, device):
        seconds = min(seconds_of(lambda: a @ b, device) for _ in range(PEAK_REPEATS))
    return 2 * side**3 / seconds, f"best of {PEAK_REPEATS} products of {side}x{side} matrices in {precision}"


# ---------------------------------------------------------------------------------------------------------------
# Text


def table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def at_most(value: float, bound: float) -> str:
    """Compare a number with its target, in words."""
    return f"{'within' if value <= bound else 'MORE THAN'} {bound:g}"


def profile_of(call: Callable[[], object], device: torch.device, title: str) -> str:
    """Table of the operators that take most of the device's time."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    call()
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_CALLS):
            seconds_of(call, device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    text = profiler.key_averages().table(order, PROFILE_ROWS, max_name_column_width=60)
    return f"{title}: {PROFILED_CALLS} calls\n{text}"
