"""Metrics, log, curves and pictures of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

from runtime import parallel
from runtime.errors import UserError
from runtime.files import complete_file
from transport.budgets import BINS, LevelErrors

# ---------------------------------------------------------------------------------------------------------------
# Logs


DISTANCE = r"fi?d\d+k?"  # a key of metrics.jsonl: fid5k is the FID of 5000 samples, fd500 another distance of 500


class RunLog:
    """log.txt, metrics.jsonl and the curves in a run's folder, and wandb where asked for.

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
        """Write a line on the screen and into log.txt."""
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()  # a killed process takes what it has not shown with it
        path = self.run_dir / "log.txt"
        with self.unless_full(), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(message + "\n")

    @contextlib.contextmanager
    def unless_full(self) -> Iterator[None]:
        """If the disk is full, skip this write and warn: logs are not worth ending a run."""
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

    def record(self, values: dict[str, Any], group: str = "train") -> None:
        """Append a record to metrics.jsonl, and to a group of wandb's; values holds the step."""
        with self.unless_full(), open(self.metrics_file, "a") as file:
            file.write(json.dumps(values) + "\n")
        if self.wandb_run:
            plain = {f"{group}/{name}": value for name, value in values.items() if not isinstance(value, list)}
            self.wandb_run.log(plain, step=values["step"])

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a picture in wandb."""
        if self.wandb_run:
            import wandb

            self.wandb_run.log({name: wandb.Image(str(path))}, step=step)

    def plot(self) -> None:
        """Draw the loss of each level over the steps in loss.png, distances of samples, if any, in eval.png, and errors
        of elastic levels over t in levels.png.
        """
        records = self.metrics()
        keys = sorted({key for record in records for key in record})
        losses = {key: key.replace("_", " ").replace("loss ", "") for key in keys if key.startswith("loss")}
        self._plot("loss.png", records, {**losses, "loss": "all levels"}, "training loss")
        distances = {key: key for key in keys if re.fullmatch(DISTANCE, key)}
        self._plot("eval.png", records, distances, "distance of EMA samples")
        if tables := [record["level_errors"] for record in records if "level_errors" in record]:
            self._plot_levels(tables[-1])

    def _plot(self, name: str, records: list[dict[str, Any]], labels: dict[str, str], ylabel: str) -> None:
        """Draw the records' values over the steps, with a label for each key; nothing where there are none."""
        from matplotlib.figure import Figure  # slow to import

        curves = {key: [(r["step"], r[key]) for r in records if r.get(key) is not None] for key in labels}
        if not any(curves.values()):
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key, points in curves.items():
            if points:
                marked = len(points) == 1 or not key.startswith("loss")
                style = {"linewidth": 2 if key == "loss" else 1, "marker": "." if marked else None}
                axes.plot(*zip(*points, strict=True), label=labels[key], **style)
        axes.set(xlabel="step", ylabel=ylabel, yscale="log")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}")  # 0.5, not 5 x 10^-1
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with self.unless_full(), complete_file(self.run_dir / name) as temporary:
            figure.savefig(temporary, dpi=120)

    def _plot_levels(self, table: list[list[float | None]]) -> None:
        """Draw the mean velocity error of each level over t, and by how much it exceeds that of the finest."""
        from matplotlib.figure import Figure  # slow to import

        errors = np.array(table, dtype=float)  # None becomes NaN, where a line has a gap
        t = (np.arange(errors.shape[1]) + 0.5) / errors.shape[1]
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        for level, row in enumerate(errors):
            left.plot(t, row, marker=".", label=f"level {level}")
            right.plot(t, 100 * (row / errors[-1] - 1), marker=".")
        left.set(xlabel="t", ylabel="velocity error", xlim=(0, 1))
        right.set(xlabel="t", ylabel="more than the finest level's, in %")
        for axes in (left, right):
            axes.grid(alpha=0.3)
        left.legend()
        with self.unless_full(), complete_file(self.run_dir / "levels.png") as temporary:
            figure.savefig(temporary, dpi=120)

    def close(self) -> None:
        if self.wandb_run:
            self.wandb_run.finish()


class StepMeter:
    """Averages over the steps since the last record: loss and velocity error of each level, gradient norm, time.

    Losses are added up on the device, so that a step waits for nothing.

    Args:
        num_levels: levels of the network
        batch_size: samples of a step, all processes
        device:     where the losses are
    """

    def __init__(self, num_levels: int, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self._sums = torch.zeros(3, num_levels, device=device)  # loss, velocity error, number of samples, by level
        self.tokens = 0  # of this process, that went through the network
        self._grad_norms, self._steps, self._start = 0.0, 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the last record, pauses left out."""
        return time.perf_counter() - self._start

    def add_losses(self, terms: dict[str, torch.Tensor]) -> None:
        """Add "loss" and "velocity_error" (n,) of samples of the levels "level" (n,)."""
        values = torch.stack([terms["loss"], terms["velocity_error"], torch.ones_like(terms["loss"])])
        self._sums.index_add_(1, terms["level"], values)

    def step_done(self, grad_norm: float) -> None:
        """Count a step."""
        self._grad_norms, self._steps = self._grad_norms + grad_norm, self._steps + 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of checkpoints and previews out."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def record(self, step: int, lr: float, epoch: float) -> dict[str, Any]:
        """One record of metrics.jsonl, and begin anew; a level without samples is null. Collective."""
        counted = torch.cat([self._sums.flatten(), self._sums.new_tensor([self.tokens])])
        *sums, tokens = parallel.all_reduce(counted).tolist()
        loss, error, count = torch.tensor(sums).reshape(3, -1).tolist()
        values = {"step": step, "loss": sum(loss) / sum(count), "grad_norm": self._grad_norms / self._steps, "lr": lr}
        for name, sums in (("loss", loss), ("velocity_error", error)):
            for level, (total, number) in enumerate(zip(sums, count, strict=True)):
                values[f"{name}_level_{level}"] = total / number if number else None
        values["epoch"] = epoch
        values["step_time"] = self.seconds / self._steps
        values["images_per_second"] = self.batch_size * self._steps / self.seconds
        values["tokens_per_second"] = tokens / self.seconds
        self._sums.zero_()
        self.tokens = 0
        self._grad_norms, self._steps, self._start = 0.0, 0, time.perf_counter()
        return values


class LevelMeter:
    """Running average of the velocity errors of each level over t, which elastic levels are compared by.

    A step counts 1 / WINDOW less with each step after it. The sums of this process are those of its own samples; those
    of the run are in its checkpoints.

    Args:
        num_levels: levels of the network
        device:     where the errors are
        stored:     what `read` returned before an interruption; on one process alone
    """

    WINDOW = 1000  # steps

    def __init__(self, num_levels: int, device: torch.device, stored: LevelErrors | None = None) -> None:
        self._sums = torch.zeros(2, num_levels * BINS, device=device)  # of errors, and of samples
        if stored is not None:
            self._sums += torch.tensor([stored.sums, stored.counts], device=device).flatten(1)

    def add(self, terms: dict[str, torch.Tensor], t: torch.Tensor) -> None:
        """Add a step: "velocity_error" (n,) of samples of the levels "level" (n,), at times t (n,) on the CPU."""
        errors, level = terms["velocity_error"], terms["level"]
        place = (t * BINS).long().clamp(max=BINS - 1).to(level.device, non_blocking=True)
        self._sums *= 1 - 1 / self.WINDOW
        self._sums.index_add_(1, level * BINS + place, torch.stack([errors, torch.ones_like(errors)]))

    def read(self) -> LevelErrors:
        """The errors of all processes' samples. Collective."""
        sums = parallel.all_reduce(self._sums.clone()).unflatten(1, (-1, BINS))
        return LevelErrors(*sums.tolist())


# ---------------------------------------------------------------------------------------------------------------
# Pictures


IMAGENET_CLASSES = (207, 360, 387, 974, 88, 979, 417, 279)  # DiT's selection


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


def shown_classes(num_classes: int) -> tuple[int, ...]:
    """The classes to draw where nobody chooses: DiT's eight of ImageNet, else the first ten."""
    return IMAGENET_CLASSES if num_classes == 1000 else tuple(range(min(10, num_classes)))
