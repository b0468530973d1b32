"""The published networks written a second time, from their description alone, and random weights for them."""

from __future__ import annotations

import inspect
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Mlp

from models import PyramidalPatchDiT

WIDTH, DEPTH, HEADS, CLASSES = 64, 2, 4, 5
DEFAULTS = {name: argument.default for name, argument in inspect.signature(PyramidalPatchDiT).parameters.items()}
del DEFAULTS["unit_patch"]  # is in a config only where it says something
PATCHES = {1: ((2, 2),), 2: ((4, 4), (2, 2)), 3: ((4, 4), (2, 4), (2, 2))}
TINY = {"hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": CLASSES, "input_size": 16}


def tiny(levels: int, **fields) -> PyramidalPatchDiT:
    """A model of ours in which every parameter is random: nothing is zero, no bias, no gate."""
    model = PyramidalPatchDiT(**{**TINY, "patch_sizes": PATCHES[levels], **fields}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def inputs(n: int = 3, channels: int = 4, size: tuple[int, int] = (16, 16)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, channels, *size, generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n) % (CLASSES + 1)


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def mae_positions(width: int, rows: np.ndarray, columns: np.ndarray) -> torch.Tensor:
    """(1, T, D): the first half of the channels from the column, the second from the row, each [sin, cos]."""

    def embed(position: float) -> np.ndarray:
        angle = position * 10000 ** (-np.arange(width // 4) / (width / 4))
        return np.concatenate([np.sin(angle), np.cos(angle)])

    table = [np.concatenate([embed(column), embed(row)]) for row in rows for column in columns]
    return torch.tensor(np.array(table), dtype=torch.float32)[None]


def published_weights(levels: int, channels: int = 4, out: int = 8, tokens: int = 8) -> dict[str, torch.Tensor]:
    """Random weights in the names and shapes of SiT's or PPFlow's code (1 level: SiT); tokens are the grid's side."""
    generator = torch.Generator().manual_seed(levels)
    shapes = {
        "x_embedder.proj.weight": (WIDTH, channels, 2, 2),
        "x_embedder.proj.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.0.bias": (WIDTH,),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "t_embedder.mlp.2.bias": (WIDTH,),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.linear.weight": (4 * out, WIDTH),
        "final_layer.linear.bias": (4 * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.adaLN_modulation.1.bias": (2 * WIDTH,),
    }
    for block, (name, rows, columns) in itertools.product(
        range(DEPTH),
        [("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4), ("adaLN_modulation.1", 6, 1)],
    ):
        shapes[f"blocks.{block}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
        shapes[f"blocks.{block}.{name}.bias"] = (rows * WIDTH,)
    if levels > 1:
        shapes["level_embedder.embedding_table.weight"] = (levels, WIDTH)
        for suffix, factor in (("1", 4), ("2", 2))[: levels - 1]:
            shapes[f"x_embedder.proj{suffix}.weight"] = (WIDTH, factor * channels, 2, 2)
            shapes[f"x_embedder.proj{suffix}.bias"] = (WIDTH,)
            shapes[f"final_layer.linear{suffix}.weight"] = (4 * factor * out, WIDTH)
            shapes[f"final_layer.linear{suffix}.bias"] = (4 * factor * out,)
    weights = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    strides = {1: [(1, 1)], 2: [(2, 2), (1, 1)], 3: [(2, 2), (1, 2), (1, 1)]}[levels]
    for level, (down, across) in enumerate(strides):
        name = "pos_embed" if levels == 1 else f"pos_embed.{level}"
        weights[name] = mae_positions(WIDTH, np.arange(0, tokens, down), np.arange(0, tokens, across))
    return weights


def published_forward(
    weights: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int, learn_sigma: bool
) -> torch.Tensor:
    """SiT's or PPFlow's network: convolutions after space-to-depth, timm's attention and MLP, depth-to-space."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def block_part(module: nn.Module, prefix: str) -> nn.Module:
        module.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
        return module

    levels = weights.get("level_embedder.embedding_table.weight", torch.zeros(1, WIDTH))
    kind = {1: ("fine",), 2: ("square", "fine"), 3: ("square", "wide", "fine")}[len(levels)][level]
    suffix = {"square": "1", "wide": "2", "fine": ""}[kind]
    if kind == "square":
        x = F.pixel_unshuffle(x, 2)  # channel c*4 + 2*dy + dx
    elif kind == "wide":
        x = torch.stack([x[..., 0::2], x[..., 1::2]], dim=2).flatten(1, 2)  # channel c*2 + dx
    grid = (x.shape[2] // 2, x.shape[3] // 2)

    angle = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))))
    c = c + weights["y_embedder.embedding_table.weight"][y] + levels[level]
    h = F.conv2d(x, weights[f"x_embedder.proj{suffix}.weight"], weights[f"x_embedder.proj{suffix}.bias"], stride=2)
    h = h.flatten(2).transpose(1, 2) + weights["pos_embed" if len(levels) == 1 else f"pos_embed.{level}"]
    for block in range(DEPTH):
        name = f"blocks.{block}"
        attention = block_part(Attention(WIDTH, num_heads=HEADS, qkv_bias=True), f"{name}.attn.")
        mlp = block_part(Mlp(WIDTH, 4 * WIDTH, act_layer=lambda: nn.GELU(approximate="tanh")), f"{name}.mlp.")
        modulation = linear(f"{name}.adaLN_modulation.1", F.silu(c))[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h = h + gate1 * attention(F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1)
        h = h + gate2 * mlp(F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, dim=-1)
    out = linear(f"final_layer.linear{suffix}", F.layer_norm(h, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
    out = torch.einsum("nhwpqc->nchpwq", out.reshape(len(x), *grid, 2, 2, -1)).reshape(len(x), -1, *x.shape[2:])
    if learn_sigma:
        out = out.chunk(2, dim=1)[0]
    if kind == "square":
        out = F.pixel_shuffle(out, 2)
    elif kind == "wide":
        out = torch.stack([out[:, 0::2], out[:, 1::2]], dim=-1).flatten(3)
    return out


@torch.no_grad()
def check_levels(model: PyramidalPatchDiT, weights: dict[str, torch.Tensor], learn_sigma: bool = True) -> None:
    """Ours and the published network agree to 1e-5 on every level."""
    x, t, y = inputs(channels=model.in_channels, size=model.input_size)
    for level in range(model.num_levels):
        expected = published_forward(weights, x, t, y, level, learn_sigma)
        assert expected.std() > 0.3
        torch.testing.assert_close(model(x, t, y, level=level), expected, atol=1e-5, rtol=1e-5)
