"""Parallelism, applied in one place: train.py reads as if there were one device.

    one process       nothing to do
    DDP               each process holds the whole model and its AdamW moments; gradients are averaged
    FSDP2, --shard    each process holds a part of every weight, gradient, moment and EMA weight; a block's weights are
                      gathered before it computes and freed after it (ZeRO-3, arXiv:1910.02054; arXiv:2304.11277)

Both see the same samples and the same numbers, so they give the same losses but for the order of sums. Outside of this
file a sharded tensor is met in three ways: elementwise arithmetic, which each process does on its `local_part`; sums
over all of it (`gradient_norm`); and whole, in checkpoints (`full_state`, `load_optimizer`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from experts import Network
from runtime.distributed import Processes, local_part
from runtime.errors import UserError
from runtime.files import tensors_of, with_tensors
from transport import Transport

# ---------------------------------------------------------------------------------------------------------------
# Networks


def check_shard(processes: Processes) -> None:
    """Refuse --shard where it cannot work. Collective.

    Raises:
        UserError: if there is one process, or if torch's gloo takes sums for means (2.6 and 2.7 do).
    """
    if processes.world_size == 1:
        raise UserError("--shard divides a model among processes, and this is the only one: start it with torchrun")
    if processes.device.type == "cpu":
        mean = torch.zeros(1)
        dist.reduce_scatter_tensor(mean, torch.ones(processes.world_size), dist.ReduceOp.AVG)
        if mean.item() != 1:
            raise UserError(f"--shard on CPUs takes a newer torch than {torch.__version__}, on GPUs this one will do")


def place(network: Network, processes: Processes, shard: bool, precision: str) -> Network:
    """Put a network that was built on the CPU, alike in every process, where it computes; in place.

    Call this last: compile first, then shard.

    With `shard` a device takes a block's weights, keeps its part and then takes the next, so it never holds the whole.
    The blocks hold linear layers alone, which autocast runs in bf16: so bf16 is what is gathered for them. It is what
    autocast would make of the weights, without copies of them that live until the backward pass. Gradients are averaged
    in fp32, as DDP does.
    """
    if not shard:
        return network.to(processes.device)
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh)
    # It warns of writing into the network's output, which nobody does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        # FSDP2 leaves the outermost weights whole for the backward pass, which a frozen network does not have.
        network.register_forward_hook(lambda network, *_: network.reshard())
    return network


class LossModule(nn.Module):
    """Model and transport as one module: what DistributedDataParallel wraps, called once per pass.

    All levels go through the model in one call, in which every parameter takes part: DDP waits for all of them, and
    FSDP2 gathers weights at each call, so that all processes must make the same ones.
    """

    def __init__(self, model: Network, transport: Transport) -> None:
        super().__init__()
        self.model = model
        self.transport = transport

    def forward(
        self, x1: torch.Tensor, y: torch.Tensor, t: torch.Tensor, x0: torch.Tensor, level: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return self.transport.training_losses(self.model, x1, y=y, t=t, x0=x0, level=level, joint=True)


def loss_module(model: Network, transport: Transport) -> nn.Module:
    """The training loss as a module whose backward pass averages the gradients of all processes."""
    loss = LossModule(model, transport)
    if isinstance(model, FSDPModule) or not dist.is_initialized():
        return loss
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)  # its successor is not in torch 2.6
    # No device_ids: with them DDP would move the times, which stay on the host so that no GPU is waited for.
    return DistributedDataParallel(loss, broadcast_buffers=False, gradient_as_bucket_view=True)


def synchronize_gradients(loss: nn.Module, enabled: bool) -> None:
    """Enable gradient synchronisation for the next backward pass; without it gradients accumulate locally.

    A sharded model's are whole until then: passes that do not average take the memory of all its gradients.
    """
    if isinstance(loss, DistributedDataParallel):
        loss.require_backward_grad_sync = enabled
    elif isinstance(loss.model, FSDPModule):
        loss.model.set_requires_gradient_sync(enabled)


# ---------------------------------------------------------------------------------------------------------------
# Numbers that all processes must agree on


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce over the processes, in place; one process alone has the result already."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def any_process(flag: bool, device: torch.device) -> bool:
    """True if the flag is set on any process. Collective, and waits for the device unless there is one process."""
    return flag if not dist.is_initialized() else all_reduce(torch.tensor(float(flag), device=device)).item() > 0


def gradient_norm(model: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The 2-norm of all gradients together, a plain scalar that is the same on every process. Collective.

    Args:
        dtype: in which the squares are added; float32, the default, ends at a norm of 1e19
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    parts = [local_part(gradient) for gradient in gradients]
    if dtype is None:
        norm = nn.utils.get_total_norm(parts)
    else:
        norm = torch.stack([torch.linalg.vector_norm(part, dtype=dtype) for part in parts]).norm()
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        norm = all_reduce(norm.double().square()).sqrt().to(norm.dtype)
    return norm


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints: the same whole tensors under the same names, however a run is parallel


def full_state(state: Any, processes: Processes) -> Any:
    """Nested dicts and lists of tensors with the sharded ones whole, on the CPU of the main process. Collective.

    One tensor at a time is gathered, so that no device holds more. What other processes return is of no use.
    """

    def whole() -> Iterator[torch.Tensor]:
        for tensor in tensors_of(state):
            if isinstance(tensor, DTensor):
                full = tensor.full_tensor()
                tensor = full.cpu() if processes.is_main else tensor
            yield tensor

    return with_tensors(state, whole())


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's full state, divided as its parameters are; its own weight decay stays. Collective."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def divided(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:  # a moment, not the step's number
            return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
        return tensor.to(parameter.device, copy=True)  # the checkpoint's file is mapped, and may be deleted

    moments = {
        index: {name: divided(tensor, parameters[index]) for name, tensor in tensors.items()}
        for index, tensors in state["state"].items()
    }
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict({**state, "state": moments})
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
