"""Experts: networks that serve one interval of time each, and share no parameters.

Patch Diffusion (arXiv:2207.04316) cuts time at thresholds of the signal-to-noise ratio and trains a network for each
piece; eDiff-I (arXiv:2211.01324) and Wan2.2 do the same with transformers. Here an expert and its patch sizes are more
levels: the levels of all experts, one after the other from noise to data, are those of an ExpertPatchDiT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from models import MODELS, Groups, PyramidalPatchDiT, canonical_name, create_model

EXPERT_CARD = Path(__file__).parent / "weights" / "expert_card.md"  # a template


def _shared(name: str) -> property:
    """An attribute that all experts have alike; setting it sets theirs."""

    def set_all(model: ExpertPatchDiT, value: Any) -> None:
        for expert in model.experts:
            setattr(expert, name, value)

    return property(lambda model: getattr(model.experts[0], name), set_all)


class ExpertPatchDiT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ppflow",
    license="mit",
    tags=["image-generation", "diffusion", "flow-matching", "arxiv:2207.04316", "arxiv:2506.23543"],
):
    """Diffusion transformers of which each serves an interval of time, with the interface of one PyramidalPatchDiT.

    Its levels are those of the first expert (noise), then those of the second, and so on. A pass over several levels
    calls each expert once, so all parameters take part in it.

    Args:
        experts:      the networks from noise to data, or the arguments of PyramidalPatchDiT for each
        expert_edges: times in (0, 1), ascending, at which one expert follows another

    Raises:
        ValueError: if there are not one edge less than experts, they do not ascend, or the experts take other inputs.
    """

    def __init__(self, experts: Sequence[PyramidalPatchDiT | Mapping[str, Any]], expert_edges: Sequence[float]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            PyramidalPatchDiT(**expert) if isinstance(expert, Mapping) else expert for expert in experts
        )
        self.expert_edges = tuple(float(edge) for edge in expert_edges)
        self._check()
        self._hub_mixin_config = self.config

    def _check(self) -> None:
        count, edges = len(self.experts), self.expert_edges
        if count < 2 or len(edges) != count - 1:
            raise ValueError(
                f"{len(edges)} expert edge(s) for {count} expert(s): give two experts or more, an edge less"
            )
        if any(not low < high for low, high in pairwise((0.0, *edges, 1.0))):
            raise ValueError(f"expert edges must ascend strictly between 0 and 1, got {edges}")
        for name in ("in_channels", "input_size", "num_classes", "position", "train_tokens"):
            values = [getattr(expert, name) for expert in self.experts]
            if len(set(values)) > 1:
                raise ValueError(f"experts must have the same {name}, got {', '.join(map(str, values))}")

    # -- Levels --------------------------------------------------------------------------------------------------

    @property
    def places(self) -> list[tuple[PyramidalPatchDiT, int]]:
        """(expert, its own number of the level) for each level."""
        return [(expert, own) for expert in self.experts for own in range(expert.num_levels)]

    def place(self, level: int) -> tuple[PyramidalPatchDiT, int]:
        """The expert of a level, and its own number of it (ValueError if there is no such level)."""
        if not 0 <= level < self.num_levels:
            raise ValueError(f"level {level} is out of range: the model has {self.num_levels} level(s)")
        return self.places[level]

    @property
    def num_levels(self) -> int:
        return sum(expert.num_levels for expert in self.experts)

    @property
    def fixed_edges(self) -> dict[int, float]:
        """Times at which levels begin that no schedule may move: an expert knows no others than its own."""
        first = [level for level, (_, own) in enumerate(self.places) if own == 0]
        return dict(zip(first[1:], self.expert_edges, strict=True))

    # -- What one network has ------------------------------------------------------------------------------------

    @property
    def networks(self) -> dict[str, PyramidalPatchDiT]:
        """The experts by the prefix of their names in the state dict."""
        return {f"experts.{number}.": expert for number, expert in enumerate(self.experts)}

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks of all experts."""
        return nn.ModuleList(block for expert in self.experts for block in expert.blocks)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data."""
        return {"experts": [expert.config for expert in self.experts], "expert_edges": list(self.expert_edges)}

    in_channels = _shared("in_channels")
    input_size = _shared("input_size")
    num_classes = _shared("num_classes")
    sample_shape = _shared("sample_shape")
    position = _shared("position")
    train_tokens = _shared("train_tokens")
    rope_scaling = _shared("rope_scaling")
    activation_checkpointing = _shared("activation_checkpointing")

    @property
    def num_parameters(self) -> int:
        return sum(expert.num_parameters for expert in self.experts)

    def input_size_of(self, size: Sequence[int], factor: int = 1) -> tuple[int, int]:
        """The size of inputs for samples of a size, if all experts take them: see PyramidalPatchDiT.input_size_of."""
        sizes = [expert.input_size_of(size, factor) for expert in self.experts]
        return sizes[0]

    def num_tokens(self, level: int, size: tuple[int, int] | None = None) -> int:
        """Tokens T per sample at a level: see PyramidalPatchDiT.num_tokens."""
        expert, own = self.place(level)
        return expert.num_tokens(own, size)

    def macs(self, level: int, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one evaluation for one sample: see PyramidalPatchDiT.macs."""
        expert, own = self.place(level)
        return expert.macs(own, size)

    def describe(self) -> str:
        """Size of the experts in words."""
        bounds = pairwise((0.0, *self.expert_edges, 1.0))
        parts = [
            f"t in [{start:g}, {stop:g}] {expert.describe()}"
            for (start, stop), expert in zip(bounds, self.experts, strict=True)
        ]
        return f"{len(self.experts)} experts, {'; '.join(parts)}"

    def level_parameters(self, level: int) -> list[nn.Parameter]:
        """The parameters that no other level uses: of an expert with a single level, all."""
        expert, own = self.place(level)
        return expert.level_parameters(own) if expert.num_levels > 1 else list(expert.parameters())

    # -- huggingface_hub ------------------------------------------------------------------------------------------

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> ExpertPatchDiT:
        # As PyramidalPatchDiT does, and for the same reason.
        return super()._from_pretrained(strict=strict, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of saved experts: EXPERT_CARD, filled in with the config and the keyword arguments."""
        fields = {**self.config, "description": self.describe(), "num_levels": self.num_levels, **kwargs}
        return ModelCard.from_template(self._hub_mixin_info.model_card_data, template_path=str(EXPERT_CARD), **fields)

    # -- Evaluation ----------------------------------------------------------------------------------------------

    def forward(
        self,
        x: torch.Tensor | Groups,
        t: torch.Tensor | Groups,
        y: torch.Tensor | Groups,
        level: int | Sequence[int] = 0,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Predict at one level, or at several in one pass: as PyramidalPatchDiT.forward."""
        if not isinstance(level, Sequence):
            expert, own = self.place(level)
            return expert(x, t, y, own)
        if not len(x) == len(t) == len(y) == len(level):
            raise ValueError(f"{len(level)} levels, but {len(x)}, {len(t)} and {len(y)} groups of x, t and y")
        places, outputs = [self.place(each) for each in level], {}
        for expert in self.experts:
            mine = [group for group, (owner, _) in enumerate(places) if owner is expert]
            if mine:
                groups = ([values[group] for group in mine] for values in (x, t, y))
                found = expert(*groups, [places[group][1] for group in mine])
                outputs.update(zip(mine, found, strict=True))
        return [outputs[group] for group in range(len(level))]


Network = PyramidalPatchDiT | ExpertPatchDiT

# ---------------------------------------------------------------------------------------------------------------
# Making networks


def network_of(config: Mapping[str, Any], **overrides: Any) -> Network:
    """The network of a config, with other arguments for each PyramidalPatchDiT in it."""
    if "experts" not in config:
        return PyramidalPatchDiT(**{**config, **overrides})
    return ExpertPatchDiT([{**expert, **overrides} for expert in config["experts"]], config["expert_edges"])


def create_expert(name: str, patches: range, **overrides: Any) -> PyramidalPatchDiT:
    """Build a model of the registry with some of its patch sizes, whose tokens stay where they are in the whole.

    Args:
        patches:   indices of the patch sizes
        overrides: arguments of PyramidalPatchDiT
    """
    sizes = overrides.pop("patch_sizes", None) or MODELS[canonical_name(name)]["patch_sizes"]
    if patches.stop == len(sizes):
        return create_model(name, patch_sizes=sizes[patches.start :], **overrides)
    own = sizes[patches.start : patches.stop]
    return create_model(name, patch_sizes=own, unit_patch=sizes[-1], **overrides)


# ---------------------------------------------------------------------------------------------------------------
# One on the device at a time


class OneExpertAtATime:
    """Keeps the weights of a single expert on a device, and those of all on the host; made by `offload`.

    An expert takes the place of another when it is called. Samplers walk the levels in order, so for each batch an
    expert is moved once. The weights must not change: the copy on the device is dropped, not brought back.

    Args:
        model:  the experts, on the CPU
        device: where they compute
    """

    def __init__(self, model: ExpertPatchDiT, device: torch.device) -> None:
        self.device = device
        self.moves = 0
        self._host = {expert: [self._pinned(tensor) for tensor in tensors_of(expert)] for expert in model.experts}
        self._resident: PyramidalPatchDiT | None = None
        for expert in model.experts:
            expert.register_forward_pre_hook(lambda expert, _: self.bring(expert))
        self.bring(model.experts[0])
        self.moves = 0

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.data.pin_memory() if self.device.type == "cuda" else tensor.data

    def bring(self, expert: PyramidalPatchDiT) -> None:
        """Move an expert to the device, if it is not there."""
        if expert is self._resident:
            return
        if self._resident is not None:
            self._put(self._resident, self._host[self._resident])
        self._put(expert, [tensor.to(self.device, non_blocking=True, copy=True) for tensor in self._host[expert]])
        self._resident, self.moves = expert, self.moves + 1

    @staticmethod
    def _put(expert: PyramidalPatchDiT, values: Sequence[torch.Tensor]) -> None:
        for tensor, value in zip(tensors_of(expert), values, strict=True):
            tensor.data = value


def tensors_of(network: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [*network.parameters(), *network.buffers()]
