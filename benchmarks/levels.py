"""Do large patches save the time that their arithmetic saves?

    python -m benchmarks.levels --model PPF-B-2 PPF-B-3

Times every level of a model on the same number of tokens: a level with a quarter of the tokens per sample gets four
times the samples. All that a level costs besides its arithmetic then shows as fewer multiply-accumulates per second.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.timing import add_device_args, default_precision, machine, median_seconds, open_device, random_model
from models import PyramidalPatchDiT, canonical_name
from runtime.errors import UserError, run_script, user_input
from runtime.speed import use_precision
from train_utils import ArgumentParser, positive_int

DEFAULT_MODELS = ("PPF-S-2", "PPF-S-3", "PPF-B-2", "PPF-B-3")
BACKWARD_MACS = 3  # of forward and backward, in forward passes: one product becomes three


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="levels.py", description="Time the levels of a model at equal tokens.")
    parser.add_argument("--model", nargs="+", default=list(DEFAULT_MODELS), help="names, as in models.py")
    parser.add_argument("--tokens", type=positive_int, help="tokens per call (default: 1024, on CUDA 65536)")
    parser.add_argument("--repeats", type=positive_int, default=11, help="timed calls per level; the median counts")
    parser.add_argument("--backward", action="store_true", help="time forward and backward instead of forward only")
    add_device_args(parser)
    return parser


@dataclass(frozen=True)
class Row:
    """A level's line of the table."""

    level: int
    patch: tuple[int, int]
    tokens: int  # per sample
    batch: int  # samples per call
    macs: int  # of one call
    seconds: float  # per call

    @property
    def macs_per_second(self) -> float:
        return self.macs / self.seconds


# ---------------------------------------------------------------------------------------------------------------
# Timing


def evaluation(model: PyramidalPatchDiT, level: int, batch: int, precision: str, backward: bool) -> Callable[[], None]:
    """A function that evaluates one level on random inputs, and with `backward` its gradient as well."""
    device = next(model.parameters()).device
    x = torch.randn(batch, model.in_channels, *model.input_size, device=device)
    t = torch.rand(batch, device=device)
    y = torch.randint(model.num_classes + 1, (batch,), device=device)

    def call() -> None:
        with torch.set_grad_enabled(backward), use_precision(precision, device):
            out = model(x, t, y, level=level)
        if backward:
            out.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    return call


def measure(
    model: PyramidalPatchDiT, tokens: int, repeats: int, device: torch.device, precision: str, backward: bool
) -> list[Row]:
    """One row per level. The levels take turns, so that noise of the machine hits all of them alike.

    Raises:
        UserError: if `tokens` is not a whole number of samples at some level.
    """
    per_sample = [model.num_tokens(level) for level in range(model.num_levels)]
    if any(tokens % number for number in per_sample):
        text = ", ".join(map(str, per_sample))
        raise UserError(f"--tokens {tokens} is no whole number of samples of {text}: give a multiple of "
                        f"{math.lcm(*per_sample)}")  # fmt: skip
    batches = [tokens // number for number in per_sample]
    calls = {level: evaluation(model, level, batch, precision, backward) for level, batch in enumerate(batches)}
    seconds = median_seconds(calls, repeats, device)
    factor = BACKWARD_MACS if backward else 1
    return [
        Row(level, patch, per_sample[level], batch, factor * batch * model.macs(level), seconds[level])
        for level, (patch, batch) in enumerate(zip(model.patch_sizes, batches, strict=True))
    ]


# ---------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = ("level", "patch", "tokens", "batch", "GMACs/sample", "ms/call", "GMACs/s", "ratio")


def table(rows: Sequence[Row]) -> str:
    """The rows as text; the ratio is that of GMACs/s to the finest level's."""
    lines = [COLUMNS]
    for row in rows:
        ratio = row.macs_per_second / rows[-1].macs_per_second
        lines.append((
            f"{row.level}", f"{row.patch[0]}x{row.patch[1]}", f"{row.tokens}", f"{row.batch}",
            f"{row.macs / row.batch / 1e9:.3f}", f"{row.seconds * 1e3:.1f}", f"{row.macs_per_second / 1e9:.1f}",
            f"{ratio:.3f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def run(args: argparse.Namespace) -> None:
    """Print a table for each model."""
    device = open_device(args.device)
    precision = default_precision(args.precision, device)
    tokens = args.tokens or (65_536 if device.type == "cuda" else 1024)
    with user_input():
        names = [canonical_name(name) for name in args.model]
    mode = "forward and backward" if args.backward else "forward"
    print(f"{machine(device)}; {mode}, {precision}, {tokens} tokens per call, median of {args.repeats}")  # fmt: skip
    for name in names:
        model = random_model(name, device)
        print(f"\n{name}\n{table(measure(model, tokens, args.repeats, device, precision, args.backward))}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_script(main)
