"""Cost and use of guidance: the null label at the sample's level, or at a coarser one.

    python -m benchmarks.guidance digits --ckpt results/demo
    python -m benchmarks.guidance cifar-16.zip --ckpt results/quality/16x16/ppf2-0/003000.pt --classifier cifar-16.pt

Draws the same noise and labels with each setting, all classes equally often, and measures the Frechet distance (with
its standard error) and the class accuracy in a classifier's features against GMACs per image:

    cfg          the null label at the sample's level
    null-level   the null label at level 0
    weak-level   the sample's label at level 0, a weak model (autoguidance, arXiv:2406.02507); level 0 itself has cfg

Level 0 must know all times, or the last two guide by what it never learned. The weights are a checkpoint of train.py or
a network that benchmarks/quality.py kept. What was measured is in --out, and is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_utils as cli
from benchmarks.quality import Judge, once
from benchmarks.recipes import open_network
from metrics.classifiers import load_classifier
from metrics.images import open_images
from pipeline import Pipeline
from runtime.errors import run_script, user_input
from runtime.logs import to_uint8
from runtime.rng import Stream, sample_generators
from sweep import an_interval
from transport import ODE, Guidance
from transport.wrappers import EvaluationCounter, Wrapper
from weights.layouts import fingerprint

KINDS = ("cfg", "null-level", "weak-level")
HEADS = ("guidance", "scale", "interval", "NFE", "GMACs/image", "distance", "class accuracy")


class SampleLabels(Wrapper):
    """A network that has the sample's label in both groups of a guided call, where guidance has the null label."""

    def __call__(self, x: Any, t: Any, y: Any, level: Any = 0) -> Any:
        return self.model(x, t, [y[0]] * len(y) if isinstance(level, Sequence) else y, level=level)


class Pixels(NamedTuple):
    """The reference, as `Judge` takes it: uint8 (N, H, W, 3)."""

    pixels: np.ndarray
    num_training: int


@torch.no_grad()
def draw(
    pipe: Pipeline, kind: str, solver: ODE, guidance: Guidance, number: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, EvaluationCounter]:
    """Images (N, 3, H, W) uint8 with their labels (N,), and the count of the evaluations."""
    labels, images = torch.arange(number) % pipe.model.num_classes, []
    counted = pipe.counted()
    guided = counted._with_model(SampleLabels(counted.model)) if kind == "weak-level" else counted
    for indices in torch.arange(number).split(250):
        generators = sample_generators(seed, indices.tolist(), Stream.SAMPLES)
        x1 = guided.latents(labels[indices], solver, guidance, generators)
        images.append(to_uint8(pipe.autoencoder.decode(x1)).expand(-1, 3, -1, -1))
    return torch.cat(images), labels, counted.model


def measure(
    pipe: Pipeline, judge: Judge, kind: str, scale: float, interval: tuple[float, float] | None, args: Any
) -> dict[str, float]:
    """Cost and scores of a setting."""
    guidance = Guidance(scale, interval=interval, null_level=None if kind == "cfg" else 0)
    images, labels, cost = draw(pipe, kind, ODE(num_steps=args.steps), guidance, args.num_samples)
    return {**judge(images, labels), "nfe": cost.nfe(len(images)), "gmacs": cost.gmacs(len(images))}


def table(results: dict[tuple[str, float, tuple[float, float] | None], dict[str, float]]) -> str:
    """Markdown of all settings; the best of each kind of guidance, interval by interval, is marked."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---|---|---|---:|---:|---|---|"]
    for (kind, scale, interval), found in results.items():
        rivals = [other["distance"] for (k, _, i), other in results.items() if (k, i) == (kind, interval)]
        distance = f"{found['distance']:.3f} +- {found['distance_error']:.3f}"
        cells = [kind, f"{scale:g}", "-".join(f"{t:g}" for t in interval or ()), f"{found['nfe']:g}"]
        cells += [f"{found['gmacs']:.4g}", f"**{distance}**" if found["distance"] == min(rivals) else distance]
        lines.append("| " + " | ".join([*cells, f"{found['accuracy']:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.guidance", description="Quality of guidance against its arithmetic.")
    add = parser.add_argument
    add("reference", metavar="REF", help="images to compare with, as for evaluate.py")
    add(
        "--ckpt", type=Path, required=True, help="a run's folder or a checkpoint, or a network of benchmarks/quality.py"
    )
    add("--classifier", type=Path, help="weights of evaluate.py classifier (default: the digits' own)")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of guidance (default: all)")
    add("--scales", type=cli.positive_float, nargs="+", default=[1.25, 1.5, 2.0, 2.5], help="guidance scales")
    add(
        "--intervals",
        type=an_interval,
        nargs="+",
        default=[None, (0.3, 0.8)],
        metavar="LOW,HIGH",
        help="times between which they guide; none for all (default: none 0.3,0.8)",
    )
    add("--num-samples", type=cli.number(int, 20), default=1000, help="samples of each setting")
    add("--steps", type=cli.positive_int, default=25, help="ab2 steps")
    add("--out", type=Path, default=Path("results/guidance"), help="folder of the measurements and the table")
    return parser


def settings_of(args: argparse.Namespace) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Kinds, scales and intervals; without guidance there is one setting."""
    guided = product(args.kinds, args.intervals, args.scales)
    return [("none", 1.0, None), *((kind, scale, interval) for kind, interval, scale in guided)]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark with these command-line arguments."""
    args = build_parser().parse_args(argv)
    with user_input():
        pipe, images = open_network(args.ckpt), open_images(args.reference)
        if pipe.model.num_levels == 1 and set(args.kinds) != {"cfg"}:
            raise ValueError(f"{args.ckpt} has one level, where all guidance is cfg: give --kinds cfg")
        size = tuple(pipe.image_size)
        classifier = load_classifier("digits" if args.classifier is None else "cifar", size, path=args.classifier)
        pixels = images.read(range(len(images)))
    judge, results = Judge(classifier, Pixels(pixels, len(pixels))), {}
    weights = fingerprint(getattr(pipe.model, "inner", pipe.model))[:16]
    reference = hashlib.sha256(pixels.tobytes()).hexdigest()[:16]
    for kind, scale, interval in settings_of(args):
        key = f"{weights} {reference} {args.num_samples} samples {args.steps} steps {kind} {scale:g} {interval}"
        results[kind, scale, interval] = once(
            args.out / "results.json",
            key,
            lambda setting=(kind, scale, interval): measure(pipe, judge, *setting, args),
        )
        print(table(results).splitlines()[-1], flush=True)
    (args.out / "guidance.md").write_text(table(results))
    print(f"\n{table(results)}")


if __name__ == "__main__":
    run_script(main)
