"""Load trained weights of any layout, and convert between layouts.

A file in our own layout holds the weights, the config and the step, without the optimizer's state:

    .pt            {"ema": state dict, "config": {"model_name", "model", "transport", "vae", ...}, "step": int}
    .safetensors   the state dict; the metadata has "config", as JSON, and "step"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from data.autoencoder import SHORT_NAMES
from experts import ExpertPatchDiT, Network, network_of
from models import PyramidalPatchDiT
from positions import RopeScaling
from runtime.checkpoints import newest_checkpoint
from runtime.errors import note
from runtime.files import complete_file
from transport import LevelErrors, PatchSchedule, Transport, create_transport
from transport.predictions import predictions_of
from weights.files import PIPELINE_WEIGHTS, choose_weights, read_file
from weights.fit import authors_scaling
from weights.layouts import (
    export_state_dict,
    fields_from_shapes,
    import_state_dict,
    initialize_levels,
    layout_of,
    load_own_state_dict,
    own_state_dict,
    registry_name,
)
from weights.published import PUBLISHED, download, published_name

# What experts that sample together have in common, of the arguments of create_transport
SAMPLING_PROCESS = ("path_type", "train_eps", "sample_eps", "aug_dim")


class TrainedWeights(NamedTuple):
    """A network with the process it was trained for."""

    model: Network
    transport: dict[str, Any]  # arguments of create_transport
    vae: str  # "none" for pixels, or a diffusers id or path
    name: str  # in the registry if it has a model of these sizes, else a description; of experts --model of their run
    step: int  # of training; 0 if unknown; of experts that were trained alone the smallest
    scaling: dict[str, Any] | None = None  # of the latents, if it is not the autoencoder's own
    stated: frozenset[str] = frozenset()  # keys of `transport` that the file gives, or all for published weights
    level_errors: LevelErrors | None = None  # of elastic levels
    steps: tuple[int, ...] = ()  # of each of the experts that were trained alone


def load_pretrained(
    name_or_path: str | Path | Sequence[str | Path],
    weights: str = "ema",
    cache_dir: str | Path | None = None,
    **overrides: Any,
) -> TrainedWeights:
    """A trained model, in evaluation mode on the CPU, from weights in any layout.

    Args:
        name_or_path: PPF-XL-2, SiT-XL/2 or another of PUBLISHED, downloaded on first use; a run's folder for its newest
                      checkpoint; a folder of save_pretrained or of download.py export; or a file in SiT's, PPFlow's,
                      FiT's or our layout.
                      Several of them, in any order, if each is an expert for a part of time
        weights:      "ema", or "model" for the last ones of a training checkpoint
        cache_dir:    where downloads are kept (default: PPFLOW_CACHE, or ~/.cache/ppflow)
        overrides:    arguments of PyramidalPatchDiT that win over the file's; no tensor's shape gives num_heads, or a
                      height other than the width

    Raises:
        FileNotFoundError: if there is no such file or published model.
        ValueError:        if the file is damaged or of another model; the message names the tensor. If several are not
                           the experts of one process, for all times.
        ConnectionError:   if a download fails.
    """
    names = [name_or_path] if isinstance(name_or_path, (str, Path)) else list(name_or_path)
    found = [(str(name), _load(name, weights, cache_dir, **overrides)) for name in names]
    return found[0][1] if len(names) == 1 else join_experts(found)


def _load(name_or_path: str | Path, weights: str, cache_dir: str | Path | None, **overrides: Any) -> TrainedWeights:
    path = locate(name_or_path, cache_dir)
    published = PUBLISHED[published_name(str(name_or_path))] if is_published(name_or_path) else None
    overrides = {**published.fields, **overrides} if published else overrides
    checkpoint = read_file(path)
    state, source = choose_weights(checkpoint, weights, path), str(path)
    other_size = "input_size" in overrides
    if layout_of(state, source) == "ours":
        config = checkpoint.get("config")
        if not isinstance(config, dict) or "model" not in config:
            raise ValueError(
                f"{path} holds our weights without their config: give a checkpoint of train.py, or what "
                "download.py convert or save_pretrained wrote"
            )
        model = network_of(config["model"], **overrides)
        load_own_state_dict(model, state, source, other_size)
        described, vae, scaling = config.get("transport", {}), config.get("vae"), config.get("scaling")
        step, table = int(checkpoint.get("step", 0)), checkpoint.get("level_errors") or config.get("level_errors")
        if config.get("rope_scaling") is not None:
            model.rope_scaling = RopeScaling(**config["rope_scaling"])
    else:
        model = PyramidalPatchDiT(**fields_from_shapes(state, source, **overrides))
        import_state_dict(model, state, source, other_size)
        args, moments = checkpoint.get("args"), (checkpoint.get("opt") or {}).get("state", {})
        described = vars(args) if isinstance(args, argparse.Namespace) else {}
        vae, scaling, table = SHORT_NAMES.get(described.get("vae")), None, None
        step = max((int(parameter.get("step", 0)) for parameter in moments.values()), default=0)  # Adam counts them
        if model.position == "rope":
            model.rope_scaling = (published and published.rope_scaling) or authors_scaling(model)
    transport = {key: described.get(key, default) for key, default in default_transport(model).items()}
    vae = vae or (SHORT_NAMES["ema"] if model.in_channels == 4 else "none")  # four channels are Stable Diffusion's
    stated = frozenset(transport if published else transport.keys() & described.keys())
    name = _name(model)
    if len(model.networks) > 1 or transport["interval"] is not None:
        name = checkpoint["config"].get("model_name", name)  # experts have a part of its patch sizes each
    errors = None if table is None else LevelErrors(**table)
    return TrainedWeights(model.eval(), transport, vae, name, step, scaling, stated, errors)


def join_experts(found: Sequence[tuple[str, TrainedWeights]]) -> TrainedWeights:
    """Experts that were trained alone as one network with one process.

    Predictions, losses' weights and densities may differ: each level keeps its prediction, and the result has the first
    expert's weight and density.

    Args:
        found: each with its source, in any order

    Raises:
        ValueError: if they do not cover [0, 1] piece by piece, or differ in what samples depend on.
    """
    for source, part in found:
        if part.transport["interval"] is None:
            raise ValueError(f"{source} is no expert that was trained alone (train.py --expert): give it alone")
    parts = sorted(found, key=lambda item: item[1].transport["interval"])
    covered, before = 0.0, "0"
    for source, part in parts:
        start, stop = part.transport["interval"]
        if start != covered:
            fault = "nothing serves" if start > covered else "two experts serve"
            low, high = sorted((covered, start))
            raise ValueError(f"{fault} t in [{low!r}, {high!r}], between {before} and {source}: give other files")
        covered, before = stop, source
    if covered != 1:
        raise ValueError(f"nothing serves t in [{covered!r}, 1], after {before}: give the files of all experts")

    def decisive(part: TrainedWeights) -> dict[str, Any]:
        network = {name: getattr(part.model, name) for name in ("num_classes", "in_channels", "input_size")}
        process = {name: part.transport[name] for name in SAMPLING_PROCESS}
        return {**network, **process, "autoencoder": part.vae, "scaling of the latents": part.scaling}

    (first_source, first), *others = parts
    for source, part in others:
        for name, value in decisive(part).items():
            if value != decisive(first)[name]:
                raise ValueError(
                    f"{name} is {decisive(first)[name]} in {first_source} and {value} in {source}: experts of one "
                    "process have the same"
                )
    processes = [part.transport for _, part in parts]
    model = ExpertPatchDiT([part.model for _, part in parts], [process["interval"][0] for process in processes[1:]])
    edges = [edge for process in processes for edge in (process["interval"][0], *process["level_edges"])]
    words = [word for _, part in parts for word in predictions_of(part.transport["prediction"], part.model.num_levels)]
    joined = {
        "prediction": words[0] if len(set(words)) == 1 else " ".join(words),
        "level_edges": edges[1:],
        "interval": None,
        "expert_levels": [part.model.num_levels for _, part in parts],
        # An expert with a single level has none to choose from, and no errors to compare.
        "elastic": min((part.transport["elastic"] for _, part in parts if part.model.num_levels > 1), default=0.0),
    }
    return first._replace(
        model=model.eval(),
        transport={**first.transport, **joined},
        name="+".join(dict.fromkeys(part.name for _, part in parts)),
        step=min(part.step for _, part in parts),
        stated=frozenset.intersection(*(part.stated for _, part in parts)),
        level_errors=LevelErrors.joined([(part.level_errors, part.model.num_levels) for _, part in parts]),
        steps=tuple(part.step for _, part in parts),
    )


def initialize_from(model: Network, name_or_path: str | Path, interval: tuple[float, float] | None = None) -> list[str]:
    """Start a model from trained weights, by `initialize_levels`.

    Experts all start from one network (eDiff-I, arXiv:2211.01324). From experts each starts from the one that serves
    the middle of its own interval: they may be divided further.

    Args:
        interval: times that the model serves, an expert alone; None for all

    Returns:
        the lines of `initialize_levels`.

    Raises:
        ValueError: if experts are to become one network, or as `load_pretrained` and `initialize_levels`; other errors
                    as `load_pretrained`.
    """
    source = load_pretrained(name_or_path).model
    networks, origins = list(model.networks.values()), list(source.networks.values())
    if len(origins) > 1 and len(networks) == 1 and interval is None:
        raise ValueError(
            f"{name_or_path} holds {len(origins)} experts, which do not become one network: "
            "give --expert-edges as well, or the file of one expert"
        )
    start, stop = interval or (0.0, 1.0)
    lines: dict[str, None] = {}
    for network, (low, high) in zip(networks, pairwise((start, *edges_of(model), stop)), strict=True):
        origin = origins[sum(edge <= (low + high) / 2 for edge in edges_of(source))]
        lines |= dict.fromkeys(initialize_levels(network, origin))
    return list(lines)


def process_of(
    file: TrainedWeights,
    source: str,
    level_edges: Sequence[float] | None = None,
    process: Mapping[str, Any] | None = None,
) -> tuple[Transport, dict[str, Any]]:
    """The process of trained weights, as far as nothing else is asked for.

    Args:
        source:      what the weights were loaded from, for messages
        level_edges: other times at which the patch size changes
        process:     arguments of create_transport, for files that say nothing of theirs; sample_eps for any

    Returns:
        the process; its settings that are not those of training

    Raises:
        ValueError: if something else than what the file states is asked for, or does not fit the network.
    """
    own = create_transport(**file.transport, check_ends=False)
    given = {name: value for name, value in (process or {}).items() if value is not None}
    if not isinstance(given.get("prediction", ""), str):
        given["prediction"] = " ".join(given["prediction"])  # as a transport tells its own
    trained_with = {
        "path_type": own.path.name,
        "prediction": own.prediction,
        "loss_weight": own.loss_weight,
        "train_eps": own.train_eps,
        "aug_dim": own.aug_dim,
    }
    check_claims({name: given.get(name) for name in file.stated}, trained_with, source)
    config = {**file.transport, "train_eps": None}  # of no matter here; an earlier version allowed any
    if own.sampling_singularity() and "sample_eps" not in given:
        config["sample_eps"], before = None, own.sample_eps
        own = create_transport(**config)
        note(f"{source} has sample_eps {before:g}, from which no solver can start: {own.sample_eps:g} is used")
    if level_edges is not None:
        given["level_edges"] = level_edges
    used = ("path_type", "prediction", "sample_eps", "level_edges", "aug_dim")
    transport = create_transport(**config | {name: given[name] for name in used if name in given})
    transport.check_levels(file.model)
    if pieces := own.schedule.not_trained(transport.schedule):
        parts = ", ".join(f"level {level} for t in [{low:g}, {high:g}]" for level, low, high in pieces)
        note(f"{source} was not trained with {parts}: only train.py --elastic trains levels for other edges")
    before, after = (
        {
            "path_type": each.path.name,
            "prediction": each.prediction,
            "sample_eps": each.sample_eps,
            "aug_dim": each.aug_dim,
        }
        for each in (own, transport)
    )
    changed = {name: value for name, value in after.items() if value != before[name]}
    return transport, changed


def check_claims(claimed: Mapping[str, Any], actual: Mapping[str, Any], source: str) -> None:
    """Refuse settings that say something else of weights than they do themselves (ValueError); None says nothing."""
    for name, value in claimed.items():
        if value is not None and name in actual and value != actual[name]:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {value}, but {source} was trained with {actual[name]}: leave {flag} out")


def edges_of(model: Network) -> tuple[float, ...]:
    """Times at which one expert follows another; () for one network."""
    return getattr(model, "expert_edges", ())


def default_transport(model: Network) -> dict[str, Any]:
    """The process of the published weights, assumed for files that do not name theirs."""
    edges = edges_of(model) or PatchSchedule.default(model.num_levels).level_edges
    steps_of_ddpm = any(network.time_input == "ddpm" for network in model.networks.values())
    return {
        "path_type": "VP" if steps_of_ddpm else "Linear",
        "prediction": "noise" if steps_of_ddpm else "velocity",
        "loss_weight": None,
        "train_eps": None,
        "sample_eps": None,
        "level_edges": list(edges),
        "aug_dim": None,
        "loss_weight_value": None,
        "time_sampling": "uniform",
        "time_params": None,
        "interval": None,
        "elastic": 0.0,
        "expert_levels": [network.num_levels for network in model.networks.values()] if edges_of(model) else [],
    }


def _name(model: Network) -> str:
    return "+".join(registry_name(network) or _describe(network) for network in model.networks.values())


def _describe(model: PyramidalPatchDiT) -> str:
    patches = "+".join(f"{p}x{q}" for p, q in model.patch_sizes)
    return f"PyramidalPatchDiT {patches}, {model.depth} blocks, {model.hidden_size} wide"


def is_published(source: str | Path | Sequence[str | Path]) -> bool:
    """True for what load_pretrained would take for a name of published weights."""
    return isinstance(source, (str, Path)) and not _exists(source)


def _exists(name_or_path: str | Path) -> bool:
    """True for a file or folder, false for the name of published weights."""
    return Path(name_or_path).expanduser().exists()


def locate(name_or_path: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The file of the weights that `load_pretrained` takes by this name: a path wins over a name; raises as that."""
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:  # ~somebody
        raise FileNotFoundError(f"{name_or_path}: {error}") from error
    if path.is_dir():
        run = path.parent if path.name == "checkpoints" else path
        saved = [
            file for file in (path / "model.safetensors", path / "transformer" / PIPELINE_WEIGHTS) if file.is_file()
        ]
        file = saved[0] if saved else newest_checkpoint(run)
        if file is None:
            raise FileNotFoundError(f"{path} holds neither checkpoints/*.pt nor model.safetensors")
        return file
    if path.is_file():
        return path
    return download(str(name_or_path), cache_dir)


def convert(
    source: str | Path | Sequence[str | Path], out: str | Path, layout: str, weights: str = "ema", **overrides: Any
) -> TrainedWeights:
    """Write weights of any layout as a .pt or .safetensors file in another.

    Args:
        source:    as name_or_path of load_pretrained
        out:       the file to write; the module's docstring gives its content
        layout:    one of LAYOUTS; all but "ours" hold weights alone, no schedule
        weights:   which of a checkpoint's; as for load_pretrained
        overrides: as for load_pretrained

    Raises:
        ValueError, OSError: if the source cannot be read, or the model has no such layout.
    """
    out = Path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"{out} ends neither in .pt nor in .safetensors")
    pretrained = load_pretrained(source, weights, **overrides)
    named = str(source) if isinstance(source, (str, Path)) else ", ".join(map(str, source))
    content: dict[str, Any]
    metadata = {"format": "pt"}  # safetensors' readers expect it
    if layout == "ours":
        config = {
            "model_name": pretrained.name,
            "model": pretrained.model.config,
            "transport": pretrained.transport,
            "vae": pretrained.vae,
            "scaling": pretrained.scaling,
        }
        if pretrained.level_errors is not None:
            config["level_errors"] = pretrained.level_errors.as_dict()
        if pretrained.model.position == "rope":
            config["rope_scaling"] = asdict(pretrained.model.rope_scaling)
        state = own_state_dict(pretrained.model)
        content = {"ema": state, "config": config, "step": pretrained.step}
        metadata |= {"config": json.dumps(config), "step": str(pretrained.step)}
    else:
        if pretrained.transport["interval"] is not None:
            raise ValueError(
                f"{named} is an expert for a part of time, which the layout of {layout} does not tell: take our own"
            )
        if pretrained.transport["aug_dim"] is not None:
            raise ValueError(
                f"{named} was trained with D = {pretrained.transport['aug_dim']:g} of PFGM++, which the layout of "
                f"{layout} does not tell: take our own"
            )
        prediction = create_transport(**pretrained.transport, check_ends=False).prediction
        if " " in prediction:
            raise ValueError(
                f"{named} has levels that predict {prediction}, where programs of the {layout} layout know one "
                "prediction: take our own"
            )
        content = state = export_state_dict(pretrained.model, layout)
    with complete_file(out) as temporary:
        if out.suffix == ".pt":
            torch.save(content, temporary)
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata)
    return pretrained
