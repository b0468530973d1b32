"""The network: a diffusion transformer with one patch embedding and one output head per level.

PPFlow (arXiv:2506.23543) keeps DiT's blocks (arXiv:2212.09748) and shares them across time. Only the patch
size changes: level 0 is the coarsest (few tokens, high noise), the last level the finest. A model with a
single level is a SiT (arXiv:2401.08740).

Letters in the shapes: N samples, C channels, H x W input, (p, q) patch, T = (H/p)(W/q) tokens, D hidden size.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from blocks import (
    MLPS,
    TIME_INPUTS,
    DiTBlock,
    FinalLayer,
    Groups,
    Joined,
    TimestepEmbedder,
    modulation_layer,
    table_embedder,
)
from positions import POSITIONS, RopeScaling, level_position_embedding, patchify, rotary_table, unpatchify
from registry import MODELS, canonical_name

MODEL_CARD = Path(__file__).parent / "weights" / "model_card.md"  # a template


def patch_embedder(patch_features: int, hidden_size: int, bottleneck: int | None) -> nn.Module:
    """Patches (N, T, p*q*C) -> (N, T, D), by one linear layer, or by two and no bias in the first."""
    if bottleneck is None:
        return nn.Linear(patch_features, hidden_size)
    return nn.Sequential(nn.Linear(patch_features, bottleneck, bias=False), nn.Linear(bottleneck, hidden_size))


# ---------------------------------------------------------------------------------------------------------------
# The model


class PyramidalPatchDiT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ppflow",
    license="mit",
    tags=["image-generation", "diffusion", "flow-matching", "arxiv:2506.23543", "arxiv:2401.08740"],
):
    """Diffusion transformer with a pyramid of patch sizes (PPFlow, arXiv:2506.23543, section 3).

    A pure function of its inputs: no randomness, no branch on tensor values. Label dropout belongs to training.
    from_pretrained, save_pretrained and push_to_hub are huggingface_hub's.

    Args:
        input_size:  side of the square input, or (H, W), in latent pixels
        patch_sizes: one (height, width) per level, coarsest first; an int means a square patch
        in_channels: channels C of the input and of the output
        hidden_size: width D, divisible by num_heads and by 4
        depth:       number of transformer blocks
        num_heads:   attention heads
        mlp_ratio:   inner width of the MLP over D, rounded down to a whole one
        num_classes: number of classes, and the id of the null label: the table has num_classes + 1 rows
        learn_sigma: double the head's output channels and drop the second half (the layout of DiT's weights)
        bottleneck:  embed patches by two linear layers with so many values in between (JiT, arXiv:2511.13720); None
                     for one layer
        unit_patch:  patch whose tokens positions are counted in; None for the finest level's
        position:    "sincos", added to the tokens of inputs of input_size alone; or "rope", rotary ones for inputs of
                     any size that the patches divide (FiT, arXiv:2402.12376), of which input_size is the default
        mlp:         "gelu" (DiT) or "swiglu" (FiT)
        qk_norm:     normalise queries and keys (FiTv2, arXiv:2410.13925)
        adaln_rank:  rank of each block's own modulation, beside one that all blocks share (FiTv2); None for full rank
        rope_theta:  base of the rotary frequencies
        train_tokens: tokens of the finest level that a sample has at most in training: beyond them the model's
                     rope_scaling matters; None for those of input_size
        time_input:  "t"; or "ddpm", the index of DDPM's 1000 steps at the noise level of the VP path (FiT's and DiT's
                     weights)

    Raises:
        ValueError: if a patch does not divide the input, or the widths do not fit together.
    """

    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_sizes: Sequence[int | Sequence[int]] = ((4, 4), (2, 2)),
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        bottleneck: int | None = None,
        unit_patch: Sequence[int] | None = None,
        position: str = "sincos",
        mlp: str = "gelu",
        qk_norm: bool = False,
        adaln_rank: int | None = None,
        rope_theta: float = 10000.0,
        train_tokens: int | None = None,
        time_input: str = "t",
    ) -> None:
        super().__init__()
        self.input_size = _pair(input_size)
        self.patch_sizes = tuple(_pair(size) for size in patch_sizes)
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        self.bottleneck = bottleneck
        self.unit_patch = None if unit_patch is None else _pair(unit_patch)
        self.position = position
        self.mlp = mlp
        self.qk_norm = qk_norm
        self.adaln_rank = adaln_rank
        self.rope_theta = rope_theta
        self.train_tokens = train_tokens
        self.time_input = time_input
        self.activation_checkpointing = False  # compute the blocks again in the backward pass instead of keeping them
        self._check()
        if position == "rope":
            self.train_tokens = train_tokens or math.prod(self.input_size) // math.prod(self.position_unit)
            self.rope_scaling = RopeScaling()  # of sampling: not of the weights, so no argument

        patch_features = [p * q * in_channels for p, q in self.patch_sizes]
        self.x_embedder = nn.ModuleList(patch_embedder(size, hidden_size, bottleneck) for size in patch_features)
        self.t_embedder = TimestepEmbedder(hidden_size, time_input)
        self.y_embedder = table_embedder(num_classes + 1, hidden_size)  # the null label's row is the last one
        if self.num_levels > 1:
            self.level_embedder = table_embedder(self.num_levels, hidden_size)
        kind = mlp_ratio, mlp, qk_norm, adaln_rank
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, *kind) for _ in range(depth))
        if adaln_rank is not None:
            self.global_adaLN_modulation = modulation_layer(hidden_size, 6)
        self.final_layer = FinalLayer(hidden_size, self.patch_sizes, in_channels * (2 if learn_sigma else 1))

        # Derived from the token grid, so not part of the state dict.
        for level in range(self.num_levels if position == "sincos" else 0):
            self.register_buffer(f"pos_embed_{level}", self.position_embedding(level), persistent=False)
        self.initialize_weights()
        self._hub_mixin_config = self.config  # save_pretrained writes this: plain numbers only

    def _check(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 1 <= self.hidden_size * self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves the MLP no width: hidden_size is {self.hidden_size}")
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be divisible by num_heads {self.num_heads} and by 4")
        h, w = self.input_size
        if h < 1 or w < 1:
            raise ValueError(f"input_size must be at least 1, got {h}x{w}")
        if not self.patch_sizes:
            raise ValueError("patch_sizes is empty: a model needs at least one level")
        if self.unit_patch is not None and min(self.unit_patch) < 1:
            raise ValueError(f"unit_patch must be at least 1, got {self.unit_patch}")
        for level, (p, q) in enumerate(self.patch_sizes):
            if p < 1 or q < 1 or h % p or w % q:
                raise ValueError(f"the {p}x{q} patch of level {level} does not divide the {h}x{w} input")
            widest = min(p * q * self.in_channels, self.hidden_size) - 1
            if self.bottleneck is not None and not 1 <= self.bottleneck <= widest:
                raise ValueError(
                    f"a bottleneck of {self.bottleneck} is none between the {p * q * self.in_channels} values of a "
                    f"{p}x{q} patch and the width {self.hidden_size}: give 1 to {widest}"
                )
        for name, choices in (("position", POSITIONS), ("mlp", MLPS), ("time_input", TIME_INPUTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.adaln_rank is not None and self.adaln_rank < 1:
            raise ValueError(f"adaln_rank must be at least 1, got {self.adaln_rank}")
        if self.position == "sincos" and self.train_tokens is not None:
            raise ValueError("train_tokens is about rotary positions: leave it out, or give position='rope'")
        if self.position == "rope" and (self.hidden_size // self.num_heads) % 4:
            head_dim = self.hidden_size // self.num_heads
            raise ValueError(f"rotary positions need heads of a multiple of 4 features, not of {head_dim}")
        if self.train_tokens is not None and self.train_tokens < 1:
            raise ValueError(f"train_tokens must be at least 1, got {self.train_tokens}")
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above 1, got {self.rope_theta}")

    @property
    def position_unit(self) -> tuple[int, int]:
        """The patch whose tokens positions are counted in."""
        return self.unit_patch or self.patch_sizes[-1]

    def position_embedding(self, level: int) -> torch.Tensor:
        """(T, D) sine-cosine embedding of a level's token grid."""
        sizes = self.input_size, self.patch_sizes[level], self.position_unit
        return level_position_embedding(self.hidden_size, *sizes)

    def initialize_weights(self) -> None:
        """Xavier-uniform linears with zero bias, tables and time MLP normal(0.02), modulation and heads zero (DiT)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [layer.adaLN_modulation[-1] for layer in (*self.blocks, self.final_layer)]
        modulations += [self.global_adaLN_modulation[-1]] if self.adaln_rank is not None else []
        for linear in (*modulations, *self.final_layer.linear):
            nn.init.zeros_(linear.weight)

    # -- Sizes and costs -----------------------------------------------------------------------------------------

    @property
    def num_levels(self) -> int:
        return len(self.patch_sizes)

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of a sample."""
        return (self.in_channels, *self.input_size)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments as plain data: PyramidalPatchDiT(**model.config) has the same shape."""
        values = {name: getattr(self, name) for name in inspect.signature(PyramidalPatchDiT).parameters}
        sizes = {"input_size": list(self.input_size), "patch_sizes": [list(size) for size in self.patch_sizes]}
        unit_patch = values.pop("unit_patch")  # earlier versions do not know it: only where it says something
        return {**values, **sizes, **({} if unit_patch is None else {"unit_patch": list(unit_patch)})}

    @property
    def networks(self) -> dict[str, PyramidalPatchDiT]:
        """The networks that share no parameters, by the prefix of their names in the state dict: itself alone."""
        return {"": self}

    def num_tokens(self, level: int, size: tuple[int, int] | None = None) -> int:
        """Tokens T per sample at a level; of samples of input_size, or of a size (H, W)."""
        (h, w), (p, q) = size or self.input_size, self.patch_sizes[level]
        return (h // p) * (w // q)

    def macs(self, level: int, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one evaluation for one sample: every matrix product, attention included.

        Args:
            size: (H, W) of the sample; None for input_size
        """
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = PyramidalPatchDiT(**self.config)
            x = torch.zeros(1, self.in_channels, *(size or self.input_size))
            t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
            with sdpa_kernel(SDPBackend.MATH):  # torch 2.6 counts its products on every device
                model(x, t, y, level)
        return counter.get_total_flops() // 2

    def input_size_of(self, size: Sequence[int], factor: int = 1) -> tuple[int, int]:
        """The size (H, W) of inputs for samples of a size, if the network takes them.

        Args:
            size:   height and width, in pixels of which `factor` make one of the input

        Raises:
            ValueError: if the network knows another size alone, or a patch does not divide; the message names the
                        nearest size that works.
        """
        height, width = size
        named = f"{height}x{width}"
        if self.position == "sincos":
            h, w = (side * factor for side in self.input_size)
            if (height, width) != (h, w):
                raise ValueError(
                    f"this network knows {h}x{w} alone, not {named}: its positions are sine-cosine, and only rotary "
                    "ones go with other sizes"
                )
            return self.input_size
        units = [factor * math.lcm(*sides) for sides in zip(*self.patch_sizes, strict=True)]
        nearest = [max(1, round(side / unit)) * unit for side, unit in zip((height, width), units, strict=True)]
        if (height, width) != tuple(nearest):
            raise ValueError(
                f"{named} does not fit: the height must be a multiple of {units[0]}, the width of {units[1]}; the "
                f"nearest size that works is {nearest[0]}x{nearest[1]}"
            )
        return height // factor, width // factor

    def describe(self) -> str:
        """Size of the model in words."""
        tokens = " / ".join(str(self.num_tokens(level)) for level in range(self.num_levels))
        return f"{self.num_parameters:,} parameters, {self.num_levels} level(s), {tokens} tokens"

    def level_parameters(self, level: int) -> list[nn.Parameter]:
        """The parameters that no other level uses: the level's patch embedding and head."""
        return [*self.x_embedder[level].parameters(), *self.final_layer.linear[level].parameters()]

    # -- huggingface_hub ------------------------------------------------------------------------------------------

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> PyramidalPatchDiT:
        # huggingface_hub's own default, False, leaves a tensor that is missing from the file at its random start.
        return super()._from_pretrained(strict=strict, **kwargs)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The README.md of a saved model: MODEL_CARD, filled in with the config and the keyword arguments."""
        fields = {**self.config, "parameters": self.num_parameters, **kwargs}
        return ModelCard.from_template(self._hub_mixin_info.model_card_data, template_path=str(MODEL_CARD), **fields)

    # -- Evaluation ----------------------------------------------------------------------------------------------

    def condition(self, t: torch.Tensor, y: torch.Tensor, level: int) -> torch.Tensor:
        """Embed times (N,), class ids (N,) and the level: (N, D)."""
        if not 0 <= level < self.num_levels:
            raise ValueError(f"level {level} is out of range: the model has {self.num_levels} level(s)")
        condition = self.t_embedder(t) + self.y_embedder(y)
        if self.num_levels > 1:
            # By a call of the table, not by its weight: hooks on modules bring weights that are elsewhere (offloading).
            condition = condition + self.level_embedder(torch.full((1,), level, device=y.device))
        return condition

    def tokens(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """Embed the patches of (N, C, H, W), and their positions unless these are rotary: (N, T, D)."""
        rotary, (p, q) = self.position == "rope", self.patch_sizes[level]
        shape = tuple(x.shape[1:])
        if rotary and len(shape) == 3 and shape[0] == self.in_channels:
            if shape[1] % p or shape[2] % q or not all(shape):
                raise ValueError(f"the {p}x{q} patch of level {level} does not divide the {shape[1]}x{shape[2]} input")
        elif shape != self.sample_shape:
            expected = f"{self.in_channels}xHxW" if rotary else "x".join(map(str, self.sample_shape))
            raise ValueError(f"the model takes {expected} inputs, got {'x'.join(map(str, shape))}")
        embedded = self.x_embedder[level](patchify(x, (p, q)))
        return embedded.to(x.dtype) if rotary else embedded + getattr(self, f"pos_embed_{level}")

    def rotation(self, x: torch.Tensor, level: int) -> torch.Tensor | None:
        """The angles (1, 2, T, d/2) by which positions turn queries and keys, for inputs (N, C, H, W)."""
        if self.position == "sincos":
            return None
        size, patches = tuple(x.shape[2:]), (self.patch_sizes[level], self.position_unit)
        settings = self.train_tokens, self.rope_theta, self.rope_scaling
        dtype = torch.promote_types(x.dtype, torch.float32)
        return rotary_table(self.hidden_size // self.num_heads, size, *patches, *settings, dtype, x.device)

    def prediction(
        self, tokens: torch.Tensor, condition: torch.Tensor, level: int, size: tuple[int, int]
    ) -> torch.Tensor:
        """Tokens (N, T, D) after the blocks -> (N, C, H, W) of a size (H, W)."""
        patches = self.final_layer(tokens, condition, level)
        return unpatchify(patches, self.patch_sizes[level], size)[:, : self.in_channels]

    def forward(
        self,
        x: torch.Tensor | Groups,
        t: torch.Tensor | Groups,
        y: torch.Tensor | Groups,
        level: int | Sequence[int] = 0,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Predict at one level, or at several in one pass.

        Args:
            x:     (N, C, H, W) noisy input
            t:     (N,) times in [0, 1]; 0 is noise, 1 is data
            y:     (N,) class ids; num_classes is the null label
            level: index of the patch size, 0 = coarsest

        With a sequence of levels, x, t and y are sequences as well: groups of samples, one for each level named. A
        group may be empty; the parameters of its level then take part with gradient zero. With rotary positions groups
        may have different sizes; those of one level and number of tokens share their attention calls.

        Returns:
            (N, C, H, W): the velocity, noise, score or data that the model was trained to predict; a list of them for a
            sequence of levels.

        Raises:
            ValueError: if the input's size or the level is not the model's, or the numbers of groups and levels differ.
        """
        single = not isinstance(level, Sequence)
        if single:
            x, t, y, level = [x], [t], [y], [level]
        if not len(x) == len(t) == len(y) == len(level):
            raise ValueError(f"{len(level)} levels, but {len(x)}, {len(t)} and {len(y)} groups of x, t and y")
        conditions = [self.condition(*each) for each in zip(t, y, level, strict=True)]
        tokens = [self.tokens(*each) for each in zip(x, level, strict=True)]
        rotations = [self.rotation(*each) for each in zip(x, level, strict=True)]
        tokens = self.run_blocks(tokens, conditions, rotations, level)
        sizes = [tuple(noisy.shape[2:]) for noisy in x]
        outputs = [self.prediction(*each) for each in zip(tokens, conditions, level, sizes, strict=True)]
        outputs = [out.to(noisy.dtype) for out, noisy in zip(outputs, x, strict=True)]  # autocast makes it bf16
        return outputs[0] if single else outputs

    def run_blocks(
        self, tokens: Groups, conditions: Groups, rotations: Sequence[torch.Tensor | None], levels: Sequence[int]
    ) -> list[torch.Tensor]:
        """Tokens (N, T, D) of each group after the blocks, under conditions (N, D)."""
        joined = Joined([(level, group.shape[1]) for level, group in zip(levels, tokens, strict=True)])
        counts = [group.shape[0] for group in tokens]
        groups, conditions = joined.join(tokens), joined.join(conditions)
        rotations = joined.join_shared(rotations, counts)
        shared = [None] * len(groups)
        if self.adaln_rank is not None:
            shared = list(self.global_adaLN_modulation(torch.cat(conditions)).split([len(c) for c in conditions]))
        for block in self.blocks:
            inputs = groups, conditions, shared, rotations
            if self.activation_checkpointing and torch.is_grad_enabled():
                groups = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                groups = block(*inputs)
        return joined.split(groups, counts)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"a size is one number or (height, width), got {sides}")
    return operator.index(sides[0]), operator.index(sides[1])


def create_model(name: str, **overrides: Any) -> PyramidalPatchDiT:
    """Build a model of the registry; any argument of PyramidalPatchDiT can be overridden.

    Example: create_model("PPF-XL-2", input_size=32, num_classes=1000)

    Raises:
        ValueError: if the name is unknown or the overrides do not fit together.
    """
    return PyramidalPatchDiT(**{**MODELS[canonical_name(name)], **overrides})
