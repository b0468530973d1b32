"""Classifier-free guidance (arXiv:2207.12598) with one scale per level; the null branch may run at a coarser level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from transport.schedule import Interval
from transport.transport import Model, Transport


@dataclass(frozen=True)
class Guidance:
    """Settings of classifier-free guidance, for any network.

    Args:
        scales:   one scale, or one per level, coarsest first; 1 turns guidance off and costs one evaluation
        channels: guide only the first channels and leave the rest conditional (DiT and SiT: 3); None for all
        interval: guide only for t in (low, high) (arXiv:2404.07724); None for all times
        null_level: level at which the null label is evaluated, in one pass with the sample's own level: fewer tokens,
                  for a network that knows this level at the times that are guided (FlexiDiT, arXiv:2502.20126); None
                  for the sample's level

    Raises:
        ValueError: if there is no scale or channel, the interval is empty, or the null level is no level.
    """

    scales: float | tuple[float, ...] = 1.0
    channels: int | None = None
    interval: tuple[float, float] | None = None
    null_level: int | None = None

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
        if self.null_level is not None and self.null_level < 0:
            raise ValueError(f"the null level is the number of a level, 0 for the coarsest, got {self.null_level}")

    def of(self, model: Model) -> ClassifierFreeGuidance:
        """The guided network.

        Raises:
            ValueError: if the model has fewer channels, another number of levels than there are scales, or a guided
                        level to which the null level does not go.
        """
        channels = getattr(model, "in_channels", None)
        if self.channels is not None and channels is not None and self.channels > channels:
            raise ValueError(f"guidance of {self.channels} channels, but the model has {channels} channel(s)")
        settings = self.channels, self.interval, self.null_level
        return ClassifierFreeGuidance(model, self.scales, model.num_classes, *settings)


class ClassifierFreeGuidance:
    """A guided network with the call signature of a network: null + scale * (conditional - null).

    Where the scale is 1 the network runs once per sample, elsewhere on both labels in one call: as one batch, or as
    groups of two levels.

    Args:
        model:      the network
        scales:     one scale, or one per level, coarsest first
        null_class: id of the null label
        channels:   guide only the first channels and leave the rest conditional (DiT and SiT: 3); None for all
        interval:   guide only for t in (low, high) (arXiv:2404.07724); None for all times
        null_level: level of the null branch; None for the sample's own

    Raises:
        ValueError: if the number of scales is neither one nor the model's number of levels, the interval is empty, or
            the null level is finer than a guided level or belongs to another expert.
    """

    def __init__(
        self,
        model: Model,
        scales: float | Sequence[float],
        null_class: int,
        channels: int | None = None,
        interval: tuple[float, float] | None = None,
        null_level: int | None = None,
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
        self.null_level = null_level
        if num_levels is not None or len(scales) > 1:
            self.num_levels = len(scales)
            if null_level is not None and null_level >= len(scales):
                raise ValueError(f"null level {null_level} is none of the {len(scales)} level(s): 0 is the coarsest")
            for level in range(len(scales)):
                self._null_level_at(level)

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

    def _null_level_at(self, level: int) -> int:
        """Level of the null branch of samples at a level (ValueError if there cannot be one)."""
        scale, null = self.scale_at(level), self.null_level
        if null is None or scale == 1:
            return level
        if null > level:
            raise ValueError(
                f"null level {null} is finer than level {level}, which is guided with scale {scale:g}: give null level "
                f"{level}, or level {level} scale 1"
            )
        experts = getattr(self.model, "fixed_edges", {})  # the levels with which they begin
        if any(null < first <= level for first in experts):
            raise ValueError(
                f"null level {null} belongs to another expert than level {level}, which is guided with scale "
                f"{scale:g}, and does not know its times: leave the null level out, or give level {level} scale 1"
            )
        return null

    def on_interval(self, interval: Interval, transport: Transport | None = None) -> Model:
        """The network as one smooth function on an interval that no edge or breakpoint cuts.

        Args:
            transport: tells what each level predicts; None if all predict the same
        """
        middle = (interval.start + interval.stop) / 2
        scale = self.scale_at(interval.level)
        if scale == 1 or (self.interval is not None and not self.interval[0] < middle < self.interval[1]):
            return partial(self.model, level=interval.level)
        return partial(self._guided, level=interval.level, scale=scale, transport=transport)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        """Guided prediction (N, C, ...) for x (N, C, ...), t (N,), y (N,); each sample's t decides on the interval.

        The null level must predict what the others do.
        """
        scale = self.scale_at(level)
        if scale == 1:
            return self.model(x, t, y=y, level=level)
        if self.interval is None:
            return self._guided(x, t, y=y, level=level, scale=scale)
        inside = (t > self.interval[0]) & (t < self.interval[1])
        scales = torch.where(inside, scale, 1.0).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return self._guided(x, t, y=y, level=level, scale=scales)

    def _guided(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        level: int,
        scale: float | torch.Tensor,
        transport: Transport | None = None,
    ) -> torch.Tensor:
        null_label, null_level = torch.full_like(y, self.null_class), self._null_level_at(level)
        if null_level == level:
            output = self.model(torch.cat([x, x]), torch.cat([t, t]), y=torch.cat([y, null_label]), level=level)
            conditional, null = output.chunk(2)
        else:
            conditional, null = self.model([x, x], [t, t], y=[y, null_label], level=[level, null_level])
            if transport is not None:
                predictions = transport.prediction_at(level), transport.prediction_at(null_level)
                null = transport.convert(null, x, t, *predictions)
        guided = null + scale * (conditional - null)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], conditional[:, self.channels :]], dim=1)
