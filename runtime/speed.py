"""Speed: precision, determinism, the weights' average, compiled blocks."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from experts import Network
from models import DiTBlock
from runtime.distributed import local_part
from runtime.errors import UserError

# ---------------------------------------------------------------------------------------------------------------
# Precision

PRECISIONS = ("fp32", "tf32", "bf16")
CPU_INFO = Path("/proc/cpuinfo")


def default_precision(device: torch.device, training: bool) -> str:
    """bf16 for training on CUDA, tf32 for sampling there, fp32 on the CPU."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if training else "tf32"


def use_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast context of a precision; what stays in fp32 is computed in tf32, but for precision fp32."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # convolutions, which are most of an autoencoder
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def precision_note(precision: str, device: torch.device) -> str | None:
    """A line to print where a precision is slow: bf16 on a CPU without instructions for it; None if all is well.

    The processor's flags are Linux's; where there are none, nothing is known and nothing is said.
    """
    if precision != "bf16" or device.type != "cpu":
        return None
    with contextlib.suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
        if flags and not {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags[1].split()):
            return "this CPU has no instructions for bf16, such as AVX512-bf16: --precision fp32 is far faster here"
    return None


def set_determinism(device: torch.device, deterministic: bool) -> None:
    """Choose algorithms that give the same bits every time: always on the CPU, on CUDA where they are asked for.

    CUDA's faster algorithms add numbers in no fixed order, in the backward pass of attention above all. Only a strict
    torch avoids them (warn_only=True leaves attention as it is), and then an operation without a deterministic kernel
    raises a RuntimeError: see `deterministic_errors`.
    """
    if device.type == "cuda" and not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost time and change nothing here


@contextlib.contextmanager
def deterministic_errors() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic kernel into a UserError that names it."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise UserError(f"--deterministic: {found[1]} has no deterministic kernel here: leave the flag out") from error


# ---------------------------------------------------------------------------------------------------------------
# EMA


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model, in a few kernels for all parameters."""
    averages, weights = ([local_part(parameter) for parameter in net.parameters()] for net in (ema, model))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def ema_decay_at(step: int, decay: float) -> float:
    """The decay rises to its value over the first steps, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------------------------------
# Compilation

MAX_GRAPHS = 64  # of a block: levels, sets of levels, with and without gradients or autocast
MIN_SAMPLES = 2  # of a group: torch.compile makes graphs of their own for 0 and 1


def compile_levels(
    model: Network, backend: str | Callable = "inductor", tell: Callable[[str], None] | None = None
) -> None:
    """Compile a model's transformer blocks in place.

    All blocks share one graph for each level, or set of levels in one pass; it is made when it is first needed. Nearly
    all the time is spent in the blocks, and such a graph takes seconds where one of the whole network takes minutes.
    Results change by rounding only. Copy a model before, not after.

    Args:
        backend: of torch.compile
        tell:    is given a line about each graph's start-up time

    The model then raises UserError where a graph cannot be made, as without a compiler.
    """
    # Under DDP graphs would be cut at its buckets, so that reducing can begin; with a graph per block it can anyway.
    torch._dynamo.config.optimize_ddp = False
    config = torch._dynamo.config
    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # its name in torch 2.6
    setattr(config, limit, max(MAX_GRAPHS, getattr(config, limit)))
    compiled = _CompiledBlock(backend, tell)
    for block in model.blocks:
        block.forward = partial(compiled, block)


class _CompiledBlock:
    """The forward of all blocks of a model: one compiled function, with a graph for each set of token counts."""

    def __init__(self, backend: str | Callable, tell: Callable[[str], None] | None) -> None:
        self.compiled = torch.compile(DiTBlock.forward, backend=backend, fullgraph=True)
        self.tell = tell
        self.started: set[tuple[int, ...]] = set()  # tokens per sample of each group

    def __call__(
        self,
        block: DiTBlock,
        groups: list[torch.Tensor],
        conditions: list[torch.Tensor],
        shared: list[torch.Tensor | None],
        rotations: list[torch.Tensor | None],
    ) -> list[torch.Tensor]:
        sizes, tokens = [group.shape[0] for group in groups], tuple(group.shape[1] for group in groups)
        inputs = [[_padded(tensor) for tensor in tensors] for tensors in (groups, conditions, shared)]
        # A rotation of one row is that of all samples: it stays as it is.
        inputs.append([x if x is None or x.shape[0] == 1 else _padded(x) for x in rotations])
        for tensor in (tensor for tensors in inputs for tensor in tensors if tensor is not None):
            if tensor.shape[0] >= MIN_SAMPLES:
                torch._dynamo.mark_dynamic(tensor, 0)
            # A graph for every number of tokens would be several times slower in bf16.
            torch._dynamo.mark_static(tensor, list(range(1, tensor.ndim)))
        start = time.perf_counter()
        try:
            outputs = self.compiled(block, *inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            hint = "install one, or leave it out" if "ompiler" in reason else "leave it out"
            raise UserError(f"--compile failed: {reason}; {hint}") from error
        if self.tell is not None and tokens not in self.started:
            self.started.add(tokens)
            named = " + ".join(map(str, tokens))
            self.tell(f"compiled a block for {named} tokens in {time.perf_counter() - start:.1f} s")
        return [output[:size] for output, size in zip(outputs, sizes, strict=True)]


def _padded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor with zero rows added where it has too few."""
    if tensor is None:
        return None
    missing = MIN_SAMPLES - tensor.shape[0]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)) if missing > 0 else tensor
