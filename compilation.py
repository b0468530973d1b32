"""Faster calls of the same network: one compiled graph per level, and one CUDA graph per level and batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from models import DiTBlock, PyramidalPatchDiT
from train_utils import UserError

MAX_GRAPHS = 64  # of a block: levels, sets of levels, with and without gradients or autocast
MIN_SAMPLES = 2  # of a group: torch.compile makes graphs of their own for 0 and 1


def compile_levels(
    model: PyramidalPatchDiT, backend: str | Callable = "inductor", tell: Callable[[str], None] | None = None
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
    torch._dynamo.config.recompile_limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
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
        self, block: DiTBlock, groups: list[torch.Tensor], conditions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        sizes, tokens = [group.shape[0] for group in groups], tuple(group.shape[1] for group in groups)
        groups, conditions = ([_padded(tensor) for tensor in tensors] for tensors in (groups, conditions))
        for tensor in (*groups, *conditions):
            torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_static(tensor, 1)  # a graph for every number of tokens is several times slower in bf16
        start = time.perf_counter()
        try:
            outputs = self.compiled(block, groups, conditions)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())
            hint = "install one, or leave it out" if "ompiler" in reason else "leave it out"
            raise UserError(f"--compile failed: {reason}; {hint}") from error
        if self.tell is not None and tokens not in self.started:
            self.started.add(tokens)
            named = " + ".join(map(str, tokens))
            self.tell(f"compiled a block for {named} tokens in {time.perf_counter() - start:.1f} s")
        return [output[:size] for output, size in zip(outputs, sizes, strict=True)]


def replay_levels(model: PyramidalPatchDiT) -> None:
    """Record a model's evaluations as CUDA graphs, in place: each is launched at once instead of kernel by kernel.

    There is one graph for each level and batch size. Calls with gradients, or of several levels, are made as before.
    The graphs share the memory of their activations, which stays taken. Compile a model before, not after.
    """
    model.forward = _ReplayedForward(model.forward)


class _ReplayedForward:
    def __init__(self, forward: Callable) -> None:
        self.forward = forward
        self.pool = torch.cuda.graph_pool_handle()  # one for all graphs: they are replayed one after the other
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int | Sequence[int] = 0
    ) -> torch.Tensor | list[torch.Tensor]:
        """As PyramidalPatchDiT.forward."""
        if torch.is_grad_enabled() or isinstance(level, Sequence):
            return self.forward(x, t, y, level=level)
        key = (level, x.shape, x.dtype, torch.is_autocast_enabled("cuda"))
        if key not in self.graphs:
            self.graphs[key] = self._record([x, t, y], level)
        graph, inputs, output = self.graphs[key]
        for buffer, value in zip(inputs, (x, t, y), strict=True):
            buffer.copy_(value)
        graph.replay()
        return output.clone()  # the next replay writes where this one did

    def _record(
        self, inputs: list[torch.Tensor], level: int
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        inputs = [tensor.clone() for tensor in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, picks kernels and takes workspaces, which a recording must not
            for _ in range(3):
                self.forward(*inputs, level=level)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            output = self.forward(*inputs, level=level)
        return graph, inputs, output


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zero rows added where it has too few."""
    missing = MIN_SAMPLES - tensor.shape[0]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)) if missing > 0 else tensor
