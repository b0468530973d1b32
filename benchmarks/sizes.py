"""Images of sizes that a network was trained on, and of others: rotary positions beside sine-cosine ones, in pixels.

    python -m benchmarks.sizes cifar10-32x32.zip --image-size 16 --steps 1500

Trains small pyramids of equal cost: `ppf2` with sine-cosine positions and `ppfit2` with rotary ones on squares, and
`ppfit2-shapes` on squares, tall and wide images of at most as many tokens. Each draws images of the sizes of training,
of a milder aspect ratio, and squares of 1.25 and 1.5 times the side, where the rotary positions are scaled in each of
the ways of `positions.RopeScaling`, and the sine-cosine ones run on or are stretched over the larger grid.

Every set of samples is compared with real images of its size, cropped as in training. Both are resized to the side of
the largest square, for a classifier that was trained on real images of all sizes resized in this way: its features give
the Frechet distance, its probabilities the class accuracy. Runs, measurements and the classifier are kept in --out, and
the same command makes what is missing. The tables go to OUT/sizes.md, the curves to OUT/sizes.png, a picture of every
set of samples, one row per class, beside them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import train_utils as cli
from benchmarks.quality import Judge, draw, mean_and_error, once
from benchmarks.recipes import RECIPES, SHAPES, SQUARE, Data, VelocityNetwork, add_training_args, open_study, train_run
from metrics.classifiers import Classifier, load_classifier, train_classifier
from positions import RopeScaling, sincos_position_embedding
from runtime.errors import run_script
from runtime.files import complete_file
from runtime.logs import save_grid
from transport import Guidance

Size = tuple[int, int]  # (H, W)

INSIDE = (*SHAPES, (4, 3), (3, 4))  # in quarters of --image-size: the last two are in no training
BEYOND = ((5, 5), (6, 6))
REFERENCES = 10_000  # real images of each size

# ---------------------------------------------------------------------------------------------------------------
# Positions beyond the sizes of training

AS_TRAINED = "as trained"
SINCOS = (AS_TRAINED, "stretched")
FADING = "ntk, fading"
ROTARY: dict[str, RopeScaling] = {
    AS_TRAINED: RopeScaling("normal"),
    "linear": RopeScaling("linear"),
    "ntk": RopeScaling("ntk"),
    "ntk-parts": RopeScaling("ntk-parts"),
    "yarn": RopeScaling("yarn"),
    FADING: RopeScaling("ntk"),
    f"{AS_TRAINED}, log": RopeScaling("normal", attention_scale="log"),
    "ntk, log": RopeScaling("ntk", attention_scale="log"),
}


def positions_of(network: VelocityNetwork) -> tuple[str, ...]:
    """The ways in which a network's positions go beyond its sizes."""
    return tuple(ROTARY) if network.inner.position == "rope" else SINCOS


def at_size(network: VelocityNetwork, size: Size, positions: str) -> VelocityNetwork:
    """A copy of a network, for samples of another size.

    Args:
        size:      (H, W) of the samples
        positions: one of `positions_of` the network
    """
    network = copy.deepcopy(network)
    inner, trained = network.inner, network.inner.input_size
    inner.input_size = size
    if inner.position == "rope":
        inner.rope_scaling = ROTARY[positions]
        if positions == FADING:
            inner.register_forward_pre_hook(partial(fade, trained=inner.train_tokens**0.5))
        return network
    # The coordinates of each level's tokens, in finest tokens, shrunk to the range of training ("stretched") or not.
    unit = inner.position_unit
    for level, patch in enumerate(inner.patch_sizes):
        coordinates = []
        for length, before, step, fine in zip(size, trained, patch, unit, strict=True):
            shrunk = min(1.0, before / length) if positions == "stretched" else 1.0
            coordinates.append(torch.arange(length // step, dtype=torch.float64) * (step / fine * shrunk))
        setattr(inner, f"pos_embed_{level}", sincos_position_embedding(inner.hidden_size, *coordinates))
    return network


def fade(inner: nn.Module, inputs: tuple[torch.Tensor, ...], trained: float) -> None:
    """Scale by s^(2 tau^2), tau = 1 - t, instead of s: by more than s in noise, and not at all in the end.

    DyPE (arXiv:2510.20766) with both of its constants 2. The angles depend on the ratio of a square's side to that of
    training (in tokens), so the latter is moved before every evaluation, whose samples have one time.
    """
    side = inner.input_size[0] / inner.position_unit[0]
    scale = (side / trained) ** (2 * (1 - inputs[1][0].item()) ** 2)
    inner.train_tokens = (side / scale) ** 2


# ---------------------------------------------------------------------------------------------------------------
# Real images


class References(NamedTuple):
    """Real images as `Judge` takes them."""

    pixels: np.ndarray  # (n, S, S, 3) uint8
    num_training: int  # the first so many are those that samples are compared with


def stretch(images: torch.Tensor, side: int) -> torch.Tensor:
    """Images (N, 3, H, W) uint8 as squares of a side, whatever their aspect ratio."""
    if images.shape[-2:] == (side, side):
        return images
    resized = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


class Judges:
    """Scores of images of any size against real ones of that size.

    Args:
        data:   the real images
        folder: keeps the classifier
        epochs: of the classifier's training
    """

    def __init__(self, data: Data, folder: Path, epochs: int) -> None:
        self.data = data
        self.side = data.size_of(BEYOND[-1])[0]
        file = folder / "classifier-of-sizes.pt"
        if not file.exists():
            seen = data.num_training
            train_classifier("cifar", self._of_all_sizes, data.labels[:seen], epochs).save(file)
        self.classifier: Classifier = load_classifier("cifar", (self.side, self.side), path=file)
        self.judges: dict[Size, Judge] = {}

    def real(self, size: Size, numbers: np.ndarray) -> torch.Tensor:
        """Real images (n, 3, S, S) uint8, cropped to a size and resized for the classifier."""
        images = torch.from_numpy(self.data.pixels_of(size, numbers)).permute(0, 3, 1, 2)
        return torch.cat([stretch(part, self.side) for part in images.split(1000)])

    def _of_all_sizes(self, numbers: np.ndarray) -> np.ndarray:
        """Real images (n, S, S, 3) uint8, one after the other of each size."""
        shapes = (*INSIDE, *BEYOND)
        pixels = np.empty((len(numbers), self.side, self.side, 3), np.uint8)
        for index, shape in enumerate(shapes):
            rows = slice(index, None, len(shapes))
            pixels[rows] = self.real(self.data.size_of(shape), numbers[rows]).permute(0, 2, 3, 1).numpy()
        return pixels

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The scores of `Judge` for images (N, 3, H, W) uint8."""
        size = tuple(images.shape[-2:])
        if size not in self.judges:
            numbers = np.arange(min(REFERENCES, self.data.num_training))
            pixels = self.real(size, numbers).permute(0, 2, 3, 1).numpy()
            self.judges[size] = Judge(self.classifier, References(pixels, len(pixels)))
        return self.judges[size](stretch(images, self.side), labels)

    def held_out(self, size: Size, number: int) -> dict[str, float]:
        """The scores of real images that no network has seen."""
        numbers = np.arange(self.data.num_training, len(self.data.labels))[:number]
        images = torch.from_numpy(self.data.pixels_of(size, numbers)).permute(0, 3, 1, 2)
        return self(images, torch.from_numpy(self.data.labels[numbers]))


# ---------------------------------------------------------------------------------------------------------------
# Measurements

Scores = dict[str, dict[str, dict[str, float]]]  # by positions, then by size


def named(size: Size) -> str:
    """A size in words."""
    return "x".join(map(str, size))


def training_gmacs(name: str, network: VelocityNetwork, data: Data) -> float:
    """GMACs of one image in training, forward alone, on average over its levels and shapes."""
    shares = network.transport.level_probabilities()
    sizes = [data.size_of(shape) for shape in RECIPES[name].shapes]
    costs = [share * network.macs(level, size) for size in sizes for level, share in enumerate(shares)]
    return sum(costs) / len(sizes) / 1e9


def measure_run(
    name: str, seed: int, network: VelocityNetwork, judges: Judges, folder: Path, args: argparse.Namespace
) -> Scores:
    """The scores of a run's samples; kept in OUT/sizes.json."""

    def sample(size: Size, positions: str) -> dict[str, float]:
        placed = at_size(network, size, positions)
        images, labels, gmacs = draw(
            placed, placed.transport, Guidance(args.guidance), args.num_samples, args.sampling_steps, seed
        )
        shown = labels[:100].argsort(stable=True)  # a row for each class
        picture = folder / f"{name}-{seed}-{named(size)}-{positions.replace(', ', '-').replace(' ', '-')}.png"
        save_grid(images[shown].float() / 127.5 - 1, picture, max(1, len(shown) // network.num_classes))
        return {**judges(images, labels), "gmacs": gmacs}

    settings = f"{args.num_samples} samples {args.sampling_steps} steps guidance {args.guidance:g}"
    scores: Scores = {}
    for shape in (*INSIDE, *BEYOND):
        for positions in positions_of(network) if shape in BEYOND else (default_positions(network, shape),):
            size = judges.data.size_of(shape)
            key = f"{name} seed {seed} steps {args.steps} {settings} {named(size)} {positions}"
            make = partial(sample, size, positions)
            scores.setdefault(positions, {})[named(size)] = once(folder / "sizes.json", key, make)
    return scores


def default_positions(network: VelocityNetwork, shape: tuple[int, int]) -> str:
    """Positions for a shape of at most as many tokens as in training: sine-cosine ones are stretched."""
    return AS_TRAINED if network.inner.position == "rope" or max(shape) <= max(SQUARE) else "stretched"


# ---------------------------------------------------------------------------------------------------------------
# Tables

Results = Mapping[tuple[str, int], Scores]


def cell(results: Results, name: str, positions: str, size: str) -> str:
    """Distance and class accuracy of a run, over its seeds."""
    scores = [run[positions][size] for (run_name, _), run in results.items() if run_name == name]
    distance = mean_and_error([s["distance"] for s in scores], [s["distance_error"] for s in scores])
    return f"{distance} / {np.mean([s['accuracy'] for s in scores]):.2f}"


def tables(
    results: Results, real: Mapping[str, Mapping[str, float]], gmacs: Mapping[str, float], inside: Sequence[str]
) -> str:
    """Markdown: sizes of at most as many tokens as the square of training; then the larger ones by positions.

    Args:
        results: scores of each run and seed
        real:    scores of held-out images by size
        gmacs:   of an image in training, by run
        inside:  the sizes of the first table; the second has the others
    """
    names = list(dict.fromkeys(name for name, _ in results))
    beyond = [size for size in real if size not in inside]
    first = {name: next(run for (other, _), run in results.items() if other == name) for name in names}

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    def real_row(*before: str, sizes: Sequence[str]) -> str:
        return row(*before, *(f"{real[size]['distance']:.3f} / {real[size]['accuracy']:.2f}" for size in sizes))

    lines = ["Frechet distance / class accuracy, sizes (height x width) of at most as many tokens as the square:", ""]
    lines += [row("run", "training GMACs per image", *inside), row(*["---"] * (2 + len(inside)))]
    for name in names:
        found = [next(p for p in first[name] if size in first[name][p]) for size in inside]
        cells = [cell(results, name, positions, size) for positions, size in zip(found, inside, strict=True)]
        lines.append(row(name, f"{gmacs[name]:.4f}", *cells))
    lines += [real_row("held-out images", "", sizes=inside), ""]
    lines += ["Larger squares:", "", row("run", "positions", *beyond), row(*["---"] * (2 + len(beyond)))]
    for name in names:
        for positions, by_size in first[name].items():
            if all(size in by_size for size in beyond):
                lines.append(row(name, positions, *(cell(results, name, positions, size) for size in beyond)))
    lines.append(real_row("held-out images", "", sizes=beyond))
    return "\n".join(lines) + "\n"


def plot(results: Results, inside: Sequence[str], beyond: Sequence[str], path: Path) -> None:
    """A panel of the distances at the sizes within the tokens of training, and one for each larger size."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(beyond), width_ratios=[1.2, *[1] * len(beyond)])
    for number, name in enumerate(dict.fromkeys(name for name, _ in results)):
        runs = [run for (other, _), run in results.items() if other == name]
        style = {"marker": "osv^D"[number % 5], "color": f"C{number}", "capsize": 2, "label": name}
        for axes, sizes in ((left, inside), *((axes, [size]) for axes, size in zip(others, beyond, strict=True))):
            points = {
                (size if axes is left else positions): [run[positions][size] for run in runs]
                for size in sizes
                for positions in runs[0]
                if size in runs[0][positions]
            }
            means = [np.mean([score["distance"] for score in scores]) for scores in points.values()]
            errors = [
                np.std([score["distance"] for score in scores], ddof=1) / len(scores) ** 0.5
                if len(scores) > 1
                else scores[0]["distance_error"]
                for scores in points.values()
            ]
            axes.errorbar(list(points), means, errors, linestyle="", **style)
    for axes, title in zip((left, *others), ("tokens of training", *beyond), strict=True):
        axes.set(title=title, ylabel="Frechet distance")
        axes.tick_params("x", rotation=0 if axes is left else 60)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---------------------------------------------------------------------------------------------------------------
# The command


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.sizes", description="Images of many sizes, by positions, in pixels.")
    add_training_args(parser)
    add = parser.add_argument
    runs = ["ppf2", "ppfit2-shapes", "ppfit2"]
    add("--runs", nargs="+", choices=runs, default=runs, metavar="RUN", help="of: " + ", ".join(runs))
    add("--seeds", type=cli.natural_int, nargs="+", default=[0], help="seeds of each run, of training and samples")
    add("--steps", type=cli.positive_int, default=1500, help="optimizer steps")
    add("--guidance", type=cli.positive_float, default=2.5, metavar="SCALE", help="guidance scale")
    add("--num-samples", type=cli.positive_int, default=500, help="samples of each set")
    add("--sampling-steps", type=cli.positive_int, default=20, help="ab2 steps of a sample")
    add("--classifier-epochs", type=cli.positive_int, default=3, help="epochs of the classifier's training")
    add("--out", type=Path, default=Path("results/sizes"), help="folder for runs, measurements, tables and pictures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.image_size % 16:
        parser.error(
            f"--image-size must be a multiple of 16, got {args.image_size}: three quarters of it are a side too"
        )
    data, folder = open_study(args)
    judges = Judges(data, folder, args.classifier_epochs)
    inside, beyond = ([named(data.size_of(shape)) for shape in shapes] for shapes in (INSIDE, BEYOND))
    real = {}
    for shape in (*INSIDE, *BEYOND):
        size = data.size_of(shape)
        key = f"real {args.num_samples} {named(size)}"
        real[named(size)] = once(folder / "sizes.json", key, partial(judges.held_out, size, args.num_samples))
    results: dict[tuple[str, int], Any] = {}
    gmacs: dict[str, float] = {}
    for seed in args.seeds:
        for name in args.runs:
            network = train_run(name, seed, args.steps, data, folder, args.batch_size, args.lr)
            gmacs[name] = training_gmacs(name, network, data)
            results[name, seed] = measure_run(name, seed, network, judges, folder, args)
            with complete_file(folder / "sizes.md") as temporary:
                temporary.write_text(tables(results, real, gmacs, inside))
    plot(results, inside, beyond, folder / "sizes.png")
    print((folder / "sizes.md").read_text())


if __name__ == "__main__":
    run_script(main)
