"""The network as a model of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from experts import Network, network_of
from positions import RopeScaling

Tensors = torch.Tensor | Sequence[torch.Tensor]  # of one level, or groups of several


class PyramidTransformer(ModelMixin, ConfigMixin):
    """A PyramidalPatchDiT, or several as experts, that diffusers saves, loads, moves and offloads.

    It holds the network rather than being one: both have a `config` and a `from_pretrained`, which differ.

    Args:
        architecture: arguments of PyramidalPatchDiT, or of ExpertPatchDiT
        rope_scaling: arguments of RopeScaling, for rotary positions; None for its defaults
    """

    # As in Pipeline.to: only the blocks are rounded, the few other weights stay as they are.
    _keep_in_fp32_modules = [  # noqa: RUF012  (diffusers' own way)
        *("x_embedder", "t_embedder", "y_embedder", "level_embedder", "global_adaLN_modulation", "final_layer"),
    ]
    _no_split_modules = ["DiTBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(self, architecture: Mapping[str, Any], rope_scaling: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.network = network_of(architecture)
        if rope_scaling is not None:
            self.network.rope_scaling = RopeScaling(**rope_scaling)

    @classmethod
    def of(cls, network: Network) -> PyramidTransformer:
        """A network with its weights, which are shared, not copied."""
        scaling = asdict(network.rope_scaling) if network.position == "rope" else None
        with torch.device("meta"):
            model = cls(architecture=network.config, rope_scaling=scaling)
        model.network = network
        return model.eval()

    # -- What guidance and samplers ask of a network ---------------------------------------------------------------

    @property
    def num_levels(self) -> int:
        return self.network.num_levels

    @property
    def num_classes(self) -> int:
        """Number of classes, and the id of the null label."""
        return self.network.num_classes

    @property
    def in_channels(self) -> int:
        return self.network.in_channels

    @property
    def input_size(self) -> tuple[int, int]:
        return self.network.input_size

    def macs(self, level: int, size: Sequence[int] | None = None) -> int:
        """Multiply-accumulates of an evaluation at a level: see PyramidalPatchDiT.macs."""
        return self.network.macs(level, size)

    @property
    def fixed_edges(self) -> dict[int, float]:
        """Times at which levels begin that no schedule may move; none but those of experts."""
        return getattr(self.network, "fixed_edges", {})

    def input_size_of(self, size: Sequence[int], factor: int = 1) -> tuple[int, int]:
        """The size of inputs for samples of a size: see PyramidalPatchDiT.input_size_of."""
        return self.network.input_size_of(size, factor)

    # -- Evaluation ------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensors, t: Tensors, y: Tensors, level: int | Sequence[int] = 0
    ) -> torch.Tensor | list[torch.Tensor]:
        """Predict at one level, or at several in one pass: as PyramidalPatchDiT.forward.

        Weights in half precision compute under autocast; inputs and outputs keep their type, fp32 in the pipeline.
        """
        device = (x if isinstance(x, torch.Tensor) else x[0]).device.type  # not self.device, which may be offloaded
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(device, self.dtype if half else None, enabled=half):
            return self.network(x, t, y=y, level=level)
