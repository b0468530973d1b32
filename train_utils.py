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
# Errors a user can cause: one line, exit code 2


EXIT_INTERRUPTED = 130  # the exit code that a shell shows for Ctrl-C


class UserError(Exception):
    """Something the user gave cannot work; the message says what is wrong and what to do.

    Args:
        everywhere: every process raises this same error, so one on each node prints it
    """

    def __init__(self, message: str, everywhere: bool = False) -> None:
        super().__init__(message)
        self.everywhere = everywhere


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Turn errors raised while reading what the user gave into a UserError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a UserError becomes one line on stderr and exit code 2.

    The line names the rank, unless all ranks fail alike and one on each node speaks for them. The process group is
    destroyed only when main returns or calls sys.exit, which all processes do together. A process that fails alone must
    not destroy it: NCCL would first wait for the others, and these may be waiting for this one.
    """
    rank = int(os.environ.get("RANK", 0))
    who = f"rank {rank}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may have bytes that no encoding has
    try:
        main()
    except SystemExit:
        destroy_processes()
        raise
    except UserError as error:
        if not error.everywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            say(f"error: {'' if error.everywhere else who}{error}")
        exit_alone(2)
    except KeyboardInterrupt:
        say(f"{who}interrupted")
        exit_alone(EXIT_INTERRUPTED)
    except Exception as error:
        if is_lost_connection(error):
            say(f"{who}lost the connection to another process, whose own message says why")
        elif dist.is_initialized():
            say(f"{who}{type(error).__name__}")
            traceback.print_exc()
        else:
            raise
        exit_alone(1)
    destroy_processes()


def say(message: str) -> None:
    """Print one line about this script on stderr, below a progress bar: this process's, or rank 0's."""
    start = "" if int(os.environ.get("RANK", 0)) == 0 else "\n"
    tqdm.write(f"{start}{Path(sys.argv[0]).name}: {' '.join(message.split())}", file=sys.stderr)


def is_lost_connection(error: Exception) -> bool:
    """Return True for the error that a collective call raises because another process has died."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"gloo|Connection (closed|reset)", str(error)))


def exit_alone(code: int) -> NoReturn:
    """End this process without waiting for the others; a checkpoint that is being written is finished first."""
    if dist.is_initialized():
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a normal exit would take the process group down, and wait for the others
    sys.exit(code)


def note(message: str) -> None:
    """Print a line that is no error, on the main process."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"note: {message}", flush=True)


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


# ---------------------------------------------------------------------------------------------------------------
# Processes, devices and precision


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_processes() -> Processes:
    """Join the other processes (nccl on CUDA, gloo on the CPU) and take this one's device."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"{local_rank + 1} processes on this node but only {torch.cuda.device_count()} GPU(s)")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun's store outlives the processes that it restarts: new ones must not read the addresses of the dead.
        # (The nodes of a larger job need not have counted the same restarts.)
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        device_id=device if cuda else None,
    )
    return Processes(dist.get_rank(), dist.get_world_size(), device)


def destroy_processes() -> None:
    """Take the process group down. All processes must come here: NCCL waits for them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that is divided among all (train.py --shard); else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def broadcast_object(value: Any) -> Any:
    """The main process's value, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather_objects(value: Any, processes: Processes) -> list[Any]:
    """Every process's value, in order of rank, on the main process; an empty list elsewhere."""
    if not dist.is_initialized():
        return [value]
    values = [None] * processes.world_size if processes.is_main else None
    dist.gather_object(value, values)
    return values or []


Value = TypeVar("Value")


def on_main(call: Callable[[], Value], processes: Processes) -> Value:
    """Run `call` on the main process and return its result, or raise its UserError, on every process. Collective."""
    value, error = None, None
    if processes.is_main:
        try:
            with user_input():
                value = call()
        except UserError as raised:
            error = str(raised)
    value, error = broadcast_object((value, error))
    if error is not None:
        raise UserError(error, everywhere=True)
    return value


def agree(call: Callable[[], Value], processes: Processes) -> Value:
    """Run `call` on every process and return its own result; if one fails, all raise one UserError. Collective.

    What differs between processes is often what is wrong: a node without the data, a disk that is full on one of them.

    Args:
        call: makes no collective calls itself

    Raises:
        UserError: the message names the ranks that failed, unless all failed alike.
    """
    value, error = None, None
    try:
        with user_input():
            value = call()
    except UserError as raised:
        error = str(raised)
    if not dist.is_initialized():
        errors = [error]
    else:
        errors = [None] * processes.world_size
        dist.all_gather_object(errors, error)
    ranks: dict[str, list[int]] = {}
    for rank, message in enumerate(errors):
        if message is not None:
            ranks.setdefault(message, []).append(rank)
    if not ranks:
        return value
    if len(ranks) == 1 and None not in errors:
        raise UserError(errors[0], everywhere=True)
    named = (f"rank {', '.join(map(str, where))}: {message}" for message, where in ranks.items())
    raise UserError("; ".join(named), everywhere=True)


def check_same_flags(args: argparse.Namespace, processes: Processes, but: Collection[str]) -> None:
    """Refuse processes that were started with different commands. Collective.

    Args:
        but: flags that may differ from node to node

    Raises:
        UserError: the message names the flag.
    """
    if not dist.is_initialized():
        return
    flags: list[Any] = [None] * processes.world_size
    dist.all_gather_object(flags, {name: value for name, value in vars(args).items() if name not in but})
    for rank, own in enumerate(flags):
        for name, value in own.items():
            if value != flags[0][name]:
                flag = "--" + name.replace("_", "-")
                raise UserError(
                    f"rank {rank} was started with {flag} {value}, rank 0 with {flags[0][name]}: start all processes "
                    "with the same command",
                    everywhere=True,
                )


PRECISIONS = ("fp32", "tf32", "bf16")


def use_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """The autocast context of a precision; what stays in fp32 is computed in tf32, but for precision fp32."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"  # convolutions, which are most of an autoencoder
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


CPU_INFO = Path("/proc/cpuinfo")


def precision_note(precision: str, device: torch.device) -> str | None:
    """A line to print where a precision is slow: bf16 on a CPU without instructions for it; None if all is well.

    The processor's flags are Linux's; where there are none, nothing is known and nothing is said.
    """
    if precision != "bf16" or device.type != "cpu":
        return None
    with contextlib.suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", CPU_INFO.read_text(), re.MULTILINE)
        if flags and not {"avx512_bf16", "amx_bf16", "bf16"}.intersection(flags[1].split()):
            return (
                "note: this CPU has no instructions for bf16, such as AVX512-bf16: --precision fp32 is far faster here"
            )
    return None


def set_determinism(device: torch.device, deterministic: bool) -> None:
    """Choose algorithms that give the same bits every time: always on the CPU, on CUDA where they are asked for.

    CUDA's faster algorithms add numbers in no fixed order, in the backward pass of attention above all. Only a strict
    torch avoids them (warn_only=True leaves attention as it is), and then an operation without a deterministic kernel
    raises a RuntimeError: see `deterministic_errors`.
    """
    if device.type == "cuda" and not deterministic:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost time and change nothing here


@contextlib.contextmanager
def deterministic_errors() -> Iterator[None]:
    """Turn torch's error about an operation without a deterministic kernel into a UserError that names it."""
    try:
        yield
    except RuntimeError as error:
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if not found:
            raise
        raise UserError(f"--deterministic: {found[1]} has no deterministic kernel here: leave the flag out") from error


# ---------------------------------------------------------------------------------------------------------------
# EMA


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model, in a few kernels for all parameters."""
    averages, weights = ([local_part(parameter) for parameter in net.parameters()] for net in (ema, model))
    torch._foreach_lerp_(averages, weights, 1 - decay)


def ema_decay_at(step: int, decay: float) -> float:
    """The decay rises to its value over the first steps, so that the initial weights are soon forgotten."""
    return min(decay, (1 + step) / (10 + step))


# ---------------------------------------------------------------------------------------------------------------
# Health


def not_finite(
    step: int,
    positions: range,
    terms: dict[str, torch.Tensor],
    model: nn.Module,
    index_of: Callable[[int], int],
    processes: Processes,
) -> str:
    """What is known about a step whose loss or gradient is not finite: its samples and levels, of all processes.

    Args:
        positions: this process's n samples, numbered over the whole run
        terms:     their "loss" and "level" (n,)
        index_of:  a position's index in the dataset
    """
    bad = (~torch.isfinite(terms["loss"])).nonzero().flatten().tolist()
    samples = [(index_of(positions[i]), positions[i], int(terms["level"][i])) for i in bad]
    gradients = {name: local_part(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    names = {name for name, gradient in gradients.items() if not gradient.isfinite().all()}
    parts = gather_objects((samples, names), processes)
    found = [sample for samples, _ in parts for sample in samples]
    if found:
        samples = ", ".join(f"{index} (position {position}, level {level})" for index, position, level in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        return f"the loss is not finite at step {step} for {len(found)} sample(s) of the dataset: {samples}{more}"
    names = set().union(*(names for _, names in parts))
    bad = {id(p): name for name, p in model.named_parameters() if name in names}
    levels = [n for n in range(model.num_levels) if any(id(p) in bad for p in model.level_parameters(n))]
    first = positions.start - processes.rank * len(positions)
    last = first + processes.world_size * len(positions) - 1
    return (
        f"the gradient is not finite at step {step}, though every loss is: in {len(bad)} parameter(s), as "
        f"{next(iter(bad.values()), 'none')}, level(s) {levels}; the samples are those at positions {first} to {last}"
    )


# ---------------------------------------------------------------------------------------------------------------
# Files: complete under their name, or absent


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


# ---------------------------------------------------------------------------------------------------------------
# Logs


class RunLog:
    """What a run leaves to read: log.txt, metrics.jsonl, loss.png, and wandb where asked for.

    Args:
        run_dir: the run's folder
        step:    metrics after this step are dropped: the run continues from here
        config:  for wandb
        wandb:   log to wandb as well; WANDB_KEY, ENTITY and PROJECT are read from the environment
    """

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], wandb: bool = False) -> None:
        self.run_dir = run_dir
        self.metrics_file = run_dir / "metrics.jsonl"
        kept = [record for record in self.metrics() if record["step"] <= step]
        with complete_file(self.metrics_file) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.wandb_run = self._start_wandb(config) if wandb else None

    def _start_wandb(self, config: dict[str, Any]) -> Any:
        import wandb

        if key := os.environ.get("WANDB_KEY"):
            os.environ.setdefault("WANDB_API_KEY", key)
        try:
            return wandb.init(
                project=os.environ.get("PROJECT", "PPFlow"),
                entity=os.environ.get("ENTITY"),
                name=self.run_dir.name,
                id=hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=self.run_dir,
                config=config,
            )
        except wandb.Error as error:
            raise UserError(f"--wandb: {error}; set WANDB_KEY, or WANDB_MODE=offline") from error

    def text(self, message: str) -> None:
        """A line for people, on the screen and in log.txt."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()  # a killed process takes what it has not shown with it
        with (
            self.unless_full(),
            open(self.run_dir / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            file.write(message + "\n")

    @contextlib.contextmanager
    def unless_full(self) -> Iterator[None]:
        """A disk that takes no more is no reason to end a run: what it does not take is left out, with a warning."""
        try:
            yield
        except OSError as error:
            tqdm.write(f"warning: a log or picture is lost: {error}", file=sys.stdout)

    def metrics(self) -> list[dict[str, Any]]:
        """All records so far, but for lines that a full disk or a lost machine cut short."""
        records = []
        for line in self.metrics_file.read_text().splitlines() if self.metrics_file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    def record(self, values: dict[str, Any]) -> None:
        """A line of metrics.jsonl; values holds the step."""
        with self.unless_full(), open(self.metrics_file, "a") as file:
            file.write(json.dumps(values) + "\n")
        if self.wandb_run:
            self.wandb_run.log({f"train/{name}": value for name, value in values.items()}, step=values["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture in wandb."""
        if self.wandb_run:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path))}, step=step)

    def plot(self) -> None:
        """Draw loss.png: the loss of each level over the steps."""
        from matplotlib.figure import Figure  # slow to import

        records = self.metrics()
        if not records:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key in sorted({key for record in records for key in record if key.startswith("loss")}):
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            label = "all levels" if key == "loss" else key.replace("_", " ").replace("loss ", "")
            axes.plot(*zip(*points, strict=True), label=label, linewidth=2 if key == "loss" else 1)
        axes.set(xlabel="step", ylabel="training loss", yscale="log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")  # 0.5, not 5 x 10^-1
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with self.unless_full(), complete_file(self.run_dir / "loss.png") as temporary:
            figure.savefig(temporary, dpi=120)

    def close(self) -> None:
        if self.wandb_run:
            self.wandb_run.finish()


def step_metrics(step: int, sums: torch.Tensor, grad_norm: float, lr: float) -> dict[str, Any]:
    """One record of metrics.jsonl from the loss sums and counts (2, levels); a level without samples is null."""
    loss, count = sums.tolist()
    values = {"step": step, "loss": sum(loss) / sum(count), "grad_norm": grad_norm, "lr": lr}
    for level, (total, number) in enumerate(zip(loss, count, strict=True)):
        values[f"loss_level_{level}"] = total / number if number else None
    return values


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] (N, C, H, W) to bytes of the same shape, on the CPU."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def save_grid(images: torch.Tensor, path: str | Path, columns: int) -> None:
    """Save images in [-1, 1] (N, C, H, W) as a grid; small ones are enlarged to about 64 pixels, to be read at once."""
    enlarge = max(1, 64 // max(images.shape[-2:]))
    if enlarge > 1:
        images = F.interpolate(images.float(), scale_factor=enlarge, mode="bicubic")
    grid = make_grid(to_uint8(images), nrow=columns, padding=2, pad_value=128)
    with complete_file(path) as temporary:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(temporary)
