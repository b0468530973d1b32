"""The scaling between an autoencoder's latents and the numbers that a network sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Scaling:
    """x = (z - shift) * scale between an autoencoder's latents z and the network's x; numbers, or one per channel."""

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    @classmethod
    def from_config(cls, config: Any) -> Scaling:
        """Read a diffusers config: one factor, and for some autoencoders also a mean and a deviation per channel."""
        factor = config["scaling_factor"]
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return cls(config.get("shift_factor") or 0.0, factor)
        return cls(tuple(config["latents_mean"]), tuple(factor / deviation for deviation in config["latents_std"]))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Scaling:
        """Build from the two fields as JSON stores them: numbers or lists."""
        shift, scale = (
            tuple(value) if isinstance(value, list | tuple) else value for value in (values["shift"], values["scale"])
        )
        return cls(shift, scale)

    def apply(self, z: torch.Tensor) -> torch.Tensor:
        """The network's x (N, C, h, w) of latents z."""
        return (z - _per_channel(self.shift, z)).mul_(_per_channel(self.scale, z))

    def invert(self, x: torch.Tensor) -> torch.Tensor:
        """The latents z (N, C, h, w) of the network's x."""
        return x / _per_channel(self.scale, x) + _per_channel(self.shift, x)


def _per_channel(value: float | tuple[float, ...], like: torch.Tensor) -> float | torch.Tensor:
    return torch.tensor(value).to(like).reshape(-1, 1, 1) if isinstance(value, tuple) else value
