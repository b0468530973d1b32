"""Files that are complete under their name, or absent; and the nested tensors that are written into them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def complete_file(path: str | Path) -> Iterator[Path]:
    """Write to a temporary name; the file gets its own once it is complete and on the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], source: str) -> None:
    """Compare names and shapes; the first difference is an error that names the tensor (ValueError)."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found:
            raise ValueError(f"{source} is incomplete or of another model: {name} is missing")
        if name not in wanted:
            raise ValueError(f"{source} is of another model: it has {name}, which is unknown")
        if found[name].shape != wanted[name].shape:
            shapes = f"{tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            raise ValueError(f"{source} is damaged or of another model: {name} is {shapes}")


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """A copy of nested dicts and lists with other tensors, in the order of tensors_of."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: with_tensors(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(item, tensors) for item in value)
    return value
