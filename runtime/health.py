"""The look at each training step before its gradients reach the weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from runtime import parallel
from runtime.distributed import Processes, broadcast_object, gather_objects, local_part

LARGEST_NORM = 1e19  # of a gradient without clipping: AdamW keeps squares in fp32


class Health(NamedTuple):
    """Facts about a step that all processes agree on."""

    norm: torch.Tensor  # of the gradient, on the device
    grad_norm: float  # the same, on the host
    stop: bool  # one of them was asked to save and end
    reason: str | None  # why the step must not be made; None if all is well


def check_step(
    step: int,
    positions: range,
    terms: dict[str, torch.Tensor],
    model: nn.Module,
    index_of: Callable[[int], int],
    stop: bool,
    clipped: bool,
    processes: Processes,
) -> Health:
    """Measure the gradient and agree on whether to go on, in the step's only look at the device. Collective.

    Args:
        step:      number of the step, for messages
        positions: this process's n samples, numbered over the whole run
        terms:     their "loss" and "level" (n,)
        index_of:  a position's index in the dataset
        stop:      this process was asked to save and end
        clipped:   the gradient will be clipped
    """
    norm = parallel.gradient_norm(model)
    bad_loss = (~terms["loss"].isfinite()).any().float()
    flags = torch.stack([bad_loss, torch.full_like(bad_loss, stop)])
    flags = parallel.all_reduce(flags, dist.ReduceOp.MAX)
    grad_norm, bad_loss, stop = torch.cat([norm[None], flags]).tolist()
    if not bad_loss and not math.isfinite(grad_norm):  # its square may be too large for fp32
        norm = parallel.gradient_norm(model, torch.float64)
        grad_norm = norm.item()
    reason = None
    if bad_loss or not math.isfinite(grad_norm):
        reason = broadcast_object(describe_not_finite(step, positions, terms, model, index_of, processes))
    elif not clipped and grad_norm > LARGEST_NORM:
        reason = f"the gradient's norm is {grad_norm:.1e} at step {step}, which AdamW cannot square in fp32"
    return Health(norm, grad_norm, bool(stop), reason)


def describe_not_finite(
    step: int,
    positions: range,
    terms: dict[str, torch.Tensor],
    model: nn.Module,
    index_of: Callable[[int], int],
    processes: Processes,
) -> str:
    """Name the samples and levels, of all processes, whose loss or gradient is not finite. Collective."""
    bad = (~torch.isfinite(terms["loss"])).nonzero().flatten().tolist()
    samples = [(index_of(positions[i]), positions[i], int(terms["level"][i])) for i in bad]
    gradients = {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    names = {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
    parts = gather_objects((samples, names), processes)
    found = [sample for samples, _ in parts for sample in samples]
    if found:
        samples = ", ".join(f"{index} (position {position}, level {level})" for index, position, level in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"the loss is not finite at step {step} for {len(found)} sample(s) of the dataset: {samples}{more}"
    names = set().union(*(names for _, names in parts))
    bad = {id(p): name for name, p in model.named_parameters() if name in names}
    levels = [n for n in range(model.num_levels) if any(id(p) in bad for p in model.level_parameters(n))]
    first = positions.start - processes.rank * len(positions)
    last = first + processes.world_size * len(positions) - 1
    return (
        f"the gradient is not finite at step {step}, though every loss is: in {len(bad)} parameter(s), as "
        f"{next(iter(bad.values()), 'none')}, level(s) {levels}; the samples are those at positions {first} to {last}"
    )
