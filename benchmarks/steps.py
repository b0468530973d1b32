"""A training step as train.py makes it, to be timed: one GPU or CPU, random latents, times that stay as they are."""

from __future__ import annotations

import copy
import gc
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from benchmarks.memory import Memory, in_fresh_process, kept_for_backward, resident
from benchmarks.packing import DenseMaskPacking
from benchmarks.padding import PaddedRows
from benchmarks.timing import Bench, random_model
from runtime.parallel import gradient_norm
from runtime.speed import compile_levels, ema_decay_at, update_ema, use_precision
from transport import PatchSchedule, create_transport
from transport.samples import Samples

WAYS = ("separate", "joint", "packed")  # one pass per level; one pass for all; packed rows with a dense mask
TRAINING_MACS = 3  # forward and backward in forward passes: one product becomes three


class Batch(NamedTuple):
    """N samples with their noise, class ids and times."""

    sizes: list[tuple[int, int]]  # (H, W) of each
    x1: Samples
    x0: Samples
    y: torch.Tensor  # (N,)
    t: torch.Tensor  # (N,)


class Step:
    """A model with its optimizer and a batch. Calling it makes one step: forward, backward, norm, AdamW, EMA.

    Args:
        name:          of the model
        bench:         batch, device and precision
        way:           one of WAYS, or "padded": rows padded to the longest, for rotary positions
        checkpointing: of activations
        compiled:      compile the blocks (packed rows never are)
    """

    def __init__(
        self, name: str, bench: Bench, way: str = "joint", checkpointing: bool = False, compiled: bool = False
    ) -> None:
        self.bench = bench
        self.model = random_model(name, bench.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        if compiled:
            compile_levels(self.model)
        self.references = {"packed": DenseMaskPacking(self.model), "padded": PaddedRows(self.model)}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.999), fused=True)
        self.transport = create_transport(level_edges=PatchSchedule.default(self.model.num_levels).level_edges)
        self.batch = self.draw([self.model.input_size] * bench.batch)
        self.change(way, checkpointing)

    def draw(self, sizes: Sequence[tuple[int, int]], level: int | None = None) -> Batch:
        """Draw samples of these sizes (H, W), as training has them: a list where the sizes differ.

        Args:
            level: of all samples; None for the levels that training gives them
        """
        device, number = self.bench.device, len(sizes)
        shapes = [(self.model.in_channels, *size) for size in sizes]
        x1, x0 = ([torch.randn(shape, device=device) for shape in shapes] for _ in range(2))
        if len(set(shapes)) == 1:
            x1, x0 = torch.stack(x1), torch.stack(x0)
        y = torch.randint(self.model.num_classes + 1, (number,), device=device)
        return Batch(list(sizes), x1, x0, y, self.times(number, level))

    def times(self, number: int, level: int | None = None) -> torch.Tensor:
        """Times (N,) of training, the same at each call; with a level, all on that level."""
        t = self.transport.sample_times(number, torch.Generator().manual_seed(0))
        if level is None:
            return t
        low, high = self.transport.schedule.edges[level : level + 2]
        return high - (high - low) * t  # on an edge is the coarser level

    def change(self, way: str = "joint", checkpointing: bool = False, level: int | None = None) -> Step:
        """Choose how the next steps run: with a level, the whole batch is on that level. Return the step itself."""
        self.way = way
        self.model.activation_checkpointing = checkpointing
        self.batch = self.batch._replace(t=self.times(len(self.batch.sizes), level))
        return self

    @property
    def levels(self) -> list[int]:
        """Level of each sample of the batch."""
        return self.transport.schedule.level_at(self.batch.t).tolist()

    @property
    def samples(self) -> list[int]:
        """Samples of the batch, by level."""
        return [self.levels.count(level) for level in range(self.model.num_levels)]

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        pairs = zip(self.levels, self.batch.sizes, strict=True)
        return sum(self.model.num_tokens(level, size) for level, size in pairs)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of forward and backward; what checkpointing computes again does not count."""
        alike = Counter(zip(self.levels, self.batch.sizes, strict=True))
        return TRAINING_MACS * sum(number * self.model.macs(*each) for each, number in alike.items())

    def loss(self) -> torch.Tensor:
        """Forward pass."""
        network, batch = self.references.get(self.way, self.model), self.batch
        with use_precision(self.bench.precision, self.bench.device):
            terms = self.transport.training_losses(
                network, batch.x1, y=batch.y, t=batch.t, x0=batch.x0, joint=self.way != "separate"
            )
        return terms["loss"].mean()

    def backward(self) -> None:
        """Forward and backward pass; the gradients stay."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def norm(self) -> float:
        """Norm of the gradient, on the host."""
        return gradient_norm(self.model).item()

    def update_ema(self) -> None:
        """Move the average of the weights."""
        update_ema(self.ema, self.model, ema_decay_at(10**6, 0.9999))

    def __call__(self) -> None:
        self.backward()
        self.norm()
        self.optimizer.step()
        self.update_ema()
        self.optimizer.zero_grad(set_to_none=True)

    def run_as(self, way: str = "joint", checkpointing: bool = False, level: int | None = None) -> None:
        """Make a step as `change` describes it."""
        self.change(way, checkpointing, level)()

    def run_on(self, batch: Batch, way: str = "joint") -> None:
        """Make a step with another batch."""
        self.batch, self.way = batch, way
        self()

    def kept(self) -> int:
        """Bytes of activations that the forward pass keeps."""
        return kept_for_backward(self.loss, self.model.parameters())[1]


def measure_memory(name: str, bench: Bench, *kind: object) -> Memory:
    """Measure the memory of a Step's second call; on the CPU in a fresh process, which nothing else has grown."""
    if bench.device.type == "cuda":
        return memory_here(name, bench, *kind)
    return in_fresh_process(memory_here, name, bench, *kind)


def memory_here(name: str, bench: Bench, *kind: object) -> Memory:
    """Memory of building a model and two steps, in this process. The second has Adam's moments from the start."""
    device, cuda = bench.device, bench.device.type == "cuda"
    gc.collect()  # a compiled model of an earlier measurement may be left
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else resident("VmRSS")
    step = Step(name, bench, *kind)
    step()
    step()
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
    return Memory(step.kept(), None if peak is None else peak - before)
