"""Memory of a training step: activations that autograd keeps, and the peak of the device or the process."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    kept: int  # activations that the forward pass keeps for the backward pass
    peak: int | None  # the most that is allocated on CUDA, or resident on Linux, above the program; None elsewhere


def kept_for_backward(call: Callable[[], Value], exclude: Iterable[torch.Tensor]) -> tuple[Value, int]:
    """Run a forward pass; return its result and the bytes of all storages that autograd keeps for the backward pass.

    A storage that several tensors share counts once. Under autocast the low-precision copies of the weights count.
    Autograd tells of what it saves itself; what activation checkpointing holds for it is found among Python's objects.

    Args:
        exclude: tensors whose storages do not count: the parameters
    """
    gc.collect()  # no address that is excluded may be freed and used again
    excluded = {tensor.untyped_storage().data_ptr() for tensor in exclude} | _tensors_of_python().keys()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:  # a kept storage stays alive, so no address is seen twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    kept |= {address: size for address, size in _tensors_of_python().items() if address not in excluded}
    return result, sum(kept.values())


def _tensors_of_python() -> dict[int, int]:
    """Address and size of the storages of all tensors that Python holds."""
    storages = (found.untyped_storage() for found in gc.get_objects() if type(found) is torch.Tensor)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def resident(what: str) -> int | None:
    """Resident memory of this process: VmRSS is that of now, VmHWM the most so far; None where Linux's /proc is not."""
    # Not getrusage's ru_maxrss: it starts at the memory of the process that started this one.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what)), None)


def in_fresh_process(call: Callable[..., Value], *arguments: Any) -> Value:
    """Return a call's result from a new process, which holds nothing else.

    Raises:
        RuntimeError: if the process ends without an answer (BrokenProcessPool: out of memory?).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()
