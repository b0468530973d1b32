"""A training step as train.py makes it, to be timed: one GPU or CPU, random latents, times that stay as they are."""

from __future__ import annotations

import copy
import gc

import torch

from benchmarks.memory import Memory, in_fresh_process, kept_for_backward, resident
from benchmarks.packing import DenseMaskPacking
from benchmarks.timing import Bench, random_model
from runtime.parallel import gradient_norm
from runtime.speed import compile_levels, ema_decay_at, update_ema, use_precision
from transport import PatchSchedule, create_transport

WAYS = ("separate", "joint", "packed")  # one pass per level; one pass for all; packed rows with a dense mask
TRAINING_MACS = 3  # forward and backward in forward passes: one product becomes three


class Step:
    """A model with its optimizer and a batch. Calling it makes one step: forward, backward, norm, AdamW, EMA.

    Args:
        name:          of the model
        bench:         batch, device and precision
        way:           one of WAYS
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
        self.packed = DenseMaskPacking(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.999), fused=True)
        self.transport = create_transport(level_edges=PatchSchedule.default(self.model.num_levels).level_edges)
        shape = (bench.batch, self.model.in_channels, *self.model.input_size)
        self.x1, self.x0 = torch.randn(2, *shape, device=bench.device)
        self.y = torch.randint(self.model.num_classes + 1, (bench.batch,), device=bench.device)
        self.change(way, checkpointing)

    def change(self, way: str = "joint", checkpointing: bool = False, level: int | None = None) -> Step:
        """Choose how the next steps run: with a level, the whole batch is on that level. Return the step itself."""
        self.way = way
        self.model.activation_checkpointing = checkpointing
        self.t = self.transport.sample_times(self.bench.batch, torch.Generator().manual_seed(0))
        if level is not None:
            low, high = self.transport.schedule.edges[level : level + 2]
            self.t = high - (high - low) * self.t  # on an edge is the coarser level
        return self

    @property
    def samples(self) -> list[int]:
        """Samples of the batch, by level."""
        return torch.bincount(self.transport.schedule.level_at(self.t), minlength=self.model.num_levels).tolist()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of forward and backward; what checkpointing computes again does not count."""
        return TRAINING_MACS * sum(count * self.model.macs(level) for level, count in enumerate(self.samples))

    def loss(self) -> torch.Tensor:
        """Forward pass."""
        network = self.packed if self.way == "packed" else self.model
        with use_precision(self.bench.precision, self.bench.device):
            terms = self.transport.training_losses(
                network, self.x1, y=self.y, t=self.t, x0=self.x0, joint=self.way != "separate"
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
