"""Draw images for a few class labels, or measure the likelihood of given ones.

    python sample.py ODE --ckpt results/000-PPF-T-2-Linear-velocity --class-labels 0 1 2 3
    python sample.py SDE --ckpt model.pt --cfg-scales 1.5 --diffusion-form sigma
    python sample.py ODE --ckpt model.pt --likelihood --data-path digits

The architecture and the schedule come from the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

import train_utils as cli
from data.datasets import AnyDataset, open_dataset
from pipeline import LIKELIHOOD_SOLVER, Pipeline, Solver
from runtime.errors import UserError, note, run_script, user_input
from runtime.files import complete_file
from runtime.logs import save_grid, shown_classes
from runtime.rng import Stream, sample_generators
from runtime.speed import default_precision, precision_note, use_precision
from transport import ODE, Guidance, bits_per_dim
from weights.layouts import fingerprint

NUM_IMAGES = 16  # of --data-path


def build_parser() -> cli.ArgumentParser:
    """The flags of sample.py."""
    parser = cli.ArgumentParser(prog="sample.py", description="Draw images for class labels from a trained model.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{ODE,SDE}")
    for mode, text in (("ODE", "the deterministic sampler"), ("SDE", "the stochastic sampler")):
        command = modes.add_parser(mode, help=f"{text}: sample.py {mode} --help", description=f"Sample with {text}.")
        add = command.add_argument_group("output").add_argument
        add(
            "--class-labels",
            type=cli.natural_int,
            nargs="+",
            metavar="ID",
            help="classes to draw (default: DiT's eight of ImageNet, else the first ten)",
        )
        add("--samples-per-class", type=cli.positive_int, default=1, metavar="N", help="images per class")
        add("--batch-size", type=cli.positive_int, default=128, help="samples solved together")
        add("--seed", type=cli.natural_int, default=0, help="seed of noise and probes")
        add("--out", type=cli.some_text, help="file to write (default: samples.png, likelihood.json or reverse.png)")
        add("--compare-finest", action="store_true", help="also time the same network at its finest level only")
        cli.add_model_args(command, None, "default: 4, or 1 with --likelihood and --reverse", budgets="+")
        if mode == "SDE":
            cli.add_sde_args(command)
            continue
        cli.add_ode_args(command, default="ab2; dopri5 with tolerances 1e-5 for --likelihood")
        add = command.add_argument_group("given images").add_argument
        add("--likelihood", action="store_true", help="bits per dimension of images in --data-path")
        add("--reverse", action="store_true", help="turn images of --data-path into noise and back")
        add("--data-path", type=cli.some_text, help="images as for train.py, for --likelihood and --reverse")
        add("--num-images", type=cli.positive_int, help=f"how many of them (default: {NUM_IMAGES})")
        add("--num-probes", type=cli.positive_int, help="probes for --likelihood (default: 1)")
    parser.set_defaults(likelihood=False, reverse=False)
    return parser


def check_flags(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that would have no effect."""
    given_images = args.likelihood or args.reverse
    if args.mode == "SDE":
        return
    if args.likelihood and args.reverse:
        parser.error("--likelihood and --reverse are two questions: give one of them")
    if given_images and not args.data_path:
        parser.error("--likelihood and --reverse need --data-path: 'digits', or a folder or zip archive of images")
    for name, takes_effect in (
        ("data_path", given_images),
        ("num_images", given_images),
        ("num_probes", args.likelihood),
        ("class_labels", not given_images),
        ("compare_finest", not given_images),
        ("budget", not given_images),
    ):
        if getattr(args, name) and not takes_effect:
            wanted = "--likelihood" if name == "num_probes" else "--likelihood or --reverse"
            relation = "without" if name in ("data_path", "num_images", "num_probes") else "with"
            parser.error(f"--{name.replace('_', '-')} has no effect {relation} {wanted}")


# ---------------------------------------------------------------------------------------------------------------
# Three jobs: samples, likelihood, round trip


def sample(args: argparse.Namespace, pipe: Pipeline, solver: Solver, guidance: Guidance, out: str) -> None:
    """Draw the labels' images, save them as a grid and report what they cost; several budgets have a row each."""
    num_classes = pipe.model.num_classes
    labels = shown_classes(num_classes) if args.class_labels is None else args.class_labels
    for label in labels:
        if label >= num_classes:
            raise UserError(f"class label {label} is out of range: the model knows 0 to {num_classes - 1}")
    labels = [label for label in labels for _ in range(args.samples_per_class)]
    ways = {kind_of(pipe): pipe}
    if args.budget:
        with user_input():
            ways = {f"budget {budget:g}": pipe.at_budget(budget, solver, guidance) for budget in args.budget}
    grids, rows = [], []
    for name, way in ways.items():
        images, cost = timed_samples(way, labels, solver, guidance, args)
        grids.append(images)
        rows.append((name, cost))
        if args.budget:
            print(f"{name}: --level-edges {' '.join(f'{edge:g}' for edge in way.transport.schedule.level_edges)}")
    columns = args.samples_per_class if args.samples_per_class > 1 else math.ceil(math.sqrt(len(labels)))
    columns = len(labels) if len(grids) > 1 else columns
    with user_input():
        save_grid(torch.cat(grids), out, columns)
    count = len(grids) * len(labels)
    print(f"{count} images, {args.mode} {solver.method}, {pipe.trained} of {pipe.name}: {out}")
    if args.compare_finest:
        steps = solver.num_steps if isinstance(solver.num_steps, int) else sum(solver.num_steps)
        at_finest = replace(solver, num_steps=steps), replace(guidance, scales=guidance.scales[-1:], null_level=None)
        rows.append(("finest level only", timed_samples(pipe.finest_only(), labels, *at_finest, args)[1]))
    print(f"{'':22}{'NFE':>8}{'GMACs/image':>14}{'seconds':>10}")
    for name, (nfe, gmacs, seconds) in rows:
        print(f"{name:22}{nfe:8.1f}{gmacs:14.3f}{seconds:10.2f}")
    if args.compare_finest and len(grids) == 1:
        (_, gmacs, seconds), (_, finest_gmacs, finest_seconds) = rows[0][1], rows[1][1]
        print(f"{'the pyramid saves':22}{'':8}{finest_gmacs / gmacs:13.2f}x{finest_seconds / seconds:9.2f}x")


def kind_of(pipe: Pipeline) -> str:
    """Name of the network in the table of costs."""
    experts = len(pipe.model.networks)
    return f"{'pyramid' if experts == 1 else f'{experts} experts'}, {pipe.model.num_levels} level(s)"


def timed_samples(
    pipe: Pipeline, labels: Sequence[int], solver: Solver, guidance: Guidance, args: argparse.Namespace
) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """Images in [-1, 1] (N, C, H, W), and the cost of solving for them: NFE, GMACs per image, seconds."""
    generators = sample_generators(args.seed, range(len(labels)), Stream.SAMPLES)
    samples = []
    with tqdm(unit="evaluation", desc="sampling", leave=False) as progress:
        counted = pipe.counted(progress)
        with cli.solving("--batch-size"):
            warm_up(pipe, guidance)
        start = time.perf_counter()
        for first in range(0, len(labels), args.batch_size):
            batch = slice(first, first + args.batch_size)
            with cli.solving("--batch-size"):
                samples.append(counted.latents(labels[batch], solver, guidance, generators[batch]))
        x1 = torch.cat(samples)
        if x1.is_cuda:
            torch.cuda.synchronize(x1.device)
        seconds = time.perf_counter() - start
        images = pipe.autoencoder.decode(x1).float().cpu()
    return images, (counted.model.nfe(len(labels)), counted.model.gmacs(len(labels)), seconds)


@torch.no_grad()
def warm_up(pipe: Pipeline, guidance: Guidance) -> None:
    """Evaluate each level once, also with its null level, so that compilation and set-up are not timed."""
    model, device = pipe.model, pipe.device
    for level in range(model.num_levels):
        x = torch.zeros(1, model.in_channels, *model.input_size, device=device)
        with use_precision(pipe.precision, device):
            t, y = x.new_zeros(1), torch.zeros(1, dtype=torch.long, device=device)
            model(x, t, y, level=level)
            if guidance.null_level is not None:
                guidance.of(model)(x, t, y, level=level)


def given_images(
    args: argparse.Namespace, dataset: AnyDataset, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images (or stored latents) (N, C, H, W) and labels (N,) of --data-path, and their numbers: a choice by --seed."""
    (generator,) = sample_generators(args.seed, [0], Stream.CHOICE)
    numbers = torch.randperm(len(dataset), generator=generator)[: args.num_images or NUM_IMAGES].tolist()
    with user_input():
        images, labels = zip(*(dataset.load(number) for number in numbers), strict=True)
    return torch.stack(images).to(device), torch.tensor(labels), numbers


def likelihood(args: argparse.Namespace, pipe: Pipeline, solver: ODE, guidance: Guidance, out: str) -> None:
    """Bits per dimension: of pixels, dequantised uniformly (arXiv:1511.01844, section 3.1), or of latents."""
    with user_input():
        dataset = open_data(args.data_path, pipe)
    x1, y, numbers = given_images(args, dataset, pipe.device)
    generators = sample_generators(args.seed, numbers, Stream.SAMPLES)
    pixels = pipe.autoencoder.name == "none" and dataset.kind != "latents"
    if pixels:
        uniform = torch.stack([torch.rand(x1.shape[1:], generator=generator) for generator in generators]).to(x1.device)
        x1 = x1 + (uniform - 0.5) * dataset.value_step
    elif dataset.kind == "images":
        x1 = pipe.autoencoder.encode(x1, generators)
    log_probs = []
    with tqdm(unit="evaluation", desc="likelihood", leave=False) as progress:
        counted = pipe.counted(progress)
        start = time.perf_counter()
        for first in range(0, len(x1), args.batch_size):
            batch = slice(first, first + args.batch_size)
            with cli.solving("--batch-size"):
                log_prob = counted.log_prob(
                    x1[batch], y[batch], solver, guidance, args.num_probes or 1, generators[batch]
                )
            log_probs.append(log_prob)
        log_prob = torch.cat(log_probs).cpu()
        seconds = time.perf_counter() - start
    bits = bits_per_dim(log_prob, x1[0].numel())
    if pixels:  # they are discrete: a value has the density's mass over one step of values
        bits -= math.log2(dataset.value_step)
    records = zip(numbers, y.tolist(), log_prob.tolist(), bits.tolist(), strict=True)
    with user_input(), complete_file(out) as temporary:
        keys = ("image", "label", "nats", "bits_per_dim")
        temporary.write_text(json.dumps([dict(zip(keys, record, strict=True)) for record in records], indent=1) + "\n")
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else float("nan")
    print(f"{len(bits)} images of {args.data_path}: {bits.mean():.4f} +- {error:.4f} bits per dimension ({out})")
    print(
        f"mean log-density {log_prob.mean():.2f} nats; NFE {counted.model.nfe(len(bits)):.1f}, {seconds:.2f} s"
        f"{' (compilation included)' if args.compile else ''}"
    )


def round_trip(args: argparse.Namespace, pipe: Pipeline, solver: ODE, guidance: Guidance, out: str) -> None:
    """Images to noise by the reverse ODE and back again: one column each of image, noise, image."""
    with user_input():
        dataset = open_data(args.data_path, pipe)
    x1, y, numbers = given_images(args, dataset, pipe.device)
    autoencoder = pipe.autoencoder
    if dataset.kind == "images":
        x1 = autoencoder.encode(x1, sample_generators(args.seed, numbers, Stream.SAMPLES))
    with tqdm(unit="evaluation", desc="reverse", leave=False) as progress, cli.solving("--num-images"):
        counted = pipe.counted(progress)
        x0 = counted.noise(x1, y, solver, guidance)
        back = counted.latents(y, solver, guidance, x0=x0)
    rows = [autoencoder.decode(x) for x in (x1, x0 / 3 if autoencoder.name == "none" else x0, back)]
    with user_input():
        save_grid(torch.cat(rows).float().cpu(), out, columns=len(x1))
    error = (back - x1).square().mean().sqrt()
    print(
        f"{len(x1)} images to noise (mean {x0.mean():.3f}, std {x0.std():.3f}) and back, RMS error {error:.1e}: {out}"
    )


def open_data(path: str, pipe: Pipeline) -> AnyDataset:
    """The dataset of --data-path, if it fits the network (ValueError otherwise)."""
    model, autoencoder = pipe.model, pipe.autoencoder
    height, width = pipe.image_size
    if height != width and path != "digits":
        raise ValueError(f"images are cropped to squares here, not to {height}x{width}: give --image-size {height}")
    dataset = open_dataset(path, None if path == "digits" else height, autoencoder)
    shape = autoencoder.latent_shape(dataset.image_shape) if dataset.kind == "images" else dataset.image_shape
    if shape != (model.in_channels, *model.input_size):
        raise ValueError(f"{path} gives {shape} inputs, the network wants {(model.in_channels, *model.input_size)}")
    if dataset.num_classes > model.num_classes:
        raise ValueError(f"{path} has {dataset.num_classes} classes, the network knows {model.num_classes}")
    return dataset


def number_together(args: argparse.Namespace, pipe: Pipeline) -> int:
    """Samples that are solved together at most."""
    if args.reverse:
        return args.num_images or NUM_IMAGES
    if args.likelihood:
        return min(args.batch_size, args.num_images or NUM_IMAGES)
    labels = shown_classes(pipe.model.num_classes) if args.class_labels is None else args.class_labels
    return min(args.batch_size, len(labels) * args.samples_per_class)


def check_out(out: Path, picture: bool) -> None:
    """Refuse a file that could not be written, before hours of work (ValueError, OSError)."""
    pictures = [suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE]
    if picture and out.suffix.lower() not in pictures:
        raise ValueError(f"--out {out} has no suffix of a picture: call it {out.stem}.png")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file in it")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: {out.parent} cannot be written to")


def main(argv: Sequence[str] | None = None) -> None:
    """Run sample.py with these command-line arguments."""
    parser = build_parser()
    args = cli.parse_mode_first(parser, argv)
    check_flags(parser, args)
    given = args.likelihood or args.reverse
    job, default_out = (sample, "samples.png") if not given else (round_trip, "reverse.png")
    if args.likelihood:
        job, default_out = likelihood, "likelihood.json"
    out = args.out or default_out
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.precision or default_precision(device, training=False)
    if line := precision_note(precision, device):
        note(line)
    with user_input():
        solver = cli.solver_from(args, LIKELIHOOD_SOLVER if args.likelihood else None)
        guidance = cli.guidance_from(args, default=1.0 if given else 4.0)
        check_out(Path(out), picture=not args.likelihood)
        pipe = cli.load_pipeline(args, pictures=not args.likelihood, any_size=True)
        digest = fingerprint(pipe.model) if vars(args).get("step_grid") == "auto" else ""  # before it is rounded
        pipe.to(device, precision, args.compile, args.offload_experts)
        if args.compare_finest:
            pipe.finest_only()
        pipe.check(solver, guidance, args.likelihood, args.reverse, number_together(args, pipe))
        for budget in args.budget or ():
            pipe.at_budget(budget, solver, guidance)
        cli.warn_of_null_level(pipe, guidance.null_level)
    solver = cli.step_grid_from(args, pipe, solver, guidance, digest)
    job(args, pipe, solver, guidance, out)


if __name__ == "__main__":
    run_script(main)
