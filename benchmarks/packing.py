"""A mixed batch as PPFlow's published training runs it: rows of equal length and a dense mask.

This is the reference that benchmarks/training.py compares with. Coarse samples are laid side by side in rows as long
as a sample of the finest level (4 samples of 64 tokens in a row of 256). Every row goes through the blocks with shift,
scale and gate written out for each token, and attention sees a boolean mask (rows, 1, T, T) that keeps the samples of a
row apart, so it costs as if every row were one fine sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from blocks import Attention, DiTBlock
from models import PyramidalPatchDiT
from positions import unpatchify


class DenseMaskPacking(nn.Module):
    """A model's own weights, called as the model is called for several levels in one pass.

    Args:
        model: whose weights are used; every level's tokens must divide the finest level's
    """

    def __init__(self, model: PyramidalPatchDiT) -> None:
        super().__init__()
        self.model = model
        self.num_levels = model.num_levels
        self.row_length = model.num_tokens(model.num_levels - 1)

    def forward(
        self, x: Sequence[torch.Tensor], t: Sequence[torch.Tensor], y: Sequence[torch.Tensor], level: Sequence[int]
    ) -> list[torch.Tensor]:
        """Predict at several levels: x of (n, C, H, W), t and y of (n,), one for each level; a list of (n, C, H, W)."""
        model = self.model
        conditions = [model.condition(*each) for each in zip(t, y, level, strict=True)]
        tokens = [model.tokens(*each) for each in zip(x, level, strict=True)]
        sample, counts = self._layout(tokens)
        sample = sample.to(tokens[0].device)
        mask = sample[:, None, :, None] == sample[:, None, None, :]  # (rows, 1, T, T)
        place = sample.clamp(min=0)  # padding, -1, borrows a condition: its output is dropped
        c = torch.cat(conditions)
        rows = torch.cat([self._rows(group) for group in tokens])
        for block in model.blocks:
            rows = self._block(block, rows, c, place, mask)
        shift, scale = model.final_layer.adaLN_modulation(c)[place].chunk(2, dim=2)
        rows = model.final_layer.norm_final(rows) * (1 + scale) + shift
        outputs = []
        for group, group_level, part in zip(tokens, level, rows.split(counts), strict=True):
            n, t_level, _ = group.shape
            per_sample = part.reshape(-1, t_level, part.shape[2])[:n]
            out = model.final_layer.linear[group_level](per_sample)
            out = unpatchify(out, model.patch_sizes[group_level], model.input_size)
            outputs.append(out[:, : model.in_channels])
        return outputs

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, T, D) side by side in rows of the finest level's length; zeros where samples are missing."""
        per_row = self.row_length // tokens.shape[1]
        padded = F.pad(tokens, (0, 0, 0, 0, 0, -len(tokens) % per_row))
        return padded.reshape(-1, self.row_length, tokens.shape[2])

    def _layout(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        """Sample of each token of the rows (rows, T), -1 for padding; and the number of rows of each group."""
        layouts, first = [], 0
        for group in tokens:
            n, t, _ = group.shape
            per_row = self.row_length // t
            samples = F.pad(torch.arange(first, first + n), (0, -n % per_row), value=-1)
            layouts.append(samples.repeat_interleave(t).reshape(-1, self.row_length))
            first += n
        return torch.cat(layouts), [len(layout) for layout in layouts]

    @staticmethod
    def _block(
        block: DiTBlock, x: torch.Tensor, c: torch.Tensor, place: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        modulation = block.adaLN_modulation(c)[place]  # (rows, T, 6D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)
        x = x + gate_a * DenseMaskPacking._attend(block.attn, block.norm1(x) * (1 + scale_a) + shift_a, mask)
        return x + gate_m * block.mlp(block.norm2(x) * (1 + scale_m) + shift_m)

    @staticmethod
    def _attend(attention: Attention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, t, d = x.shape
        q, k, v = attention.qkv(x).reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.proj(out.transpose(1, 2).reshape(n, t, d))
