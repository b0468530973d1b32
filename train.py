"""Train a diffusion transformer.

    torchrun --nnodes=1 --nproc_per_node=N train.py --model PPF-XL-2 --data-path /path/to/imagenet/train
    python train.py --model PPF-T-2 --data-path digits --max-steps 1500

One process per GPU under torchrun, or a single one. All random numbers are functions of (seed, step, sample), so a run
is the same on any number of processes, and the same when it is stopped and continued.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from download import initialize_levels, load_pretrained
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from autoencoder import Autoencoder, autoencoder_name, load_autoencoder
from data import AnyDataset, StepSampler, open_dataset, posterior_generators, training_loader
from models import PyramidalPatchDiT, canonical_name, create_model
from train_utils import (
    PRECISIONS,
    ArgumentParser,
    Processes,
    RunLog,
    UserError,
    add_cfg_args,
    add_transport_args,
    broadcast_object,
    gather_objects,
    guided,
    level_edges_of,
    load_checkpoint,
    load_weights,
    natural_float,
    natural_int,
    newest_checkpoint,
    positive_float,
    positive_int,
    probability,
    run_script,
    save_checkpoint,
    save_grid,
    start_processes,
    update_ema,
    use_precision,
    user_input,
)
from transport import Sampler, Transport, create_transport, sample_generators

# Streams of random numbers; 1 and 2 belong to data.py, 7, 8 and 10 to sample_utils.py.
NOISE, TIME, DROPOUT, PREVIEW = 3, 4, 5, 6

# What may change when a run is continued; everything else would make it another run.
FREE_TO_CHANGE = {
    "epochs", "max_steps", "results_dir", "run_dir", "ckpt", "num_workers", "log_every", "ckpt_every", "sample_every",
    "cfg_scales", "cfg_channels", "cfg_interval", "wandb",
}  # fmt: skip

PREVIEW_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet, as in DiT
PREVIEW_COLUMNS = 8
PREVIEW_STEPS = 25


def build_parser() -> ArgumentParser:
    """The flags of train.py."""
    parser = ArgumentParser(prog="train.py", description="Train a diffusion transformer with a pyramid of patch sizes.")
    run = parser.add_argument_group("run")
    run.add_argument("--data-path", required=True, help="'digits', a folder of class folders, a zip file, or latents")
    run.add_argument("--model", default="PPF-XL-2", help="PPF-{T,S,B,L,XL}-{2,3}, SiT-{S,B,L,XL}/{2,4,8}")
    run.add_argument(
        "--image-size", type=positive_int, help="side of the images (default: 256 for folders, else their own)"
    )
    run.add_argument("--num-classes", type=positive_int, help="number of classes (default: the dataset's)")
    run.add_argument("--vae", help="autoencoder: ema or mse (Stable Diffusion's), a hub id, a local folder, or none "
                     "for pixels (default: none for digits, that of the latents for latents, else ema)")  # fmt: skip
    run.add_argument("--results-dir", default="results", help="where a new numbered run folder is made")
    run.add_argument("--run-dir", help="the run's folder; an interrupted run in it is continued")
    run.add_argument("--ckpt", help="continue from this checkpoint, with the settings stored in it")
    run.add_argument("--initialize_from", "--initialize-from", metavar="WEIGHTS",
                     help="pretrained weights to start from: a name (SiT-XL/2), or a file of any layout")  # fmt: skip

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=1400, help="passes over the data")
    training.add_argument("--max-steps", type=positive_int, help="optimizer steps; instead of --epochs")
    training.add_argument("--global-batch-size", type=positive_int, default=256, help="samples per step, all processes")
    training.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="passes per step")
    training.add_argument("--lr", type=positive_float, default=1e-4, help="AdamW's learning rate")
    training.add_argument("--weight-decay", type=natural_float, default=0.0, help="AdamW's weight decay")
    training.add_argument("--warmup-steps", type=natural_int, default=0, help="steps of linear warm-up")
    training.add_argument("--max-grad-norm", type=positive_float, help="clip the gradient to this norm")
    training.add_argument("--ema-decay", type=probability, default=0.9999, help="decay of the weights' average")
    training.add_argument("--class-dropout-prob", type=probability, default=0.1, help="labels made null, for guidance")
    training.add_argument("--precision", choices=PRECISIONS, help="(default: bf16 on CUDA, fp32 on the CPU)")
    training.add_argument("--global-seed", type=natural_int, default=0, help="seed of everything random")
    training.add_argument("--num-workers", type=natural_int, default=min(4, os.cpu_count() or 1),
                          help="data loading processes per rank")  # fmt: skip
    add_transport_args(parser)

    logging = parser.add_argument_group("logging")
    logging.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of metrics")
    logging.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    logging.add_argument("--sample-every", type=natural_int, default=10_000,
                         help="steps between grids of EMA samples; 0 for none at all")  # fmt: skip
    logging.add_argument("--wandb", action="store_true", help="log to wandb (WANDB_KEY, ENTITY and PROJECT are read)")
    add_cfg_args(parser, default=4.0)
    return parser


# ---------------------------------------------------------------------------------------------------------------
# Set-up


def settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint to continue from: --ckpt, or what --run-dir holds.

    A continued run keeps its settings; a flag that contradicts them is an error that names it.
    """
    args, given = build_parser().parse_with_given(argv)
    with user_input():
        args.model = canonical_name(args.model)
        source = args.ckpt or (newest_checkpoint(Path(args.run_dir)) if args.run_dir else None)
        checkpoint = load_checkpoint(source) if source else None
    if checkpoint is None:
        return args, None
    for name, value in checkpoint["config"]["args"].items():
        if name in FREE_TO_CHANGE:
            continue
        if name in given and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} is {value} in {source}, not {getattr(args, name)}: "
                f"leave {flag} out to continue that run, or start another with a new --run-dir"
            )
        setattr(args, name, value)
    return args, checkpoint


def open_data(args: argparse.Namespace, device: torch.device) -> tuple[AnyDataset, Autoencoder | None]:
    """The dataset, and the autoencoder of its latents; None where nothing is encoded or shown.

    Raises:
        ValueError, OSError: if either cannot be had, or they do not fit together.
    """
    autoencoder = load_autoencoder(args.vae, device) if args.vae else None
    dataset = open_dataset(args.data_path, args.image_size, autoencoder)
    if dataset.kind == "digits" and args.vae not in (None, "none"):
        raise ValueError(f"digits are trained on as pixels: leave --vae {args.vae} out")
    default = {"digits": "none", "images": "ema", "latents": getattr(dataset, "vae", None)}[dataset.kind]
    args.vae = autoencoder_name(args.vae or default)
    if autoencoder is None and (dataset.kind == "images" or args.sample_every):
        autoencoder = load_autoencoder(args.vae, device)
    return dataset, autoencoder


def build(
    args: argparse.Namespace, processes: Processes, pretrained: bool
) -> tuple[AnyDataset, Autoencoder | None, PyramidalPatchDiT, Transport, dict[str, Any]]:
    """Dataset, autoencoder, model and transport that the arguments ask for, and the config that describes them.

    Args:
        pretrained: start from --initialize_from where it is given; a continued run does not
    """
    with user_input():
        dataset, autoencoder = open_data(args, processes.device)
        encodes = dataset.kind == "images" and autoencoder is not None
        channels, *input_size = autoencoder.latent_shape(dataset.image_shape) if encodes else dataset.image_shape
        args.image_size, args.num_classes = dataset.image_size, args.num_classes or dataset.num_classes
        if args.num_classes < dataset.num_classes:
            raise ValueError(f"--num-classes {args.num_classes} is too few: {args.data_path} has {dataset.num_classes}")
        torch.manual_seed(args.global_seed)  # initial weights, the same on every rank
        model = create_model(args.model, input_size=input_size, in_channels=channels, num_classes=args.num_classes)
        args.level_edges = list(level_edges_of(args, model.num_levels))
        if args.initialize_from and pretrained:
            initialize_levels(model, load_pretrained(args.initialize_from).model)
        transport_config = {
            "path_type": args.path_type,
            "prediction": args.prediction,
            "loss_weight": args.loss_weight,
            "train_eps": args.train_eps,
            "sample_eps": args.sample_eps,
            "level_edges": args.level_edges,
        }
        transport = create_transport(**transport_config)
        transport.check_levels(model)
        guided(model, args)
        passes = processes.world_size * args.gradient_accumulation_steps
        if args.global_batch_size % passes:
            raise ValueError(
                f"--global-batch-size {args.global_batch_size} does not divide into {processes.world_size} process(es) "
                f"x {args.gradient_accumulation_steps} accumulation step(s): choose a multiple of {passes}"
            )
    config = {
        "model_name": args.model,
        "model": model.config,
        "transport": transport_config,
        "vae": args.vae,
        "args": dict(vars(args)),
        "torch": str(torch.__version__),
    }
    return dataset, autoencoder, model, transport, config


def make_run_dir(args: argparse.Namespace) -> Path:
    """--run-dir, or the next results/NNN-model-path-prediction."""
    if args.run_dir:
        run_dir = Path(args.run_dir)
    else:
        taken = [int(path.name[:3]) for path in Path(args.results_dir).glob("[0-9][0-9][0-9]-*")]
        name = f"{max(taken, default=-1) + 1:03d}-{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}"
        run_dir = Path(args.results_dir) / name
    with user_input():
        for folder in ("checkpoints", "samples"):
            (run_dir / folder).mkdir(parents=True, exist_ok=True)
    return run_dir


# ---------------------------------------------------------------------------------------------------------------
# One step


class LossModule(nn.Module):
    """Model and transport as one module: what DistributedDataParallel wraps, called once per pass."""

    def __init__(self, model: PyramidalPatchDiT, transport: Transport) -> None:
        super().__init__()
        self.model = model
        self.transport = transport

    def forward(self, x1: torch.Tensor, y: torch.Tensor, t: torch.Tensor, x0: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = self.transport.training_losses(self.model, x1, y=y, t=t, x0=x0)
        present = set(self.transport.schedule.level_at(t).tolist())
        # A level without samples still takes part, with gradient zero: DDP waits for every parameter.
        absent = [p for level in range(self.model.num_levels) if level not in present
                  for p in self.model.level_parameters(level)]  # fmt: skip
        terms["loss"] = terms["loss"] + sum(0.0 * parameter.sum() for parameter in absent)
        return terms


def draw_step(
    step: int, positions: range, shape: Sequence[int], transport: Transport, args: argparse.Namespace
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's random numbers of a step.

    Args:
        positions: the rank's n samples, numbered over the whole run
        shape:     of one sample

    Returns:
        times (n,), noise (n, *shape), and which labels to drop (n,). Times and drops are drawn for the whole batch and
        cut; noise belongs to the sample's position.
    """
    first = step * args.global_batch_size
    local = slice(positions.start - first, positions.stop - first)
    (time_generator,) = sample_generators(args.global_seed, [step], TIME)
    (dropout_generator,) = sample_generators(args.global_seed, [step], DROPOUT)
    t = transport.sample_times(args.global_batch_size, time_generator)[local]
    drop = torch.rand(args.global_batch_size, generator=dropout_generator)[local] < args.class_dropout_prob
    x0 = transport.noise.sample((len(positions), *shape), sample_generators(args.global_seed, positions, NOISE))
    return t, x0, drop


def ema_decay_at(step: int, decay: float) -> float:
    """The decay rises to its value over the first steps, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------------------------------
# Previews


@torch.no_grad()
def preview(
    ema: PyramidalPatchDiT,
    autoencoder: Autoencoder,
    transport: Transport,
    args: argparse.Namespace,
    processes: Processes,
    batch_size: int,
) -> torch.Tensor | None:
    """EMA samples, one row per class, made by all processes together; returned on the main one."""
    classes = PREVIEW_CLASSES if ema.num_classes == 1000 else range(min(10, ema.num_classes))
    labels = torch.tensor(list(classes)).repeat_interleave(PREVIEW_COLUMNS)
    mine = torch.arange(processes.rank, len(labels), processes.world_size)
    images = []
    for indices in mine.split(batch_size):
        x0 = transport.noise.sample(
            (len(indices), ema.in_channels, *ema.input_size),
            sample_generators(args.global_seed, indices.tolist(), PREVIEW),
            processes.device,
        )
        y = labels[indices].to(processes.device)
        x1 = Sampler(transport).sample_ode(guided(ema, args), x0, num_steps=PREVIEW_STEPS, y=y)
        images += autoencoder.decode(x1).float().cpu()
    parts = gather_objects((mine, images), processes)
    if not parts:
        return None
    order = torch.cat([indices for indices, _ in parts]).argsort().tolist()
    images = [image for _, part in parts for image in part]
    return torch.stack([images[index] for index in order])


# ---------------------------------------------------------------------------------------------------------------
# The run


def train(argv: Sequence[str] | None = None) -> None:
    """Run train.py with these command-line arguments."""
    args, checkpoint = settings(argv)
    processes = start_processes()
    args.precision = args.precision or ("bf16" if processes.device.type == "cuda" else "fp32")
    dataset, autoencoder, model, transport, config = build(args, processes, pretrained=checkpoint is None)
    run_dir = Path(broadcast_object(str(make_run_dir(args)) if processes.is_main else None))
    device = processes.device

    # Model, average, optimizer
    model = model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    start_step = 0
    if checkpoint is not None:
        with user_input():
            load_weights(model, checkpoint["model"], "the checkpoint")
            load_weights(ema, checkpoint["ema"], "the checkpoint's EMA")
        optimizer.load_state_dict(checkpoint["opt"])
        start_step = checkpoint["step"]
        del checkpoint
    loss_module = LossModule(model, transport)
    parallel = loss_module
    if dist.is_initialized():
        ids = [device.index] if device.type == "cuda" else None
        parallel = DistributedDataParallel(loss_module, device_ids=ids, broadcast_buffers=False)

    # Data
    total_steps = args.max_steps or max(1, args.epochs * len(dataset) // args.global_batch_size)
    steps = StepSampler(start_step, total_steps, args.global_batch_size, processes.rank, processes.world_size)
    loader = training_loader(dataset, args.global_seed, steps, args.num_workers, pin_memory=device.type == "cuda")
    micro_batch = steps.local // args.gradient_accumulation_steps

    # Logs
    log = None
    if processes.is_main:
        (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        log = RunLog(run_dir, start_step, config, args.wandb)
        parameters = sum(p.numel() for p in model.parameters())
        log.text(f"{args.model}: {parameters:,} parameters, {model.num_levels} level(s), "
                 f"{' / '.join(str(model.num_tokens(level)) for level in range(model.num_levels))} tokens")  # fmt: skip
        log.text(f"{args.data_path}: {len(dataset):,} images, {dataset.num_classes} classes; "
                 f"{processes.world_size} process(es) on {device.type}, {args.precision}; {run_dir}")  # fmt: skip
        if start_step:
            log.text(f"continuing from step {start_step}")

    def save(step: int) -> None:
        """Checkpoint of a step, unless it is there."""
        path = run_dir / "checkpoints" / f"{step:07d}.pt"
        if log and not path.exists():
            state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
            save_checkpoint(path, {**state, "config": config, "step": step})
            log.text(f"saved {path}")

    def show(step: int) -> None:
        """Grid of EMA samples of a step."""
        path = run_dir / "samples" / f"{step:07d}.png"
        with use_precision(args.precision, device):
            images = preview(ema, autoencoder, transport, args, processes, batch_size=max(micro_batch, 16))
        if log and images is not None:
            save_grid(images, path, columns=PREVIEW_COLUMNS)
            log.picture("samples", path, step)
            log.plot()

    progress = tqdm(total=total_steps, initial=min(start_step, total_steps), unit="step", disable=not log,
                    mininterval=0.5 if sys.stderr.isatty() else 15)  # fmt: skip
    sums = torch.zeros(2, model.num_levels, device=device)  # loss and number of samples, by level
    grad_norms, timed_steps, seconds, mark = 0.0, 0, 0.0, time.perf_counter()
    for step, (images, labels) in enumerate(readable(loader), start=start_step):
        # The equations in one place: x_t = alpha_t x_1 + sigma_t x_0, the network predicts at (x_t, t, y)
        first = step * args.global_batch_size + processes.rank * steps.local
        positions = range(first, first + steps.local)
        t, x0, drop = draw_step(step, positions, (model.in_channels, *model.input_size), transport, args)
        labels = labels.masked_fill(drop, model.num_classes)
        images, x0, y = (tensor.to(device, non_blocking=True) for tensor in (images, x0, labels))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        for start in range(0, steps.local, micro_batch):
            part = slice(start, start + micro_batch)
            last = start + micro_batch == steps.local
            parallel.require_backward_grad_sync = last  # gradients are averaged once per step
            with use_precision(args.precision, device):
                x1 = images[part]
                if dataset.kind == "images":
                    x1 = autoencoder.encode(x1, posterior_generators(args.global_seed, positions[part]))
                terms = parallel(x1, y[part], t[part], x0[part])
            (terms["loss"].mean() / args.gradient_accumulation_steps).backward()
            sums[0].index_add_(0, terms["level"], terms["loss"].detach().float())
            sums[1].index_add_(0, terms["level"], torch.ones_like(terms["loss"], dtype=torch.float32))
        limit = args.max_grad_norm or math.inf
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), limit).item()
        if not math.isfinite(grad_norm):
            # Before it reaches the weights. The gradient is averaged over processes, so all of them stop here.
            progress.close()
            kept = newest_checkpoint(run_dir)
            advice = f"the last good checkpoint is {kept}" if kept else "no checkpoint was written yet"
            raise UserError(f"the loss is not finite at step {step + 1}: {advice}; try --max-grad-norm 1, a lower --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, ema_decay_at(step, args.ema_decay))
        done = step + 1
        grad_norms, timed_steps = grad_norms + grad_norm, timed_steps + 1
        progress.update(1)

        finished = done == total_steps
        if done % args.log_every == 0 or finished:
            if dist.is_initialized():
                dist.all_reduce(sums)
            seconds = time.perf_counter() - mark
            if log:
                values = step_metrics(done, sums, grad_norms / timed_steps, optimizer.param_groups[0]["lr"])
                values["epoch"] = done * args.global_batch_size / len(dataset)
                values["step_time"] = seconds / timed_steps
                values["images_per_second"] = args.global_batch_size * timed_steps / seconds
                log.record(values)
                log.text(f"step {done}: loss {values['loss']:.4f}, {values['images_per_second']:.0f} images/s, "
                         f"{values['step_time'] * 1e3:.0f} ms/step")  # fmt: skip
                progress.set_postfix(loss=f"{values['loss']:.4f}")
            sums.zero_()
            grad_norms, timed_steps, mark = 0.0, 0, time.perf_counter()
        if (args.sample_every and done % args.sample_every == 0) or done % args.ckpt_every == 0 or finished:
            before = time.perf_counter()
            if done % args.ckpt_every == 0 or finished:
                save(done)
            if args.sample_every and (done % args.sample_every == 0 or finished):
                show(done)
            mark += time.perf_counter() - before  # not the steps' time
    progress.close()
    if log:
        log.plot()
        log.text(f"done: {total_steps} steps, see {run_dir}")
        log.close()


def readable(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    """The loader's batches; an image that cannot be read ends the run with its name."""
    try:
        yield from loader
    except OSError as error:  # from a worker the text is a traceback, which ends with the error itself
        raise UserError(str(error).strip().splitlines()[-1].removeprefix("OSError: ")) from error


def step_metrics(step: int, sums: torch.Tensor, grad_norm: float, lr: float) -> dict[str, Any]:
    """One record of metrics.jsonl from the loss sums and counts (2, levels); a level without samples is null."""
    loss, count = sums.tolist()
    values = {"step": step, "loss": sum(loss) / sum(count), "grad_norm": grad_norm, "lr": lr}
    for level, (total, number) in enumerate(zip(loss, count, strict=True)):
        values[f"loss_level_{level}"] = total / number if number else None
    return values


if __name__ == "__main__":
    run_script(train)
