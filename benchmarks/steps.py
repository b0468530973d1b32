"""A training step as train.py makes it, to be timed: one GPU or CPU, random latents, times that stay as they are."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass

import torch

from benchmarks.memory import Memory, in_fresh_process, kept_for_backward, resident
from benchmarks.packing import DenseMaskPacking
from benchmarks.timing import random_model
from runtime.parallel import gradient_norm
from runtime.speed import compile_levels, ema_decay_at, update_ema, use_precision
from transport import PatchSchedule, create_transport

WAYS = ("separate", "joint", "packed")  # one pass per level; one pass for all; packed rows with a dense mask
TRAINING_MACS = 3  # forward and backward in forward passes: one product becomes three


@dataclass(frozen=True)
class Setting:
    """What is timed."""

    model: str
    batch: int
    device: torch.device
    precision: str
    way: str = "joint"
    checkpointing: bool = False
    compiled: bool = False


class Step:
    """Calling it makes one step: forward, backward, gradient norm, AdamW, EMA."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.way = setting.way  # may be changed, as may the model's activation_checkpointing
        self.model = random_model(setting.model, setting.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.model.activation_checkpointing = setting.checkpointing
        if setting.compiled:
            compile_levels(self.model)
        self.packed = DenseMaskPacking(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.999), fused=True)
        self.transport = create_transport(level_edges=PatchSchedule.default(self.model.num_levels).level_edges)
        shape = (setting.batch, self.model.in_channels, *self.model.input_size)
        self.x1, self.x0 = torch.randn(2, *shape, device=setting.device)
        self.y = torch.randint(self.model.num_classes + 1, (setting.batch,), device=setting.device)
        self.t = self.transport.sample_times(setting.batch, torch.Generator().manual_seed(0))

    def only_level(self, level: int | None) -> None:
        """Train on one level alone, or on the whole of time again."""
        self.t = self.transport.sample_times(len(self.t), torch.Generator().manual_seed(0))
        if level is not None:
            low, high = self.transport.schedule.edges[level : level + 2]
            self.t = high - (high - low) * self.t  # on an edge is the coarser level

    @property
    def samples(self) -> list[int]:
        """Samples of the batch, by level."""
        return torch.bincount(self.transport.schedule.level_at(self.t), minlength=self.model.num_levels).tolist()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of forward and backward; what checkpointing computes again does not count."""
        return TRAINING_MACS * sum(count * self.model.macs(level) for level, count in enumerate(self.samples))

    def loss(self) -> torch.Tensor:
        """The forward pass."""
        network = self.packed if self.way == "packed" else self.model
        with use_precision(self.setting.precision, self.setting.device):
            terms = self.transport.training_losses(
                network, self.x1, y=self.y, t=self.t, x0=self.x0, joint=self.way != "separate"
            )
        return terms["loss"].mean()

    def backward(self) -> None:
        """Forward and backward pass; the gradients stay."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()

    def norm(self) -> float:
        """The gradient's norm, on the host."""
        return gradient_norm(self.model).item()

    def update_ema(self) -> None:
        """The weights' moving average."""
        update_ema(self.ema, self.model, ema_decay_at(10**6, 0.9999))

    def __call__(self) -> None:
        self.backward()
        self.norm()
        self.optimizer.step()
        self.update_ema()
        self.optimizer.zero_grad(set_to_none=True)

    def kept(self) -> int:
        """Bytes of activations that the forward pass keeps."""
        return kept_for_backward(self.loss, self.model.parameters())[1]


def measure_memory(setting: Setting) -> Memory:
    """Memory of a step; on the CPU measured in a fresh process, which nothing else has grown."""
    return memory_here(setting) if setting.device.type == "cuda" else in_fresh_process(memory_here, setting)


def memory_here(setting: Setting) -> Memory:
    """Memory of building a model and two steps, in this process. The second has Adam's moments from the start."""
    device, cuda = setting.device, setting.device.type == "cuda"
    gc.collect()  # a compiled model of an earlier measurement may be left
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if cuda else resident("VmRSS")
    step = Step(setting)
    step()
    step()
    peak = torch.cuda.max_memory_allocated(device) if cuda else resident("VmHWM")
    return Memory(step.kept(), None if peak is None else peak - before)
