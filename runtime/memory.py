"""The memory that passes of a network take at least, beside what is free: refused before the work, not killed in it.

The numbers are bounds from below, so that what works is never refused: the least that a block's inputs and the inner
values of its MLP take, of all samples at once. Attention, weights, and whatever else is kept come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import psutil
import torch

from experts import Network
from models import PyramidalPatchDiT

GB = 1e9


def free_memory(device: torch.device) -> int:
    """Bytes that tensors on a device can still take; on the CPU swap counts."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available + psutil.swap_memory().free


def levels_of(model: Network, number: int) -> list[tuple[PyramidalPatchDiT, int]]:
    """(network, its own number of the level) for each level, or for the finest ones where there are fewer."""
    return [(network, own) for network in model.networks.values() for own in range(network.num_levels)][-number:]


def inner_width(network: PyramidalPatchDiT) -> int:
    """Width of the MLP's inner values."""
    return int(network.hidden_size * network.mlp_ratio)


def item_bytes(precision: str) -> int:
    """Bytes of a number in a precision of `runtime.speed`."""
    return 2 if precision == "bf16" else 4


def evaluation_bytes(model: Network, rows: Sequence[int], precision: str) -> int:
    """Bytes that an evaluation without gradients takes at least, at the level that takes most.

    A block holds its input and the MLP's, of width D, and at least one of the MLP's inner values.

    Args:
        rows: samples of input_size in one evaluation, for each level
    """
    return max(
        number * network.num_tokens(own) * (2 * network.hidden_size + inner_width(network)) * item_bytes(precision)
        for (network, own), number in zip(levels_of(model, len(rows)), rows, strict=True)
    )


def training_bytes(model: Network, rows: Sequence[float], precision: str, checkpointing: bool) -> float:
    """Bytes that the forward pass of training keeps at least for the backward pass.

    Each block keeps the inputs of its linear layers, the queries, keys and values, and the outputs that gates multiply,
    which is 8 times D, and one of the MLP's inner values (a compiled block computes the others again); with activation
    checkpointing its input alone.

    Args:
        rows:          samples of input_size in one pass, for each level, on average
        checkpointing: of activations
    """
    total = 0.0
    for (network, own), number in zip(levels_of(model, len(rows)), rows, strict=True):
        width = network.hidden_size if checkpointing else 8 * network.hidden_size + inner_width(network)
        total += number * network.num_tokens(own) * network.depth * width * item_bytes(precision)
    return total


def fitting_size(model: Network, share: float) -> tuple[int, int] | None:
    """The largest size (H, W) of about input_size's shape with at most this share of its tokens; None without one."""
    patches = [size for network in model.networks.values() for size in network.patch_sizes]
    units = [math.lcm(*sides) for sides in zip(*patches, strict=True)]
    height, width = (
        int(side * math.sqrt(share)) // unit * unit for side, unit in zip(model.input_size, units, strict=True)
    )
    rotary = all(network.position == "rope" for network in model.networks.values())
    return (height, width) if rotary and height and width else None


def check_evaluation(
    model: Network,
    rows: Sequence[int],
    batch: int,
    precision: str,
    device: torch.device,
    factor: Callable[[], int] = lambda: 1,
) -> None:
    """Refuse a batch of samples that the device's free memory cannot hold (ValueError).

    Args:
        rows:   evaluations of a sample that are made together, for each level: two where it is guided
        batch:  samples that are drawn together
        factor: tells how many pixels of an image make one of the input, for the message
    """
    single, free = evaluation_bytes(model, rows, precision), free_memory(device)
    if batch * single <= free:
        return
    pixels = factor()
    height, width = (side * pixels for side in model.input_size)
    taken = f"{batch} sample(s) of {height}x{width} together take {batch * single / GB:.3g} GB of memory or more"
    fault = f"{taken}, and {free / GB:.3g} GB are free"
    if single <= free:
        raise ValueError(f"{fault}: draw {free // single} together at most")
    size = fitting_size(model, free / single)
    if size is None:
        raise ValueError(f"{fault}: no single one fits")
    raise ValueError(f"{fault}: draw one alone, of {size[0] * pixels}x{size[1] * pixels} at most")


def check_training(
    model: Network,
    shares: Sequence[float],
    batch: int,
    precision: str,
    device: torch.device,
    checkpointing: bool,
    many_sizes: bool,
) -> list[str]:
    """Refuse a batch for one pass of training that the device's free memory cannot hold.

    Args:
        shares:        of the samples, for each level
        batch:         samples of a process in one pass
        checkpointing: of activations
        many_sizes:    input_size is the largest of many, so how much is taken is not known

    Returns:
        a line to print where it is not known; none if all is well.

    Raises:
        ValueError: if it cannot be held.
    """
    single, free = training_bytes(model, shares, precision, checkpointing), free_memory(device)
    if batch * single <= free:
        return []
    taken = f"{batch} samples in one pass keep {batch * single / GB:.3g} GB of memory or more"
    fault = f"{taken}, and {free / GB:.3g} GB are free, enough for {free // single:.0f}"
    less = "--gradient-accumulation-steps" + ("" if checkpointing else " or --activation-checkpointing")
    if many_sizes:
        return [f"where all images are of the largest size, {fault}: {less} takes less"]
    raise ValueError(f"{fault}: give {less}, or a smaller --global-batch-size")
