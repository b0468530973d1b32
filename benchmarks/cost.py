"""What does training need, on paper? FLOPs, bytes and communication of a step against the number of GPUs.

    python -m benchmarks.cost --model PPF-XL-2 --world-size 8 64 512

Nothing is run and no weight is allocated: the numbers follow from the architecture and from the assumptions that are
printed above the table. benchmarks/training.py measures one GPU's part of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from UNKNOWN import add_level_edges, level_edges_of

from benchmarks.timing import table
from models import FREQUENCY_FEATURES, DiTBlock, PyramidalPatchDiT, canonical_name, create_model
from runtime.errors import run_script, user_input
from train_utils import ArgumentParser, positive_float, positive_int, probability
from transport import PatchSchedule

FP32, BF16 = 4, 2  # bytes
BACKWARD = 2  # of a forward pass: one matrix product becomes two


def build_parser() -> ArgumentParser:
    """The flags of this benchmark."""
    parser = ArgumentParser(prog="cost.py", description="FLOPs, bytes and communication of a training step, on paper.")
    run = parser.add_argument_group("run")
    run.add_argument("--model", default="PPF-XL-2", help="name, as in models.py")
    run.add_argument("--input-size", type=positive_int, default=32, help="side of the latents (256x256 images: 32)")
    run.add_argument("--global-batch-size", type=positive_int, nargs="+", default=[256, 1024], metavar="N",
                     help="samples per step, all GPUs")  # fmt: skip
    run.add_argument("--world-size", type=positive_int, nargs="+", default=[8, 64, 512], metavar="W", help="GPUs")
    run.add_argument("--max-steps", type=positive_int, default=500_000, help="steps of the whole training")
    run.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="bf16 is autocast: fp32 weights")
    run.add_argument("--activation-checkpointing", action="store_true", help="compute blocks again in backward")
    run.add_argument("--shard", action="store_true", help="FSDP2, as train.py --shard: all state divided")
    add_level_edges(run)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--peak-tflops", type=positive_float, default=989, help="of a GPU (H100 SXM, dense bf16: 989)")
    machine.add_argument("--mfu", type=probability, default=0.4, help="share of the peak that a step reaches")
    machine.add_argument("--gpus-per-node", type=positive_int, default=8, help="joined by NVLink")
    machine.add_argument("--nvlink", type=positive_float, default=300, metavar="GB/S",
                         help="that a GPU sends to another one of its node")  # fmt: skip
    machine.add_argument("--network", type=positive_float, default=300, metavar="GB/S",
                         help="that a node sends to another node (8 x 400 Gb/s: 400 at most)")  # fmt: skip
    return parser


# ---------------------------------------------------------------------------------------------------------------
# FLOPs


def linear_weights(module: nn.Module) -> int:
    """Elements of all linear layers' weight matrices."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def block_macs(model: PyramidalPatchDiT, level: int) -> int:
    """Multiply-accumulates of all transformer blocks for one sample; `macs` without embeddings and head."""
    block, t = model.blocks[0], model.num_tokens(level)
    modulation = linear_weights(block.adaLN_modulation)  # once per sample, all else once per token
    tokens = t * (linear_weights(block) - modulation) + 2 * t * t * model.hidden_size
    return model.depth * (modulation + tokens)


def step_flops(model: PyramidalPatchDiT, samples: Sequence[float], checkpointing: bool) -> float:
    """FLOPs of forward and backward: 3 forward passes, 4 of the blocks with activation checkpointing.

    Args:
        samples: of the step, by level
    """
    passes = ((1 + BACKWARD) * model.macs(level) + checkpointing * block_macs(model, level)
              for level in range(model.num_levels))  # fmt: skip
    return sum(2 * count * macs for count, macs in zip(samples, passes, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Bytes that are kept for the backward pass


def block_bytes(
    model: PyramidalPatchDiT, samples: Sequence[float], precision: str, joint: bool, block: DiTBlock
) -> float:
    """Activations that one block keeps: each tensor that its backward needs, in the precision that it has.

    Autocast keeps the residual stream and LayerNorm in fp32; linear layers, GELU and attention are in bf16.
    """
    high, low = FP32, BF16 if precision == "bf16" else FP32
    tokens = sum(count * model.num_tokens(level) for level, count in enumerate(samples))
    d, inner = model.hidden_size, block.mlp.fc1.out_features
    normed = 2 * high * (2 * d + 2)  # twice: the stream, its normalization, mean and deviation
    attention = low * (d + 3 * d + d + d) + FP32 * model.num_heads  # input, q k v, output, projected; log-sum-exp
    mlp = low * (d + 2 * inner + d)  # input, before and after GELU, output
    modulation = low * d * (1 + 6 + 2)  # SiLU(c), its six parts, and 1 + scale twice
    if joint and model.num_levels > 1:  # copies that join the levels: of attention's outputs and of c
        attention += low * d
        modulation += high * d
    return tokens * (normed + attention + mlp) + sum(samples) * modulation


def kept_bytes(
    model: PyramidalPatchDiT, samples: Sequence[float], precision: str, joint: bool, checkpointing: bool
) -> float:
    """Activations that a forward pass keeps for the backward pass, the loss included, weights apart.

    Args:
        samples: of one GPU, by level
        joint:   all levels in one pass

    Derived for scaled_dot_product_attention's fused kernels, without compilation. With checkpointing a block keeps
    its input alone; while a block's backward runs, its `block_bytes` come on top.
    """
    high, low = FP32, BF16 if precision == "bf16" else FP32
    n, d, (h, w) = sum(samples), model.hidden_size, model.input_size
    tokens = sum(count * model.num_tokens(level) for level, count in enumerate(samples))
    pixels = n * model.in_channels * h * w
    conditions = n * (low * (FREQUENCY_FEATURES + 2 * d) + high * d + 8)  # sinusoids, MLP of t, c; the label
    embedding = low * pixels
    final = tokens * (high * (2 * d + 2) + low * d) + n * low * d * (1 + 1)  # as in a block; SiLU(c), 1 + scale
    loss = FP32 * (pixels + n)  # the error, its weight
    if checkpointing:
        blocks = model.depth * tokens * high * d
    else:
        blocks = sum(block_bytes(model, samples, precision, joint, block) for block in model.blocks)
    return conditions + embedding + blocks + final + loss


def autocast_bytes(model: PyramidalPatchDiT, precision: str, checkpointing: bool, shard: bool = False) -> int:
    """The bf16 copies of fp32 weights that autocast makes, and linear layers keep for the gradient of their input.

    The first layers, of the patches and of t, need no such gradient. With checkpointing only one block is at work; with
    shards the blocks' weights are gathered in bf16 already.
    """
    if precision != "bf16":
        return 0
    blocks, one = linear_weights(model.blocks), linear_weights(model.blocks[0])
    first = linear_weights(model.x_embedder) + linear_weights(model.t_embedder.mlp[0])
    at_work = 0 if shard else one if checkpointing else blocks
    return BF16 * (linear_weights(model) - first - blocks + at_work)


# ---------------------------------------------------------------------------------------------------------------
# Bytes on a GPU and between GPUs


def sent_bytes(model: PyramidalPatchDiT, world_size: int, shard: bool, precision: str) -> float:
    """Bytes that a GPU sends in a step, by ring algorithms: each pass around the ring moves (W - 1) / W of the data.

    DDP all-reduces the gradients: a reduce-scatter and an all-gather. FSDP2 gathers each block in the forward and once
    more in the backward pass (bf16 where that is what computes), all else once, and reduce-scatters the gradients.
    """
    blocks, others = parameters_of(model)
    low = BF16 if precision == "bf16" else FP32
    moved = 2 * low * blocks + FP32 * others + FP32 * (blocks + others) if shard else 2 * FP32 * (blocks + others)
    return (world_size - 1) / world_size * moved


def parameters_of(model: PyramidalPatchDiT) -> tuple[int, int]:
    """Parameters of all blocks, and of everything else."""
    blocks = sum(parameter.numel() for parameter in model.blocks.parameters())
    return blocks, sum(parameter.numel() for parameter in model.parameters()) - blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: float  # and what FSDP2 gathers, and autocast's copies
    gradients: float
    adam: float  # two moments
    ema: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.adam + self.ema + self.activations


def memory(model: PyramidalPatchDiT, samples: Sequence[float], world_size: int, args: argparse.Namespace) -> Memory:
    """What a GPU holds when the backward pass begins."""
    blocks, others = parameters_of(model)
    block, low = blocks // model.depth, BF16 if args.precision == "bf16" else FP32
    checkpointing = args.activation_checkpointing
    activations = kept_bytes(model, samples, args.precision, True, checkpointing)
    if checkpointing:
        activations += block_bytes(model, samples, args.precision, True, model.blocks[0])
    copies = autocast_bytes(model, args.precision, checkpointing, args.shard)
    state = FP32 * (blocks + others) / (world_size if args.shard else 1)
    if args.shard:
        gathered = low * 2 * block + FP32 * others  # the block at work and the next one; embeddings and heads stay
        return Memory(state + gathered + copies, state + FP32 * block, 2 * state, state, activations)
    return Memory(state + copies, state, 2 * state, state, activations)


# ---------------------------------------------------------------------------------------------------------------
# The table

COLUMNS = ("batch", "GPUs", "per GPU", "TFLOP/GPU", "weights", "gradients", "Adam", "EMA", "activations", "GB",
           "sent GB", "compute ms", "sent ms", "overlapped", "in turn", "images/s", "hours")  # fmt: skip


def assumptions(model: PyramidalPatchDiT, shares: Sequence[float], args: argparse.Namespace) -> list[str]:
    """What the table rests on, a line each."""
    parameters = sum(parameters_of(model))
    tokens = "/".join(str(model.num_tokens(level)) for level in range(model.num_levels))
    time = "/".join(f"{share:g}" for share in shares)
    again = "4 forward passes of the blocks, 3 of the rest"
    passes = again if args.activation_checkpointing else "3 forward passes"
    lines = [
        f"{parameters:,} parameters; levels of {tokens} tokens take {time} of the samples: "
        f"{step_flops(model, shares, False) / 6e9:.2f} GMACs per sample and forward pass; a GPU has its share of each",
        f"compute: {passes}, at {args.mfu:.0%} of {args.peak_tflops:g} TFLOP/s; optimizer, EMA and data apart",
        f"bytes: weights, gradients, EMA and Adam's two moments in fp32; activations in {args.precision}"
        + (" (autocast)" if args.precision == "bf16" else "")
        + ", all levels in one pass, "
        + ("each block's input, and one block in full" if args.activation_checkpointing else "no checkpointing")
        + "; no allocator overhead, no workspaces",
    ]
    if args.shard:
        lines.append(
            f"FSDP2: all state is divided; a block is gathered in {args.precision} in the forward and again in the "
            "backward pass, two at a time, all else once in fp32; gradients reduce-scattered in fp32"
        )
    else:
        lines.append(
            "DDP: a copy of everything on each GPU; gradients all-reduced in fp32, in the buckets that they are kept in"
        )
    lines.append(
        f"ring algorithms without latency: {args.nvlink:g} GB/s per GPU in a node of {args.gpus_per_node}; "
        f"across nodes, {args.network:g} GB/s per node, which every ring passes through"
    )
    lines.append(
        "overlapped: the longer of compute and communication, as if all were hidden (DDP hides behind the backward "
        "pass alone, two thirds of compute); in turn: their sum. A step is between the two; "
        f"hours are of {args.max_steps:,} overlapped steps"
    )
    return lines


def cells(model: PyramidalPatchDiT, shares: Sequence[float], batch: int, world: int, args: argparse.Namespace) -> tuple:
    """A line of the table, as text."""
    local = [share * batch / world for share in shares]
    flops = step_flops(model, local, args.activation_checkpointing)
    used = memory(model, local, world, args)
    sent = sent_bytes(model, world, args.shard, args.precision)
    compute = flops / (args.mfu * args.peak_tflops * 1e12)
    bandwidth = args.nvlink if world <= args.gpus_per_node else min(args.nvlink, args.network)
    communication = sent / (bandwidth * 1e9)
    step = max(compute, communication)
    sizes = (used.weights, used.gradients, used.adam, used.ema, used.activations, used.total, sent)
    times = (compute, communication, step, compute + communication)
    return (
        f"{batch}", f"{world}", f"{batch // world}", f"{flops / 1e12:.2f}", *(f"{size / 1e9:.2f}" for size in sizes),
        *(f"{seconds * 1e3:.2f}" for seconds in times), f"{batch / step:.0f}", f"{step * args.max_steps / 3600:.1f}",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    args = build_parser().parse_args(argv)
    with user_input():
        name = canonical_name(args.model)
        with torch.device("meta"):  # shapes alone
            model = create_model(name, input_size=args.input_size)
        schedule = PatchSchedule(level_edges_of(args, model.num_levels))
        if schedule.num_levels != model.num_levels:
            raise ValueError(
                f"--level-edges: {name} has {model.num_levels} level(s), so {model.num_levels - 1} edge(s)"
            )
    shares = [interval.length for interval in schedule.intervals(0.0, 1.0)]
    print(f"{name}, latents {args.input_size}x{args.input_size}. Assumptions:")
    for line in assumptions(model, shares, args):
        print(f"- {line}")
    rows, refused = [COLUMNS], []
    for batch in args.global_batch_size:
        for world in args.world_size:
            if batch % world:
                refused.append(f"{batch} samples do not divide among {world} GPUs")
            else:
                rows.append(cells(model, shares, batch, world, args))
    print(f"\n{table(rows)}")
    for line in refused:
        print(line)


if __name__ == "__main__":
    run_script(main)
