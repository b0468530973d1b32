"""What does writing a checkpoint cost the training that goes on meanwhile?

    python -m benchmarks.checkpoints --model PPF-B-2

Runs training steps (forward, backward, AdamW, EMA) on random data, and times them alone, and while checkpoints are
written in the background as train.py writes them. The stall is what the loop itself waits for: the call that starts the
write, and the wait for the copy before the weights change. That the writer takes part of the machine's cores and memory
bandwidth shows as longer steps beside it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.timing import add_device_args, default_precision, machine, open_device
from models import canonical_name, create_model
from runtime.checkpoints import CheckpointWriter, checkpoint_path
from runtime.errors import run_script, user_input
from runtime.speed import update_ema, use_precision
from train_utils import ArgumentParser, positive_int
from transport import create_transport

TARGET = 0.05  # stall over write time


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="checkpoints.py", description="Time training while checkpoints are written.")
    parser.add_argument("--model", default="PPF-B-2", help="name, as in models.py")
    parser.add_argument("--batch-size", type=positive_int, help="samples per step (default: 2, on CUDA 64)")
    parser.add_argument("--steps", type=positive_int, default=5, help="timed steps without a checkpoint")
    parser.add_argument("--checkpoints", type=positive_int, default=4, help="written; the first one fills the buffers")
    parser.add_argument("--dir", help="where to write (default: the system's folder for temporary files)")
    add_device_args(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print a row for each checkpoint."""
    device = open_device(args.device)
    precision = default_precision(args.precision, device)
    batch = args.batch_size or (64 if device.type == "cuda" else 2)
    with user_input():
        name = canonical_name(args.model)
    torch.manual_seed(0)
    model = create_model(name).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    transport = create_transport(level_edges=() if model.num_levels == 1 else (0.5, 0.75)[: model.num_levels - 1])
    x1 = torch.randn(batch, model.in_channels, *model.input_size, device=device)
    y = torch.zeros(batch, dtype=torch.int64, device=device)

    def step(before_update: Callable[[], None]) -> tuple[float, float]:
        """One training step; returns its seconds, and those that before_update took of them."""
        start = time.perf_counter()
        with use_precision(precision, device):
            loss = transport.training_losses(model, x1, y=y, generator=torch.Generator().manual_seed(0))["loss"].mean()
        loss.backward()
        loss.item()  # as train.py looks at the gradient's norm here
        stalled = time.perf_counter()
        before_update()
        stalled = time.perf_counter() - stalled
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, 0.999)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, stalled

    for _ in range(2):
        step(lambda: None)
    alone = statistics.median(step(lambda: None)[0] for _ in range(args.steps))
    print(f"{machine(device)}; {name}, {precision}, {batch} samples per step; "
          f"a step alone takes {alone * 1e3:.0f} ms")  # fmt: skip
    print("checkpoint       MB  write s  stall ms  stall/write  steps beside it  ms/step beside it", flush=True)
    with user_input(), tempfile.TemporaryDirectory(dir=args.dir) as folder:
        run_dir = Path(folder)
        (run_dir / "checkpoints").mkdir()
        written: list[float] = []
        writer = CheckpointWriter(run_dir, keep_last=1, tell=lambda line: written.append(time.perf_counter()))
        ratios = []
        for number in range(args.checkpoints):
            written.clear()
            start = time.perf_counter()
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
            writer.save(number, {**state, "config": {}, "step": number})
            stall = time.perf_counter() - start
            beside = []
            while not written:
                seconds, waited = step(writer.wait_copied)
                stall += waited
                beside.append(seconds)
            if failed := writer.wait():
                raise OSError(failed)
            write = written[0] - start
            ratios.append(stall / write)
            size = checkpoint_path(run_dir, number).stat().st_size / 1e6
            mean = statistics.mean(beside) * 1e3
            print(f"{number:10}  {size:7.0f}  {write:7.2f}  {stall * 1e3:8.1f}  {stall / write:11.2%}  "
                  f"{len(beside):15}  {mean:17.0f}", flush=True)  # fmt: skip
    ratio = statistics.median(ratios)
    print(f"median stall {ratio:.2%} of the write: {'within' if ratio < TARGET else 'MORE THAN'} {TARGET:.0%}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    run(build_parser().parse_args(argv))


if __name__ == "__main__":
    run_script(main)
