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
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

import train_utils as cli
from data import order
from data.autoencoder import Autoencoder
from data.datasets import AnyDataset, open_training_data
from data.sizes import SizeRule
from experts import ExpertPatchDiT, Network, create_expert
from metrics.training import TrainingEvaluation
from pipeline import Pipeline
from runtime import checkpoints, distributed, health, logs, memory, parallel, preemption, rng, run, speed
from runtime.errors import run_script
from transport import ODE, ExpertPart, LevelErrors, Transport, create_transport, samples
from transport.samples import Samples
from weights.pretrained import initialize_from

PREVIEW_COLUMNS = 8
PREVIEW_STEPS = 25
EVALUATION_STEPS = 50
NODE_FLAGS = {"num_workers", "vae", "ckpt", "initialize_from", *run.PATHS}  # may differ from node to node

# ---------------------------------------------------------------------------------------------------------------
# Flags


def build_parser() -> cli.ArgumentParser:
    """The flags of train.py."""
    parser = cli.ArgumentParser(
        prog="train.py",
        description="Train a diffusion transformer with a pyramid of patch sizes.",
        epilog="Exit codes: 0 the run is done; 75 SIGTERM or SIGUSR1: saved after the current step, the same command "
        "continues (a second signal exits at once); 130 the same for Ctrl-C; 2 something to mend, said in one line. "
        "torchrun turns every code but 0 into 1.",
    )
    cli.add_run_args(parser)
    cli.add_training_args(parser)
    cli.add_transport_args(parser)
    cli.add_logging_args(parser)
    cli.add_evaluation_args(parser)
    cli.add_cfg_args(parser, default=4.0)
    return parser


# ---------------------------------------------------------------------------------------------------------------
# Set-up


@dataclass
class Training:
    """Everything that a run computes with."""

    args: argparse.Namespace  # what was given, what the run remembers, and what follows from the data
    processes: distributed.Processes
    dataset: AnyDataset
    autoencoder: Autoencoder | None  # None where nothing is encoded or shown
    transport: Transport
    model: Network
    ema: Network
    optimizer: torch.optim.Optimizer
    loss: nn.Module  # transport.training_losses of the model, averaging gradients over the processes
    evaluation: TrainingEvaluation | None
    level_meter: logs.LevelMeter | None  # None where levels are not elastic
    start_step: int


def build(
    args: argparse.Namespace, processes: distributed.Processes, stored: dict[str, Any] | None
) -> tuple[AnyDataset, Autoencoder | None, Network, Transport, dict[str, Any]]:
    """Dataset, autoencoder, network and process that the arguments ask for, and the config that describes them.

    Args:
        stored: the config of a run that is continued: it keeps its layout of the head, and a process that is refused
                by now

    Raises:
        ValueError, OSError: if something is missing, or does not fit the rest.
    """
    dataset, autoencoder, vae = open_training_data(
        args.data_path, args.image_size, args.vae, bool(args.sample_every or args.eval_every), processes.device
    )
    cli.take_sizes(args, dataset, autoencoder)
    encodes = dataset.kind == "images" and autoencoder is not None
    channels, *input_size = autoencoder.latent_shape(dataset.image_shape) if encodes else dataset.image_shape
    num_classes = args.num_classes or dataset.num_classes
    if num_classes < dataset.num_classes:
        raise ValueError(f"--num-classes {num_classes} is too few: {args.data_path} has {dataset.num_classes}")
    cli.check_numbers(args, processes.world_size)
    process, parts = cli.process_from(args)
    network = stored and stored["model"]
    pixels = vae == "none" and dataset.kind != "latents"
    fields = {
        "input_size": input_size,
        "in_channels": channels,
        "num_classes": num_classes,
        "bottleneck": args.bottleneck,
        "learn_sigma": network.get("experts", [network])[0]["learn_sigma"] if network else not pixels,
    }
    fields |= {name: getattr(args, name) for name in ("patch_sizes", "position") if getattr(args, name)}
    model = build_network(args.model, parts, args.global_seed, **fields)
    cli.fit_sizes(args, dataset, model)
    transport = create_transport(**process, check_ends=stored is None)
    transport.check_levels(model)
    cli.guidance_from(args).of(model)
    resolved = {
        "vae": vae,
        "image_size": dataset.image_size if args.max_tokens is None else None,
        "num_classes": num_classes,
        "level_edges": cli.patch_edges(args),
        "precision": args.precision or speed.default_precision(processes.device, training=True),
        "size_multiple": dataset.sizes and dataset.sizes.multiple,
        "crop_probability": dataset.sizes and dataset.sizes.crop_probability,
        **{name: run.full_path(getattr(args, name)) for name in run.PATHS},
    }
    identity = dataset.identity()
    config = {
        "model_name": args.model,
        "model": model.config,
        "transport": process,
        "vae": vae,
        "scaling": identity.get("scaling"),
        "args": {**vars(args), **resolved},
        "data": identity,
        "torch": str(torch.__version__),
    }
    return dataset, autoencoder, model, transport, config


def build_network(name: str, parts: Sequence[ExpertPart], seed: int, **fields: Any) -> Network:
    """The network of a run, the same on every rank; an expert begins with the same weights alone and beside others."""
    networks = []
    for part in parts:
        torch.manual_seed(seed)
        networks.append(create_expert(name, part.patches, **fields))
    return networks[0] if len(parts) == 1 else ExpertPatchDiT(networks, [part.interval[0] for part in parts[1:]])


def check_memory(
    args: argparse.Namespace,
    model: Network,
    transport: Transport,
    dataset: AnyDataset,
    processes: distributed.Processes,
) -> list[str]:
    """Refuse a batch that the device cannot hold (ValueError), or return a line where it is not known."""
    return memory.check_training(
        model,
        transport.level_probabilities(),
        batch=args.global_batch_size // processes.world_size // args.gradient_accumulation_steps,
        precision=args.precision,
        device=processes.device,
        checkpointing=args.activation_checkpointing,
        many_sizes=dataset.sizes is not None,
    )


def set_up(args: argparse.Namespace, given: set[str], signals: preemption.Preemption) -> tuple[Training, run.Run]:
    """Start a run, or continue it from its newest checkpoint or from --ckpt. Collective."""
    # Processes, and the checkpoint to continue from
    processes = distributed.start_processes()
    distributed.check_same_flags(vars(args), processes, but=NODE_FLAGS)
    if args.shard:
        parallel.check_shard(processes)
    source, notes = distributed.on_main(lambda: run.starting_point(args.run_dir, args.ckpt), processes)
    stored: dict[str, Any] | None = None
    if source:
        defaults = vars(build_parser().parse_args([]))
        stored = distributed.agree(lambda: checkpoints.load_checkpoint(source), processes)
        settings, changes = distributed.agree(
            lambda: run.continued_settings(vars(args), given, defaults, stored["config"]["args"], source), processes
        )
        args, notes = argparse.Namespace(**settings), notes + changes
    cli.check_complete(args, given)

    # Data, network and process
    speed.set_determinism(processes.device, args.deterministic)
    dataset, autoencoder, model, transport, config = distributed.agree(
        lambda: build(args, processes, stored and stored["config"]), processes
    )
    args = argparse.Namespace(**config["args"])
    if stored:
        distributed.agree(lambda: run.check_data(stored["config"], config["data"], args.data_path), processes)
    elif args.initialize_from:
        source_of = args.initialize_from, transport.interval
        notes += distributed.agree(lambda: initialize_from(model, *source_of), processes)
    notes += distributed.agree(lambda: check_memory(args, model, transport, dataset, processes), processes)
    evaluation = None
    if args.eval_every:
        source_of = args.eval_ref, args.eval_features, args.eval_weights, args.eval_num
        shape = Pipeline(model, transport, autoencoder).image_shape
        evaluation = TrainingEvaluation(*source_of, dataset.num_classes, shape, processes)
    folder_name = f"{args.model}-{args.path_type}-{args.prediction.replace(' ', '-')}"
    folder = distributed.on_main(lambda: run.make_run_dir(args.run_dir, args.results_dir, folder_name), processes)

    # Weights, average and optimizer, placed on the devices
    ema = copy.deepcopy(model).requires_grad_(False)
    if stored:
        distributed.agree(lambda: checkpoints.load_networks(stored, source, model=model, ema=ema), processes)
    start_step = stored["step"] if stored else 0
    this_run = run.Run(folder, start_step, config, processes, signals, args.keep_last, args.keep_every, args.wandb)
    model.activation_checkpointing = args.activation_checkpointing
    if args.compile:
        speed.compile_levels(model, tell=this_run.say)
    model, ema = (parallel.place(network, processes, args.shard, args.precision) for network in (model, ema))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.999), weight_decay=args.weight_decay, fused=True
    )
    if stored:
        parallel.load_optimizer(optimizer, stored["opt"])
    loss = parallel.loss_module(model, transport)
    level_meter = None
    if transport.schedule.elastic:
        kept = LevelErrors(**stored["level_errors"]) if stored and processes.is_main else None
        level_meter = logs.LevelMeter(model.num_levels, processes.device, kept)

    data = f"{args.data_path}: {len(dataset):,} images, {dataset.num_classes} classes"
    notes += transport.rare_levels(args.global_batch_size)
    alone = "" if args.expert is None else f", expert for t in [{transport.interval[0]:g}, {transport.interval[1]:g}]"
    this_run.introduce(f"{args.model}{alone}: {model.describe()}", data, args.precision, notes)
    if start_step:
        this_run.say(f"continuing from step {start_step}, {source}")
    return Training(
        *(args, processes, dataset, autoencoder, transport, model, ema, optimizer, loss, evaluation),
        *(level_meter, start_step),
    ), this_run


# ---------------------------------------------------------------------------------------------------------------
# Samples on the way


def preview_sizes(sizes: SizeRule | None) -> dict[str, tuple[int, int] | None]:
    """Sizes (H, W) in pixels that previews have, by the end of the picture's name: three where images have many."""
    if sizes is None:
        return {"": None}
    long = 4 * sizes.square
    shapes = [sizes.size_of(*stored) for stored in ((2 * long, long), (long, 2 * long))]
    return {"": None} | {f"-{height}x{width}": (height, width) for height, width in shapes}


def draw(t: Training, indices: torch.Tensor, y: torch.Tensor, stream: rng.Stream, **how: Any) -> torch.Tensor:
    """EMA samples (n, C, H, W) with these numbers and class ids, by a solver and guidance; on the CPU. Collective."""
    pipe = Pipeline(t.ema, t.transport, t.autoencoder)
    pipe.precision = t.args.precision
    generators = rng.sample_generators(t.args.global_seed, indices.tolist(), stream)
    return pipe.images(y, **how, generators=generators).float().cpu()


def preview(
    t: Training, this_run: run.Run, batch_size: int, size: tuple[int, int] | None = None
) -> torch.Tensor | None:
    """EMA samples (N, C, H, W), one row per class, on the main process; None if they are interrupted. Collective."""
    labels = torch.tensor(logs.shown_classes(t.ema.num_classes)).repeat_interleave(PREVIEW_COLUMNS)
    how = {"solver": ODE(num_steps=PREVIEW_STEPS), "guidance": cli.guidance_from(t.args), "size": size}
    drawn: dict[int, torch.Tensor] = {}
    for indices in distributed.shares(len(labels), batch_size, t.processes):
        indices %= len(labels)
        if this_run.any_should_stop():
            break
        try:
            images = draw(t, indices, labels[indices], rng.Stream.PREVIEW, **how)
        except FloatingPointError as error:  # no reason to end a run
            this_run.say(f"warning: a preview is left out: {error}")
            continue
        drawn.update(zip(indices.tolist(), images, strict=True))
    found = {index: image for part in distributed.gather_objects(drawn, t.processes) for index, image in part.items()}
    return torch.stack([found[index] for index in range(len(labels))]) if len(found) == len(labels) else None


# ---------------------------------------------------------------------------------------------------------------
# The training loop


@dataclass(frozen=True)
class Batch:
    """This process's n samples of a step; x_t = alpha_t x_1 + sigma_t x_0, and the network predicts at (x_t, t, y)."""

    positions: range  # numbers of the samples in the run
    images: Samples  # (n, C, H, W), or x_1 itself where nothing is encoded; of many sizes a list of (C, H, W)
    y: torch.Tensor  # (n,) class ids
    t: torch.Tensor  # (n,) times, on the CPU so that no device is waited for
    level: torch.Tensor  # (n,), on the CPU as well
    x0: Samples  # (n, C, h, w) noise, or a list


def noise_shapes(t: Training, images: Samples) -> Sequence[int] | list[Sequence[int]]:
    """Shape of the noise of every sample, or of each where images have many sizes."""
    if isinstance(images, torch.Tensor):
        return t.model.sample_shape
    encoded = t.dataset.kind == "images"
    return [t.autoencoder.latent_shape(image.shape) if encoded else tuple(image.shape) for image in images]


def count_tokens(t: Training, levels: torch.Tensor, shapes: Sequence[int] | list[Sequence[int]]) -> int:
    """Tokens that go through the network for samples of these levels (n,)."""
    sizes = [None] * len(levels) if isinstance(shapes[0], int) else [tuple(shape[1:]) for shape in shapes]
    return sum(t.model.num_tokens(level, size) for level, size in zip(levels.tolist(), sizes, strict=True))


def forward_backward(t: Training, batch: Batch, micro_batch: int) -> dict[str, torch.Tensor]:
    """Leave the gradient of the mean loss in the parameters; returns the samples' terms but for their times."""
    parts = []
    for start in range(0, len(batch.y), micro_batch):
        part = slice(start, start + micro_batch)
        parallel.synchronize_gradients(t.loss, enabled=part.stop == len(batch.y))  # once per step
        x1 = batch.images[part]
        if t.dataset.kind == "images":
            x1 = t.autoencoder.encode(x1, order.posterior_generators(t.args.global_seed, batch.positions[part]))
        with speed.use_precision(t.args.precision, t.processes.device):
            terms = t.loss(x1, batch.y[part], batch.t[part], batch.x0[part], batch.level[part])
        (terms["loss"].mean() / t.args.gradient_accumulation_steps).backward()
        values = {key: terms[key].detach().float() for key in ("loss", "velocity_error")}
        parts.append({**values, "level": terms["level"]})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def train_steps(t: Training, this_run: run.Run) -> None:
    """Make the steps that are left, with records, checkpoints and previews. Collective.

    Raises:
        UserError:  if a loss or gradient is not finite, or an image cannot be read.
        SystemExit: if the run was asked to stop before its end.
    """
    args, device, model = t.args, t.processes.device, t.model
    total_steps = args.max_steps or max(1, args.epochs * len(t.dataset) // args.global_batch_size)
    batches = order.TrainingBatches(
        t.dataset, args.global_seed, t.start_step, total_steps, args.global_batch_size, t.processes, args.num_workers
    )
    micro_batch = batches.local_size // args.gradient_accumulation_steps
    samples_batch = max(micro_batch, 16)
    evaluated = {"stream": rng.Stream.EVALUATION, "solver": ODE(num_steps=EVALUATION_STEPS)}  # unguided
    progress = tqdm(
        total=total_steps,
        initial=min(t.start_step, total_steps),
        unit="step",
        disable=not t.processes.is_main,
        mininterval=0.5 if sys.stderr.isatty() else 15,
    )
    meter = logs.StepMeter(model.num_levels, args.global_batch_size, device)
    done, stop, this_run.preemption.working = t.start_step, False, True
    for step, positions, images, labels in batches:
        # Random numbers and learning rate of this step
        settings = args.global_seed, args.global_batch_size, args.class_dropout_prob
        shapes = noise_shapes(t, images)
        times, levels, x0, drop = rng.draw_step(step, positions, shapes, t.transport, *settings)
        y = labels.masked_fill(drop, model.num_classes)
        images, y, x0 = (samples.to(values, device) for values in (images, y, x0))
        lr = args.lr * min(1.0, (step + 1) / max(1, args.warmup_steps))
        for group in t.optimizer.param_groups:
            group["lr"] = lr

        # Forward and backward
        terms = forward_backward(t, Batch(positions, images, y, times, levels, x0), micro_batch)
        meter.add_losses(terms)
        meter.tokens += count_tokens(t, levels, shapes)
        if t.level_meter:
            t.level_meter.add(terms, times)

        # Health: numbers that are not finite must not reach the weights
        clipped = args.max_grad_norm is not None
        seen = health.check_step(
            done + 1, positions, terms, model, batches.index, this_run.should_stop, clipped, t.processes
        )
        if seen.reason:
            progress.close()
            raise this_run.fail(seen.reason, "continue with --max-grad-norm 1 or a lower --lr")

        # Clip, step, average
        if clipped:
            nn.utils.clip_grads_with_norm_(model.parameters(), args.max_grad_norm, seen.norm)
        this_run.wait_copied()  # a checkpoint that is being written has read the weights
        t.optimizer.step()
        t.optimizer.zero_grad(set_to_none=True)
        speed.update_ema(t.ema, model, speed.ema_decay_at(step, args.ema_decay))
        done, stop = step + 1, seen.stop
        if args.compile and step == t.start_step:
            this_run.say(f"first step after {meter.seconds:.0f} s, compilation included")
        meter.step_done(seen.grad_norm)
        progress.update(1)

        # Log
        last = done == total_steps
        if done % args.log_every == 0 or last:
            record = meter.record(done, lr, epoch=done * args.global_batch_size / len(t.dataset))
            if t.level_meter:
                record["level_errors"] = t.level_meter.read().means
            this_run.record(record)
            progress.set_postfix(loss=f"{record['loss']:.4f}")

        # Checkpoint, preview and evaluation, which are not the steps' time
        with meter.pause():
            if done % args.ckpt_every == 0 or last or stop:
                measured = {"level_errors": t.level_meter.read().as_dict()} if t.level_meter else {}
                this_run.save(done, model, t.ema, t.optimizer, **measured)
            if stop:
                break
            if args.sample_every and (done % args.sample_every == 0 or last):
                for name, size in preview_sizes(t.dataset.sizes).items():
                    this_run.show(done, preview(t, this_run, samples_batch, size), PREVIEW_COLUMNS, name)
            if t.evaluation and (done % args.eval_every == 0 or last):
                t.evaluation.measure(done, lambda i, y: draw(t, i, y, **evaluated), this_run, samples_batch)
    progress.close()
    this_run.finish(done, t.start_step, total_steps)


def train(argv: Sequence[str] | None = None) -> None:
    """Run train.py with these command-line arguments."""
    args, given = build_parser().parse_with_given(argv)
    args = cli.checked_training_flags(args, given)
    with preemption.Preemption() as signals, speed.deterministic_errors():
        train_steps(*set_up(args, given, signals))


if __name__ == "__main__":
    run_script(train)
