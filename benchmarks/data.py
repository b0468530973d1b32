"""How fast are latent shards read, and what do workers cost?

    python -m benchmarks.data

Writes shards of ImageNet's shape (4x32x32 latents of 256x256 images) to a temporary folder and reads them at random,
as training does. The baseline reads them as LightningDiT's dataset does: for each sample it opens the shard with
safetensors' safe_open and takes a slice. Files that were just written are in the system's memory: this measures the
program, not the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import table
from data.latents import FORMAT, STORAGE, LatentShards, shard_files, shard_name, write_shard
from data.order import TrainingStream, identity_collate
from runtime.errors import run_script
from train_utils import ArgumentParser, natural_int, positive_int

SHAPE = (4, 32, 32)
PARTS = ("reads", "memory", "start")


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="data.py", description="Random reads from latent shards of ImageNet's shape.")
    parser.add_argument("--samples", type=positive_int, default=50_000, help="in all shards together")
    parser.add_argument("--shards", type=positive_int, default=10, help="number of files")
    parser.add_argument("--dtype", choices=list(STORAGE), default="fp16", help="of the stored latents")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="samples per batch")
    parser.add_argument("--batches", type=positive_int, default=200, help="timed batches of each measurement")
    parser.add_argument("--repeats", type=positive_int, default=3, help="of each measurement; the median counts")
    parser.add_argument("--workers", type=natural_int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS), help="what to measure")
    parser.add_argument("--folder", help="where to make the shards (default: the system's temporary folder)")
    return parser


def make_shards(folder: Path, samples: int, shards: int, dtype: str) -> Path:
    """Shards as extract_latents.py writes them, all with the same random numbers."""
    rows = -(-samples // shards)
    names = ("latents", "latents_flip", "latents_std", "latents_flip_std")
    tensors = {name: torch.randn(rows, *SHAPE).to(STORAGE[dtype]) for name in names}
    tensors["labels"] = torch.randint(1000, (rows,))
    metadata = {"format": FORMAT, "autoencoder": "random", "shift": "0.0", "scale": "0.18215", "image_size": "256",
                "num_classes": "1000", "shards": str(shards)}  # fmt: skip
    for number in range(shards):
        write_shard(folder / shard_name(number), tensors, metadata)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Reads


class SafeOpenSlices(Dataset):
    """The baseline: LightningDiT's way to read one sample."""

    def __init__(self, folder: Path) -> None:
        self.places = []
        for file in shard_files(folder):
            with safe_open(file, framework="pt") as shard:
                self.places += [(str(file), row) for row in range(shard.get_slice("labels").get_shape()[0])]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        file, row = self.places[index]
        with safe_open(file, framework="pt") as shard:
            name = "latents" if np.random.rand() > 0.5 else "latents_flip"
            latents, label = shard.get_slice(name)[row : row + 1], shard.get_slice("labels")[row : row + 1]
        return latents.squeeze(0).float() * 0.18215, label.squeeze(0)


class PlainReads(Dataset):
    """`latents` and labels as they are: no flips, no draws from the posterior."""

    def __init__(self, shards: LatentShards) -> None:
        self.shards = shards

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.shards.load_many(indices)


def samples_per_second(dataset: Dataset, order: list[list[int]], workers: int, collate: Callable | None) -> float:
    """Through a DataLoader, from its first batch on; `order` has one batch more than is timed."""
    batches = iter(DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate))
    next(batches)
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    return count / (time.perf_counter() - start)


def reads(folder: Path, args: argparse.Namespace) -> str:
    """Table of samples per second."""
    shards = LatentShards(folder)
    random = torch.randint(len(shards), (args.batches + 1, args.batch_size)).tolist()
    positions = torch.arange((args.batches + 1) * args.batch_size).view(-1, args.batch_size).tolist()
    ways = [
        ("safe_open, get_slice (baseline)", SafeOpenSlices(folder), random, None),
        ("mean or draw as stored", PlainReads(shards), random, as_it_is),
        ("training: flips and posterior draws", TrainingStream(shards, seed=0), positions, as_it_is),
    ]
    lines = [("samples/s", "workers", "median", "lowest", "highest", "ratio")]
    for workers in args.workers:
        rates = [[] for _ in ways]
        for _ in range(args.repeats):  # in turns, so that noise of the machine hits all of them alike
            for (_, dataset, order, collate), found in zip(ways, rates, strict=True):
                found.append(samples_per_second(dataset, order, workers, collate))
        for (name, *_), found in zip(ways, rates, strict=True):
            ratio = np.median(found) / np.median(rates[0])
            numbers = (f"{value:.0f}" for value in (np.median(found), min(found), max(found)))
            lines.append((name, str(workers), *numbers, f"{ratio:.1f}"))
    return table(lines)


# ---------------------------------------------------------------------------------------------------------------
# Memory and workers


def resident_bytes() -> int:
    """Memory of this process, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def growth(folder: Path, batches: int, batch_size: int) -> int:
    """Bytes by which this process's memory grows, at its peak, while it opens and reads shards."""
    warm_up = torch.randn(batch_size, *SHAPE) + torch.randn(batch_size, *SHAPE)  # torch's own threads and buffers
    del warm_up
    before = peak = resident_bytes()
    stream = TrainingStream(LatentShards(folder), seed=0)
    for first in range(0, batches * batch_size, batch_size):
        stream.__getitems__(range(first, first + batch_size))
        peak = max(peak, resident_bytes())
    return peak - before


def _send_growth(connection: multiprocessing.connection.Connection, *arguments: object) -> None:
    connection.send(growth(*arguments))


def memory(folders: Sequence[Path], args: argparse.Namespace) -> str:
    """Table of the memory that reading takes, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    lines = [("memory", "data MB", "read MB", "growth MB")]
    for folder in folders:
        here, there = context.Pipe()
        process = context.Process(target=_send_growth, args=(there, folder, args.batches, args.batch_size))
        process.start()
        grown = here.recv()
        process.join()
        size = sum(file.stat().st_size for file in shard_files(folder))
        read = 2 * args.batches * args.batch_size * torch.Size(SHAPE).numel() * STORAGE[args.dtype].itemsize
        lines.append(
            (f"{len(shard_files(folder))} shard(s)", *(f"{bytes_ / 2**20:.1f}" for bytes_ in (size, read, grown)))
        )
    return table(lines)


def start(folders: Sequence[Path], args: argparse.Namespace) -> str:
    """Table of what a worker is sent, and seconds until two workers gave a batch."""
    lines = [("worker start", "sent bytes", "fork s", "spawn s")]
    for folder in folders:
        stream = TrainingStream(LatentShards(folder), seed=0)
        seconds = []
        for method in ("fork", "spawn"):
            loader = DataLoader(stream, batch_sampler=[range(args.batch_size)], num_workers=2, collate_fn=as_it_is,
                                multiprocessing_context=method)  # fmt: skip
            begin = time.perf_counter()
            next(iter(loader))
            seconds.append(f"{time.perf_counter() - begin:.2f}")
        lines.append((f"{len(shard_files(folder))} shard(s)", str(len(pickle.dumps(stream))), *seconds))
    return table(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        many = make_shards(Path(temporary) / "many", args.samples, args.shards, args.dtype)
        one = make_shards(Path(temporary) / "one", -(-args.samples // args.shards), 1, args.dtype)
        print(f"{args.samples} samples {'x'.join(map(str, SHAPE))} {args.dtype} in {args.shards} shard(s), batches of "
              f"{args.batch_size}, torch {torch.__version__}, {torch.get_num_threads()} threads")  # fmt: skip
        if "reads" in args.parts:
            print(f"\n{reads(many, args)}", flush=True)
        if "memory" in args.parts:
            print(f"\n{memory([one, many], args)}", flush=True)
        if "start" in args.parts:
            print(f"\n{start([one, many], args)}", flush=True)


if __name__ == "__main__":
    run_script(main)
