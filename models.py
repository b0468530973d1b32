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
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from positions import level_position_embedding, patchify, unpatchify

FREQUENCY_FEATURES = 256  # sinusoidal features of t
MODEL_CARD = Path(__file__).parent / "weights" / "model_card.md"  # a template

Groups = Sequence[torch.Tensor]  # one tensor for each group of samples; all samples of a group are at the same level


def patch_embedder(patch_features: int, hidden_size: int, bottleneck: int | None) -> nn.Module:
    """Patches (N, T, p*q*C) -> (N, T, D), by one linear layer, or by two and no bias in the first."""
    if bottleneck is None:
        return nn.Linear(patch_features, hidden_size)
    return nn.Sequential(nn.Linear(patch_features, bottleneck, bias=False), nn.Linear(bottleneck, hidden_size))


# ---------------------------------------------------------------------------------------------------------------
# Conditioning


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (N, D). The sinusoids see t itself, not 1000 t (the convention of SiT's weights)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = FREQUENCY_FEATURES // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=t.dtype))
        angle = t[:, None] * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def table_embedder(num_rows: int, hidden_size: int) -> nn.Sequential:
    """Integer ids (N,) -> (N, D), by a table with the name that it has in DiT's weights."""
    return nn.Sequential(OrderedDict(embedding_table=nn.Embedding(num_rows, hidden_size)))


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: x (N, T, D) with one shift and scale (N, D) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each sample, (N, T, D) -> (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(self.attend(self.qkv(x)))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """(N, T, 3D) -> (N, T, D)."""
        n, t, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        if n == 0:  # CUDA's attention kernels refuse an empty batch
            return qkv[..., :d]
        q, k, v = qkv.unflatten(2, (3, self.num_heads, d // self.num_heads)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (DiT, section 3.2).

    A pass of the network may hold several levels: groups of samples with T tokens each, which never meet.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        inner_size = int(hidden_size * mlp_ratio)
        self.mlp = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(hidden_size, inner_size),
                act=nn.GELU(approximate="tanh"),
                fc2=nn.Linear(inner_size, hidden_size),
            )
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def block(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Tokens x (N, T, D) of one level under conditions c (N, D)."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def forward(self, groups: list[torch.Tensor], conditions: list[torch.Tensor]) -> list[torch.Tensor]:
        """Groups of one or several levels in one call: FSDP2 gathers weights once, torch.compile makes one graph."""
        if len(groups) == 1:
            return [self.block(groups[0], conditions[0])]
        return self.blocks_at_once(groups, conditions)

    def blocks_at_once(self, groups: list[torch.Tensor], conditions: list[torch.Tensor]) -> list[torch.Tensor]:
        """`block` of every group; linear layers read their weights once for all tokens (benchmarks/RESULTS.md)."""
        modulations = self.adaLN_modulation(torch.cat(conditions)).split([len(c) for c in conditions])
        parts = zip(*(modulation.chunk(6, dim=1) for modulation in modulations), strict=True)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        inputs = [modulate(self.norm1(x), *m) for x, *m in zip(groups, shift_msa, scale_msa, strict=True)]
        attended = [self.attn.attend(qkv) for qkv in at_once(self.attn.qkv, inputs)]
        groups = add_gated(groups, gate_msa, at_once(self.attn.proj, attended))
        inputs = [modulate(self.norm2(x), *m) for x, *m in zip(groups, shift_mlp, scale_mlp, strict=True)]
        return add_gated(groups, gate_mlp, at_once(self.mlp, inputs))


def at_once(layer: nn.Module, groups: Groups) -> list[torch.Tensor]:
    """Apply a layer that acts on single tokens to all groups (N, T, features) in one call."""
    out = layer(torch.cat([group.flatten(0, 1) for group in groups]))
    parts = out.split([group.shape[0] * group.shape[1] for group in groups])
    return [part.unflatten(0, group.shape[:2]) for part, group in zip(parts, groups, strict=True)]


def add_gated(groups: Groups, gates: Groups, outputs: Groups) -> list[torch.Tensor]:
    """x + gate * output for every group x (N, T, D) with its gate (N, D)."""
    return [x + gate.unsqueeze(1) * out for x, gate, out in zip(groups, gates, outputs, strict=True)]


class FinalLayer(nn.Module):
    """adaLN, then the head of the level: (N, T, D) under conditions (N, D) -> (N, T, p*q*out_channels)."""

    def __init__(self, hidden_size: int, patch_sizes: Sequence[tuple[int, int]], out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.ModuleList(nn.Linear(hidden_size, p * q * out_channels) for p, q in patch_sizes)

    def forward(self, x: torch.Tensor, c: torch.Tensor, level: int) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear[level](modulate(self.norm_final(x), shift, scale))


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
        mlp_ratio:   inner width of the MLP over D
        num_classes: number of classes, and the id of the null label: the table has num_classes + 1 rows
        learn_sigma: double the head's output channels and drop the second half (the layout of DiT's weights)
        bottleneck:  embed patches by two linear layers with so many values in between (JiT, arXiv:2511.13720); None
                     for one layer
        unit_patch:  patch whose tokens positions are counted in; None for the finest level's

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
        self.activation_checkpointing = False  # compute the blocks again in the backward pass instead of keeping them
        self._check()

        patch_features = [p * q * in_channels for p, q in self.patch_sizes]
        self.x_embedder = nn.ModuleList(patch_embedder(size, hidden_size, bottleneck) for size in patch_features)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = table_embedder(num_classes + 1, hidden_size)  # the null label's row is the last one
        if self.num_levels > 1:
            self.level_embedder = table_embedder(self.num_levels, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, self.patch_sizes, in_channels * (2 if learn_sigma else 1))

        # Derived from the token grid, so not part of the state dict.
        for level in range(self.num_levels):
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

    def position_embedding(self, level: int) -> torch.Tensor:
        """(T, D) sine-cosine embedding of a level's token grid."""
        sizes = self.input_size, self.patch_sizes[level], self.unit_patch or self.patch_sizes[-1]
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

    def num_tokens(self, level: int) -> int:
        """Tokens T per sample at a level."""
        (h, w), (p, q) = self.input_size, self.patch_sizes[level]
        return (h // p) * (w // q)

    def macs(self, level: int) -> int:
        """Multiply-accumulates of one evaluation for one sample: every matrix product, attention included."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = PyramidalPatchDiT(**self.config)
            x, t, y = torch.zeros(1, *self.sample_shape), torch.zeros(1), torch.zeros(1, dtype=torch.long)
            with sdpa_kernel(SDPBackend.MATH):  # torch 2.6 counts its products on every device
                model(x, t, y, level)
        return counter.get_total_flops() // 2

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
            condition = condition + self.level_embedder.embedding_table.weight[level]
        return condition

    def tokens(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """Embed the patches of (N, C, H, W) and their positions: (N, T, D)."""
        if x.shape[1:] != self.sample_shape:
            expected, got = ("x".join(map(str, shape)) for shape in (self.sample_shape, x.shape[1:]))
            raise ValueError(f"the model takes {expected} inputs, got {got}")
        return self.x_embedder[level](patchify(x, self.patch_sizes[level])) + getattr(self, f"pos_embed_{level}")

    def prediction(self, tokens: torch.Tensor, condition: torch.Tensor, level: int) -> torch.Tensor:
        """Tokens (N, T, D) after the blocks -> (N, C, H, W)."""
        patches = self.final_layer(tokens, condition, level)
        return unpatchify(patches, self.patch_sizes[level], self.input_size)[:, : self.in_channels]

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
        group may be empty; the parameters of its level then take part with gradient zero.

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
        groups = [self.tokens(*each) for each in zip(x, level, strict=True)]
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                groups = checkpoint(block, groups, conditions, use_reentrant=False, preserve_rng_state=False)
            else:
                groups = block(groups, conditions)
        outputs = [self.prediction(*each) for each in zip(groups, conditions, level, strict=True)]
        outputs = [out.to(noisy.dtype) for out, noisy in zip(outputs, x, strict=True)]  # autocast makes it bf16
        return outputs[0] if single else outputs


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise ValueError(f"a size is one number or (height, width), got {sides}")
    return operator.index(sides[0]), operator.index(sides[1])


# ---------------------------------------------------------------------------------------------------------------
# Registry

SIZES = {
    "T": {"depth": 6, "hidden_size": 128, "num_heads": 4},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16},
}

# The pyramids of the paper, and SiT's single levels.
PATCH_SIZES = {
    "PPF-{}-2": ((4, 4), (2, 2)),
    "PPF-{}-3": ((4, 4), (2, 4), (2, 2)),
    "SiT-{}/2": ((2, 2),),
    "SiT-{}/4": ((4, 4),),
    "SiT-{}/8": ((8, 8),),
}

# The same for pixels, named after the finest patch: 16 for 256x256 images and 32 for 512x512, 256 tokens in both.
PIXEL_PATCH_SIZES = {
    "PPF-{}-2/16": ((32, 32), (16, 16)),
    "PPF-{}-3/16": ((32, 32), (16, 32), (16, 16)),
    "PPF-{}-2/32": ((64, 64), (32, 32)),
    "PPF-{}-3/32": ((64, 64), (32, 64), (32, 32)),
    "SiT-{}/16": ((16, 16),),
    "SiT-{}/32": ((32, 32),),
}

MODELS: dict[str, dict[str, Any]] = {
    name.format(size): {"patch_sizes": patch_sizes, **fields}
    for size, fields in SIZES.items()
    for name, patch_sizes in PATCH_SIZES.items()
    if size != "T" or patch_sizes[-1] == (2, 2)  # the tiny size is for images of few tokens
}
MODELS |= {
    name.format(size): {
        "patch_sizes": patch_sizes,
        **SIZES[size],
        "input_size": 16 * patch_sizes[-1][0],
        "in_channels": 3,
        "learn_sigma": False,
    }
    for size in ("B", "L")
    for name, patch_sizes in PIXEL_PATCH_SIZES.items()
}


def canonical_name(name: str) -> str:
    """The registry's spelling of a model name: "PPFlow_XL_2" -> "PPF-XL-2".

    Raises:
        ValueError: if no such model exists; the message lists those that do.
    """

    def normal_form(text: str) -> str:
        return re.sub("[-_/]", "", text.lower()).replace("ppflow", "ppf")

    for known in MODELS:
        if normal_form(known) == normal_form(name):
            return known
    raise ValueError(f"unknown model {name!r}; choose one of {', '.join(MODELS)}")


def create_model(name: str, **overrides: Any) -> PyramidalPatchDiT:
    """Build a model of the registry; any argument of PyramidalPatchDiT can be overridden.

    Example: create_model("PPF-XL-2", input_size=32, num_classes=1000)

    Raises:
        ValueError: if the name is unknown or the overrides do not fit together.
    """
    return PyramidalPatchDiT(**{**MODELS[canonical_name(name)], **overrides})
