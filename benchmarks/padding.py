"""A batch of many sizes as FiT's published training runs it: samples padded to the longest, and a mask.

This is the reference that benchmarks/training.py compares with (FiT, arXiv:2402.12376, section 3.3). Every sample is a
row as long as the longest one of the batch; attention sees a boolean mask (N, 1, T, T) in which padding and tokens do
not see each other, and what the blocks make of padding is set to zero. FiT has a single level; here a sample of any
level is a row, with the tokens and angles of its level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import Attention, DiTBlock, modulate
from models import PyramidalPatchDiT
from positions import rotate


class PaddedRows(nn.Module):
    """A model's own weights, called as the model is called for several levels and sizes in one pass.

    Args:
        model: whose weights are used; its positions are rotary
    """

    def __init__(self, model: PyramidalPatchDiT) -> None:
        super().__init__()
        self.model = model
        self.num_levels = model.num_levels

    def forward(
        self, x: Sequence[torch.Tensor], t: Sequence[torch.Tensor], y: Sequence[torch.Tensor], level: Sequence[int]
    ) -> list[torch.Tensor]:
        """Predict for groups of a level and size each: x of (n, C, H, W), t and y of (n,); a list of (n, C, H, W)."""
        model = self.model
        tokens = [model.tokens(*each) for each in zip(x, level, strict=True)]
        counts, lengths = [len(group) for group in tokens], [group.shape[1] for group in tokens]
        rotations = [
            model.rotation(*each).expand(count, -1, -1, -1) for *each, count in zip(x, level, counts, strict=True)
        ]
        c = torch.cat([model.condition(*each) for each in zip(t, y, level, strict=True)])
        rows, rotation = padded(tokens, 1), padded(rotations, 2)  # (N, T, D), (N, 2, T, d/2)
        length = torch.tensor(lengths).repeat_interleave(torch.tensor(counts))
        valid = (torch.arange(max(lengths)) < length[:, None]).to(rows.device)  # (N, T)
        mask = (valid[:, :, None] == valid[:, None, :]).unsqueeze(1)
        shared = None if model.adaln_rank is None else model.global_adaLN_modulation(c)
        for block in model.blocks:
            rows = self._block(block, rows, block.modulation(c, shared), rotation, mask, valid.unsqueeze(2))
        parts = zip(rows.split(counts), lengths, c.split(counts), level, x, strict=True)
        return [
            model.prediction(part[:, :own], condition, group_level, tuple(noisy.shape[2:]))
            for part, own, condition, group_level, noisy in parts
        ]

    @staticmethod
    def _block(
        block: DiTBlock,
        x: torch.Tensor,
        modulation: torch.Tensor,
        rotation: torch.Tensor,
        mask: torch.Tensor,
        valid: torch.Tensor,
    ) -> torch.Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        attended = PaddedRows._attend(block.attn, modulate(block.norm1(x), shift_a, scale_a), rotation, mask)
        x = x + gate_a.unsqueeze(1) * attended * valid
        return x + gate_m.unsqueeze(1) * block.mlp(modulate(block.norm2(x), shift_m, scale_m)) * valid

    @staticmethod
    def _attend(attention: Attention, x: torch.Tensor, rotation: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = attention.qkv(x).reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        if attention.qk_norm:
            q, k = (F.layer_norm(each, each.shape[-1:], eps=1e-6) for each in (q, k))
        q, k = (rotate(each, rotation).to(v.dtype) for each in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.proj(out.transpose(1, 2).reshape(n, t, d))


def padded(groups: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """All rows of the groups (n, ...) in one tensor (N, ...), with zeros up to the longest in this dimension."""
    longest = max(group.shape[dim] for group in groups)
    return torch.cat(
        [F.pad(group, (0, 0) * (group.ndim - 1 - dim) + (0, longest - group.shape[dim])) for group in groups]
    )
