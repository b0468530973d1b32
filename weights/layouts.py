"""Layouts of weights in files (ours, SiT's, PPFlow's), and initialisation of one set of levels from another.

    part                  ours                         SiT and PPFlow
    patch embedding       x_embedder.L, a linear       x_embedder.proj{1,2,}, a convolution after space-to-depth
    head                  final_layer.linear.L         final_layer.linear{1,2,}, its channels in space-to-depth order
    positions             computed                     pos_embed in SiT, pos_embed.L in PPFlow
    everything else       under the same name          (PPFlow alone has level_embedder)

FiT's layout is in weights/fit.py.

PPFlow's patches are (a, b) convolution kernels on an image of which (fy, fx) neighbouring pixels became channels, so
its levels have (a fy, b fx) patches. Channel c of the image became the channels (c, dy, dx), c slowest. The finest
level comes last and has no number. Letters: D hidden size, C input channels, E output channels (2C with learn_sigma).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from experts import Network
from models import MODELS, PyramidalPatchDiT
from runtime.files import check_tensors
from weights.fit import export_to_fit, fields_from_fit, import_from_fit
from weights.shapes import Shapes

Weights = dict[str, torch.Tensor]

LAYOUTS = ("ours", "ppflow", "sit", "fit")

# What the registry's models have where they do not say otherwise.
DITS_BLOCK = {
    "mlp_ratio": 4,
    "position": "sincos",
    "mlp": "gelu",
    "qk_norm": False,
    "adaln_rank": None,
    "time_input": "t",
}

# By number of levels: suffixes of the levels' tensor names, and their space-to-depth factors (fy, fx).
SUFFIXES = {1: ("",), 2: ("1", ""), 3: ("1", "2", "")}
FACTORS = {1: ((1, 1),), 2: ((2, 2), (1, 1)), 3: ((2, 2), (1, 2), (1, 1))}

# The file's positions are the computed ones up to rounding. PPFlow averages them with the weights, which moves them by
# up to 2e-4; half precision by 4e-3. Another convention would differ by about 1.
POSITION_TOLERANCE = 1e-2


def layout_of(weights: Mapping[str, Any], source: str) -> str:
    """The layout that the tensors' names belong to.

    Raises:
        ValueError: if it is none of them.
    """
    names = list(weights)
    if any(re.match(r"(experts\.\d+\.)?x_embedder\.\d", name) for name in names):
        return "ours"
    if any(re.match(r"blocks\.\d+\.mlp\.fc1_[gx]\.", name) for name in names):
        return "fit"
    if any(name.startswith(("level_embedder.", "x_embedder.proj1.", "final_layer.linear1.")) for name in names):
        return "ppflow"
    if any(name.startswith(("x_embedder.proj.", "final_layer.linear.")) for name in names):
        return "sit"
    first = ", ".join(names[:3]) if names else "nothing"
    raise ValueError(f"{source} has no known layout (ours, PPFlow's, SiT's or FiT's): it begins with {first}")


def foreign_layout(model: PyramidalPatchDiT) -> str:
    """The layout of the repository that has such models."""
    if model.position == "rope":
        return "fit"
    return "sit" if model.num_levels == 1 else "ppflow"


def _position_names(num_levels: int) -> list[str]:
    """SiT's and PPFlow's tensor names of a model's positions."""
    return ["pos_embed"] if num_levels == 1 else [f"pos_embed.{level}" for level in range(num_levels)]


# ---------------------------------------------------------------------------------------------------------------
# Arguments from shapes


def fields_from_shapes(weights: Mapping[str, torch.Tensor], source: str, **overrides: Any) -> dict[str, Any]:
    """The arguments of PyramidalPatchDiT that weights in SiT's, PPFlow's or FiT's layout were made with.

    No shape gives the number of heads: it is that of the registry's size of this width, else hidden_size / 64. The
    input is assumed to be square.

    Args:
        weights:   tensors by name; only their shapes matter
        source:    the file's name, for messages
        overrides: known arguments, which win

    Raises:
        ValueError: if the shapes do not determine the arguments, or contradict each other.
    """
    layout = layout_of(weights, source)
    if layout == "fit":
        return fields_from_fit(weights, source, **overrides)
    shapes = Shapes(weights, source)
    sizes, most = shapes.sizes, shapes.most
    levels = 1
    if layout == "ppflow":
        parts = [
            rf"{part}[12]?\.{end}" for part in ("x_embedder.proj", "final_layer.linear") for end in ("weight", "bias")
        ]
        counts = [len(sizes(part)) for part in parts] + sizes(r"level_embedder\.embedding_table\.weight")
        levels = most(counts, "the levels")
        if levels not in (2, 3):
            raise ValueError(f"{source} is damaged: PPFlow has 2 or 3 levels, not {levels}")
    kernels, heads, tokens = [], [], []  # (channels, a, b); output channels; tokens of the finest level
    for suffix, factor, positions in zip(SUFFIXES[levels], FACTORS[levels], _position_names(levels), strict=True):
        kernel = shapes.of.get(f"x_embedder.proj{suffix}.weight", ())
        kernels += [(kernel[1] // math.prod(factor), *kernel[2:])] if len(kernel) == 4 else []
        heads += [rows // math.prod(factor) for rows in sizes(rf"final_layer\.linear{suffix}\.(weight|bias)")]
        tokens += [count * math.prod(factor) for count in sizes(re.escape(positions), axis=1)]
    channels, a, b = most(kernels, "the patch size (x_embedder.proj.weight)")
    hidden = shapes.hidden_size()
    inner = sizes(r"blocks\.\d+\.mlp\.fc1\.(weight|bias)") + sizes(r"blocks\.\d+\.mlp\.fc2\.weight", axis=1)
    fields = {
        "patch_sizes": [[a * fy, b * fx] for fy, fx in FACTORS[levels]],
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": shapes.depth(),
        "mlp_ratio": most(inner, "the width of the MLP") / hidden,
        "num_classes": shapes.num_classes(),
    }
    outs = [rows // (a * b) for rows in heads]
    out_channels = most([out for out in outs if out in (channels, 2 * channels)] or outs, "the output channels")
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"{source} is damaged: x_embedder.proj.weight is for {channels} channels, "
            f"final_layer.linear.weight for {out_channels}"
        )
    fields["learn_sigma"] = out_channels == 2 * channels
    if "num_heads" not in overrides:
        fields["num_heads"] = shapes.num_heads()
    if "input_size" not in overrides:
        squares = [count for count in tokens if math.isqrt(count) ** 2 == count]
        count = most(squares or tokens, "the input size (pos_embed), give input_size")
        side = math.isqrt(count)
        if side * side != count:
            name = _position_names(levels)[-1]
            raise ValueError(f"{source}: {name} has {count} tokens, which make no square: give input_size=(H, W)")
        fields["input_size"] = [side * a, side * b]
    return {**fields, **overrides}


def registry_name(model: PyramidalPatchDiT) -> str | None:
    """The name in MODELS with the model's patches and widths; what else a model is made with may differ."""
    sizes = ("patch_sizes", "hidden_size", "depth", "num_heads")
    for name, fields in MODELS.items():
        wanted = {**DITS_BLOCK, **{field: fields[field] for field in (*sizes, *DITS_BLOCK) if field in fields}}
        if all(getattr(model, field) == value for field, value in wanted.items()):
            return name
    return None


# ---------------------------------------------------------------------------------------------------------------
# Conversions and their inverses


def _kernel_to_linear(kernel: torch.Tensor, factor: tuple[int, int]) -> torch.Tensor:
    """(D, C*fy*fx, a, b) with channels (c, dy, dx) -> (D, p*q*C) with features (p, q, channel); p = a fy, q = b fx."""
    (d, channels, a, b), (fy, fx) = kernel.shape, factor
    split = kernel.reshape(d, channels // (fy * fx), fy, fx, a, b)
    return split.permute(0, 4, 2, 5, 3, 1).reshape(d, -1)


def _linear_to_kernel(weight: torch.Tensor, patch: tuple[int, int], factor: tuple[int, int]) -> torch.Tensor:
    """Invert `_kernel_to_linear`."""
    (p, q), (fy, fx) = patch, factor
    a, b = p // fy, q // fx
    split = weight.reshape(len(weight), a, fy, b, fx, -1)
    return split.permute(0, 5, 2, 4, 1, 3).reshape(len(weight), -1, a, b)


def _head_from_channels(head: torch.Tensor, patch: tuple[int, int], factor: tuple[int, int]) -> torch.Tensor:
    """Rows (a, b, channel), channels (e, dy, dx) -> rows (p, q, channel). A weight (p*q*E, D), or a bias (p*q*E,)."""
    (p, q), (fy, fx) = patch, factor
    a, b = p // fy, q // fx
    split = head.reshape(a, b, len(head) // (p * q), fy, fx, -1)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(head.shape)


def _head_to_channels(head: torch.Tensor, patch: tuple[int, int], factor: tuple[int, int]) -> torch.Tensor:
    """Invert `_head_from_channels`."""
    (p, q), (fy, fx) = patch, factor
    split = head.reshape(p // fy, fy, q // fx, fx, len(head) // (p * q), -1)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(head.shape)


def export_state_dict(model: Network, layout: str) -> Weights:
    """The model's weights under the names and in the shapes of another repository, pos_embed (1, T, D) included.

    Args:
        model:  any device and dtype, meta too
        layout: "sit" for a single level, "ppflow" for (2a, 2b), (a, b) or (2a, 2b), (a, 2b), (a, b) patches; "fit" for
                FiT's and FiTv2's, which have no pos_embed

    Raises:
        ValueError: if that repository has no such model.
    """
    if layout not in ("sit", "ppflow", "fit"):
        raise ValueError(f"unknown layout {layout!r}: choose sit, ppflow or fit")
    if list(model.networks) != [""]:
        raise ValueError(f"the {layout} layout has no experts: take our own")
    if layout == "fit":
        return export_to_fit(model)
    patches = model.patch_sizes
    a, b = patches[-1]
    fits = {"sit": len(patches) == 1, "ppflow": len(patches) in (2, 3)}
    if model.position != "sincos" or model.mlp != "gelu" or model.qk_norm or model.adaln_rank is not None:
        raise ValueError(f"the {layout} layout has no model with rotary positions, or with parts of FiT's block")
    if model.bottleneck is not None:
        raise ValueError(f"the {layout} layout has no patch embedding with a bottleneck: take our own")
    if not fits[layout] or patches != tuple((a * fy, b * fx) for fy, fx in FACTORS[len(patches)]):
        sizes = ", ".join(f"{p}x{q}" for p, q in patches)
        raise ValueError(f"the {layout} layout has no model with {sizes} patches")
    own = ("x_embedder.", "final_layer.linear.")
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}
    names = zip(SUFFIXES[len(patches)], FACTORS[len(patches)], patches, _position_names(len(patches)), strict=True)
    for level, (suffix, factor, patch, positions) in enumerate(names):
        embedding, head = model.x_embedder[level], model.final_layer.linear[level]
        weights[f"x_embedder.proj{suffix}.weight"] = _linear_to_kernel(embedding.weight.detach(), patch, factor)
        weights[f"x_embedder.proj{suffix}.bias"] = embedding.bias.detach()
        for kind, tensor in head.named_parameters():
            weights[f"final_layer.linear{suffix}.{kind}"] = _head_to_channels(tensor.detach(), patch, factor)
        weights[positions] = getattr(model, f"pos_embed_{level}").unsqueeze(0)
    return weights


def import_state_dict(
    model: PyramidalPatchDiT, weights: Mapping[str, torch.Tensor], source: str, other_size: bool = False
) -> None:
    """Load weights of SiT's, PPFlow's or FiT's layout, positions included, into a model of their shape.

    Args:
        other_size: the model's input size is not read from the file, which may have other positions or none

    Raises:
        ValueError: naming the tensor that is missing, unknown, of another shape, or no sine-cosine table.
    """
    if layout_of(weights, source) == "fit":
        import_from_fit(model, weights, source)
        return
    names = _position_names(model.num_levels)
    with torch.device("meta"):
        wanted = export_state_dict(PyramidalPatchDiT(**model.config), foreign_layout(model))
    ignored = set(names) if other_size else set()
    found, expected = (
        {name: tensor for name, tensor in tensors.items() if name not in ignored} for tensors in (weights, wanted)
    )
    check_tensors(found, expected, source)
    ours = {
        name: tensor
        for name, tensor in weights.items()
        if name not in names and not name.startswith(("x_embedder.", "final_layer.linear"))
    }
    parts = zip(SUFFIXES[model.num_levels], FACTORS[model.num_levels], model.patch_sizes, strict=True)
    for level, (suffix, factor, patch) in enumerate(parts):
        embedding, head = f"x_embedder.proj{suffix}", f"final_layer.linear{suffix}"
        ours[f"x_embedder.{level}.weight"] = _kernel_to_linear(weights[f"{embedding}.weight"], factor)
        ours[f"x_embedder.{level}.bias"] = weights[f"{embedding}.bias"]
        for kind in ("weight", "bias"):
            ours[f"final_layer.linear.{level}.{kind}"] = _head_from_channels(weights[f"{head}.{kind}"], patch, factor)
    model.load_state_dict(ours)
    for level, name in enumerate(names):
        if name in weights:
            _set_positions(model, level, weights[name].squeeze(0), f"{source}: {name}", other_size)


def _set_positions(model: PyramidalPatchDiT, level: int, table: torch.Tensor, what: str, other_size: bool) -> None:
    """Take over a file's positions (T, D) if they are the computed ones up to rounding: see POSITION_TOLERANCE."""
    buffer = getattr(model, f"pos_embed_{level}")
    if table.shape == buffer.shape and (table.to(buffer) - buffer).abs().max() <= POSITION_TOLERANCE:
        buffer.copy_(table)
    elif not other_size:
        raise ValueError(f"{what} is not the sine-cosine table of {len(buffer)} tokens: give the right input_size")


def own_state_dict(model: Network) -> Weights:
    """The state dict, with pos_embed_L for each level whose positions came from a file and differ from the computed."""
    weights = model.state_dict()
    for prefix, network in model.networks.items():
        for level in range(network.num_levels if network.position == "sincos" else 0):
            buffer = getattr(network, f"pos_embed_{level}")
            if not torch.equal(buffer, network.position_embedding(level).to(buffer)):
                weights[f"{prefix}pos_embed_{level}"] = buffer
    return weights


def fingerprint(model: Network) -> str:
    """The sha256 of a network's names and weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(own_state_dict(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_own_state_dict(
    model: Network, weights: Mapping[str, torch.Tensor], source: str, other_size: bool = False
) -> None:
    """Load the result of `own_state_dict`; arguments and errors as in `import_state_dict`."""
    names = {
        f"{prefix}pos_embed_{level}": (network, level)
        for prefix, network in model.networks.items()
        for level in range(network.num_levels if network.position == "sincos" else 0)
    }
    parameters = {name: tensor for name, tensor in weights.items() if name not in names}
    check_tensors(parameters, model.state_dict(), source)
    model.load_state_dict(parameters)
    for name, place in names.items():
        if name in weights:
            _set_positions(*place, weights[name], f"{source}: {name}", other_size)


# ---------------------------------------------------------------------------------------------------------------
# From one set of levels to another


@torch.no_grad()
def initialize_levels(model: PyramidalPatchDiT, source: PyramidalPatchDiT) -> list[str]:
    """Start a model from another that may have other levels (PPFlow, arXiv:2506.23543, training from a normal DiT).

    Blocks, class table and time embedding are copied. A level copies the source's level of the same patch, if there is
    one; otherwise it is derived from the source's finest patch (a, b) that divides its own. With a patch of
    (a fy, b fx), each fine pixel stands for fy x fx: the embedding's weights are repeated over them and divided by
    fy fx, so it embeds the mean of the pixels; the head's rows are repeated, so each pixel gets the fine pixel's
    output. New level embeddings are zero: the finest level starts as an exact copy of a SiT. In a model with a single
    level, the finest level's embedding is added to the class table.

    With another number of classes, the model keeps its own rows of the class table; the null label's row is copied.

    Args:
        model:  changed in place, on any device
        source: left as it is

    Returns:
        lines for the log: about the class table if it is not the source's, and about rotary positions that are scaled
        otherwise than the source's at the model's size.

    Raises:
        ValueError: if an argument differs besides patch_sizes, input_size, train_tokens, num_classes and learn_sigma,
                    or if no patch divides.
    """
    here, there = (
        {
            "in_channels": net.in_channels,
            "hidden_size": net.hidden_size,
            "depth": net.depth,
            "num_heads": net.num_heads,
            "bottleneck": net.bottleneck,
            "mlp": net.mlp,
            "width of the MLP": net.blocks[0].mlp.fc2.in_features,
            "position": net.position,
            "rope_theta": net.rope_theta,
            "qk_norm": net.qk_norm,
            "adaln_rank": net.adaln_rank,
            "time_input": net.time_input,
        }
        for net in (model, source)
    )
    for field in here:
        if here[field] != there[field]:
            differ = f"{field} is {there[field]} there, {here[field]} here"
            raise ValueError(f"cannot start from weights of another model: {differ}")
    found = source.state_dict()
    by_level = ("x_embedder.", "final_layer.linear.", "level_embedder.")
    weights = {name: tensor for name, tensor in found.items() if not name.startswith(by_level)}
    classes, old_levels = (f"{table}.embedding_table.weight" for table in ("y_embedder", "level_embedder"))
    new_levels = torch.zeros(model.num_levels, model.hidden_size, device=found[classes].device)
    notes = []
    if model.num_classes != source.num_classes:
        own = model.y_embedder.embedding_table.weight[:-1].to(weights[classes])
        weights[classes] = torch.cat([own, weights[classes][-1:]])
        notes.append(
            f"the weights are of {source.num_classes} classes, and the model has {model.num_classes}: the label table "
            "is new, except for the row of the null label"
        )
    if model.position == "rope" and model.patch_sizes[-1] == source.patch_sizes[-1]:
        sample = torch.zeros(1, *model.sample_shape)
        own, given = (network.rotation(sample, network.num_levels - 1) for network in (model, source))
        if not torch.equal(own, given):
            size = "x".join(map(str, model.input_size))
            notes.append(
                f"inputs of {size} are beyond the {source.train_tokens} tokens that the weights' positions are scaled "
                "from, and this run does not scale them: it does not start as their copy"
            )
    for level, patch in enumerate(model.patch_sizes):
        origin = _origin(patch, source.patch_sizes)
        (a, b), (p, q) = source.patch_sizes[origin], patch
        for end in ("weight", "bias"):
            head = _repeat(found[f"final_layer.linear.{origin}.{end}"], (a, b), (p, q))
            weights[f"final_layer.linear.{level}.{end}"] = _out_channels(head, model, source)
        for end, _ in model.x_embedder[level].named_parameters():
            weights[f"x_embedder.{level}.{end}"] = found[f"x_embedder.{origin}.{end}"]
        first = f"x_embedder.{level}.weight" if model.bottleneck is None else f"x_embedder.{level}.0.weight"
        weights[first] = _repeat(weights[first].T, (a, b), (p, q)).T / (p * q // (a * b))
        if old_levels in found and (p, q) == (a, b):
            new_levels[level] = found[old_levels][origin]
    if model.num_levels > 1:
        weights[old_levels] = new_levels
    else:
        weights[classes] = weights[classes] + new_levels
    model.load_state_dict(weights)
    return notes


def _origin(patch: tuple[int, int], patch_sizes: tuple[tuple[int, int], ...]) -> int:
    """The source's level that a patch starts from: the same patch, or the finest that divides it."""
    if patch in patch_sizes:
        return patch_sizes.index(patch)
    for level, (a, b) in reversed(list(enumerate(patch_sizes))):
        if patch[0] % a == 0 and patch[1] % b == 0:
            return level
    sizes = ", ".join(f"{a}x{b}" for a, b in patch_sizes)
    raise ValueError(f"cannot start from these weights: none of their patches ({sizes}) divides {patch[0]}x{patch[1]}")


def _repeat(rows: torch.Tensor, fine: tuple[int, int], coarse: tuple[int, int]) -> torch.Tensor:
    """Repeat rows (a, b, channel) over sub-pixels: (a*b*E, ...) -> (p*q*E, ...) with rows (p, q, channel)."""
    (a, b), (p, q) = fine, coarse
    split = rows.reshape(a, b, len(rows) // (a * b), -1)
    return split.repeat_interleave(p // a, 0).repeat_interleave(q // b, 1).reshape(-1, *rows.shape[1:])


def _out_channels(head: torch.Tensor, model: PyramidalPatchDiT, source: PyramidalPatchDiT) -> torch.Tensor:
    """Rows (p, q, channel) of the source's head for the model's output: sigma's half dropped, or added as zeros."""
    if model.learn_sigma == source.learn_sigma:
        return head
    c = source.in_channels
    split = head.reshape(-1, c * (2 if source.learn_sigma else 1), *head.shape[1:])
    split = split[:, :c] if source.learn_sigma else torch.cat([split, torch.zeros_like(split)], dim=1)
    return split.reshape(-1, *head.shape[1:])
