"""FiT's and FiTv2's layout of weights (arXiv:2402.12376, arXiv:2410.13925): one level of 2x2 patches.

    part                  ours                         FiT
    patch embedding       x_embedder.0                 x_embedder.proj, its columns by (channel, p, q)
    head                  final_layer.linear.0         final_layer.linear, its rows by (channel, p, q)
    everything else       under the same name

FiTv2 has global_adaLN_modulation, and blocks.N.adaLN_modulation of low rank. Its network predicts the velocity at t, as
ours does; FiT's predicts noise at the index of DDPM's steps, and learns sigma. Rotary positions store nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from models import FIT, FIT_V2, PyramidalPatchDiT
from positions import RopeScaling
from runtime.files import check_tensors
from weights.shapes import Shapes

PATCH = 2  # no shape tells it, and all published ones have it
TRAIN_TOKENS = 256  # of all published weights; those for 512x512 images were trained to stretch positions from there
EMBEDDING, HEAD = "x_embedder.proj", "final_layer.linear"


def fields_from_fit(weights: Mapping[str, torch.Tensor], source: str, **overrides: Any) -> dict[str, Any]:
    """As fields_from_shapes of weights.layouts, for FiT's layout; the input is assumed to be 32x32."""
    shapes = Shapes(weights, source)
    hidden, second = shapes.hidden_size(), any(name.startswith("global_adaLN_modulation.") for name in weights)
    features = shapes.most(shapes.sizes(r"x_embedder\.proj\.weight", axis=1), f"the channels ({EMBEDDING}.weight)")
    heads = shapes.sizes(r"final_layer\.linear\.(weight|bias)")
    rows = shapes.most(
        [rows for rows in heads if rows in (features, 2 * features)] or heads, f"the output channels ({HEAD}.weight)"
    )
    inner = shapes.sizes(r"blocks\.\d+\.mlp\.fc1_[gx]\.(weight|bias)") + shapes.sizes(
        r"blocks\.\d+\.mlp\.fc2\.weight", axis=1
    )
    ratio = shapes.most(inner, "the width of the MLP") / hidden
    fields = {
        **(FIT_V2 if second else FIT),
        "patch_sizes": [[PATCH, PATCH]],
        "in_channels": features // PATCH**2,
        "hidden_size": hidden,
        "depth": shapes.depth(),
        "num_classes": shapes.num_classes(),
        "learn_sigma": rows == 2 * features,
        # The quotient may be rounded below the width that it stands for.
        "mlp_ratio": ratio if int(hidden * ratio) == round(hidden * ratio) else math.nextafter(ratio, math.inf),
        "train_tokens": TRAIN_TOKENS,
    }
    if second:
        ranks = shapes.sizes(r"blocks\.\d+\.adaLN_modulation\.1\.(weight|bias)")
        ranks += shapes.sizes(r"blocks\.\d+\.adaLN_modulation\.2\.weight", axis=1)
        fields["adaln_rank"] = shapes.most(ranks, "the rank of the modulation (blocks.0.adaLN_modulation.1.weight)")
    if "num_heads" not in overrides:
        fields["num_heads"] = shapes.num_heads()
    return {**fields, **overrides}


def authors_scaling(model: PyramidalPatchDiT) -> RopeScaling:
    """The scaling of rotary positions that the papers recommend: for FiT VisionNTK, for FiTv2 with attention scale.

    The weights that were trained on 512x512 images want FiT's as well, and no tensor tells which they are.
    """
    return RopeScaling("ntk") if model.time_input == "ddpm" else RopeScaling("auto", attention_scale="fit2")


def _by_channel(rows: torch.Tensor) -> torch.Tensor:
    """Rows (p, q, channel) -> rows (channel, p, q), of a tensor (p*q*C, ...)."""
    return rows.unflatten(0, (PATCH**2, -1)).transpose(0, 1).reshape(rows.shape)


def _by_place(rows: torch.Tensor) -> torch.Tensor:
    """Invert `_by_channel`."""
    return rows.unflatten(0, (-1, PATCH**2)).transpose(0, 1).reshape(rows.shape)


def export_to_fit(model: PyramidalPatchDiT) -> dict[str, torch.Tensor]:
    """The model's weights under the names and in the order of FiT's files; any device and dtype, meta too.

    Raises:
        ValueError: if FiT has no such model.
    """
    if model.patch_sizes != ((PATCH, PATCH),) or model.position != "rope" or model.mlp != "swiglu":
        sizes = ", ".join(f"{p}x{q}" for p, q in model.patch_sizes)
        kind = f"{sizes} patches, {model.position} positions and a {model.mlp} MLP"
        raise ValueError(f"the fit layout has no model with {kind}")
    if model.qk_norm != (model.adaln_rank is not None) or model.qk_norm == (model.time_input == "ddpm"):
        raise ValueError(
            "the fit layout is FiT's, whose time is DDPM's index, or FiTv2's, with qk_norm and adaln_rank: no mixture"
        )
    if model.rope_theta != 10_000 or model.bottleneck is not None:
        raise ValueError("the fit layout has no place for another rope_theta than 10000, or for a bottleneck")
    weights = dict(model.state_dict())
    for end in ("weight", "bias"):
        embedding, head = weights.pop(f"x_embedder.0.{end}"), weights.pop(f"final_layer.linear.0.{end}")
        weights[f"{EMBEDDING}.{end}"] = _by_channel(embedding.T).T if end == "weight" else embedding
        weights[f"{HEAD}.{end}"] = _by_channel(head)
    return weights


def import_from_fit(model: PyramidalPatchDiT, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Load weights of FiT's layout into a model of their shape.

    Raises:
        ValueError: naming the tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        check_tensors(weights, export_to_fit(PyramidalPatchDiT(**model.config)), source)
    ours = dict(weights)
    for end in ("weight", "bias"):
        embedding = ours.pop(f"{EMBEDDING}.{end}")
        ours[f"x_embedder.0.{end}"] = _by_place(embedding.T).T if end == "weight" else embedding
        ours[f"final_layer.linear.0.{end}"] = _by_place(ours.pop(f"{HEAD}.{end}"))
    model.load_state_dict(ours)
