"""The commands' flags: the parser, types, groups of flags, and the values that they become."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NoReturn

import torch

from data.autoencoder import Autoencoder, autoencoder_name
from data.datasets import AnyDataset
from data.sizes import SizeRule
from experts import Network
from models import MODELS, canonical_name
from pipeline import Pipeline
from positions import ATTENTION_SCALES, POSITIONS, ROPE_KINDS, RopeScaling
from runtime.errors import UserError, note, user_input, user_output
from runtime.speed import PRECISIONS
from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    LOSS_WEIGHTS,
    ODE,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE,
    SDE_METHODS,
    TIME_SAMPLINGS,
    ExpertPart,
    Guidance,
    PatchSchedule,
    expert_parts,
)
from transport.grids import Grid
from transport.solvers import check_grid_method
from weights.pretrained import check_claims, locate
from weights.step_grids import kept_grid, what_decides

SHOWN_METHODS = ("ab2", "dpmpp_2m", "euler")

# ---------------------------------------------------------------------------------------------------------------
# Parser and types


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults that say something and that the help text does not tell: not None, False or a list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = (
            action.default in (None, False) or isinstance(action.default, list) or "(default" in (action.help or "")
        )
        return action.help if silent else super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, shows defaults, and says what is wrong in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    def parse_with_given(self, argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, set[str]]:
        """Parse; also returns the names of the flags that were given rather than left at their default."""
        absent = object()
        names = [action.dest for action in self._actions if action.dest != "help"]
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        given = {name for name in vars(args) if getattr(args, name) is not absent}
        for name in names:
            if name not in given:
                setattr(args, name, self.get_default(name))
        return args, given


def number(kind: type, low: float, high: float = float("inf"), open_ends: bool = False) -> Callable[[str], Any]:
    """Argparse type for a number of the kind between low and high."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high or math.isinf(value) or (open_ends and value in (low, high)):
            bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {'above 0' if open_ends and low == 0 else bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its message
    return parse


def finite_float(text: str) -> float:
    """Argparse type for a number that is neither infinite nor NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


finite_float.__name__ = "float"


def some_text(text: str) -> str:
    """Argparse type for a non-empty string (catches --ckpt "$UNSET")."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def augmented_dimension(text: str) -> float | None:
    """Argparse type for the D of PFGM++; None for infinity, which is Gaussian noise."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return None if math.isinf(value) else value


augmented_dimension.__name__ = "float"


def patch_size(text: str) -> tuple[int, int]:
    """Argparse type for (height, width) of a patch: "4" for a square one, "4x8" for another."""
    sides = [int(side) for side in text.split("x")]
    if len(sides) > 2 or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no patch: give its side, or HxW as 4x8")
    return sides[0], sides[-1]


patch_size.__name__ = "patch"


class JoinWords(argparse.Action):
    """Keep the words of a flag as one text: "data velocity"."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, " ".join(values))


positive_int = number(int, 1)
natural_int = number(int, 0)
positive_float = number(float, 0, open_ends=True)
natural_float = number(float, 0)  # zero included
probability = number(float, 0, 1)


def optional_choice(*choices: str) -> dict[str, Any]:
    """Arguments of add_argument for a choice among names where "None" means None, and _ may stand for -."""

    def parse(text: str) -> str | None:
        text = text.replace("_", "-")
        if text not in ("None", *choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not one of None, {', '.join(choices)}")
        return None if text == "None" else text

    return {"type": parse, "metavar": "{" + ",".join(("None", *choices)) + "}"}


def parse_mode_first(parser: ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; flags before ODE or SDE, which argparse would take for another program's, are told their place."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        mode = next((word for word in argv if word in ("ODE", "SDE")), "ODE")
        others = shlex.join(word for word in argv if word not in ("ODE", "SDE"))
        parser.error(f"ODE or SDE comes first: {parser.prog} {mode} {others}")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------
# Flags of training


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the data, the network and the folder of a run."""
    add = parser.add_argument_group("run").add_argument
    add(
        "--data-path",
        type=some_text,
        help="'digits', a folder of class folders, a zip file, or latents (default: that of the run that is continued)",
    )
    add(
        "--model",
        default="PPF-XL-2",
        help="PPF-{T,S,B,L,XL}-{2,3}, SiT-{S,B,L,XL}/{2,4,8}, SiT-T/2; for pixels PPF-{B,L}-{2,3}/{16,32}, "
        "SiT-{B,L}/{16,32}; with rotary positions PPFiT-{T,S,B,XL}-{2,3}, FiT-{B,L,XL}/2, FiTv2-{B,XL,3B}/2",
    )
    add(
        "--patch-sizes",
        type=patch_size,
        nargs="+",
        metavar="P",
        help="other patches than --model's, one per level, coarsest first: a side, or HxW as 4x8",
    )
    add(
        "--bottleneck",
        type=positive_int,
        metavar="D",
        help="embed patches by two linear layers with D values in between (default: by one)",
    )
    add("--patch-level", type=positive_int, help="number of levels, checked against --model's")
    add(
        "--position",
        choices=POSITIONS,
        help="positions of tokens: sincos for images of one size, rope for any (default: --model's)",
    )
    add("--image-size", type=positive_int, help="side of the images (default: 256 for folders, else their own)")
    add(
        "--max-tokens",
        type=positive_int,
        metavar="N",
        help="let images keep their aspect ratio: the size of each is the best of at most N tokens (of 2x2 latents); "
        "needs rotary positions; latents that were extracted so know it",
    )
    add(
        "--size-multiple",
        type=positive_int,
        metavar="P",
        help="pixels that divide the sides then, as the patches must (default: those of 4x4 latents)",
    )
    add(
        "--crop-probability",
        type=number(float, 0, 1),
        metavar="P",
        help="share of square crops among the images that are larger than the square (default: 0.5; FiT: 0)",
    )
    add("--num-classes", type=positive_int, help="number of classes (default: the dataset's)")
    add(
        "--vae",
        type=some_text,
        help="autoencoder: ema or mse (Stable Diffusion's), a hub id, a local folder, or none for pixels (default: "
        "none for digits, that of the latents for latents, else ema)",
    )
    add("--results-dir", type=some_text, default="results", help="where a new numbered run folder is made")
    add("--run-dir", type=some_text, help="the run's folder; a run that is in it is continued")
    add("--ckpt", type=some_text, help="continue from this checkpoint, with the settings stored in it")
    add(
        "--initialize_from",
        "--initialize-from",
        type=some_text,
        metavar="WEIGHTS",
        help="pretrained weights to start from: a name (SiT-XL/2), or a file of any layout",
    )


def add_training_args(parser: argparse.ArgumentParser) -> None:
    """Add the optimizer, the length of training, and how it computes."""
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=positive_int, default=1400, help="passes over the data")
    add("--max-steps", type=positive_int, help="optimizer steps; instead of --epochs")
    add("--global-batch-size", type=positive_int, default=256, help="samples per step, all processes")
    add(
        "--gradient-accumulation-steps",
        type=positive_int,
        default=1,
        help="forward and backward passes per optimizer step: less memory, the same result",
    )
    add("--lr", type=positive_float, default=1e-4, help="AdamW's learning rate")
    add("--weight-decay", type=natural_float, default=0.0, help="AdamW's weight decay")
    add("--warmup-steps", type=natural_int, default=0, help="steps of linear warm-up")
    add("--max-grad-norm", type=positive_float, help="clip the gradient to this norm")
    add("--ema-decay", type=probability, default=0.9999, help="decay of the weights' average")
    add("--class-dropout-prob", type=probability, default=0.1, help="probability of dropping the label, for guidance")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the network; weights and optimizer stay in fp32 (default: bf16 on CUDA, fp32 on the CPU)",
    )
    add("--compile", action="store_true", help="compile the blocks first: a minute of waiting, then faster steps")
    add(
        "--activation-checkpointing",
        action="store_true",
        help="keep only the inputs of blocks for the backward pass: a fraction of the memory, a third more time",
    )
    add(
        "--shard",
        action="store_true",
        help="divide weights, gradients, moments and EMA among the processes (FSDP2): for what does not fit; the "
        "losses stay the same",
    )
    add(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="on CUDA, the same bits in every repetition, for some speed; on CPUs they always are",
    )
    add("--global-seed", type=natural_int, default=0, help="seed of everything random")
    add("--num-workers", type=natural_int, default=min(4, os.cpu_count() or 1), help="data loading processes per rank")


def add_logging_args(parser: argparse.ArgumentParser) -> None:
    """Add intervals of records, checkpoints and previews."""
    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=positive_int, default=100, help="steps between lines of metrics")
    add("--ckpt-every", type=positive_int, default=50_000, help="steps between checkpoints")
    add("--keep-last", type=positive_int, metavar="K", help="delete all but the last K checkpoints (default: keep all)")
    add(
        "--keep-every",
        type=positive_int,
        metavar="M",
        help="with --keep-last, keep those of every M-th step as well",
    )
    add(
        "--sample-every",
        type=natural_int,
        default=10_000,
        help="steps between grids of EMA samples; 0 for none at all",
    )
    add("--wandb", action="store_true", help="log to wandb (WANDB_KEY, ENTITY and PROJECT are read)")


def add_evaluation_args(parser: argparse.ArgumentParser) -> None:
    """Add the measurement of samples during training."""
    add = parser.add_argument_group(
        "evaluation",
        "the Fréchet distance of unguided EMA samples, logged as fid5k with Inception's features, else fd5k",
    ).add_argument
    add("--eval-every", type=natural_int, default=0, help="steps between evaluations; 0 for none at all")
    add("--eval-num", type=number(int, 2), default=5000, help="samples of an evaluation; their number is in the name")
    add("--eval-ref", type=some_text, help="statistics or images to compare with: what evaluate.py takes")
    add("--eval-features", type=some_text, default="inception", help="as --features of evaluate.py")
    add(
        "--eval-weights",
        type=some_text,
        metavar="FILE",
        help="weights of the features' network, where the cache has none",
    )


def check_complete(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse a start without data, and flags of an evaluation that lack one or have no effect (UserError).

    Args:
        args:  of this start, with what the run remembers
        given: names of the flags that were given
    """
    if not args.data_path:
        raise UserError(
            "--data-path is missing: 'digits', a folder of class folders, a zip file, or latents; only a run that is "
            "continued remembers its own",
            everywhere=True,
        )
    if args.eval_every and not args.eval_ref:
        raise UserError("--eval-every needs --eval-ref, statistics or images to compare with", everywhere=True)
    useless = sorted({"eval_num", "eval_ref", "eval_features", "eval_weights"} & given)
    if useless and not args.eval_every:
        flag = "--" + useless[0].replace("_", "-")
        raise UserError(f"{flag} has no effect without --eval-every: give both, or leave it out", everywhere=True)
    for name in ("sample_every", "eval_every"):
        if args.expert is not None and getattr(args, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} draws samples, for which it takes all experts: leave it out", everywhere=True)


def check_numbers(args: argparse.Namespace, world_size: int) -> None:
    """Refuse numbers of levels or samples (ValueError) that the network or the processes do not have."""
    num_levels = num_patch_sizes(args)
    if args.patch_level not in (None, num_levels):
        raise ValueError(
            f"--patch-level {args.patch_level}, but {args.model} has {num_levels} level(s): leave it out, or "
            f"choose another --model (those of two levels end in -2, those of three in -3)"
        )
    areas = [math.prod(size) for size in args.patch_sizes or ()]
    if any(before < after for before, after in pairwise(areas)):
        raise ValueError("--patch-sizes go from the coarsest to the finest: give the largest first")
    passes = world_size * args.gradient_accumulation_steps
    if args.global_batch_size % passes:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} does not divide into {world_size} process(es) "
            f"x {args.gradient_accumulation_steps} accumulation step(s): choose a multiple of {passes}"
        )


def checked_training_flags(args: argparse.Namespace, given: set[str]) -> argparse.Namespace:
    """The flags of train.py with the full names of network and autoencoder.

    Args:
        given: names of the flags that were given

    Raises:
        UserError: if flags contradict each other, or there is no such network.
    """
    with user_input():
        names = {"model": canonical_name(args.model), "vae": args.vae and autoencoder_name(args.vae)}
        guidance_from(args)
    if not args.run_dir and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise UserError("torchrun --max-restarts needs --run-dir: without it, every restart would begin another run")
    if {"epochs", "max_steps"} <= given:
        raise UserError("--epochs and --max-steps both say how long to train: give one of them")
    if {"expert_edges", "expert_snr"} <= given:
        raise UserError("--expert-edges and --expert-snr both say when experts change: give one of them")
    if args.expert is not None and "sample_every" not in given:
        names["sample_every"] = 0  # it takes all experts to draw samples
    if args.keep_every and not args.keep_last:
        raise UserError("--keep-every says what --keep-last does not delete: give --keep-last as well")
    return argparse.Namespace(**vars(args) | names)


# ---------------------------------------------------------------------------------------------------------------
# Flags of the process, its solvers and guidance, and their values


def add_transport_args(parser: argparse.ArgumentParser) -> None:
    """Add --path-type and the other arguments of create_transport, as training chooses them."""
    add = parser.add_argument_group("transport").add_argument
    add("--path-type", choices=list(PATHS), default="Linear", help="interpolant between noise and data")
    add(
        "--prediction",
        choices=PREDICTIONS,
        nargs="+",
        action=JoinWords,
        default="velocity",
        help="what the network predicts: one for all levels, or one per level (coarsest first)",
    )
    add("--loss-weight", help="weight of the loss over time", **optional_choice(*LOSS_WEIGHTS[1:]))
    add(
        "--loss-weight-value",
        type=finite_float,
        metavar="X",
        help="number of the weight: gamma of p2 (default: 0.5), min-snr (5) and soft-min-snr (1), the data's standard "
        "deviation of edm (1), the bias of sigmoid (0)",
    )
    add("--train-eps", type=finite_float, help="distance of training from singular ends of [0, 1]")
    add("--sample-eps", type=finite_float, help="distance of sampling from singular ends of [0, 1]")
    add(
        "--level-edges",
        type=float,
        nargs="+",
        metavar="T",
        help="times in (0, 1) at which the patch size changes, ascending (default: 0.5, or 0.5 0.75 for 3 levels)",
    )
    add(
        "--expert-edges",
        type=finite_float,
        nargs="+",
        metavar="T",
        help="times in (0, 1), ascending, at which another network takes over: one expert more than times, which share "
        "no parameters (default: one network)",
    )
    add(
        "--expert-snr",
        type=positive_float,
        nargs="+",
        metavar="S",
        help="the same as signal-to-noise ratios (alpha / sigma)^2, ascending",
    )
    add(
        "--elastic",
        type=probability,
        default=0.0,
        metavar="P",
        help="draw a sample's level from all levels with this probability: then --budget and --level-edges are free "
        "when the network is sampled (default: 0, each level sees its own times alone)",
    )
    add("--expert", type=natural_int, metavar="K", help="train expert K alone, 0 being the noisiest (default: all)")
    add(
        "--aug-dim",
        "--aug_dim",
        type=augmented_dimension,
        metavar="D",
        help="PFGM++'s augmented dimension: noise is a Student-t with D degrees of freedom (default: inf, Gaussian)",
    )
    add("--time-sampling", choices=TIME_SAMPLINGS, default="uniform", help="density of the times of training")
    add(
        "--time-params",
        type=finite_float,
        nargs=2,
        metavar=("M", "S"),
        help="mean and standard deviation of log(alpha/sigma) for logit-normal times (default: 0 1)",
    )


PROCESS_FLAGS = ("path_type", "prediction", "loss_weight", "train_eps", "sample_eps")
TRAINING_PROCESS_FLAGS = (*PROCESS_FLAGS, "loss_weight_value", "aug_dim", "time_sampling", "time_params", "elastic")


def take_sizes(args: argparse.Namespace, dataset: AnyDataset, autoencoder: Autoencoder | None) -> None:
    """Let images keep their aspect ratio, where the flags or the dataset say so.

    Args:
        autoencoder: of images that are encoded on the fly

    Raises:
        ValueError: if the sizes do not go together, or with the data.
    """
    given = {"max_tokens": args.max_tokens, "multiple": args.size_multiple, "crop_probability": args.crop_probability}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return
    if args.max_tokens is not None and args.image_size is not None:
        raise ValueError("the sizes follow from --max-tokens: leave --image-size out")
    if dataset.sizes is None and args.max_tokens is None:
        flag = "--size-multiple" if args.size_multiple else "--crop-probability"
        raise ValueError(f"{flag} is about images of many sizes: give --max-tokens as well, or leave it out")
    factor = autoencoder.factor if autoencoder else 1
    default = {"multiple": 4 * factor, "token": 2 * factor}
    dataset.take_sizes(replace(dataset.sizes, **given) if dataset.sizes else SizeRule(**{**default, **given}))


def fit_sizes(args: argparse.Namespace, dataset: AnyDataset, model: Network) -> None:
    """Tell a network how large the images of many sizes become (ValueError if it does not take them)."""
    if dataset.sizes is None:
        return
    if model.position != "rope":
        raise ValueError(
            f"{args.model} knows one size alone, and the images have many: choose a --model with rotary positions, as "
            "PPFiT-B-2, or give --position rope"
        )
    multiple = dataset.sizes.multiple
    try:
        model.input_size_of((multiple, multiple), dataset.sizes.token // 2)
    except ValueError as error:
        raise ValueError(f"the images' sides are multiples of {multiple} pixels: {error}") from error
    if args.compile:
        raise ValueError("--compile would make a graph for each mix of sizes: leave it out")
    finest = math.prod((args.patch_sizes or MODELS[args.model]["patch_sizes"])[-1])
    model.train_tokens = 4 * dataset.sizes.max_tokens // finest


def num_patch_sizes(args: argparse.Namespace) -> int:
    """Number of patch sizes: of --patch-sizes, or of --model."""
    return len(args.patch_sizes or MODELS[args.model]["patch_sizes"])


def patch_edges(args: argparse.Namespace) -> list[float]:
    """Times at which the patch size changes: --level-edges, or the paper's (ValueError for another number of them)."""
    num_sizes = num_patch_sizes(args)
    if args.level_edges is None:
        return list(PatchSchedule.default(num_sizes).level_edges)
    if len(args.level_edges) != num_sizes - 1:
        raise ValueError(f"{args.model} has {num_sizes} level(s): give {num_sizes - 1} level edge(s)")
    return list(args.level_edges)


def process_from(args: argparse.Namespace) -> tuple[dict[str, Any], list[ExpertPart]]:
    """Arguments of create_transport, and the parts of the networks to be trained: one, or those of the experts.

    Raises:
        ValueError: if the edges of levels and experts do not fit together, or there is no such --expert.
    """
    edges = args.expert_edges or [PATHS[args.path_type].time_of_snr(snr) for snr in args.expert_snr or ()]
    try:
        parts = expert_parts(patch_edges(args), edges)
    except ValueError as error:
        if not args.expert_snr:
            raise
        ratios, times = (" ".join(f"{value:g}" for value in values) for values in (args.expert_snr, edges))
        raise ValueError(f"--expert-snr {ratios} is t = {times} on the {args.path_type} path: {error}") from error
    interval = None
    if args.expert is not None:
        if not edges:
            raise ValueError("--expert is about one of several: give --expert-edges or --expert-snr")
        if args.expert >= len(parts):
            raise ValueError(f"there is no --expert {args.expert}: {len(edges)} edge(s) make experts 0 to {len(edges)}")
        parts = parts[args.expert : args.expert + 1]
        interval = list(parts[0].interval)
    level_edges = [edge for part in parts for edge in (part.interval[0], *part.level_edges)]
    process = {name: getattr(args, name) for name in TRAINING_PROCESS_FLAGS}
    process |= {"expert_levels": [len(part.patches) for part in parts] if len(parts) > 1 else []}
    return {**process, "level_edges": level_edges[1:], "interval": interval}, parts


def add_network_args(parser: argparse.ArgumentParser, files: int | str = "+") -> Callable[..., Any]:
    """Add the trained network that is sampled from, and its process as checked against it.

    Args:
        files: nargs of --ckpt; 1 in front of positional arguments

    Returns:
        add_argument of the process's group.
    """
    add = parser.add_argument_group("model").add_argument
    add(
        "--ckpt",
        type=some_text,
        nargs=files,
        action="extend",
        help="weights: a checkpoint of train.py, a run's folder for its newest one, or a file in the layout of SiT, "
        "PPFlow or FiT; several for experts that were trained alone (default: the published weights of --model)",
    )
    add("--model", help="name of the model, checked against --ckpt (default without --ckpt: PPF-XL-2)")
    add(
        "--image-size",
        type=positive_int,
        nargs="+",
        metavar="PIXELS",
        help="side of the images, or height and width, checked against the checkpoint; with rotary positions sample.py "
        "and sample_ddp.py draw any size",
    )
    add("--num-classes", type=positive_int, help="number of classes, checked against the checkpoint")
    add("--vae", type=some_text, help="autoencoder: ema, mse, a hub id or a local folder (default: the checkpoint's)")
    add("--weights", choices=["ema", "model"], default="ema", help="averaged weights, or the last ones")
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the network; solvers compute in fp32 (default: tf32 on CUDA, else fp32)",
    )
    add("--compile", action="store_true", help="compile the blocks first: seconds of waiting, then faster evaluations")
    add("--offload-experts", action="store_true", help="keep one expert at a time on the GPU: less memory")
    add = parser.add_argument_group(
        "process", "as given to train.py; a checkpoint tells them, and they are checked against it (but --sample-eps)"
    ).add_argument
    add("--path-type", choices=list(PATHS), help="interpolant between noise and data")
    add(
        "--prediction",
        choices=PREDICTIONS,
        nargs="+",
        action=JoinWords,
        help="what the network predicts: one for all levels, or one per level",
    )
    add("--loss-weight", help="of the training alone", **optional_choice(*LOSS_WEIGHTS[1:]))
    add("--train-eps", type=finite_float, help="of the training alone")
    add("--sample-eps", type=finite_float, help="distance from singular ends of [0, 1] (default: the checkpoint's)")
    return add


def add_model_args(
    parser: argparse.ArgumentParser, cfg_scale: float | None, cfg_note: str = "", budgets: str | None = None
) -> None:
    """Add the trained network that is sampled from, its process as checked against it, positions and guidance.

    Args:
        budgets: nargs of --budget
    """
    add = add_network_args(parser)
    add(
        "--level-edges",
        type=float,
        nargs="+",
        metavar="T",
        help="other times at which the patch size changes, ascending (default: the checkpoint's)",
    )
    add(
        "--budget",
        type=positive_float,
        nargs=budgets,
        metavar="B",
        help="choose them for a share B of the arithmetic that the finest level alone would take; for networks trained "
        f"with --elastic{' (several: one row of images for each)' * (budgets is not None)}",
    )
    add_rope_args(parser)
    add_cfg_args(parser, cfg_scale, cfg_note)(
        "--null-level",
        type=natural_int,
        metavar="LEVEL",
        help="evaluate the null label at this level, 0 for the coarsest: guided steps of finer levels get cheaper, for "
        "a network that knows the level at all times (default: the sample's level)",
    )


# FiT's --interpolation: a kind and an attention scale of RopeScaling.
INTERPOLATIONS = {
    "no": ("normal", None),
    "linear": ("linear", None),
    "yarn": ("yarn", None),
    "dynntk": ("ntk", None),
    "partntk": ("ntk-parts", None),
    "ntkpro1": ("ntk", "fit1"),
    "ntkpro2": ("ntk", "fit2"),
}


def add_rope_args(parser: argparse.ArgumentParser) -> None:
    """Add the scaling of rotary positions, by our names and by FiT's."""
    add = parser.add_argument_group(
        "rotary positions", "how FiT, FiTv2 and PPFiT reach beyond the sizes they were trained on (docs/any-size.md)"
    ).add_argument
    add(
        "--rope",
        choices=ROPE_KINDS,
        help="scaling of the frequencies; auto: none up to the tokens of training, then ntk with --attention-scale, or "
        "log (default: the weights' own, else auto)",
    )
    add(
        "--decouple",
        action=argparse.BooleanOptionalAction,
        help="each axis has its own scaling (the default; with --interpolation, as in FiT, only if given)",
    )
    add(
        "--attention-scale", choices=ATTENTION_SCALES, help="factor of attention's logits beyond the tokens of training"
    )
    add("--interpolation", choices=list(INTERPOLATIONS), help="FiT's name for --rope and --attention-scale")
    add(
        "--ori-max-pe-len",
        type=positive_int,
        metavar="TOKENS",
        help="tokens along a side in training (default: the weights' own)",
    )


def rope_from(args: argparse.Namespace) -> RopeScaling | None:
    """The scaling that the flags of `add_rope_args` ask for; None where they do not.

    Raises:
        UserError:  if two flags say the same.
        ValueError: if the values do not go together.
    """
    if args.interpolation is not None:
        for name in ("rope", "attention_scale"):
            if getattr(args, name) is not None:
                raise UserError(f"--interpolation and --{name.replace('_', '-')} say the same: give one of them")
        kind, attention_scale = INTERPOLATIONS[args.interpolation]
        return RopeScaling(kind, bool(args.decouple), attention_scale)
    if args.rope is None and args.decouple is None and args.attention_scale is None:
        return None
    return RopeScaling(args.rope or "auto", args.decouple is not False, args.attention_scale)


def load_pipeline(
    args: argparse.Namespace, pictures: bool = True, latents: bool = False, any_size: bool = False
) -> Pipeline:
    """The trained network of --ckpt or --model, on the CPU, checked against the other flags of `add_network_args`.

    Args:
        pictures: samples are to be shown, for which they must have one channel or three
        latents:  samples stay latents: no autoencoder is read
        any_size: there are the flags of `add_rope_args`, and --image-size may be another than the checkpoint's

    Raises:
        OSError, ValueError: if something is missing, damaged, or not what the flags say.
    """
    if vars(args).get("budget") and args.level_edges:
        raise ValueError("--budget chooses the level edges: give it or --level-edges")
    source = source_of(args)
    process = {name: getattr(args, name) for name in PROCESS_FLAGS}
    guidance = guidance_from(args)
    pipe = Pipeline.load(source, args.weights, None if latents else args.vae, args.level_edges, process)
    source = pipe.source
    claims = {"model": args.model and canonical_name(args.model), "num_classes": args.num_classes}
    check_claims(claims, {"model": pipe.name, "num_classes": pipe.model.num_classes}, source)
    guidance.of(pipe.model)
    if any_size:
        set_positions(pipe, args, source)
    if latents:
        if args.image_size is not None:
            raise ValueError("--image-size is the side of images, and --latents makes none: leave it out")
        pipe.keep_latents(args.vae)
        return pipe
    if args.image_size is not None:
        set_size(pipe, args.image_size, source, any_size)
    if pictures and pipe.image_channels not in (1, 3):
        raise ValueError(
            f"{source} makes {pipe.image_channels} channels, which no picture holds: give --vae, "
            f"or take the latents themselves with sample_ddp.py --latents"
        )
    return pipe


def source_of(args: argparse.Namespace) -> list[str]:
    """The files of --ckpt, or the published weights of --model."""
    return args.ckpt or [canonical_name(args.model or "PPF-XL-2")]


def set_positions(pipe: Pipeline, args: argparse.Namespace, source: str) -> None:
    """Take over the flags of `add_rope_args` (ValueError for any of them where positions are not rotary)."""
    given = [
        name
        for name in ("rope", "decouple", "attention_scale", "interpolation", "ori_max_pe_len")
        if vars(args)[name] is not None
    ]
    if pipe.model.position != "rope":
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise ValueError(f"{flag} is about rotary positions, and those of {source} are sine-cosine: leave it out")
        return
    pipe.model.rope_scaling = rope_from(args) or pipe.model.rope_scaling
    if args.ori_max_pe_len is not None:
        pipe.model.train_tokens = args.ori_max_pe_len**2


def set_size(pipe: Pipeline, numbers: Sequence[int], source: str, any_size: bool) -> None:
    """Take over --image-size, or check it where the network has a size of its own (ValueError for one that is wrong).

    Args:
        numbers:  a side, or height and width
        any_size: networks with rotary positions take any size
    """
    if len(numbers) > 2:
        raise ValueError(f"--image-size takes a side, or height and width, not {len(numbers)} numbers")
    if any_size and pipe.model.position == "rope":
        pipe.use_size((numbers[0], numbers[-1]))
        return
    claimed, actual = ("x".join(map(str, sides[: len(numbers)])) for sides in (numbers, pipe.image_size))
    check_claims({"image_size": claimed}, {"image_size": actual}, source)


def add_cfg_args(parser: argparse.ArgumentParser, default: float | None, default_note: str = "") -> Callable[..., Any]:
    """Add --cfg-scales and its companions; returns add_argument of their group."""
    add = parser.add_argument_group("guidance").add_argument
    add(
        "--cfg-scales",
        "--cfg-scale",
        type=finite_float,
        nargs="+",
        metavar="W",
        default=default and [default],
        help="classifier-free guidance scale: one, or one per level (coarsest first); 1 is none "
        f"({default_note or f'default: {default:g}'})",
    )
    add(
        "--cfg-channels",
        type=positive_int,
        metavar="C",
        help="guide only the first C channels (DiT, SiT and PPFlow's published numbers: 3)",
    )
    add(
        "--cfg-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only for t between LOW and HIGH (0 is noise, 1 is data)",
    )
    return add


def guidance_from(args: argparse.Namespace, default: float | tuple[float, ...] = 1.0) -> Guidance:
    """Guidance that --cfg-scales and its companions ask for (ValueError where they cannot)."""
    interval = tuple(args.cfg_interval) if args.cfg_interval else None
    null_level = vars(args).get("null_level")  # training has none
    return Guidance(tuple(args.cfg_scales) if args.cfg_scales else default, args.cfg_channels, interval, null_level)


def warn_of_null_level(pipe: Pipeline, null_level: int | None) -> None:
    """Tell if the null label is to be evaluated at a level that training showed other times alone."""
    schedule = pipe.transport.schedule
    if null_level is None or null_level == schedule.num_levels - 1 or schedule.elastic:
        return
    note(
        f"training showed level {null_level} times up to {schedule.edges[null_level + 1]:g} alone, and --null-level "
        f"{null_level} evaluates it at later ones: only train.py --elastic trains levels for all times"
    )


def evaluation_scales(num_levels: int) -> tuple[float, ...]:
    """Guidance scales that PPFlow draws the samples of its FID with; SiT's single level is not guided there."""
    return {2: (1.0, 3.0), 3: (1.0, 3.5, 3.75)}.get(num_levels, (1.0,))


def add_ode_args(parser: argparse.ArgumentParser, default: str = "ab2") -> None:
    """Add the ODE solver's flags; `default` says which method is."""
    others = ", ".join(method for method in ODE_METHODS if method not in SHOWN_METHODS)
    add = parser.add_argument_group("ODE solver").add_argument
    add(
        "--sampling-method",
        choices=ODE_METHODS,
        metavar="METHOD",
        help="one evaluation a step: ab2 (Adams-Bashforth), dpmpp_2m (DPM-Solver++(2M)), euler; more: "
        f"{others} (default: {default})",
    )
    add(
        "--num-sampling-steps",
        type=positive_int,
        nargs="+",
        metavar="STEPS",
        help="steps of a fixed-step method, over all or one number per level (default: 50)",
    )
    add("--atol", type=positive_float, help="absolute tolerance of an adaptive method (default: 1e-6)")
    add("--rtol", type=positive_float, help="relative tolerance of an adaptive method (default: 1e-3)")
    add(
        "--step-grid",
        choices=["uniform", "auto"],
        default="uniform",
        help="auto: steps lie where this network's error is, which is measured once and kept beside the weights "
        "(default: uniform, equal steps)",
    )


def add_sde_args(parser: argparse.ArgumentParser) -> None:
    """Add the SDE solver's flags."""
    add = parser.add_argument_group("SDE solver").add_argument
    add("--sampling-method", choices=SDE_METHODS, default="Euler", help="Euler-Maruyama or Heun")
    add(
        "--num-sampling-steps",
        type=positive_int,
        nargs="+",
        metavar="STEPS",
        default=[250],
        help="steps over the whole trajectory, the last one included, or one number per level (default: 250)",
    )
    add("--diffusion-form", choices=list(DIFFUSION_FORMS), default="sigma", help="shape of w_t")
    add("--diffusion-norm", type=natural_float, default=1.0, help="factor of w_t")
    names = [name for name in LAST_STEPS if name]
    add("--last-step", default="Mean", help="how the last stretch is taken", **optional_choice(*names))
    add("--last-step-size", type=positive_float, help="length of the last step in t (default: 0.04)")


def solver_from(args: argparse.Namespace, default: ODE | None = None) -> ODE | SDE:
    """The solver that the flags of `sample.py ODE` or `sample.py SDE` ask for.

    Args:
        default: solver where no flag chooses one

    Raises:
        UserError:  if a flag would have no effect.
        ValueError: if the values do not make a solver.
    """
    if args.mode == "SDE":
        if args.last_step is None and args.last_step_size is not None:
            raise UserError("--last-step-size has no effect with --last-step None: leave it out")
        return SDE(
            method=args.sampling_method,
            num_steps=steps_from(args.num_sampling_steps),
            diffusion_form=args.diffusion_form,
            diffusion_norm=args.diffusion_norm,
            last_step=args.last_step,
            last_step_size=args.last_step_size or 0.04,
        )
    if default is None or args.sampling_method or args.num_sampling_steps:
        default = ODE(args.sampling_method or "ab2")
    if default.adaptive and args.num_sampling_steps:
        note(f"{default.method} chooses its own steps: --num-sampling-steps has no effect")
    if args.step_grid == "auto":
        check_grid_method(default.method)
    for name in ("atol", "rtol"):
        if not default.adaptive and getattr(args, name):
            raise UserError(
                f"--{name} has no effect with {default.method}, which takes --num-sampling-steps: leave it out, or "
                "give --sampling-method dopri5 as well"
            )
    steps = None if default.adaptive else args.num_sampling_steps
    return ODE(default.method, steps_from(steps or [50]), args.atol or default.atol, args.rtol or default.rtol)


def at_budget(pipe: Pipeline, budget: float | None, solver: ODE | SDE, guidance: Guidance) -> Pipeline:
    """The pipeline with the level edges of --budget; without the flag as it is (ValueError as Pipeline.at_budget)."""
    return pipe if budget is None else pipe.at_budget(budget, solver, guidance)


def step_grid_from(
    args: argparse.Namespace, pipe: Pipeline, solver: ODE | SDE, guidance: Guidance, digest: str
) -> ODE | SDE:
    """The solver with the grid that --step-grid asks for: found beside the weights, or measured and kept there.

    It is measured at the pipeline's own level edges; a --budget takes the steps as they then are.

    Args:
        digest: `fingerprint` of the weights as they were read

    Raises:
        UserError: if it cannot be measured, or not be kept.
    """
    if args.mode == "SDE" or args.step_grid == "uniform":
        return solver

    def measure() -> Grid:
        note("--step-grid auto: measuring where the steps should lie, once for these weights, solver and guidance")
        return pipe.step_grid(solver, guidance)

    advice = "choose --step-grid uniform, or copy the weights to a folder that can be written to"
    file = locate(source_of(args)[0])
    with user_input(), user_output(file.parent, advice):
        decides = what_decides(pipe.model, pipe.transport, digest, solver, guidance)
        return replace(solver, grid=kept_grid(file, decides, measure))


@contextlib.contextmanager
def solving(batch_flag: str) -> Iterator[None]:
    """Turn errors of solvers, and of a device without the memory for a batch, into a UserError.

    Args:
        batch_flag: the flag that makes batches smaller
    """
    try:
        with user_input():
            yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the device's memory is too small for the samples of a batch: lower {batch_flag}") from error


def steps_from(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number stands for the whole trajectory, several for one level each."""
    return values[0] if len(values) == 1 else tuple(values)
