"""torch.compile for a model: one graph per level, whatever the number of samples."""

from __future__ import annotations

import time
import types
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from models import DiTBlock, PyramidalPatchDiT

LEAST = 2  # samples of a group: torch.compile makes graphs of their own for 0 and 1


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
    """
    graphs = _BlockGraphs(backend, tell)
    for block in model.blocks:
        block.forward = partial(graphs, block)


class _BlockGraphs:
    def __init__(self, backend: str | Callable, tell: Callable[[str], None] | None) -> None:
        self.backend = backend
        self.tell = tell
        self.graphs: dict[tuple[int, ...], Callable] = {}  # by the tokens per sample of each group

    def __call__(
        self, block: DiTBlock, groups: list[torch.Tensor], conditions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        sizes, tokens = [group.shape[0] for group in groups], tuple(group.shape[1] for group in groups)
        groups, conditions = ([_padded(tensor) for tensor in tensors] for tensors in (groups, conditions))
        for tensor in (*groups, *conditions):
            torch._dynamo.mark_dynamic(tensor, 0)
        first = tokens not in self.graphs
        if first:
            self.graphs[tokens] = torch.compile(_own_code(tokens), backend=self.backend, fullgraph=True)
        start = time.perf_counter()
        outputs = self.graphs[tokens](block, groups, conditions)
        if first and self.tell is not None:
            named = " + ".join(map(str, tokens))
            self.tell(f"compiled a block for {named} tokens in {time.perf_counter() - start:.1f} s")
        return [output[:size] for output, size in zip(outputs, sizes, strict=True)]


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with zero rows added where it has too few."""
    missing = LEAST - tensor.shape[0]
    return F.pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, missing)) if missing > 0 else tensor


def _own_code(tokens: tuple[int, ...]) -> Callable:
    """A block's call as a function with its own code: torch.compile limits the graphs of each code object."""

    def run(block: DiTBlock, groups: list[torch.Tensor], conditions: list[torch.Tensor]) -> list[torch.Tensor]:
        return DiTBlock.forward(block, groups, conditions)

    name = "_".join(map(str, ("tokens", *tokens)))
    return types.FunctionType(run.__code__.replace(co_name=name), run.__globals__, name)
