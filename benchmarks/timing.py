"""What the benchmarks share: devices, clocks, the peak rate of a device, tables, the profiler."""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from models import MODELS, PyramidalPatchDiT, create_model
from runtime.errors import UserError
from runtime.speed import PRECISIONS, use_precision
from train_utils import positive_float

WARMUP = 2  # calls that are not timed
PEAK_REPEATS = 10
PROFILED_CALLS = 2
PROFILE_ROWS = 20

# Dense bf16 matrix products, TFLOP/s, from the vendor's data sheets; the first name that occurs counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "A40": 150,
               "A10": 125, "L40S": 362, "L4": 121, "RTX 4090": 165}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Devices


def add_device_args(parser: argparse.ArgumentParser) -> None:
    """--device and --precision."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--precision", choices=PRECISIONS, help="(default: bf16 on CUDA, fp32 on the CPU)")


def add_peak_args(parser: argparse.ArgumentParser) -> None:
    """--peak-tflops, which model FLOPs utilisation is relative to."""
    parser.add_argument("--peak-tflops", type=positive_float, metavar="P",
                        help="peak rate of the device that MFU is relative to (default: in bf16 the data sheet's where "
                        "the card is known, else that of a large matrix product, measured)")  # fmt: skip


def open_device(name: str | None) -> torch.device:
    """The device of that name, or the fastest there is.

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
    """What the machine calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: torch.device) -> str:
    """Device, torch and threads, for a benchmark's first line."""
    return f"{device_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def default_precision(precision: str | None, device: torch.device) -> str:
    """--precision, or train.py's default on the device."""
    return precision or ("bf16" if device.type == "cuda" else "fp32")


def random_model(name: str, device: torch.device, **overrides: object) -> PyramidalPatchDiT:
    """A model whose weights are all random: modulation and heads start at zero, and zeros can be faster."""
    torch.manual_seed(0)
    model = create_model(name, **overrides).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def baseline(name: str) -> str:
    """The SiT of a model's size: PPF-B-2 -> SiT-B/2."""
    fields = {key: value for key, value in MODELS[name].items() if key != "patch_sizes"}
    return next(known for known, other in MODELS.items() if other == {"patch_sizes": ((2, 2),), **fields})


# ---------------------------------------------------------------------------------------------------------------
# Time


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_seconds(
    calls: Mapping[object, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warmup: int = WARMUP,
    note: str = "",
) -> dict[object, float]:
    """Median seconds of each call. They take turns, back and forth, so that noise of the machine hits all alike."""
    seconds: dict[object, list[float]] = {key: [] for key in calls}
    with tqdm(total=(warmup + repeats) * len(calls), desc=note, leave=False, disable=not sys.stderr.isatty()) as bar:
        for _ in range(warmup):
            for call in calls.values():
                call()
                bar.update()
        for repeat in range(repeats):
            for key in calls if repeat % 2 == 0 else reversed(calls):
                seconds[key].append(seconds_of(calls[key], device))
                bar.update()
    return {key: statistics.median(taken) for key, taken in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------
# Rates


def peak_flops(tflops: float | None, precision: str, device: torch.device) -> tuple[float, str]:
    """FLOP/s that utilisation is relative to, and where the number is from.

    Args:
        tflops: --peak-tflops, or None for the data sheet's number or else a measured one
    """
    if tflops is not None:
        return tflops * 1e12, "as given"
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
# What is printed


def table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of text as columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def print_profile(call: Callable[[], object], device: torch.device, title: str) -> None:
    """Print the operators that take most of the device's time."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    call()
    with profile(activities=activities) as profiler:
        for _ in range(PROFILED_CALLS):
            seconds_of(call, device)
    print(f"\n{title}: {PROFILED_CALLS} calls")
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(order, PROFILE_ROWS, max_name_column_width=60), flush=True)
