"""Encode images once, to train on their latents.

    torchrun --nnodes=1 --nproc_per_node=N extract_latents.py --data-path /path/to/imagenet/train --out latents/imagenet
    torchrun --nnodes=1 --nproc_per_node=N train.py --data-path latents/imagenet

Writes latent files that train.py and LightningDiT read (data/latent_files.py gives their format). File k holds the
images from k * shard_size on, in the dataset's order, whichever process made it. The same command continues an
interrupted run: a file is complete or absent, and complete ones are kept.

With --max-tokens images keep their aspect ratio, and each file holds images of one size.

    python extract_latents.py convert imagenet1k_latents_256_sd_vae_ft_ema latents/fit

rewrites a set of latents that FiT publishes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.autoencoder import LatentSpace, load_autoencoder
from data.datasets import open_dataset
from data.fit_latents import convert_set
from data.images import ImageDataset, UnreadableImage, printable
from data.latent_files import STORAGE, Shard, settings_of, shard_files, shard_metadata, shard_name, write_shard
from data.parts import Part, parts_of, stored_sizes
from data.sizes import SizeRule
from runtime.distributed import agree, check_same_flags, on_main, start_processes
from runtime.errors import UserError, run_script, user_input
from runtime.files import complete_file
from runtime.speed import default_precision, use_precision
from train_utils import ArgumentParser, natural_int, positive_int, some_text

SETTINGS = "settings.json"
DEFAULT_SHARD_SIZE = 10_000
SMALL_DATASET_SHARDS = 16  # at least so many files, so that as many processes have work


def encoder_precision(text: str) -> str:
    """An argparse type: fp32 or tf32."""
    if text not in ("fp32", "tf32"):
        raise argparse.ArgumentTypeError(f"the encoder runs in fp32 or tf32, as it does in training, not in {text}")
    return text


def build_parser() -> ArgumentParser:
    """The flags of extract_latents.py."""
    parser = ArgumentParser(prog="extract_latents.py", description="Encode images to files of latents.")
    images = "a folder of class folders, or a zip archive of images"
    parser.add_argument("--data-path", required=True, type=some_text, help=images)
    out = "folder for the latent files"
    parser.add_argument("--out", "--features-path", type=some_text, required=True, metavar="DIR", help=out)
    parser.add_argument("--vae", default="ema", help="autoencoder: ema, mse, a hub id or a local folder")
    parser.add_argument("--image-size", type=positive_int, help="(default: 256 for folders, archives their own)")
    tokens = "keep aspect ratios: the size of each image is the best of at most N tokens (of 2x2 latents)"
    parser.add_argument("--max-tokens", type=positive_int, metavar="N", help=tokens)
    multiple = "pixels that divide the sides then, as the patches must (default: those of 4x4 latents)"
    parser.add_argument("--size-multiple", type=positive_int, metavar="P", help=multiple)
    parser.add_argument("--dtype", choices=list(STORAGE), default="fp16", help="of the stored latents")
    precision = "of the encoder (default: tf32 on CUDA, else fp32)"
    parser.add_argument("--precision", type=encoder_precision, metavar="{fp32,tf32}", help=precision)
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images encoded at once, per process")
    shard_size = "images per file (default: 10000, or a 16th of a small dataset)"
    parser.add_argument("--shard-size", type=positive_int, help=shard_size)
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--num-workers", type=natural_int, default=workers, help="image reading processes per rank")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave images out that cannot be read")
    return parser


# ---------------------------------------------------------------------------------------------------------------
# Settings of an interrupted run


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a folder begun with other settings or data (ValueError); the same data may have moved."""
    file = out / SETTINGS
    source = Path(settings["data_path"]).resolve()
    if out.resolve() == source or source in out.resolve().parents:
        raise ValueError(f"--out {out} is in --data-path, whose images would then be taken for latents: give another")
    if not file.exists():
        if shard_files(out):
            raise ValueError(f"{out} holds shards but no {SETTINGS}: give another --out")
        return
    try:
        begun = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot read {file}: give another --out") from error
    if begun.get("data") == settings["data"]:
        begun["data_path"] = settings["data_path"]
    for name, value in settings.items():
        if name == "data" and begun.get(name, value) != value:
            raise ValueError(
                f"the files or labels in {settings['data_path']} have changed since {out} was begun: give another --out"
            )
        if name != "data" and begun.get(name) != value:
            flag = {"images": "the number of images", "classes": "the number of classes"}.get(
                name, "--" + name.replace("_", "-")
            )
            raise ValueError(
                f"{flag} was {begun.get(name)} when {out} was begun and is {value} now: "
                "continue with the same settings, or give another --out"
            )


def is_complete(file: Path, metadata: dict[str, str]) -> bool:
    """True if a latent file exists and belongs to this set; False for a damaged one, which is made again."""
    try:
        return settings_of(Shard.read(file)) == metadata
    except (FileNotFoundError, ValueError):
        return False


# ---------------------------------------------------------------------------------------------------------------
# Images


class Failure(NamedTuple):
    """An image that could not be read: the message, and if the image itself is the cause and may be skipped."""

    message: str
    can_be_skipped: bool


class ReadableImages(Dataset):
    """(image, label, number) of a dataset's images by (number, is the square version), or the failure to read it."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    def __getitem__(self, item: tuple[int, bool]) -> tuple[torch.Tensor, int, int] | Failure:
        index, square = item
        try:
            return *self.images.load(index, square=square), index
        except OSError as error:
            return Failure(str(error), isinstance(error, UnreadableImage))


def collate(
    items: list[tuple[torch.Tensor, int, int] | Failure],
) -> tuple[torch.Tensor | None, torch.Tensor, list[Failure]]:
    """Images (n, 3, H, W), labels and numbers (2, n), and failures; None if there are no images."""
    failures = [item for item in items if isinstance(item, Failure)]
    readable = [item for item in items if not isinstance(item, Failure)]
    images = torch.stack([image for image, _, _ in readable]) if readable else None
    return images, torch.tensor([item[1:] for item in readable], dtype=torch.int64).reshape(-1, 2).T, failures


# ---------------------------------------------------------------------------------------------------------------
# Latent files


def make_shard(
    file: Path,
    part: Part,
    batches: Iterator[Any],
    autoencoder: LatentSpace,
    metadata: dict[str, str],
    args: argparse.Namespace,
    device: torch.device,
    progress: tqdm,
) -> None:
    """Encode the next batches of images, those of the part, and write them as a latent file.

    Raises:
        UserError: at the first image that cannot be read, unless --skip-unreadable; if the disk cannot be read; if
            latents are not finite in --dtype; if the file cannot be written.
    """
    dtype, shape, size = STORAGE[args.dtype], autoencoder.latent_shape((3, *part.size)), len(part.images)
    names = ["latents", "latents_flip"] + ([] if autoencoder.deterministic else ["latents_std", "latents_flip_std"])
    tensors = {name: torch.empty(size, *shape, dtype=dtype) for name in names}
    numbers = ["labels"] if args.max_tokens is None else ["labels", "index"]
    tensors |= {name: torch.empty(size, dtype=torch.int64) for name in numbers}
    skipped: list[str] = []
    seen = rows = 0
    while seen < size:
        images, found, unreadable = next(batches)
        for failure in unreadable:
            if not failure.can_be_skipped:
                raise UserError(f"{failure.message}; the same command continues once it can be read")
            if not args.skip_unreadable:
                raise UserError(f"{failure.message}; --skip-unreadable leaves such images out")
            skipped.append(failure.message)
        if images is not None:
            place = slice(rows, rows + len(images))
            images = images.to(device, non_blocking=True)
            for name, pixels in (("latents", images), ("latents_flip", images.flip(-1))):
                mean, deviation = autoencoder.raw_moments(pixels)
                tensors[name][place] = mean.to(dtype).cpu()
                if deviation is not None:
                    tensors[f"{name}_std"][place] = deviation.to(dtype).cpu()
            for name, values in zip(numbers, found, strict=False):
                tensors[name][place] = values
            rows += len(images)
        done = len(unreadable) + (0 if images is None else len(images))
        seen += done
        progress.update(done)
    tensors = {name: tensor[:rows] for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"the latents of {autoencoder.name} are not finite in {args.dtype}: give --dtype fp32")
    with user_input():
        version = {} if args.max_tokens is None else {"square": str(int(part.square))}
        write_shard(file, tensors, {**metadata, **version, "skipped": json.dumps(skipped)})


def wait_for_all() -> None:
    """Wait for every process: a slow one may need hours for a file, and the default timeout is minutes."""
    if dist.is_initialized():
        dist.barrier(dist.new_group(backend="gloo", timeout=timedelta(days=30)))


def summary(out: Path, seconds: float) -> str:
    """Text for the end: the size of the finished set, and the images that were skipped."""
    shards = [Shard.read(file) for file in shard_files(out)]
    skipped = [message for shard in shards for message in json.loads(shard.metadata["skipped"])]
    shapes = list(dict.fromkeys(shard.shape for shard in shards))
    latents = "x".join(map(str, shapes[0])) if len(shapes) == 1 else f"of {len(shapes)} sizes"
    images = sum(shard.rows for shard in shards if shard.metadata.get("square") != "1")
    lines = [f"{printable(str(out))}: {images:,} images in {len(shards)} shards, latents {latents}, {seconds:.0f} s"]
    if skipped:
        lines += [f"skipped {len(skipped)} that cannot be read:", *(f"  {message}" for message in skipped)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# The run


def prepare(args: argparse.Namespace, device: torch.device) -> tuple[ImageDataset, LatentSpace]:
    """The images and the autoencoder.

    Raises:
        OSError, ValueError: if either cannot be loaded, or they do not fit together.
    """
    dataset = open_dataset(args.data_path, args.image_size)
    if dataset.kind != "images":
        raise ValueError(f"--data-path {args.data_path} holds {dataset.kind}: give a folder or zip archive of images")
    autoencoder = load_autoencoder(args.vae, device)
    if not isinstance(autoencoder, LatentSpace):
        raise ValueError("--vae none encodes nothing: train.py --vae none reads the images themselves")
    if args.max_tokens is not None:
        multiple = args.size_multiple or 4 * autoencoder.factor
        dataset.take_sizes(SizeRule(args.max_tokens, multiple, 2 * autoencoder.factor))
        autoencoder.latent_shape((3, multiple, multiple))
    autoencoder.latent_shape(dataset.image_shape)
    return dataset, autoencoder


def begin(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings, and remove what a killed process left.

    Raises:
        ValueError, OSError: if the folder holds other work, or cannot be written to.
    """
    check_settings(out, settings)
    with complete_file(out / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    for torn in (*out.glob(".latents_*"), *out.glob(".tmp*")):  # ours and safetensors', of a killed process
        torn.unlink()


def missing_files(out: Path, metadata: dict[str, str], shards: int) -> list[int]:
    """Numbers of the missing ones of so many latent files."""
    missing = [k for k in range(shards) if not is_complete(out / shard_name(k), metadata)]
    if len(missing) < shards:
        print(f"{shards - len(missing)} of {shards} shards are there already")
    return missing


def convert(argv: Sequence[str]) -> None:
    """Run extract_latents.py convert with these command-line arguments."""
    parser = ArgumentParser(prog="extract_latents.py convert", description="Rewrite a set of FiT's latents.")
    parser.add_argument("source", metavar="IN", help="folder with FiT's folders from_16_to_256 and so on")
    parser.add_argument("out", metavar="OUT", help="folder for the latent files")
    parser.add_argument("--dtype", choices=list(STORAGE), default="fp16", help="of the stored latents")
    parser.add_argument("--shard-size", type=positive_int, default=DEFAULT_SHARD_SIZE, help="images per file")
    args = parser.parse_args(argv)
    with user_input():
        images = convert_set(args.source, args.out, args.dtype, args.shard_size)
    print(f"{printable(args.out)}: {images:,} images")


def extract(argv: Sequence[str] | None = None) -> None:
    """Run extract_latents.py with these command-line arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["convert"]:
        return convert(argv[1:])
    start = time.perf_counter()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.max_tokens is None and args.size_multiple is not None:
        parser.error("--size-multiple is about images of many sizes: give --max-tokens as well, or leave it out")
    if args.max_tokens is not None and args.image_size is not None:
        parser.error("the sizes follow from --max-tokens: leave --image-size out")
    out = Path(args.out)
    processes = start_processes()
    device = processes.device
    check_same_flags(vars(args), processes, but={"data_path", "vae", "num_workers"})
    dataset, autoencoder = agree(lambda: prepare(args, device), processes)
    precision = args.precision or default_precision(device, training=False)
    shard_size = args.shard_size or min(DEFAULT_SHARD_SIZE, math.ceil(len(dataset) / SMALL_DATASET_SHARDS))
    settings = {
        "data_path": str(Path(args.data_path).resolve()),
        "vae": autoencoder.name,
        "max_tokens": args.max_tokens,
        "size_multiple": dataset.sizes and dataset.sizes.multiple,
        "image_size": dataset.image_size,
        "dtype": args.dtype,
        "precision": precision,
        "shard_size": shard_size,
        "images": len(dataset),
        "classes": dataset.num_classes,
        "data": {name: value for name, value in dataset.identity().items() if name in ("names", "labels")},
    }
    on_main(lambda: begin(out, settings), processes)
    sizes = on_main(lambda: stored_sizes(out, dataset, args.num_workers), processes) if dataset.sizes else None
    parts = parts_of(dataset, sizes, shard_size)
    metadata = shard_metadata(autoencoder, dataset.image_size, dataset.num_classes, len(parts), dataset.sizes)
    missing = on_main(lambda: missing_files(out, metadata, len(parts)), processes)
    mine = missing[processes.rank :: processes.world_size]

    batches = [
        [(image, parts[k].square) for image in parts[k].images[first : first + args.batch_size]]
        for k in mine
        for first in range(0, len(parts[k].images), args.batch_size)
    ]
    loader = DataLoader(
        ReadableImages(dataset),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=device.type == "cuda",
    )
    progress = tqdm(
        total=sum(len(parts[k].images) for k in mine),
        unit="image",
        smoothing=0.02,
        desc=f"process 1 of {processes.world_size}",
        disable=not (processes.is_main and mine),
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
    images = iter(loader)
    with use_precision(precision, device):
        for k in mine:
            make_shard(out / shard_name(k), parts[k], images, autoencoder, metadata, args, device, progress)
    progress.close()
    wait_for_all()
    if processes.is_main:
        print(summary(out, time.perf_counter() - start))


if __name__ == "__main__":
    run_script(extract)
