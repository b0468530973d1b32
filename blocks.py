"""Parts of the network: the embedding of t and y, the transformer block, the head.

The block is DiT's (arXiv:2212.09748, section 3.2), or that of FiT (arXiv:2402.12376), which turns queries and keys by
rotary positions and has a SwiGLU for an MLP, or of FiTv2 (arXiv:2410.13925), which also normalises queries and keys and
shares most of its modulation with the other blocks.

Letters in the shapes: N samples, T tokens, D hidden size, d head size, (p, q) patch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from positions import rotate

FREQUENCY_FEATURES = 256  # sinusoidal features of t
TIME_INPUTS = ("t", "ddpm")
MLPS = ("gelu", "swiglu")

Groups = Sequence[torch.Tensor]  # one tensor for each group of samples; all samples of a group are at the same level
OptionalGroups = Sequence[torch.Tensor | None]  # all of them, or None for each group


# ---------------------------------------------------------------------------------------------------------------
# Conditioning


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> (N, D). The sinusoids see t itself, not 1000 t (the convention of SiT's weights).

    Args:
        time_input: "t", or "ddpm" for sinusoids that see `ddpm_index` of t
    """

    def __init__(self, hidden_size: int, time_input: str = "t") -> None:
        super().__init__()
        self.time_input = time_input
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        if time_input == "ddpm":
            # -log of DDPM's alpha-bar at its 1000 steps, beta from 1e-4 to 0.02 (arXiv:2006.11239, section 4).
            beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
            self.register_buffer("ddpm_noise", -torch.log1p(-beta).cumsum(0).float(), persistent=False)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        if self.time_input == "ddpm":
            t = ddpm_index(t, self.ddpm_noise.to(t.dtype))
        half = FREQUENCY_FEATURES // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, device=t.device, dtype=t.dtype))
        angle = t[:, None] * frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


def ddpm_index(t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The index (N,) at which DDPM's 1000 steps are as noisy as the VP path is at times t (N,).

    DDPM's betas are steps of 1/1000 of that path, so this is about 1000 (1 - t); the two differ by up to 5 steps.

    Args:
        noise: -log alpha-bar at the indices 0 to 999, ascending; between them it is taken for linear
    """
    s = 1 - t
    wanted = s**2 * (20.0 - 0.1) / 2 + s * 0.1  # -log alpha^2 (arXiv:2011.13456, equation 33)
    above = torch.searchsorted(noise, wanted).clamp(1, len(noise) - 1)
    low, high = noise[above - 1], noise[above]
    return (above - 1 + (wanted - low) / (high - low)).clamp(0, len(noise) - 1)


def table_embedder(num_rows: int, hidden_size: int) -> nn.Sequential:
    """Integer ids (N,) -> (N, D), by a table with the name that it has in DiT's weights."""
    return nn.Sequential(OrderedDict(embedding_table=nn.Embedding(num_rows, hidden_size)))


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: x (N, T, D) with one shift and scale (N, D) per sample."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each sample, (N, T, D) -> (N, T, D).

    Args:
        qk_norm: normalise queries and keys over the features of a head, without parameters
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        return self.proj(self.attend(self.qkv(x), rotation))

    def attend(self, qkv: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
        """(N, T, 3D) -> (N, T, D); `rotation` (N or 1, 2, T, d/2) turns queries and keys."""
        n, t, d = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        if n == 0:  # CUDA's attention kernels refuse an empty batch
            return qkv[..., :d]
        q, k, v = qkv.unflatten(2, (3, self.num_heads, d // self.num_heads)).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (q, k))
        if rotation is not None:  # in the table's fp32, whatever the others are in
            q, k = (rotate(x, rotation) for x in (q, k))
        q, k = q.to(v.dtype), k.to(v.dtype)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)


def gelu_mlp(hidden_size: int, inner_size: int) -> nn.Sequential:
    """DiT's MLP, (..., D) -> (..., D)."""
    return nn.Sequential(
        OrderedDict(
            fc1=nn.Linear(hidden_size, inner_size),
            act=nn.GELU(approximate="tanh"),
            fc2=nn.Linear(inner_size, hidden_size),
        )
    )


class SwiGLU(nn.Module):
    """FiT's MLP (arXiv:2002.05202, equation 6, with biases), (..., D) -> (..., D)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(hidden_size, inner_size)
        self.fc1_x = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.silu(self.fc1_g(x)) * self.fc1_x(x))


def modulation_layer(hidden_size: int, parts: int, rank: int | None = None) -> nn.Sequential:
    """Shifts, scales and gates of a condition: (N, D) -> (N, parts*D); with a rank, through that many features."""
    if rank is None:
        return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))
    return nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, rank), nn.Linear(rank, parts * hidden_size))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero (DiT, section 3.2).

    A pass of the network may hold several levels and sizes: groups of samples with T tokens each, which never meet.

    Args:
        hidden_size: width D
        num_heads:   attention heads
        mlp_ratio:   inner width of the MLP over D, rounded down
        mlp:         one of MLPS
        qk_norm:     as of Attention
        adaln_rank:  rank of the block's own modulation, which is then added to the one that all blocks share (FiTv2,
                     section 3.2); None for a modulation of full rank that nothing is added to
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        mlp: str = "gelu",
        qk_norm: bool = False,
        adaln_rank: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = {"gelu": gelu_mlp, "swiglu": SwiGLU}[mlp](hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = modulation_layer(hidden_size, 6, adaln_rank)

    def block(
        self,
        x: torch.Tensor,
        c: torch.Tensor,
        shared: torch.Tensor | None = None,
        rotation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens x (N, T, D) of one level under conditions c (N, D); the others as in `forward`."""
        modulation = self.modulation(c, shared)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), rotation)
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))

    def modulation(self, c: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
        """Shifts, scales and gates (N, 6D) under conditions c (N, D)."""
        own = self.adaLN_modulation(c)
        return own if shared is None else own + shared

    def forward(
        self,
        groups: list[torch.Tensor],
        conditions: list[torch.Tensor],
        shared: OptionalGroups,
        rotations: OptionalGroups,
    ) -> list[torch.Tensor]:
        """Groups of one or several levels in one call: FSDP2 gathers weights once, torch.compile makes one graph.

        Args:
            groups:     tokens (N, T, D)
            conditions: (N, D)
            shared:     the modulation (N, 6D) that all blocks share, or None
            rotations:  angles of the tokens (N or 1, 2, T, d/2), or None
        """
        if len(groups) == 1:
            return [self.block(groups[0], conditions[0], shared[0], rotations[0])]
        return self.blocks_at_once(groups, conditions, shared, rotations)

    def blocks_at_once(
        self,
        groups: list[torch.Tensor],
        conditions: list[torch.Tensor],
        shared: OptionalGroups,
        rotations: OptionalGroups,
    ) -> list[torch.Tensor]:
        """`block` of every group; linear layers read their weights once for all tokens (benchmarks/RESULTS.md)."""
        added = None if shared[0] is None else torch.cat(shared)
        modulations = self.modulation(torch.cat(conditions), added).split([len(c) for c in conditions])
        parts = zip(*(modulation.chunk(6, dim=1) for modulation in modulations), strict=True)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = parts
        inputs = [modulate(self.norm1(x), *m) for x, *m in zip(groups, shift_msa, scale_msa, strict=True)]
        queries = zip(at_once(self.attn.qkv, inputs), rotations, strict=True)
        attended = [self.attn.attend(qkv, rotation) for qkv, rotation in queries]
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
        self.adaLN_modulation = modulation_layer(hidden_size, 2)
        self.linear = nn.ModuleList(nn.Linear(hidden_size, p * q * out_channels) for p, q in patch_sizes)

    def forward(self, x: torch.Tensor, c: torch.Tensor, level: int) -> torch.Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear[level](modulate(self.norm_final(x), shift, scale))


# ---------------------------------------------------------------------------------------------------------------
# Groups that share a call


class Joined:
    """Groups that share an attention call, because they have the same level and number of tokens, joined into one.

    Args:
        keys: (level, tokens per sample) of each group
    """

    def __init__(self, keys: Sequence[tuple[int, int]]) -> None:
        self.members: dict[tuple[int, int], list[int]] = {}
        for index, key in enumerate(keys):
            self.members.setdefault(key, []).append(index)

    def join(self, groups: Groups) -> list[torch.Tensor]:
        """Joined tensors (sum of N, ...) of tensors (N, ...)."""
        parts = [[groups[index] for index in indices] for indices in self.members.values()]
        return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]

    def join_shared(self, groups: OptionalGroups, counts: Sequence[int]) -> list[torch.Tensor | None]:
        """As `join` for tensors (1, ...) that all `counts` samples of a group share; (1, ...) where they are one."""
        joined = []
        for indices in self.members.values():
            first = groups[indices[0]]
            if all(groups[index] is first for index in indices):
                joined.append(first)
            else:
                joined.append(torch.cat([groups[index].expand(counts[index], -1, -1, -1) for index in indices]))
        return joined

    def split(self, joined: Groups, counts: Sequence[int]) -> list[torch.Tensor]:
        """The groups of `counts` samples each that were joined."""
        groups: list[torch.Tensor | None] = [None] * len(counts)
        for whole, indices in zip(joined, self.members.values(), strict=True):
            parts = [whole] if len(indices) == 1 else whole.split([counts[index] for index in indices])
            for index, part in zip(indices, parts, strict=True):
                groups[index] = part
        return groups
