"""The processes of a run: who they are, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from runtime.errors import UserError, user_input


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_processes() -> Processes:
    """Join the other processes (nccl on CUDA, gloo on the CPU) and take this one's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} processes on this node but only {torch.cuda.device_count()} GPU(s)")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives the processes that it restarts: new ones must not read the addresses of the dead.
        # (The nodes of a larger job need not have counted the same restarts.)
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if cuda else None,
    )
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def shares(number: int, batch_size: int, processes: Processes) -> tuple[torch.Tensor, ...]:
    """This process's part of the numbers 0, 1, ..., number - 1, in batches.

    Calls of a sharded network are collective, so all processes have batches of the same sizes. For that some numbers
    are past the end: take them modulo `number`, and the sample once more.
    """
    each = -(-number // processes.world_size)
    return (processes.rank + torch.arange(each) * processes.world_size).split(batch_size)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that is divided among all (train.py --shard); else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def broadcast_object(value: Any) -> Any:
    """Broadcast the main process's value and return it on every process. Collective."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_objects(value: Any, processes: Processes) -> list[Any]:
    """Gather every process's value, in order of rank, on the main process; an empty list elsewhere. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * processes.world_size if processes.is_main else None
    dist.gather_object(value, values)
    return values or []


Value = TypeVar("Value")


def on_main(call: Callable[[], Value], processes: Processes) -> Value:
    """Run `call` on the main process and return its result, or raise its UserError, on every process. Collective."""
    value, error = None, None
    if processes.is_main:
        try:
            with user_input():
                value = call()
        except UserError as raised:
            error = str(raised)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise UserError(error, everywhere=True)
    return value


def agree(call: Callable[[], Value], processes: Processes) -> Value:
    """Run `call` on every process and return its own result; if one fails, all raise one UserError. Collective.

    What differs between processes is often what is wrong: a node without the data, a disk that is full on one of them.

    Args:
        call: makes no collective calls itself

    Raises:
        UserError: the message names the ranks that failed, unless all failed alike.
    """
    value, error = None, None
    try:
        with user_input():
            value = call()
    except UserError as raised:
        error = str(raised)
    if not dist.is_initialized():
        errors = [error]
    else:
        errors = [None] * processes.world_size
        dist.all_gather_object(errors, error)
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(errors):
        if message is not None:
            ranks.setdefault(message, []).append(rank)
    if not ranks:
        return value
    if len(ranks) == 1 and None not in errors:
        raise UserError(errors[0], everywhere=True)
    named = (f"rank {', '.join(map(str, where))}: {message}" for message, where in ranks.items())
    raise UserError("; ".join(named), everywhere=True)


def check_same_flags(flags: Mapping[str, Any], processes: Processes, but: Collection[str]) -> None:
    """Refuse processes that were started with different commands. Collective.

    Args:
        flags: values by the flags' names
        but:   names of those that may differ from node to node

    Raises:
        UserError: the message names the flag.
    """
    if not dist.is_initialized():
        return
    gathered: list[Any] = [None] * processes.world_size
    dist.all_gather_object(gathered, {name: value for name, value in flags.items() if name not in but})
    for rank, own in enumerate(gathered):
        for name, value in own.items():
            if value != gathered[0][name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"rank {rank} was started with {flag} {value}, rank 0 with {gathered[0][name]}: start all "
                    "processes with the same command",
                    everywhere=True,
                )
