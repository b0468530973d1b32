"""A run: what it remembers from one start to the next, its folder, and what it writes there."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from filelock import FileLock, Timeout

from runtime import parallel
from runtime.checkpoints import (
    CheckpointWriter,
    describe_newest_checkpoint,
    find_checkpoint,
    newest_checkpoint,
    newest_good,
    remove_leftovers,
    set_aside,
)
from runtime.distributed import Processes, broadcast_object, on_main
from runtime.errors import UserError
from runtime.files import complete_file
from runtime.logs import RunLog, save_grid
from runtime.preemption import Preemption
from runtime.speed import precision_note

LOCK_PATIENCE = 45.0  # seconds

# ---------------------------------------------------------------------------------------------------------------
# Settings

# Flags of one start of a run: each start has its own.
OF_A_START = {
    "run_dir",
    "results_dir",
    "ckpt",
    "num_workers",
    "wandb",
    "compile",
    "shard",
    "activation_checkpointing",
    "joint_levels",  # of earlier versions
    "patch_level",
}
# The others are remembered. These may be given other values at any time,
FREE_TO_CHANGE = {
    "epochs",
    "max_steps",
    "log_every",
    "ckpt_every",
    "sample_every",
    "eval_every",
    "eval_num",
    "keep_last",
    "keep_every",
    "cfg_scales",
    "cfg_channels",
    "cfg_interval",
}
# these too, with a line in the log; any other flag would make it another run.
LOGGED_WHEN_CHANGED = {
    "lr",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "gradient_accumulation_steps",
    "deterministic",
    "data_path",
    "vae",
    "eval_ref",
    "eval_features",
    "eval_weights",
}
PATHS = {"data_path", "eval_ref", "eval_weights"}


def continued_settings(
    settings: Mapping[str, Any],
    given: set[str],
    defaults: Mapping[str, Any],
    stored: Mapping[str, Any],
    source: Path,
) -> tuple[dict[str, Any], list[str]]:
    """The settings of a start that continues a run: those that were given, and those that the run remembers.

    Args:
        settings: this start's flags by their names, defaults included
        given:    names of the flags that were given
        defaults: values of flags that are not given, which a run of an earlier version has where it knows no others
        stored:   the settings in the run's checkpoint
        source:   the checkpoint's file

    Returns:
        the settings, and a line for each of LOGGED_WHEN_CHANGED that is another one from here on.

    Raises:
        UserError: if a flag was given that would make it another run; the message names it.
    """
    run_dir, own = settings["run_dir"], False
    if run_dir and source.parent.parent == Path(run_dir):
        own = True
        if settings["ckpt"] not in (None, stored.get("ckpt")):
            raise UserError(
                f"{run_dir} holds a run that did not start from --ckpt {settings['ckpt']}: "
                f"leave --ckpt out to continue it, or start another with a new --run-dir"
            )
    merged, changes = dict(settings), []
    if own:
        merged["ckpt"] = stored.get("ckpt")
    if {"epochs", "max_steps"} & given:  # two ways to say how long
        given = given | {"epochs", "max_steps"}
    for name, value in {**defaults, **stored}.items():
        if name in OF_A_START:
            continue
        if name not in given:
            merged[name] = value
            continue
        now, flag = settings[name], "--" + name.replace("_", "-")
        same = full_path(now) == full_path(value) if name in PATHS else now == value
        if same or name in FREE_TO_CHANGE:
            continue
        if name not in LOGGED_WHEN_CHANGED:
            another = "with a new --run-dir" if own else "without --ckpt (--initialize_from takes its weights)"
            raise UserError(
                f"{flag} is {value} in {source}, not {now}: leave {flag} out to continue that run, "
                f"or start another {another}"
            )
        changes.append(f"{flag} is {now} from here on; it was {value}")
    return merged, changes


def full_path(path: str | None) -> str | None:
    """A path as a run remembers it, to be found from any working directory; the word "digits" and None stay."""
    return path if path in (None, "digits") else os.path.abspath(path)


DATA_PARTS = {
    "kind": "the kind of data",
    "images": "the number of images",
    "num_classes": "the number of classes",
    "names": "names of images or classes",
    "labels": "the labels",
    "scaling": "the scaling of the latents",
}


def check_data(config: dict[str, Any], identity: dict[str, Any], data_path: str) -> None:
    """Refuse data that is not the data of a run (ValueError); it may have moved.

    Args:
        config:   of the run's checkpoint; one of an earlier version knows the number of images alone
        identity: of the dataset that is there now
    """
    stored = config.get("data") or {"images": config.get("images", identity["images"])}
    for part, value in identity.items():
        if part in stored and stored[part] != value:
            shown = f" ({stored[part]} then, {value} now)" if part in ("kind", "images", "num_classes") else ""
            raise ValueError(
                f"{data_path} is not what the run was trained on, {DATA_PARTS[part]} changed{shown}: give the run's "
                "data by --data-path, or start another run with a new --run-dir"
            )


# ---------------------------------------------------------------------------------------------------------------
# Folders


def starting_point(run_dir: str | None, ckpt: str | None) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and what to tell about it: the run's own newest good one, else --ckpt.

    The run's folder is locked first: a process that is just ending may still write the newest checkpoint.

    Raises:
        ValueError, OSError: if --ckpt, or every checkpoint of the run, is damaged; if another process trains there.
    """
    if run_dir and (Path(run_dir) / "checkpoints").is_dir():
        lock_run_dir(Path(run_dir))
        own, damaged = newest_good(Path(run_dir))
        if own is not None:  # the damaged ones must not count as checkpoints any more
            return own, [
                f"{path} is damaged, {reason}; it is now {set_aside(path).name}" for path, reason in damaged.items()
            ]
    if not ckpt:
        return None, []
    found, damaged = find_checkpoint(ckpt)
    return found, [f"{path} is damaged, {reason}" for path, reason in damaged.items()]


def make_run_dir(run_dir: str | None, results_dir: str, name: str) -> Path:
    """Make and lock --run-dir, or the next results/NNN-name.

    Raises:
        ValueError: if the folder holds something else than a run, or another process is at work there.
    """
    if run_dir:
        folder = Path(run_dir)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "checkpoints").is_dir():
            raise ValueError(f"--run-dir {folder} holds other files and no run: give a new or an empty folder")
    else:
        folder = next_run_dir(Path(results_dir), name)
    for part in ("checkpoints", "samples"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    if lock_run_dir(folder) and newest_checkpoint(folder):
        # There was no run when `starting_point` looked.
        raise ValueError(f"another process has begun a run in {folder}: give another --run-dir, or continue that run")
    remove_leftovers(folder)
    return folder


def next_run_dir(results_dir: Path, name: str) -> Path:
    """Make results_dir/NNN-name with the first number after those that are there; several starts get several."""
    numbers = [int(found[1]) for path in results_dir.glob("*") if (found := re.match(r"(\d{3,})-", path.name))]
    for number in itertools.count(max(numbers, default=-1) + 1):
        run_dir = results_dir / f"{number:03d}-{name.replace('/', '-')}"
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:  # another start was faster
            continue
        return run_dir


_locks: dict[Path, FileLock] = {}  # held as long as the process lives


def lock_run_dir(run_dir: Path) -> bool:
    """Keep a run's folder for this process, which a second one would write into as well.

    A process that is just ending (its torchrun was killed, say) is waited for, and so are its loader's workers.

    Returns:
        False if this process had it already.

    Raises:
        ValueError: if another process trains there and does not end.
    """
    path = (run_dir / ".lock").resolve()
    if path in _locks:
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=LOCK_PATIENCE, poll_interval=0.2)
    except Timeout:
        raise ValueError(f"another process trains in {run_dir}: end it, or give another --run-dir") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass
    _locks[path] = lock
    return True


# ---------------------------------------------------------------------------------------------------------------
# What a run writes


class Run:
    """A run's folder, log, checkpoints and signals. Every process has one; only the main process's writes.

    Args:
        folder:     as `make_run_dir` made it
        step:       from which the run goes on; later metrics are dropped
        config:     what describes the run: config.json, and in every checkpoint
        keep_last:  how many of the last checkpoints to keep; None for all
        keep_every: keep those of every so many steps as well
        wandb:      log to wandb as well

    Raises:
        UserError: if the folder cannot be written to, or wandb does not start.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        config: dict[str, Any],
        processes: Processes,
        preemption: Preemption,
        keep_last: int | None = None,
        keep_every: int | None = None,
        wandb: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.processes = processes
        self.preemption = preemption
        self.log: RunLog | None = None

        def open_log() -> None:
            with complete_file(folder / "config.json") as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")
            self.log = RunLog(folder, step, config, wandb)

        on_main(open_log, processes)
        self.writer = CheckpointWriter(folder, keep_last, keep_every, self.say)

    def say(self, line: str) -> None:
        """Print a line, and keep it in log.txt."""
        if self.log:
            self.log.text(line)

    def introduce(self, model: str, data: str, precision: str, notes: Sequence[str]) -> None:
        """Begin the log: what is trained on what, with which precision, and what there is to note about it."""
        self.say(model)
        device = self.processes.device
        self.say(f"{data}; {self.processes.world_size} process(es) on {device.type}, {precision}; {self.folder}")
        for line in notes:
            self.say(f"warning: {line}")
        if line := precision_note(precision, device):
            self.say(f"note: {line}")

    def record(self, values: dict[str, Any]) -> None:
        """Log the metrics of a step."""
        if self.log:
            self.log.record(values)
            rate, seconds = values["images_per_second"], values["step_time"]
            errors = [values[name] for name in values if name.startswith("velocity_error")]
            by_level = " / ".join("-" if error is None else f"{error:.4f}" for error in errors)
            self.say(
                f"step {values['step']}: loss {values['loss']:.4f}, velocity error {by_level}, {rate:.0f} images/s, "
                f"{values['tokens_per_second']:.0f} tokens/s, {seconds * 1e3:.0f} ms/step"
            )

    def record_evaluation(self, step: int, name: str, distance: float, seconds: float) -> None:
        """Log the distance of samples at a step, and how long it took to draw and measure them."""
        if self.log:
            self.log.record({"step": step, name: distance, "evaluation_seconds": seconds}, "eval")
            self.say(f"step {step}: {name} {distance:.4g}, in {seconds:.0f} s")
            self.log.plot()

    @property
    def should_stop(self) -> bool:
        """True once this process was asked to save and end."""
        return self.preemption.requested

    def any_should_stop(self) -> bool:
        """True on all processes once one was asked to save and end. Collective."""
        return parallel.any_process(self.should_stop, self.processes.device)

    def save(self, step: int, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, **plain: Any) -> None:
        """Start writing the checkpoint of a step; call `wait_copied` before the weights change. Collective.

        Args:
            plain: further parts of the checkpoint, plain data
        """
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": optimizer.state_dict()}
        state = parallel.full_state(state, self.processes)
        if self.log:
            self.writer.save(step, {**state, "config": self.config, "step": step, **plain})

    def wait_copied(self) -> None:
        """Wait until the checkpoint that is being written has read the weights."""
        self.writer.wait_copied()

    def show(self, step: int, images: torch.Tensor | None, columns: int, name: str = "") -> None:
        """Save a grid of samples (N, C, H, W) in [-1, 1] and the curves so far; None leaves the grid out.

        Args:
            name: end of the picture's name, after the step
        """
        if self.log is None:
            return
        if images is not None:
            path = self.folder / "samples" / f"{step:07d}{name}.png"
            with self.log.unless_full():
                save_grid(images, path, columns)
                self.log.picture(f"samples{name}", path, step)
        self.log.plot()

    def fail(self, reason: str, advice: str) -> UserError:
        """The error that ends the run on all processes; what is being written is finished first."""
        self.writer.wait()
        return UserError(f"{reason}; {describe_newest_checkpoint(self.folder)}; {advice}", everywhere=True)

    def finish(self, done: int, start: int, total: int) -> None:
        """Wait for the last checkpoint, and say how the run ended. Collective.

        Args:
            done:  steps that are done
            start: step from which this start of the run went on
            total: steps that were asked for

        Raises:
            UserError: if the last checkpoint was not written.
            SystemExit: if the run was asked to stop before its end.
        """
        failed = broadcast_object(self.writer.wait())  # so that all processes end together
        if failed:
            raise UserError(f"{failed}; make room, and the same command continues", everywhere=True)
        if start >= total:
            self.say(f"nothing to do: {self.folder} is at step {start}, and {total} are asked for")
        elif done >= total:
            if self.log:
                self.log.plot()
            self.say(f"done: {total} steps, see {self.folder}")
        else:
            self.say(f"stopped by a signal after step {done}, which is saved: the same command continues")
        if self.log:
            self.log.close()
        if done < total:
            raise SystemExit(self.preemption.exit_code)
