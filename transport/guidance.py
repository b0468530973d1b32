"""Classifier-free guidance (arXiv:2207.12598) with one scale per level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from transport.schedule import Interval
from transport.transport import Model


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance, for any network.

    Args:
        scales:   one scale, or one per level, coarsest first; 1 turns guidance off and costs one evaluation
        channels: guide only the first channels and leave the rest conditional (DiT and SiT: 3); None for all
        interval: guide only for t in (low, high) (arXiv:2404.07724); None for all times

    Raises:
        ValueError: if there is no scale or channel, or the interval is empty.
    """

    scales: float | tuple[float, ...] = 1.0
    channels: int | None = None
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        scales = (self.scales,) if isinstance(self.scales, (int, float)) else tuple(self.scales)
        object.__setattr__(self, "scales", tuple(float(scale) for scale in scales))
        if not self.scales:
            raise ValueError("no guidance scale: give one, or one per level")
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"guidance must act on at least one channel, got {self.channels}")
        if self.interval is not None:
            object.__setattr__(self, "interval", tuple(self.interval))
            if not self.interval[0] < self.interval[1]:
                raise ValueError(f"the guidance interval {self.interval} is empty: give low < high")

    def of(self, model: Model) -> ClassifierFreeGuidance:
        """The guided network.

        Raises:
            ValueError: if the model has fewer channels, or another number of levels than there are scales.
        """
        channels = getattr(model, "in_channels", None)
        if self.channels is not None and channels is not None and self.channels > channels:
            raise ValueError(f"guidance of {self.channels} channels, but the model has {channels} channel(s)")
        return ClassifierFreeGuidance(model, self.scales, model.num_classes, self.channels, self.interval)


class ClassifierFreeGuidance:
    """A guided network with the call signature of a network: null + scale * (conditional - null).

    Where the scale is 1 the network runs once per sample, elsewhere on both labels in one call.

    Args:
        model:      the network
        scales:     one scale, or one per level, coarsest first
        null_class: id of the null label
        channels:   guide only the first channels and leave the rest conditional (DiT and SiT: 3); None for all
        interval:   guide only for t in (low, high) (arXiv:2404.07724); None for all times

    Raises:
        ValueError: if the number of scales is neither one nor the model's number of levels, or the interval is empty.
    """

    def __init__(
        self,
        model: Model,
        scales: float | Sequence[float],
        null_class: int,
        channels: int | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        scales = (float(scales),) if isinstance(scales, (int, float)) else tuple(float(scale) for scale in scales)
        num_levels = getattr(model, "num_levels", None)
        if num_levels is not None and len(scales) == 1:
            scales = scales * num_levels
        if not scales:
            raise ValueError("no guidance scale: give one, or one per level")
        if num_levels not in (None, len(scales)):
            raise ValueError(f"{len(scales)} guidance scale(s) for {num_levels} level(s): give one, or one per level")
        if channels is not None and channels < 1:
            raise ValueError(f"guidance must act on at least one channel, got {channels}")
        if interval is not None and not interval[0] < interval[1]:
            raise ValueError(f"the guidance interval {interval} is empty: give low < high")
        self.model = model
        self.scales = scales
        self.null_class = null_class
        self.channels = channels
        self.interval = interval
        if num_levels is not None or len(scales) > 1:
            self.num_levels = len(scales)

    @property
    def breakpoints(self) -> tuple[float, ...]:
        """Times at which guidance switches on or off: the field jumps there, so a solver must stop there."""
        return () if self.interval is None else tuple(self.interval)

    def scale_at(self, level: int) -> float:
        """The scale of a level; a single scale serves all."""
        if len(self.scales) == 1:
            return self.scales[0]
        if not 0 <= level < len(self.scales):
            raise ValueError(f"no guidance scale for level {level}: {len(self.scales)} given")
        return self.scales[level]

    def on_interval(self, interval: Interval) -> Model:
        """The network as one smooth function on an interval that no edge or breakpoint cuts."""
        middle = (interval.start + interval.stop) / 2
        scale = self.scale_at(interval.level)
        if scale == 1 or (self.interval is not None and not self.interval[0] < middle < self.interval[1]):
            return partial(self.model, level=interval.level)
        return partial(self._guided, level=interval.level, scale=scale)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        """Guided prediction (N, C, ...) for x (N, C, ...), t (N,), y (N,); each sample's t decides on the interval."""
        scale = self.scale_at(level)
        if scale == 1:
            return self.model(x, t, y=y, level=level)
        if self.interval is None:
            return self._guided(x, t, y=y, level=level, scale=scale)
        inside = (t > self.interval[0]) & (t < self.interval[1])
        scales = torch.where(inside, scale, 1.0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return self._guided(x, t, y=y, level=level, scale=scales)

    def _guided(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int, scale: float | torch.Tensor
    ) -> torch.Tensor:
        labels = torch.cat([y, torch.full_like(y, self.null_class)])
        output = self.model(torch.cat([x, x]), torch.cat([t, t]), y=labels, level=level)
        conditional, null = output.chunk(2)
        guided = null + scale * (conditional - null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
