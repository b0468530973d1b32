"""Tokens of a level: how patches become tokens and back, and their positions, sine-cosine or rotary.

Letters in the shapes: N samples, C channels, H x W input, (p, q) patch, T = (H/p)(W/q) tokens, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

POSITIONS = ("sincos", "rope")
ROPE_KINDS = ("auto", "normal", "linear", "ntk", "ntk-parts", "yarn")
ATTENTION_SCALES = ("log", "fit1", "fit2")

# ---------------------------------------------------------------------------------------------------------------
# Patches


def patchify(x: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """Cut images into patches: (N, C, H, W) -> (N, T, p*q*C), tokens in raster order, features (p, q, channel)."""
    n, c, h, w = x.shape
    p, q = patch_size
    x = x.reshape(n, c, h // p, p, w // q, q)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // p) * (w // q), p * q * c)


def unpatchify(tokens: torch.Tensor, patch_size: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Invert `patchify`: (N, T, p*q*C) -> (N, C, H, W) with size = (H, W)."""
    n, _, features = tokens.shape
    (p, q), (h, w) = patch_size, size
    c = features // (p * q)
    x = tokens.reshape(n, h // p, w // q, p, q, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


# ---------------------------------------------------------------------------------------------------------------
# Sine-cosine positions


def sincos_position_embedding(dim: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Fixed 2-D sine-cosine embedding of MAE (arXiv:2111.06377).

    Args:
        dim:     channels D, divisible by 4; the first half embeds the column, the second half the row
        rows:    (R,) row coordinates
        columns: (S,) column coordinates

    Returns:
        (R*S, D) float32, tokens in raster order.
    """

    def embed(position: torch.Tensor) -> torch.Tensor:  # (M,) -> (M, D/2)
        omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
        angle = position.double()[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.cat([embed(column.reshape(-1)), embed(row.reshape(-1))], dim=1).float()


def level_position_embedding(
    dim: int, input_size: tuple[int, int], patch_size: tuple[int, int], finest_patch_size: tuple[int, int]
) -> torch.Tensor:
    """(T, D) sine-cosine embedding of a level's token grid, measured in tokens of the finest level.

    A coarse token sits where its top-left fine token does: 0, 2, 4, ... when it is twice as large.
    """
    (h, w), (p, q), (fine_p, fine_q) = input_size, patch_size, finest_patch_size
    rows = torch.arange(h // p, dtype=torch.float64) * p / fine_p
    columns = torch.arange(w // q, dtype=torch.float64) * q / fine_q
    return sincos_position_embedding(dim, rows, columns)


# ---------------------------------------------------------------------------------------------------------------
# Rotary positions


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions reach beyond the sizes of training (FiT, arXiv:2402.12376; FiTv2, arXiv:2410.13925).

    It is a setting of sampling, not of the weights. s is the number of tokens along an axis over that of training.

    Args:
        kind:            "normal" keeps the frequencies; "linear" divides them by s (arXiv:2306.15595); "ntk" leaves the
                         highest and stretches the lowest by s; "ntk-parts" and "yarn" treat low, middle and high ones
                         differently (arXiv:2309.00071). "auto" is "normal" up to the tokens of training, and beyond
                         them "ntk" with an attention scale: `attention_scale`, or "log" where it is None.
        decouple:        each axis has its own s ("Vision" in FiT's names); else both have the larger one
        attention_scale: factor of the attention's logits for N tokens, N_0 in training: "log" is log N / log N_0 where
                         that is above 1 (FiTv2, equation 15); "fit1" and "fit2" are what FiT's code computes under the
                         names ntkpro1 and ntkpro2; None is 1

    Raises:
        ValueError: if a name is unknown, or "yarn", which has a factor of its own, is given another.
    """

    kind: str = "auto"
    decouple: bool = True
    attention_scale: str | None = None

    def __post_init__(self) -> None:
        for value, name, allowed in (
            (self.kind, "kind of rotary positions", ROPE_KINDS),
            (self.attention_scale, "attention scale", (None, *ATTENTION_SCALES)),
        ):
            if value not in allowed:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, allowed))}")
        if self.kind == "yarn" and self.attention_scale is not None:
            raise ValueError(f"yarn scales the attention itself: leave the attention scale {self.attention_scale} out")

    def resolved(self, num_tokens: float, train_tokens: int) -> RopeScaling:
        """The setting that "auto" stands for at this number of tokens; any other kind as it is."""
        if self.kind != "auto":
            return self
        if num_tokens <= train_tokens:
            return RopeScaling("normal")
        return RopeScaling("ntk", self.decouple, self.attention_scale or "log")


def rope_frequencies(head_dim: int, length: float, train_length: float, kind: str, theta: float) -> torch.Tensor:
    """Angles per token (d/4,) in float64 of the d/4 pairs of features that belong to one axis, highest first.

    With e = d/2 features per axis: f_i = theta^(-2i / e), i = 0 .. e/2 - 1 (RoFormer, arXiv:2104.09864, section 3.2),
    changed by the kind where the axis is longer than in training.

    Args:
        head_dim:     d, divisible by 4
        length:       tokens along the axis
        train_length: tokens along an axis in training
        kind:         one of ROPE_KINDS but "auto"
        theta:        base of the frequencies
    """
    e = head_dim // 2
    i = torch.arange(e // 2, dtype=torch.float64, device="cpu")
    s = max(length / train_length, 1.0)

    def powers(base: float) -> torch.Tensor:
        return base ** (-2 * i / e)

    def kept(fast: float, slow: float) -> torch.Tensor:
        """1 for pairs that turn at least `fast` times over the training's length, 0 for at most `slow` (YaRN, 3.2)."""
        first, last = (
            e * math.log(train_length / (2 * math.pi * turns)) / (2 * math.log(theta)) for turns in (fast, slow)
        )
        low, high = max(math.floor(first), 0), min(math.ceil(last), e - 1)
        return 1 - ((i - low) / (high - low if high != low else 0.001)).clamp(0, 1)

    normal, linear = powers(theta), powers(theta) / s
    # The exponent makes the lowest frequency, i = e/2 - 1, exactly that of "linear"; a single pair has none to keep.
    ntk = powers(theta * s ** (e / (e - 2))) if e > 2 else normal
    if kind == "ntk-parts":
        mixed = torch.lerp(linear, ntk, kept(1.25, 0.75))
        return torch.lerp(mixed, normal, kept(16, 2))
    if kind == "yarn":
        return torch.lerp(linear, normal, kept(32, 1))
    return {"normal": normal, "linear": linear, "ntk": ntk}[kind]


def attention_factor(
    scaling: RopeScaling, tokens: tuple[float, float], train_tokens: float, stretch: float = 1.0
) -> float:
    """The factor of the logits under a scaling that is not "auto".

    Args:
        tokens:       rows and columns of tokens
        train_tokens: number of tokens in training
        stretch:      the larger side over that of training, in finest tokens: for "yarn" (its section 3.4)
    """
    rows, columns = tokens
    if scaling.kind == "yarn":
        return (0.1 * math.log(max(stretch, 1.0)) + 1) ** 2
    if scaling.attention_scale is None or train_tokens <= 1:
        return 1.0
    seen, trained = {
        "log": (rows * columns, train_tokens),
        "fit1": (2 * max(rows, columns), math.sqrt(train_tokens)),
        "fit2": (2 * rows * columns, train_tokens),
    }[scaling.attention_scale]
    return max(1.0, math.log(seen) / math.log(trained))


@lru_cache(maxsize=128)  # for the sizes and levels of a run
def rotary_table(
    head_dim: int,
    size: tuple[int, int],
    patch_size: tuple[int, int],
    finest_patch_size: tuple[int, int],
    train_tokens: int,
    theta: float,
    scaling: RopeScaling,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Cosines and sines (1, 2, T, d/2) of a level's token grid, for `rotate`: first the row's pairs, then the column's.

    Positions and s are measured in tokens of the finest level: a coarse token sits where its top-left fine one does.
    The attention's factor is that of the level's own numbers of tokens; it is shared out evenly between q and k.

    Args:
        head_dim:     d, divisible by 4
        size:         (H, W) of the input
        train_tokens: finest tokens in training, in a square
        theta:        base of the frequencies
    """
    (p, q), (fine_p, fine_q) = patch_size, finest_patch_size
    fine = size[0] / fine_p, size[1] / fine_q
    scaling = scaling.resolved(fine[0] * fine[1], train_tokens)
    train_length = math.sqrt(train_tokens)
    lengths = fine if scaling.decouple else (max(fine), max(fine))
    angles = []
    for number, step, length in zip((size[0] // p, size[1] // q), (p / fine_p, q / fine_q), lengths, strict=True):
        positions = torch.arange(number, dtype=torch.float64, device="cpu") * step
        angles.append(torch.outer(positions, rope_frequencies(head_dim, length, train_length, scaling.kind, theta)))
    rows, columns = angles  # (H/p, d/4), (W/q, d/4)
    grid = len(rows), len(columns), head_dim // 4
    angle = torch.cat([rows[:, None].expand(grid), columns[None].expand(grid)], dim=2).flatten(0, 1)
    trained = train_tokens * fine_p * fine_q / (p * q)
    factor = math.sqrt(attention_factor(scaling, grid[:2], trained, max(fine) / train_length))
    return (factor * torch.stack([angle.cos(), angle.sin()])).to(device, dtype).unsqueeze(0)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn pairs of neighbouring features of x (N, heads, T, d) by their tokens' angles, (N or 1, 2, T, d/2)."""
    cos, sin = table.unsqueeze(2).unbind(1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(3)
