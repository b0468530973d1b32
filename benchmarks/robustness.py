"""Is a small D of PFGM++ more robust? Small pyramids trained on digits, alike but for D, and disturbed in sampling.

    python -m benchmarks.robustness
    python -m benchmarks.robustness --aug-dims 8 inf --seeds 0 --steps 200 --num-samples 500

Samples are disturbed as in PFGM++ (arXiv:2302.04265, section 5.2 and appendix): Gaussian noise of alpha sigma_t before
every step, fewer steps, weights rounded to few bits. Each set is scored in the features of the digits' classifier:
class accuracy, and Frechet distance to the digits. A run and a score are kept in --out, and the same command makes
what is missing. The tables go to OUT/robustness.md, the curves to OUT/robustness.png.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

import train_utils as cli
from benchmarks.quality import mean_and_error, once
from data.datasets import Digits
from metrics.classifiers import load_classifier
from metrics.features import Extractor
from metrics.statistics import Gaussian, Moments, frechet_distance
from pipeline import Pipeline
from runtime.errors import run_script
from runtime.files import complete_file
from runtime.logs import to_uint8
from runtime.rng import Stream, sample_generators
from train import train
from transport import randn
from transport.solvers import solve_ode

STEPS = 25  # of a sample that is not disturbed by another number of them
BATCH = 250  # samples solved together


class Disturbance(NamedTuple):
    """A way to disturb sampling: noise before every step, another number of steps, or weights of few bits."""

    alpha: float = 0.0
    steps: int = STEPS
    bits: int | None = None  # None leaves the weights as they are


STUDIES: dict[str, tuple[str, dict[str, Disturbance]]] = {
    "alpha": ("noise before every step, alpha", {f"{a:g}": Disturbance(alpha=a) for a in (0.0, 0.1, 0.2, 0.4)}),
    "steps": ("steps of heun2", {str(n): Disturbance(steps=n) for n in (5, 10, 25, 50)}),
    "bits": (
        "bits of a weight",
        {"32": Disturbance(), **{str(b): Disturbance(bits=b) for b in (8, 6, 5, 4)}},
    ),
}

# ---------------------------------------------------------------------------------------------------------------
# Runs and samples


def label(aug_dim: float | None) -> str:
    """D as the tables show it."""
    return "inf" if aug_dim is None else f"{aug_dim:g}"


def train_run(aug_dim: float | None, seed: int, steps: int, batch_size: int, out: Path) -> Path:
    """Train the run of a D and a seed, or what is missing of it; returns its folder."""
    folder = out / f"D-{label(aug_dim)}-seed-{seed}-steps-{steps}"
    flags = ["--data-path", "digits", "--model", "PPF-T-2", "--max-steps", steps, "--global-batch-size", batch_size]
    flags += ["--lr", "1e-3", "--warmup-steps", min(50, steps), "--ema-decay", "0.995", "--num-workers", 0]
    flags += ["--sample-every", 0, "--ckpt-every", steps, "--log-every", max(1, steps // 10), "--global-seed", seed]
    train([str(flag) for flag in (*flags, "--aug-dim", label(aug_dim), "--run-dir", folder)])
    return folder


def images_per_second(folder: Path) -> float:
    """Speed of a run: the median over its records."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(record["images_per_second"] for record in records)


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> None:
    """Round the weights of attention and MLP to 2^bits values from the least to the largest of each tensor, in place.

    Norms, embeddings, modulation and heads stay, as published.
    """
    for name, weight in model.blocks.named_parameters():
        if weight.ndim == 2 and "adaLN" not in name:
            low, high = weight.aminmax()
            step = (high - low) / (2**bits - 1)
            weight.copy_(((weight - low) / step).round() * step + low)


@torch.no_grad()
def draw(pipe: Pipeline, disturbance: Disturbance, number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples (N, 1, 8, 8) in about [-1, 1] with their labels (N,), all classes equally often; noise by seed alone."""
    model, schedule = pipe.model, pipe.transport.schedule
    if disturbance.bits is not None:
        model = copy.deepcopy(model)
        round_weights(model, disturbance.bits)
    labels, samples = torch.arange(number) % model.num_classes, []
    intervals = schedule.intervals(*pipe.transport.sample_interval)
    counts = schedule.share_steps(disturbance.steps, intervals)
    for rows in torch.arange(number).split(BATCH):
        generators = sample_generators(seed, rows.tolist(), Stream.SAMPLES)
        x = pipe.transport.noise.sample((len(rows), *model.sample_shape), generators)
        for interval, count in zip(intervals, counts, strict=True):

            def velocity(
                t: torch.Tensor, x: torch.Tensor, level: int = interval.level, y: torch.Tensor = labels[rows]
            ) -> torch.Tensor:
                return model(x, t.to(x.dtype).expand(len(x)), y, level=level)

            grid = torch.linspace(interval.start, interval.stop, count + 1, dtype=torch.float64)
            for start, stop in pairwise(grid.tolist()):
                if disturbance.alpha:
                    sigma = pipe.transport.path.coefficients(torch.tensor(start)).sigma
                    x = x + disturbance.alpha * sigma * randn(x.shape, generators)
                x = solve_ode(velocity, x, start, stop, "heun2", 1, 0.0, 0.0)
        samples.append(x)
    return torch.cat(samples), labels


# ---------------------------------------------------------------------------------------------------------------
# Scores and tables


def gaussian_of(features: torch.Tensor) -> Gaussian:
    """Mean and covariance of features (N, d)."""
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments.gaussian()


def judge_of(extractor: Extractor) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
    """A function that scores samples (N, 1, 8, 8) with labels (N,) by a classifier's features."""
    reference = gaussian_of(extractor(rgb(Digits().images)).pool)

    def judge(samples: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        features = extractor(rgb(samples))
        correct = features.probabilities.argmax(1) == labels
        return {
            "accuracy": correct.double().mean().item(),
            "distance": frechet_distance(gaussian_of(features.pool), reference),
        }

    return judge


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Grey images (N, 1, H, W) in [-1, 1] as (N, 3, H, W) uint8."""
    return to_uint8(images).expand(-1, 3, -1, -1)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


Scores = dict[tuple[str, int], dict[str, dict[str, dict[str, float]]]]  # by D and seed, study and value


def report(scores: Scores, speeds: dict[tuple[str, int], float], seeds: Sequence[int]) -> str:
    """Markdown of all studies: rows are D, cells the mean over seeds with its standard error."""
    dims = list(dict.fromkeys(dim for dim, _ in scores))
    lines = []
    for study, (text, cells) in STUDIES.items():
        for score, title in (("distance", "Frechet distance"), ("accuracy", "Class accuracy")):
            rows = [
                [dim, *(mean_and_error([scores[dim, seed][study][cell][score] for seed in seeds]) for cell in cells)]
                for dim in dims
            ]
            lines += [f"{title} by {text}:", "", markdown(["D", *cells], rows), ""]
    rows = [[dim, mean_and_error([speeds[dim, seed] for seed in seeds])] for dim in dims]
    return "\n".join([*lines, "Training:", "", markdown(["D", "images/s"], rows), ""])


def plot(scores: Scores, seeds: Sequence[int], path: Path) -> None:
    """A column for each study: distance above, accuracy below, with standard errors over seeds."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(STUDIES), squeeze=False)
    for column, (study, (text, cells)) in enumerate(STUDIES.items()):
        for axes, score in zip(panels[:, column], ("distance", "accuracy"), strict=True):
            for dim in dict.fromkeys(dim for dim, _ in scores):
                values = torch.tensor([[scores[dim, seed][study][cell][score] for cell in cells] for seed in seeds])
                error = values.std(0) / len(seeds) ** 0.5 if len(seeds) > 1 else None
                axes.errorbar(list(cells), values.mean(0), error, marker="o", capsize=2, label=f"D = {dim}")
            axes.set(xlabel=text, ylabel={"distance": "Frechet distance", "accuracy": "class accuracy"}[score])
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---------------------------------------------------------------------------------------------------------------
# The command


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.robustness", description="Robustness of PFGM++ by its D, on digits.")
    add = parser.add_argument
    dims = [8.0, 32.0, 128.0, None]
    text = "augmented dimensions; inf is Gaussian noise (default: 8 32 128 inf)"
    add("--aug-dims", type=cli.augmented_dimension, nargs="+", default=dims, metavar="D", help=text)
    add("--seeds", type=cli.natural_int, nargs="+", default=[0, 1, 2], help="seeds of each D, of training and samples")
    add("--steps", type=cli.positive_int, default=700, help="optimizer steps of a run")
    add("--batch-size", type=cli.positive_int, default=128, help="images per step")
    add("--num-samples", type=cli.positive_int, default=1000, help="samples of a score")
    add("--out", type=Path, default=Path("results/robustness"), help="folder for runs, scores, tables and curves")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study with these command-line arguments."""
    args = build_parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    judge = judge_of(load_classifier("digits", (8, 8), "cpu", None))
    scores: Scores = {}
    speeds: dict[tuple[str, int], float] = {}
    for seed in args.seeds:
        for aug_dim in args.aug_dims:
            key = label(aug_dim), seed
            folder = train_run(aug_dim, seed, args.steps, args.batch_size, args.out)
            pipe, speeds[key] = Pipeline.load(folder), images_per_second(folder)

            def score(disturbance: Disturbance, pipe: Pipeline = pipe, seed: int = seed) -> dict[str, float]:
                return judge(*draw(pipe, disturbance, args.num_samples, seed))

            file = folder / "robustness.json"
            scores[key] = {
                study: {
                    cell: once(file, f"{args.num_samples} samples, {tuple(how)}", lambda how=how: score(how))
                    for cell, how in cells.items()
                }
                for study, (_, cells) in STUDIES.items()
            }
    text = report(scores, speeds, args.seeds)
    with complete_file(args.out / "robustness.md") as temporary:
        temporary.write_text(text)
    plot(scores, args.seeds, args.out / "robustness.png")
    print(text)


if __name__ == "__main__":
    run_script(main)
