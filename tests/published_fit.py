"""FiT and FiTv2 written a second time, from their formulas alone and under their own names, with random weights."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

WIDTH, DEPTH, HEADS, CLASSES = 144, 2, 2, 5  # heads of 72 features, as in the published XL
INTERPOLATIONS = ("no", "linear", "dynntk", "ntkpro1", "ntkpro2", "partntk", "yarn")
TOKENS = ((16, 16), (10, 20), (20, 20), (10, 30))


def fit_weights(version: int, channels: int = 4) -> dict[str, torch.Tensor]:
    """Random weights in the names and shapes of FiT's files; version 1 learns sigma, 2 shares its modulation."""
    generator = torch.Generator().manual_seed(version)
    inner, rank = (4 * WIDTH if version == 1 else 4 * WIDTH * 2 // 3), WIDTH // 4
    linears = {
        "x_embedder.proj": (WIDTH, 4 * channels),
        "t_embedder.mlp.0": (WIDTH, 256),
        "t_embedder.mlp.2": (WIDTH, WIDTH),
        "final_layer.linear": (4 * channels * (2 if version == 1 else 1), WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    if version == 2:
        linears["global_adaLN_modulation.1"] = (6 * WIDTH, WIDTH)
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        linears |= {f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH)}
        linears |= {f"{block}.mlp.fc1_{part}": (inner, WIDTH) for part in "gx"} | {f"{block}.mlp.fc2": (WIDTH, inner)}
        if version == 1:
            linears[f"{block}.adaLN_modulation.1"] = (6 * WIDTH, WIDTH)
        else:
            linears[f"{block}.adaLN_modulation.1"] = (rank, WIDTH)
            linears[f"{block}.adaLN_modulation.2"] = (6 * WIDTH, rank)
    shapes = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes["y_embedder.embedding_table.weight"] = (CLASSES + 1, WIDTH)
    return {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def angles(rows: int, columns: int, d: int, interpolation: str, decouple: bool) -> tuple[np.ndarray, float]:
    """Angles (T, d/2) of a grid of tokens, and the factor of cosines and sines, by FiT's names."""
    e, theta, original = d // 2, 10_000.0, 16

    def frequencies(s: float) -> np.ndarray:
        found = []
        for i in range(d // 4):
            b = theta ** (-2 * i / e)
            ntk = (theta * s ** (e / (e - 2))) ** (-2 * i / e)

            def keep(fast: float, slow: float, i: int = i) -> float:
                lo = max(math.floor(e * math.log(original / (2 * math.pi * fast)) / (2 * math.log(theta))), 0)
                hi = min(math.ceil(e * math.log(original / (2 * math.pi * slow)) / (2 * math.log(theta))), e - 1)
                return 1 - min(max((i - lo) / (hi - lo + (0.001 if hi == lo else 0)), 0), 1)

            if interpolation == "no":
                found.append(b)
            elif interpolation == "linear":
                found.append(b / s)
            elif interpolation in ("dynntk", "ntkpro1", "ntkpro2"):
                found.append(ntk)
            elif interpolation == "partntk":
                mixed = b / s * (1 - keep(1.25, 0.75)) + ntk * keep(1.25, 0.75)
                found.append(mixed * (1 - keep(16, 2)) + b * keep(16, 2))
            else:
                found.append(b / s * (1 - keep(32, 1)) + b * keep(32, 1))
        return np.array(found)

    longest = max(rows, columns)
    down, across = (max((n if decouple else longest) / original, 1) for n in (rows, columns))
    table = [[*(i * frequencies(down)), *(j * frequencies(across))] for i in range(rows) for j in range(columns)]
    factor = 1.0
    if interpolation == "ntkpro1" and 2 * longest > original:
        factor = math.sqrt(math.log(2 * longest) / math.log(original))
    if interpolation == "ntkpro2" and 2 * rows * columns > original**2:
        factor = math.sqrt(math.log(2 * rows * columns) / math.log(original**2))
    if interpolation == "yarn":
        factor = 0.1 * math.log(max(longest / original, 1)) + 1
    return np.array(table), factor


def fit_forward(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    time: torch.Tensor,
    y: torch.Tensor,
    interpolation: str = "no",
    decouple: bool = True,
) -> torch.Tensor:
    """Velocity (version 2) or noise (version 1) of x (N, C, H, W); `time` is the network's own, t or DDPM's index."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])

    n, channels, h, w = x.shape
    grid, d = (h // 2, w // 2), WIDTH // HEADS
    turn, factor = angles(*grid, d, interpolation, decouple)
    turn = torch.polar(torch.full(turn.shape, factor, dtype=torch.float64), torch.tensor(turn)).to(torch.complex64)

    # Tokens row by row, their features by channel, row and column
    patches = F.unfold(x, 2, stride=2).transpose(1, 2)
    hidden = linear("x_embedder.proj", patches)
    angle = time[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()], dim=1))))
    c = F.silu(c + weights["y_embedder.embedding_table.weight"][y])
    second = "global_adaLN_modulation.1.weight" in weights
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        m = linear(f"{block}.adaLN_modulation.1", c)
        if second:
            m = linear(f"{block}.adaLN_modulation.2", m) + linear("global_adaLN_modulation.1", c)
        shift1, scale1, gate1, shift2, scale2, gate2 = m[:, None].chunk(6, dim=-1)
        u = F.layer_norm(hidden, (WIDTH,), eps=1e-6) * (1 + scale1) + shift1
        q, k, v = (part.reshape(n, -1, HEADS, d) for part in linear(f"{block}.attn.qkv", u).split(WIDTH, dim=-1))
        if second:
            q, k = F.layer_norm(q, (d,), eps=1e-6), F.layer_norm(k, (d,), eps=1e-6)
        q, k = (torch.view_as_complex(part.reshape(n, -1, HEADS, d // 2, 2)) * turn[:, None] for part in (q, k))
        q, k = (torch.view_as_real(part).flatten(3) for part in (q, k))
        weight = torch.einsum("nihd,njhd->nhij", q, k).mul(d**-0.5).softmax(dim=-1)
        attended = torch.einsum("nhij,njhd->nihd", weight, v).reshape(n, -1, WIDTH)
        hidden = hidden + gate1 * linear(f"{block}.attn.proj", attended)
        u = F.layer_norm(hidden, (WIDTH,), eps=1e-6) * (1 + scale2) + shift2
        inner = F.silu(linear(f"{block}.mlp.fc1_g", u)) * linear(f"{block}.mlp.fc1_x", u)
        hidden = hidden + gate2 * linear(f"{block}.mlp.fc2", inner)
    shift, scale = linear("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, dim=-1)
    out = linear("final_layer.linear", F.layer_norm(hidden, (WIDTH,), eps=1e-6) * (1 + scale) + shift)
    return F.fold(out.transpose(1, 2), (h, w), 2, stride=2)[:, :channels]
