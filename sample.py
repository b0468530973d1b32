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
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from data import AnyDataset, open_dataset
from sample_models import TrainedModel, finest_only, load_trained
from sample_utils import (
    SAMPLES,
    EvaluationCounter,
    add_model_args,
    add_ode_args,
    add_sde_args,
    check_solver_args,
    draw_samples,
    dry_run,
    follow_ode,
    guided,
    log_density,
)
from train_utils import (
    ArgumentParser,
    UserError,
    complete_file,
    natural_int,
    positive_int,
    precision_note,
    run_script,
    save_grid,
    some_text,
    use_precision,
    user_input,
)
from transport import bits_per_dim, sample_generators

IMAGENET_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # DiT's selection


def build_parser() -> ArgumentParser:
    """The flags of sample.py."""
    parser = ArgumentParser(prog="sample.py", description="Draw images for class labels from a trained model.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{ODE,SDE}")
    for mode, text in (("ODE", "the deterministic sampler"), ("SDE", "the stochastic sampler")):
        command = modes.add_parser(mode, help=f"{text}: sample.py {mode} --help", description=f"Sample with {text}.")
        output = command.add_argument_group("output")
        output.add_argument("--class-labels", type=natural_int, nargs="+", metavar="ID",
                            help="classes to draw (default: DiT's eight of ImageNet, else the first ten)")  # fmt: skip
        output.add_argument("--samples-per-class", type=positive_int, default=1, metavar="N", help="images a label")
        output.add_argument("--batch-size", type=positive_int, default=128, help="samples solved together")
        output.add_argument("--seed", type=natural_int, default=0, help="seed of noise and probes")
        output.add_argument(
            "--out", type=some_text, help="file to write (default: samples.png, likelihood.json or reverse.png)"
        )
        output.add_argument("--compare-finest", action="store_true",
                            help="also time the same network at its finest level only")  # fmt: skip
        add_model_args(command, None, "default: 4, or 1 with --likelihood and --reverse")
        if mode == "SDE":
            add_sde_args(command)
            continue
        add_ode_args(command, default="ab2; dopri5 with tolerances 1e-5 for --likelihood")
        given = command.add_argument_group("given images")
        given.add_argument("--likelihood", action="store_true", help="bits per dimension of images in --data-path")
        given.add_argument("--reverse", action="store_true", help="turn images of --data-path into noise and back")
        given.add_argument("--data-path", type=some_text, help="images as for train.py, for --likelihood and --reverse")
        given.add_argument("--num-images", type=positive_int, help="how many of them (default: 16)")
        given.add_argument("--num-probes", type=positive_int, help="probes for --likelihood (default: 1)")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with flags refused that would have no effect."""
    parser = build_parser()
    args = parser.parse_args(argv)
    given_images = args.mode == "ODE" and (args.likelihood or args.reverse)
    if args.mode == "ODE":
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
        ):
            if getattr(args, name) and not takes_effect:
                wanted = "--likelihood" if name == "num_probes" else "--likelihood or --reverse"
                relation = "without" if name in ("data_path", "num_images", "num_probes") else "with"
                parser.error(f"--{name.replace('_', '-')} has no effect {relation} {wanted}")
        if args.likelihood and not args.sampling_method and not args.num_sampling_steps:
            args.sampling_method, args.atol, args.rtol = "dopri5", args.atol or 1e-5, args.rtol or 1e-5
    check_solver_args(parser, args, noise_to_data=not given_images)
    if args.cfg_scales is None:
        args.cfg_scales = [1.0 if given_images else 4.0]
    return args


# ---------------------------------------------------------------------------------------------------------------
# Three jobs: samples, likelihood, there and back


def sample(args: argparse.Namespace, trained: TrainedModel, device: torch.device) -> None:
    """Draw the labels' images, save them as a grid and report what they cost."""
    num_classes = trained.model.num_classes
    labels = args.class_labels
    if labels is None:
        labels = IMAGENET_CLASSES if num_classes == 1000 else range(min(10, num_classes))
    for label in labels:
        if label >= num_classes:
            raise UserError(f"class label {label} is out of range: the model knows 0 to {num_classes - 1}")
    labels = [label for label in labels for _ in range(args.samples_per_class)]
    images, cost = timed_samples(args, trained, labels, device)
    columns = args.samples_per_class if args.samples_per_class > 1 else math.ceil(math.sqrt(len(labels)))
    out = args.out
    with user_input():
        save_grid(images, out, columns)
    print(f"{len(labels)} images, {args.mode} {args.sampling_method}, step {trained.step} of {trained.name}: {out}")
    rows = [(f"pyramid, {trained.model.num_levels} level(s)", cost)]
    if args.compare_finest:
        args.cfg_scales = args.cfg_scales[-1:]
        args.num_sampling_steps = [sum(args.num_sampling_steps)]
        rows.append(("finest level only", timed_samples(args, finest_only(trained), labels, device)[1]))
    print(f"{'':22}{'NFE':>8}{'GMACs/image':>14}{'seconds':>10}")
    for name, (nfe, gmacs, seconds) in rows:
        print(f"{name:22}{nfe:8.1f}{gmacs:14.3f}{seconds:10.2f}")
    if args.compare_finest:
        (_, gmacs, seconds), (_, finest_gmacs, finest_seconds) = rows[0][1], rows[1][1]
        print(f"{'the pyramid saves':22}{'':8}{finest_gmacs / gmacs:13.2f}x{finest_seconds / seconds:9.2f}x")


def timed_samples(
    args: argparse.Namespace, trained: TrainedModel, labels: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """Images in [-1, 1] (N, C, H, W), and the cost of solving for them: NFE, GMACs per image, seconds."""
    images, indices = [], range(len(labels))
    with tqdm(unit="evaluation", desc="sampling", leave=False) as progress, use_precision(args.precision, device):
        counter = EvaluationCounter(trained.model, progress)
        warm_up(trained, args, min(args.batch_size, len(labels)), device)
        start = time.perf_counter()
        for first in range(0, len(labels), args.batch_size):
            batch = slice(first, first + args.batch_size)
            images.append(draw_samples(trained, counter, args, labels[batch], indices[batch], args.seed, device))
        x1 = torch.cat(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        images = trained.autoencoder.decode(x1).float().cpu()
    return images, (counter.nfe(len(labels)), counter.gmacs(len(labels)), seconds)


@torch.no_grad()
def warm_up(trained: TrainedModel, args: argparse.Namespace, batch_size: int, device: torch.device) -> None:
    """One evaluation of each level, so that compilation and the first one's set-up are not timed."""
    model, guidance = trained.model, guided(trained.model, args)
    for level in range(model.num_levels):
        # A recorded graph is for one batch size; everything else is ready after a single sample.
        rows = batch_size * (2 if guidance.scale_at(level) != 1 else 1) if args.cuda_graphs else 1
        x = torch.zeros(rows, model.in_channels, *model.input_size, device=device)
        model(x, x.new_zeros(rows), torch.zeros(rows, dtype=torch.long, device=device), level=level)


def given_images(
    args: argparse.Namespace, dataset: AnyDataset, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Images (or stored latents) (N, C, H, W) and labels (N,) of --data-path, and their numbers: a choice by --seed."""
    (generator,) = sample_generators(args.seed, [0])
    numbers = torch.randperm(len(dataset), generator=generator)[: args.num_images or 16].tolist()
    with user_input():
        images, labels = zip(*(dataset.load(number) for number in numbers), strict=True)
    return torch.stack(images).to(device), torch.tensor(labels, device=device), numbers


def likelihood(args: argparse.Namespace, trained: TrainedModel, dataset: AnyDataset, device: torch.device) -> None:
    """Bits per dimension: of pixels, dequantised uniformly (arXiv:1511.01844, section 3.1), or of latents."""
    x1, y, numbers = given_images(args, dataset, device)
    generators = sample_generators(args.seed, numbers, SAMPLES)
    pixels = trained.autoencoder.name == "none" and dataset.kind != "latents"
    if pixels:
        uniform = torch.stack([torch.rand(x1.shape[1:], generator=generator) for generator in generators]).to(device)
        x1 = x1 + (uniform - 0.5) * dataset.value_step
    elif dataset.kind == "images":
        x1 = trained.autoencoder.encode(x1, generators)
    log_probs = []
    with tqdm(unit="evaluation", desc="likelihood", leave=False) as progress, use_precision(args.precision, device):
        counter = EvaluationCounter(trained.model, progress)
        start = time.perf_counter()
        for first in range(0, len(x1), args.batch_size):
            batch = slice(first, first + args.batch_size)
            log_probs.append(log_density(trained, counter, args, x1[batch], y[batch], generators[batch]))
        log_prob = torch.cat(log_probs).cpu()
        seconds = time.perf_counter() - start
    bits = bits_per_dim(log_prob, x1[0].numel())
    if pixels:  # they are discrete: a value has the density's mass over one step of values
        bits -= math.log2(dataset.value_step)
    out = args.out
    records = zip(numbers, y.tolist(), log_prob.tolist(), bits.tolist(), strict=True)
    with user_input(), complete_file(out) as temporary:
        keys = ("image", "label", "nats", "bits_per_dim")
        temporary.write_text(json.dumps([dict(zip(keys, record, strict=True)) for record in records], indent=1) + "\n")
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else float("nan")
    print(f"{len(bits)} images of {args.data_path}: {bits.mean():.4f} +- {error:.4f} bits per dimension ({out})")
    print(
        f"mean log-density {log_prob.mean():.2f} nats; NFE {counter.nfe(len(bits)):.1f}, {seconds:.2f} s"
        f"{' (compilation included)' if args.compile else ''}"
    )


def there_and_back(args: argparse.Namespace, trained: TrainedModel, dataset: AnyDataset, device: torch.device) -> None:
    """Images to noise by the reverse ODE and back again: one column each of image, noise, image."""
    x1, y, numbers = given_images(args, dataset, device)
    autoencoder = trained.autoencoder
    if dataset.kind == "images":
        with use_precision(args.precision, device):
            x1 = autoencoder.encode(x1, sample_generators(args.seed, numbers, SAMPLES))
    with tqdm(unit="evaluation", desc="reverse", leave=False) as progress, use_precision(args.precision, device):
        counter = EvaluationCounter(trained.model, progress)
        x0 = follow_ode(trained, counter, args, x1, y, reverse=True)
        back = follow_ode(trained, counter, args, x0, y)
        rows = [autoencoder.decode(x) for x in (x1, x0 / 3 if autoencoder.name == "none" else x0, back)]
    out = args.out
    with user_input():
        save_grid(torch.cat(rows).float().cpu(), out, columns=len(x1))
    error = (back - x1).square().mean().sqrt()
    print(
        f"{len(x1)} images to noise (mean {x0.mean():.3f}, std {x0.std():.3f}) and back, RMS error {error:.1e}: {out}"
    )


def open_data(path: str, trained: TrainedModel) -> AnyDataset:
    """The dataset of --data-path, if it fits the network (ValueError otherwise)."""
    model, autoencoder = trained.model, trained.autoencoder
    dataset = open_dataset(path, None if path == "digits" else trained.image_size[0], autoencoder)
    shape = autoencoder.latent_shape(dataset.image_shape) if dataset.kind == "images" else dataset.image_shape
    if shape != (model.in_channels, *model.input_size):
        raise ValueError(f"{path} gives {shape} inputs, the network wants {(model.in_channels, *model.input_size)}")
    if dataset.num_classes > model.num_classes:
        raise ValueError(f"{path} has {dataset.num_classes} classes, the network knows {model.num_classes}")
    return dataset


def default_out(args: argparse.Namespace) -> str:
    """Where the answer goes when --out does not say."""
    if args.mode == "SDE" or not (args.likelihood or args.reverse):
        return "samples.png"
    return "likelihood.json" if args.likelihood else "reverse.png"


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
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("tf32" if device.type == "cuda" else "fp32")
    args.out = args.out or default_out(args)
    if line := precision_note(args.precision, device):
        print(line, flush=True)
    with user_input():
        pictures = not (args.mode == "ODE" and args.likelihood)
        check_out(Path(args.out), pictures)
        trained = load_trained(args, device, pictures)
        dry_run(trained, args, device)
    if args.mode == "SDE" or not (args.likelihood or args.reverse):
        sample(args, trained, device)
        return
    with user_input():
        dataset = open_data(args.data_path, trained)
    (likelihood if args.likelihood else there_and_back)(args, trained, dataset, device)


if __name__ == "__main__":
    run_script(main)
