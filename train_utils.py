"""What the scripts share: errors, flags, processes, EMA, files, logs and pictures."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from transport import PATHS, PREDICTIONS, ClassifierFreeGuidance, PatchSchedule

# ---------------------------------------------------------------------------------------------------------------
# Flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something: not None, not False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, shows defaults, and says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_with_given(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """Parse, and tell which flags were given rather than left at their default."""
        absent = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        given = {name for name in vars(args) if getattr(args, name) is not absent}
        for name in names:
            if name not in given:
                setattr(args, name, self.get_default(name))
        return args, given


def number(kind: type, low: float, high: float = float("inf"), open_ends: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of the kind between low and high."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or math.isinf(value) or (open_ends and value in (low, high)):
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {'above 0' if open_ends and low == 0 else bounds}")
        return value

    parse.__name__ = kind.__name__
    return parse


def finite_float(text: str) -> float:
    """An argparse type: a number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


finite_float.__name__ = "float"  # argparse names the type in its message


def some_text(text: str) -> str:
    """An argparse type: text that is not empty, as an unset variable of the shell is."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


positive_int = number(int, 1)
natural_int = number(int, 0)
positive_float = number(float, 0, open_ends=True)
natural_float = number(float, 0)  # zero included
probability = number(float, 0, 1)


def optional_choice(*choices: str) -> dict[str, Any]:
    """Arguments of add_argument for a choice among names where "None" means None."""

    def parse(text: str) -> str | None:
        if text not in ("None", *choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of None, {', '.join(choices)}")
        return None if text == "None" else text

    return {"type": parse, "metavar": "{" + ",".join(("None", *choices)) + "}"}


def add_transport_args(parser: argparse.ArgumentParser) -> None:
    """--path-type and the other flags of create_transport."""
    group = parser.add_argument_group("transport")
    group.add_argument("--path-type", choices=list(PATHS), default="Linear", help="interpolant between noise and data")
    group.add_argument("--prediction", choices=PREDICTIONS, default="velocity", help="what the network predicts")
    weights = optional_choice("velocity", "likelihood")
    group.add_argument("--loss-weight", default=None, help="weight of the loss over time", **weights)
    group.add_argument("--train-eps", type=finite_float, help="distance of training from singular ends of [0, 1]")
    group.add_argument("--sample-eps", type=finite_float, help="the same in sampling")
    add_level_edges(group)


def add_level_edges(parser: argparse._ActionsContainer) -> None:
    """--level-edges, which training and sampling share."""
    text = "times in (0, 1) at which the patch size changes, ascending (default: 0.5, or 0.5 0.75 for 3 levels)"
    parser.add_argument("--level-edges", type=float, nargs="+", metavar="T", help=text)


def add_cfg_args(parser: argparse.ArgumentParser, default: float | None, note: str = "") -> None:
    """--cfg-scales and its companions."""
    group = parser.add_argument_group("guidance")
    text = "classifier-free guidance scale: one, or one per level (coarsest first); 1 is none"
    group.add_argument("--cfg-scales", "--cfg-scale", type=finite_float, nargs="+", metavar="W",
                       default=default and [default], help=f"{text} ({note})" if note else text)  # fmt: skip
    group.add_argument("--cfg-channels", type=positive_int, metavar="C",
                       help="guide only the first C channels (DiT, SiT and PPFlow's published numbers: 3)")  # fmt: skip
    group.add_argument("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                       help="guide only for t between LOW and HIGH (0 is noise, 1 is data)")  # fmt: skip


def guided(model: nn.Module, args: argparse.Namespace) -> ClassifierFreeGuidance:
    """The model under the guidance that --cfg-scales and its companions ask for."""
    interval = tuple(args.cfg_interval) if args.cfg_interval else None
    if args.cfg_channels and args.cfg_channels > getattr(model, "in_channels", args.cfg_channels):
        raise ValueError(f"--cfg-channels {args.cfg_channels}, but the model has {model.in_channels} channel(s)")
    return ClassifierFreeGuidance(model, args.cfg_scales, model.num_classes, args.cfg_channels, interval)


def level_edges_of(args: argparse.Namespace, num_levels: int) -> tuple[float, ...]:
    """--level-edges, or the paper's for this number of levels."""
    return PatchSchedule.default(num_levels).level_edges if args.level_edges is None else tuple(args.level_edges)
