"""Files of weights, read without unpickling code: torch files with weights_only=True, and safetensors."""

from __future__ import annotations

import argparse
import inspect
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from experts import ExpertPatchDiT
from models import PyramidalPatchDiT

PIPELINE_WEIGHTS = "diffusion_pytorch_model.safetensors"  # of a component of a pipeline of diffusers


def read_file(path: Path) -> dict[str, Any]:
    """Read a file onto the CPU: a state dict, or a checkpoint, a dict of state dicts and other training state.

    Raises:
        ValueError: if it cannot be read, or holds code.
    """
    try:
        if path.name.removesuffix(".part").endswith(".safetensors"):  # .part: a download that is being checked
            return _read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # PPFlow's and SiT's "args": plain data
            # Memory-mapped: tensors that nobody uses (the optimizer's) are not read.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises half a dozen kinds for a damaged file
        if isinstance(error, UnicodeEncodeError):
            raise ValueError(f"cannot read {path}: this locale has no such letters, set PYTHONUTF8=1") from error
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(f"{path} holds {refused[1]}, not only tensors and plain data: it is not opened") from error
        # torch advises weights_only=False for files of other formats: name the exception's type instead.
        advice = isinstance(error, pickle.UnpicklingError) or not str(error).strip()
        reason = type(error).__name__ if advice else re.split(r"\. |\n", str(error).strip())[0]
        size = f"{path.stat().st_size:,} bytes"
        raise ValueError(f"cannot read {path} ({size}), is it truncated, or no file of weights? ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, not a dict of tensors")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A safetensors file as a checkpoint: its config is in its metadata, next to it (save_pretrained), or around it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "config" in metadata:
        return {"ema": state, "config": json.loads(metadata["config"]), "step": int(metadata["step"])}
    if path.name == PIPELINE_WEIGHTS and (path.parents[1] / "model_index.json").is_file():
        return _as_checkpoint(path.parents[1], state)
    beside = path.with_name("config.json")
    if path.name == "model.safetensors" and beside.is_file():
        config = json.loads(beside.read_text())
        names = [name for kind in (PyramidalPatchDiT, ExpertPatchDiT) for name in inspect.signature(kind).parameters]
        return {"ema": state, "config": {**config, "model": {key: config[key] for key in names if key in config}}}
    return state


def _as_checkpoint(folder: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A folder that download.py export wrote for diffusers, with the weights of its transformer, as a checkpoint."""
    files = "model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"
    index, transformer, scheduler = (json.loads((folder / file).read_text(encoding="utf-8")) for file in files)
    config = {
        "model": transformer["architecture"],
        "rope_scaling": transformer["rope_scaling"],
        "transport": scheduler,
        "vae": "none" if index["vae"][0] is None else str(folder / "vae"),
        "scaling": index["scaling"],
        "level_errors": scheduler.get("level_errors"),  # earlier folders have none
    }
    return {"ema": {name.removeprefix("network."): tensor for name, tensor in state.items()}, "config": config}


def choose_weights(checkpoint: dict[str, Any], weights: str, path: Path) -> dict[str, torch.Tensor]:
    """The averaged or the last weights of a checkpoint; a bare state dict has one set, which counts as averaged."""
    sets = {key: checkpoint[key] for key in ("ema", "model") if isinstance(checkpoint.get(key), dict)}
    sets = sets or {"ema": checkpoint}
    if weights not in sets:
        raise ValueError(f"{path} has no weights {weights!r}, only {', '.join(map(repr, sets))}")
    for name, value in sets[weights].items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} is no checkpoint: {name} is a {type(value).__name__}, not a tensor")
    return sets[weights]
