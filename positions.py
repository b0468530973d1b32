"""Tokens of a level: how patches become tokens and back, and fixed sine-cosine embeddings of their positions.

Letters in the shapes: N samples, C channels, H x W input, (p, q) patch, T = (H/p)(W/q) tokens, D hidden size.
"""

from __future__ import annotations

import torch


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
