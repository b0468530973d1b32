"""Train a diffusion transformer.

    torchrun --nnodes=1 --nproc_per_node=N train.py --model PPF-XL-2 --data-path /path/to/imagenet/train
    python train.py --model PPF-T-2 --data-path digits --max-steps 1500

One process per GPU under torchrun, or a single one; with --shard they divide the model among them. All random numbers
are functions of (seed, step, sample), so a run is the same on any number of processes, and the same when it is stopped
and continued.

With --run-dir DIR the same command starts the run in DIR or continues it. SIGTERM and SIGUSR1 end it after the
current step with a checkpoint and exit code 75, Ctrl-C with code 130; what the user must mend ends it with code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import parallel
from autoencoder import Autoencoder, autoencoder_name, load_autoencoder
from checkpoints import (
    CheckpointWriter,
    check_data,
    continue_from,
    full_path,
    last_words,
    load_networks,
    make_run_dir,
    starting_point,
)
from compilation import compile_levels
from data import AnyDataset, StepSampler, open_dataset, posterior_generators, training_loader
from download import initialize_levels, load_pretrained
from images import UnreadableImage
from models import PyramidalPatchDiT, canonical_name, create_model
from preemption import EXIT_PREEMPTED, Preempted, Preemption, outlive_preemption
from train_utils import (
    PRECISIONS,
    ArgumentParser,
    Processes,
    RunLog,
    UserError,
    add_cfg_args,
    add_transport_args,
    agree,
    broadcast_object,
    check_same_flags,
    complete_file,
    deterministic_errors,
    ema_decay_at,
    gather_objects,
    guided,
    level_edges_of,
    natural_float,
    natural_int,
    not_finite,
    on_main,
    positive_float,
    positive_int,
    precision_note,
    probability,
    run_script,
    save_grid,
    set_determinism,
    some_text,
    start_processes,
    step_metrics,
    update_ema,
    use_precision,
    user_input,
)
from transport import Sampler, Transport, create_transport, sample_generators

# Streams of random numbers; 1 and 2 belong to data.py, 7, 8 and 10 to sample_utils.py.
NOISE, TIME, DROPOUT, PREVIEW = 3, 4, 5, 6

PREVIEW_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # of ImageNet, as in DiT
PREVIEW_COLUMNS = 8
PREVIEW_STEPS = 25

LARGEST_NORM = 1e19  # of a gradient: AdamW keeps squares in fp32


def build_parser() -> ArgumentParser:
    """The flags of train.py."""
    parser = ArgumentParser(
        prog="train.py",
        description="Train a diffusion transformer with a pyramid of patch sizes.",
        epilog=f"Exit codes: 0 the run is done; {EXIT_PREEMPTED} SIGTERM or SIGUSR1: saved after the current step, the "
        "same command continues (a second signal exits at once); 130 the same for Ctrl-C; 2 something to mend, said in "
        "one line. torchrun turns every code but 0 into 1.",
    )
    run = parser.add_argument_group("run")
    run.add_argument("--data-path", type=some_text, help="'digits', a folder of class folders, a zip file, or latents "
                     "(default: that of the run that is continued)")  # fmt: skip
    run.add_argument("--model", default="PPF-XL-2", help="PPF-{T,S,B,L,XL}-{2,3}, SiT-{S,B,L,XL}/{2,4,8}, SiT-T/2")
    run.add_argument(
        "--image-size", type=positive_int, help="side of the images (default: 256 for folders, else their own)"
    )
    run.add_argument("--patch-level", type=positive_int, help="number of levels, checked against --model's")
    run.add_argument("--num-classes", type=positive_int, help="number of classes (default: the dataset's)")
    run.add_argument("--vae", type=some_text,
                     help="autoencoder: ema or mse (Stable Diffusion's), a hub id, a local folder, or none for pixels "
                     "(default: none for digits, that of the latents for latents, else ema)")  # fmt: skip
    run.add_argument("--results-dir", type=some_text, default="results", help="where a new numbered run folder is made")
    run.add_argument("--run-dir", type=some_text, help="the run's folder; a run that is in it is continued")
    run.add_argument("--ckpt", type=some_text, help="continue from this checkpoint, with the settings stored in it")
    run.add_argument("--initialize_from", "--initialize-from", type=some_text, metavar="WEIGHTS",
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
    training.add_argument(
        "--compile", action="store_true", help="compile the blocks first: a minute of waiting, then faster steps"
    )
    training.add_argument("--joint-levels", action=argparse.BooleanOptionalAction, default=True,
                          help="all levels' tokens in one pass of the network, or a pass per level")  # fmt: skip
    training.add_argument("--activation-checkpointing", action="store_true", help="keep only the inputs of blocks for "
                          "the backward pass: a fraction of the memory, a third more time")  # fmt: skip
    training.add_argument("--shard", action="store_true", help="divide weights, gradients, moments and EMA among the "
                          "processes (FSDP2): for what does not fit; the losses stay the same")  # fmt: skip
    deterministic = "on CUDA, the same bits in every repetition, for some speed; on CPUs they always are"
    training.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=False, help=deterministic)
    training.add_argument("--global-seed", type=natural_int, default=0, help="seed of everything random")
    training.add_argument("--num-workers", type=natural_int, default=min(4, os.cpu_count() or 1),
                          help="data loading processes per rank")  # fmt: skip
    add_transport_args(parser)

    logging = parser.add_argument_group("logging")
    logging.add_argument("--log-every", type=positive_int, default=100, help="steps between lines of metrics")
    logging.add_argument("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    logging.add_argument("--keep-last", type=positive_int, metavar="K",
                         help="delete all but the last K checkpoints (default: keep all)")  # fmt: skip
    logging.add_argument("--keep-every", type=positive_int, metavar="M",
                         help="with --keep-last, keep those of every M-th step as well")  # fmt: skip
    logging.add_argument("--sample-every", type=natural_int, default=10_000,
                         help="steps between grids of EMA samples; 0 for none at all")  # fmt: skip
    logging.add_argument("--wandb", action="store_true", help="log to wandb (WANDB_KEY, ENTITY and PROJECT are read)")
    add_cfg_args(parser, default=4.0)
    return parser


# ---------------------------------------------------------------------------------------------------------------
# Set-up


def settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and which of them were given."""
    args, given = build_parser().parse_with_given(argv)
    with user_input():
        args.model = canonical_name(args.model)
        args.vae = args.vae and autoencoder_name(args.vae)
    if not args.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("torchrun --max-restarts needs --run-dir: without it, every restart would begin another run")
    if {"epochs", "max_steps"} <= given:
        raise UserError("--epochs and --max-steps both say how long to train: give one of them")
    if args.shard and not args.joint_levels:
        raise UserError("--shard passes all levels through the network at once: leave --no-joint-levels out")
    if args.keep_every and not args.keep_last:
        raise UserError("--keep-every says what --keep-last does not delete: give --keep-last as well")
    return args, given


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
    args.vae = autoencoder_name(args.vae or default or "none")
    if args.vae == "none" and dataset.kind == "latents" and args.sample_every:
        raise ValueError(f"{args.data_path} does not say which autoencoder decodes it: give --vae, or --sample-every 0")
    if autoencoder is None and (dataset.kind == "images" or args.sample_every):
        autoencoder = load_autoencoder(args.vae, device)
    if dataset.kind == "latents" and autoencoder is not None and autoencoder.name != "none":
        autoencoder = autoencoder.with_scaling(dataset.scaling)
    return dataset, autoencoder


def build(
    args: argparse.Namespace, processes: Processes, pretrained: bool
) -> tuple[AnyDataset, Autoencoder | None, PyramidalPatchDiT, Transport, dict[str, Any]]:
    """Dataset, autoencoder, model and transport that the arguments ask for, and the config that describes them.

    Args:
        pretrained: start from --initialize_from where it is given; a continued run does not, and keeps what an earlier
                    version allowed
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
        if args.patch_level not in (None, model.num_levels):
            raise ValueError(
                f"--patch-level {args.patch_level}, but {args.model} has {model.num_levels} level(s): leave it out, or "
                f"choose another --model (those of two levels end in -2, those of three in -3)"
            )
        args.level_edges = list(level_edges_of(args, model.num_levels))
        if args.initialize_from and pretrained:
            initialize_levels(model, load_pretrained(args.initialize_from).model)
        names = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps", "level_edges")
        transport_config = {name: getattr(args, name) for name in names}
        transport = create_transport(**transport_config, check_ends=pretrained)
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
        "scaling": asdict(dataset.scaling) if dataset.kind == "latents" else None,
        "args": {**vars(args), "data_path": full_path(args.data_path)},
        "data": dataset.identity(),
        "torch": str(torch.__version__),
    }
    return dataset, autoencoder, model, transport, config


# ---------------------------------------------------------------------------------------------------------------
# One step


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
    """EMA samples, one row per class, made by all processes together; returned on the main one.

    None there if Preempted interrupted them. All make the same number, as calls of a sharded network are collective:
    where the samples do not divide, some are made twice.
    """
    classes = PREVIEW_CLASSES if ema.num_classes == 1000 else range(min(10, ema.num_classes))
    labels = torch.tensor(list(classes)).repeat_interleave(PREVIEW_COLUMNS)
    share = math.ceil(len(labels) / processes.world_size)
    mine = (processes.rank + torch.arange(share) * processes.world_size) % len(labels)
    images = []
    with contextlib.suppress(Preempted):
        for indices in mine.split(batch_size):
            x0 = transport.noise.sample(
                (len(indices), ema.in_channels, *ema.input_size),
                sample_generators(args.global_seed, indices.tolist(), PREVIEW),
                processes.device,
            )
            y = labels[indices].to(processes.device)
            x1 = Sampler(transport).sample_ode(guided(ema, args), x0, num_steps=PREVIEW_STEPS, y=y)
            images += autoencoder.decode(x1).float().cpu()
    parts = gather_objects((mine.tolist(), images), processes)
    found = {index: image for indices, images in parts for index, image in zip(indices, images, strict=False)}
    return torch.stack([found[index] for index in range(len(labels))]) if len(found) == len(labels) else None


# ---------------------------------------------------------------------------------------------------------------
# The run


def train(argv: Sequence[str] | None = None) -> None:
    """Run train.py with these command-line arguments."""
    args, given = settings(argv)
    with Preemption() as preemption, deterministic_errors():
        run(args, given, preemption)


def run(args: argparse.Namespace, given: set[str], preemption: Preemption) -> None:
    """Start or continue the run that the arguments describe.

    Raises:
        SystemExit: with EXIT_PREEMPTED, if it was asked to stop.
        UserError:  if it cannot go on; one of the user's arguments or the disk is why.
    """
    processes = start_processes()
    check_same_flags(args, processes, but={"data_path", "vae", "num_workers", "ckpt", "initialize_from"})
    if args.shard:
        parallel.check_shard(processes)
    device = processes.device
    source, told = on_main(lambda: starting_point(args), processes)
    checkpoint, changes = agree(lambda: continue_from(source, args, given), processes) if source else (None, [])
    if not args.data_path:
        raise UserError("--data-path is missing: 'digits', a folder of class folders, a zip file, or latents; only a "
                        "run that is continued remembers its own", everywhere=True)  # fmt: skip
    set_determinism(device, args.deterministic)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dataset, autoencoder, model, transport, config = agree(
        lambda: build(args, processes, pretrained=checkpoint is None), processes
    )
    if checkpoint is not None:
        agree(lambda: check_data(checkpoint["config"], config["data"], args.data_path), processes)
    run_dir = on_main(lambda: make_run_dir(args), processes)

    # Model, average, optimizer
    ema = copy.deepcopy(model).requires_grad_(False)
    start_step = 0
    if checkpoint is not None:
        agree(lambda: load_networks(checkpoint, source, model=model, ema=ema), processes)
        start_step = checkpoint["step"]
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        compile_levels(model, tell=lambda line: log and log.text(line))
    model, ema = (parallel.place(network, processes, args.shard, args.precision) for network in (model, ema))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    if checkpoint is not None:
        parallel.load_optimizer(optimizer, checkpoint["opt"])
        for group in optimizer.param_groups:
            group["weight_decay"] = args.weight_decay
        checkpoint = None  # the memory that it takes
    loss = parallel.loss_module(model, transport, processes, args.joint_levels)

    def stop_preview(*_: object) -> None:
        """All processes leave at the same call, so that none waits for another."""
        if parallel.any_process(preemption.requested, device):
            raise Preempted

    ema.register_forward_pre_hook(stop_preview, prepend=True)  # it is evaluated for previews alone

    # Data
    total_steps = args.max_steps or max(1, args.epochs * len(dataset) // args.global_batch_size)
    steps = StepSampler(start_step, total_steps, args.global_batch_size, processes.rank, processes.world_size)
    loader = training_loader(dataset, args.global_seed, steps, args.num_workers, pin_memory=device.type == "cuda")
    loader.worker_init_fn = outlive_preemption
    micro_batch = steps.local // args.gradient_accumulation_steps

    # Logs
    log = None

    def open_log() -> None:
        nonlocal log
        with complete_file(run_dir / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")
        log = RunLog(run_dir, start_step, config, args.wandb)

    on_main(open_log, processes)
    if log:
        parameters = sum(p.numel() for p in model.parameters())
        log.text(f"{args.model}: {parameters:,} parameters, {model.num_levels} level(s), "
                 f"{' / '.join(str(model.num_tokens(level)) for level in range(model.num_levels))} tokens")  # fmt: skip
        log.text(f"{args.data_path}: {len(dataset):,} images, {dataset.num_classes} classes; "
                 f"{processes.world_size} process(es) on {device.type}, {args.precision}; {run_dir}")  # fmt: skip
        for line in (*told, *changes):
            log.text(f"warning: {line}")
        if line := precision_note(args.precision, device):
            log.text(line)
        if start_step:
            log.text(f"continuing from step {start_step}, {source}")
    writer = CheckpointWriter(run_dir, args.keep_last, args.keep_every, log.text if log else print)

    def save(step: int) -> None:
        """Start writing the checkpoint of a step."""
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
        state = parallel.full_state(state, processes)
        if log:
            writer.save(step, {**state, "config": config, "step": step})

    def show(step: int) -> None:
        """Grid of EMA samples of a step."""
        path = run_dir / "samples" / f"{step:07d}.png"
        with use_precision(args.precision, device):
            images = preview(ema, autoencoder, transport, args, processes, batch_size=max(micro_batch, 16))
        if log and images is not None:
            with log.unless_full():
                save_grid(images, path, columns=PREVIEW_COLUMNS)
                log.picture("samples", path, step)
            log.plot()

    progress = tqdm(total=total_steps, initial=min(start_step, total_steps), unit="step", disable=not log,
                    mininterval=0.5 if sys.stderr.isatty() else 15)  # fmt: skip
    sums = torch.zeros(2, model.num_levels, device=device)  # loss and number of samples, by level
    grad_norms, timed_steps, mark = 0.0, 0, time.perf_counter()
    done, preempted, preemption.working = start_step, False, True
    for step, (images, labels) in enumerate(readable(loader), start=start_step):
        # The equations in one place: x_t = alpha_t x_1 + sigma_t x_0, the network predicts at (x_t, t, y)
        first = step * args.global_batch_size + processes.rank * steps.local
        positions = range(first, first + steps.local)
        t, x0, drop = draw_step(step, positions, (model.in_channels, *model.input_size), transport, args)
        labels = labels.masked_fill(drop, model.num_classes)
        images, x0, y = (tensor.to(device, non_blocking=True) for tensor in (images, x0, labels))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        all_terms = []
        for start in range(0, steps.local, micro_batch):
            part = slice(start, start + micro_batch)
            parallel.synchronize_gradients(loss, start + micro_batch == steps.local)  # once per step
            with use_precision(args.precision, device):
                x1 = images[part]
                if dataset.kind == "images":
                    x1 = autoencoder.encode(x1, posterior_generators(args.global_seed, positions[part]))
                terms = loss(x1, y[part], t[part], x0[part])
            (terms["loss"].mean() / args.gradient_accumulation_steps).backward()
            all_terms.append({"loss": terms["loss"].detach().float(), "level": terms["level"]})
        terms = {key: torch.cat([part[key] for part in all_terms]) for key in ("loss", "level")}
        sums[0].index_add_(0, terms["level"], terms["loss"])
        sums[1].index_add_(0, terms["level"], torch.ones_like(terms["loss"]))
        norm = parallel.gradient_norm(model)
        # What one process knows and all must agree on, in the step's only look at the device.
        bad_loss = (~terms["loss"].isfinite()).any().float()
        flags = torch.stack([bad_loss, torch.full_like(bad_loss, preemption.requested)])
        flags = parallel.all_reduce(flags, dist.ReduceOp.MAX)
        grad_norm, bad_loss, preempted = torch.cat([norm[None], flags]).tolist()
        if not bad_loss and not math.isfinite(grad_norm):  # its square may be too large for fp32
            norm = parallel.gradient_norm(model, torch.float64)
            grad_norm = norm.item()
        if bad_loss or not grad_norm < (LARGEST_NORM if args.max_grad_norm is None else math.inf):
            progress.close()  # before it reaches the weights
            if bad_loss or not math.isfinite(grad_norm):
                reason = broadcast_object(
                    not_finite(done + 1, positions, terms, model, loader.dataset.index, processes)
                )
            else:
                reason = f"the gradient's norm is {grad_norm:.1e} at step {done + 1}, which AdamW cannot square in fp32"
            writer.wait()
            hints = "continue with --max-grad-norm 1 or a lower --lr"
            raise UserError(f"{reason}; {last_words(run_dir)}; {hints}", everywhere=True)
        if args.max_grad_norm:
            nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, norm)
        writer.wait_copied()  # a checkpoint that is being written has read the weights
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, ema_decay_at(step, args.ema_decay))
        done = step + 1
        if args.compile and log and step == start_step:
            log.text(f"first step after {time.perf_counter() - mark:.0f} s, compilation included")
        grad_norms, timed_steps = grad_norms + grad_norm, timed_steps + 1
        progress.update(1)

        finished = done == total_steps
        if done % args.log_every == 0 or finished:
            parallel.all_reduce(sums)
            if log:
                seconds = time.perf_counter() - mark
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
        before = time.perf_counter()
        if done % args.ckpt_every == 0 or finished or preempted:
            save(done)
        if preempted:
            break
        if args.sample_every and (done % args.sample_every == 0 or finished):
            show(done)
        mark += time.perf_counter() - before  # not the steps' time
    progress.close()
    failed = broadcast_object(writer.wait())  # so that all processes end together
    if failed:
        raise UserError(f"{failed}; make room, and the same command continues", everywhere=True)
    if log and start_step >= total_steps:
        log.text(f"nothing to do: {run_dir} is at step {start_step}, and {total_steps} are asked for")
    elif log and done >= total_steps:
        log.plot()
        log.text(f"done: {total_steps} steps, see {run_dir}")
    elif log:
        log.text(f"stopped by a signal after step {done}, which is saved: the same command continues")
    if log:
        log.close()
    if done < total_steps:
        sys.exit(preemption.exit_code)


def readable(loader: DataLoader) -> Iterator[list[torch.Tensor]]:
    """The loader's batches; data that cannot be read end the run with their name."""
    try:
        yield from loader
    except OSError as error:  # from a worker the text is a traceback, which ends with the error itself
        message = re.sub(r"^[\w.]+: ", "", str(error).strip().splitlines()[-1])
        image = isinstance(error, UnreadableImage)
        advice = "; remove it, or train on extract_latents.py --skip-unreadable's latents" if image else ""
        raise UserError(f"{message}{advice}") from error


if __name__ == "__main__":
    run_script(train)
