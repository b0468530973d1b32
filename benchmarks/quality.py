"""Does the pyramid keep SiT's quality? Small networks trained in pixels, alike but for their levels.

    python -m benchmarks.quality cifar10-32x32.zip --image-size 16 --steps 1500 --runs sit ppf2 ppf3 --seeds 0 1

Trains the runs that are asked for and measures each with its averaged weights: Frechet distance to the training images
and class accuracy in a classifier's features, precision and recall, the velocity's error over t on images that no run
has seen, the jump of the velocity at a level's edge, and at the end the seconds of a training step and of an image, the
runs in turns. Everything is resumable: a run, a measurement and the classifier are kept in --out, and the same command
makes what is missing. The tables go to OUT/quality.md, the curves to OUT/quality.png.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train_utils as cli
from benchmarks import recipes
from benchmarks.recipes import (
    RECIPES,
    Data,
    Recipe,
    VelocityNetwork,
    add_training_args,
    loss_of_step,
    open_study,
    train_run,
    transport_of,
)
from benchmarks.timing import machine, time_in_turns
from metrics.classifiers import Classifier, load_classifier, train_classifier
from metrics.scores import precision_recall
from metrics.statistics import Moments, frechet_distance
from pipeline import EvaluationCounter
from runtime.errors import run_script
from runtime.files import complete_file
from runtime.logs import save_grid, to_uint8
from runtime.rng import Stream, sample_generators
from runtime.speed import update_ema
from transport import Guidance, Sampler, Transport, create_transport

TIMED_IMAGES = 20
TIMES = tuple((i + 0.5) / 20 for i in range(20))  # of the velocity's error
# ---------------------------------------------------------------------------------------------------------------
# Measurements


@torch.no_grad()
def velocity_errors(network: VelocityNetwork, data: Data, number: int) -> dict[str, list[float]]:
    """Mean squared error of the velocity of held-out images at TIMES, at the schedule's level."""
    x1, y = data.batch(torch.arange(data.num_training, data.num_training + number))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1))
    schedule, errors, jumps = network.transport.schedule, [], []
    for time_ in TIMES:
        t = torch.full((number,), time_)
        x = network.transport.path.interpolate(x0, x1, t)
        output = network(x, t, y, level=int(schedule.level_at(t[:1])))
        errors.append((output - (x1 - x0)).square().mean().item())
    for number_of, edge in enumerate(schedule.level_edges):
        t = torch.full((number,), edge)
        x = network.transport.path.interpolate(x0, x1, t)
        before, after = (network(x, t, y, level=number_of + side) for side in (0, 1))
        jumps.append(((before - after).square().mean() / after.square().mean()).sqrt().item())
    return {"errors": errors, "jumps": jumps}


@torch.no_grad()
def draw(
    network: VelocityNetwork, transport: Transport, guidance: Guidance, number: int, steps: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Samples (N, 3, S, S) uint8 with their labels (N,), all classes equally often, and the GMACs of each."""
    labels = torch.arange(number) % network.num_classes
    counter = EvaluationCounter(network)
    counter.in_channels = 3
    guided, sampler, images = guidance.of(counter), Sampler(transport), []
    for indices in torch.arange(number).split(250):
        generators = sample_generators(seed, indices.tolist(), Stream.SAMPLES)
        x0 = transport.noise.sample((len(indices), *network.inner.sample_shape), generators)
        images.append(to_uint8(sampler.sample_ode(guided, x0, num_steps=steps, y=labels[indices])))
    return torch.cat(images), labels, counter.gmacs(number)


class Judge:
    """Scores of sets of images against the training images, in a classifier's features."""

    def __init__(self, classifier: Classifier, data: Data, neighbours: int = 5000) -> None:
        self.classifier = classifier
        reference = self._features(torch.from_numpy(data.pixels[: data.num_training]).permute(0, 3, 1, 2))[0]
        self.reference = self._gaussian(reference)
        self.neighbours = reference[:neighbours]

    def _features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [self.classifier(part) for part in images.split(500)]
        return torch.cat([part.pool for part in parts]), torch.cat([part.probabilities for part in parts])

    def _gaussian(self, features: torch.Tensor) -> Any:
        moments = Moments(features.shape[1])
        moments.add(features)
        return moments.gaussian()

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Distance with its standard error (jackknife over ten parts), class accuracy, precision, recall."""
        features, probabilities = self._features(images)
        distance = frechet_distance(self._gaussian(features), self.reference)
        parts = torch.arange(len(features)) // 10 % 10  # labels repeat, and each part has all classes
        left_out = [frechet_distance(self._gaussian(features[parts != part]), self.reference) for part in range(10)]
        spread = float(np.sqrt(9 / 10 * np.sum((np.array(left_out) - np.mean(left_out)) ** 2)))
        precision, recall = precision_recall(self.neighbours, features[: len(self.neighbours)])
        return {
            "distance": float(distance),
            "distance_error": spread,
            "accuracy": (probabilities.argmax(1) == labels).double().mean().item(),
            "precision": float(precision),
            "recall": float(recall),
        }


def open_judge(data: Data, folder: Path, epochs: int) -> Judge:
    """The judge of a study, whose classifier is trained on the images so many epochs, once for a folder."""
    file, seen = folder / "classifier.pt", data.num_training
    if not file.exists():
        train_classifier("cifar", data.pixels[:seen].__getitem__, data.labels[:seen], epochs).save(file)
    return Judge(load_classifier("cifar", data.pixels.shape[1:3], path=file), data)


def held_out_scores(judge: Judge, data: Data, number: int, folder: Path) -> dict[str, float]:
    """Scores of so many real images that no network has seen; kept in OUT/results.json."""
    images = torch.from_numpy(data.pixels[data.num_training :][:number]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(data.labels[data.num_training :][:number])
    return once(folder / "results.json", f"real {number}", lambda: judge(images, labels))


def once(file: Path, key: str, make: Any) -> Any:
    """A measurement by its key in a JSON file, made if it is not there."""
    found = json.loads(file.read_text()) if file.exists() else {}
    if key not in found:
        value = make()
        found = json.loads(file.read_text()) if file.exists() else {}
        found[key] = value
        with complete_file(file) as temporary:
            temporary.write_text(json.dumps(found, indent=1))
    return found[key]


def measure_run(
    name: str, seed: int, network: VelocityNetwork, judge: Judge, data: Data, folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that the tables say of a run; kept in OUT/results.json."""
    file, key = folder / "results.json", f"{name} seed {seed} steps {args.steps}"
    result = once(file, f"{key} velocity", lambda: velocity_errors(network, data, args.num_held_out))

    def sample(setting: str, transport: Transport) -> dict[str, Any]:
        guidance = guidance_of(setting, network.num_levels)
        images, labels, gmacs = draw(network, transport, guidance, args.num_samples, args.sampling_steps)
        if transport is network.transport:
            shown = labels[:100].argsort(stable=True)  # a row for each class
            picture = folder / f"{name}-{seed}-guidance-{setting.replace(',', '-')}.png"
            save_grid(images[shown].float() / 127.5 - 1, picture, len(shown) // data.num_classes)
        return {**judge(images, labels), "gmacs": gmacs}

    settings = f"{args.num_samples} samples {args.sampling_steps} steps"
    result["samples"] = {}
    for setting in args.guidance:
        if network.num_levels > 1 or "," not in setting:
            make = partial(sample, setting, network.transport)
            result["samples"][setting] = once(file, f"{key} {settings} guidance {setting}", make)
    result["moved"], best = {}, best_setting(result["samples"])
    for edge in args.moved_edges if network.num_levels == 2 else ():
        make = partial(sample, best, create_transport(level_edges=[edge]))
        result["moved"][f"{edge:g}"] = once(file, f"{key} {settings} guidance {best} edge {edge:g}", make)
    return result


def training_steps(
    recipe: Recipe, network: VelocityNetwork, data: Data, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """Make a step of training each time that the next loss is asked for."""
    optimizer, ema = torch.optim.AdamW(network.parameters(), fused=True), copy.deepcopy(network)
    for step in itertools.count():
        loss = loss_of_step(recipe, network, data, step, 0, args.batch_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, network, 0.999)
        yield loss


def measure_costs(names: Sequence[str], data: Data, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of a training step and of an image for each run, which take turns; costs do not depend on weights."""
    size, timed = data.pixels.shape[1], {}
    for name in names:
        recipe = RECIPES[name]
        network = VelocityNetwork(recipe, size, data.num_classes, transport_of(recipe))
        guidance = guidance_of(args.guidance[0], network.num_levels)
        timed[name, "step"] = partial(next, training_steps(recipe, network, data, args))
        timed[name, "image"] = partial(draw, network, network.transport, guidance, TIMED_IMAGES, args.sampling_steps)
    seconds = time_in_turns(timed, args.repeats, torch.device("cpu"), "seconds")
    return {
        name: {"step": seconds[name, "step"].median, "image": seconds[name, "image"].median / TIMED_IMAGES}
        for name in names
    }


def guidance_setting(text: str) -> str:
    """Argparse type for a value of --guidance."""
    scales = [cli.positive_float(scale) for scale in text.split(",")]
    if len(scales) > 2:
        raise argparse.ArgumentTypeError(f"{text} names more than two scales: the coarsest level's, the others'")
    return ",".join(f"{scale:g}" for scale in scales)


def guidance_of(setting: str, num_levels: int) -> Guidance:
    """The guidance that --guidance names: one scale, or that of the coarsest level and that of the others."""
    first, *others = (float(scale) for scale in setting.split(","))
    return Guidance((first, *others * (num_levels - 1))) if others else Guidance(first)


def best_setting(samples: Mapping[str, Mapping[str, float]]) -> str:
    """The guidance of the lowest distance."""
    return min(samples, key=lambda setting: samples[setting]["distance"])


# ---------------------------------------------------------------------------------------------------------------
# Tables


def mean_and_error(values: Sequence[float], errors: Sequence[float] = ()) -> str:
    """The mean over seeds with its standard error: from their spread if there are several, else the single one's."""
    mean = float(np.mean(values))
    if len(values) > 1:
        return f"{mean:.3f} +- {np.std(values, ddof=1) / np.sqrt(len(values)):.3f}"
    return f"{mean:.3f}" + (f" +- {errors[0]:.3f}" if errors else "")


def tables(results: Mapping[tuple[str, int], dict[str, Any]], real: Mapping[str, float]) -> str:
    """Markdown of all runs: samples by guidance, moved edges, then the velocity's error over SiT's of the same seed."""
    names = list(dict.fromkeys(name for name, _ in results))
    lines = [
        f"Held-out images: distance {real['distance']:.3f}, class accuracy {real['accuracy']:.3f}, "
        f"precision {real['precision']:.3f}, recall {real['recall']:.3f}.",
        "",
        "| run | seeds | guidance | distance | class accuracy | precision | recall | GMACs per image | jump at edges |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        runs = [result for (run, _), result in results.items() if run == name]
        jump = ", ".join(f"{np.mean(values):.2f}" for values in zip(*(run["jumps"] for run in runs), strict=True))
        for key in runs[0]["samples"]:
            scores = [run["samples"][key] for run in runs]
            columns = [mean_and_error([s["distance"] for s in scores], [s["distance_error"] for s in scores])]
            columns += [mean_and_error([s[column] for s in scores]) for column in ("accuracy", "precision", "recall")]
            columns += [f"{scores[0]['gmacs']:.2f}", jump]
            lines.append(f"| {name} | {len(runs)} | {key} | " + " | ".join(columns) + " |")
    moved = [(name, seed, run["moved"]) for (name, seed), run in results.items() if run["moved"]]
    if moved:
        edges = list(moved[0][2])
        lines += ["", "Distance with the edge moved at sampling, each with its best guidance:", ""]
        lines += ["| run | seed | " + " | ".join(edges) + " |", "|---|---|" + "---|" * len(edges)]
        for name, seed, row in moved:
            lines.append(f"| {name} | {seed} | " + " | ".join(f"{row[edge]['distance']:.3f}" for edge in edges) + " |")
    sit = {seed: result["errors"] for (name, seed), result in results.items() if name == "sit"}
    lines += ["", "Velocity error over that of SiT of the same seed, held-out images:", ""]
    lines += ["| run | " + " | ".join(f"t = {t:.3g}" for t in TIMES[::2]) + " |", "|---|" + "---|" * len(TIMES[::2])]
    for name in names:
        pairs = [(run["errors"], sit[seed]) for (other, seed), run in results.items() if other == name and seed in sit]
        if pairs and name != "sit":
            ratio = np.mean([np.array(errors) / np.array(base) for errors, base in pairs], axis=0)
            lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in ratio[::2]) + " |")
    return "\n".join(lines) + "\n"


def costs_table(costs: Mapping[str, Mapping[str, float]], steps: int, device: str) -> str:
    """Markdown of measured seconds, beside those of the first run."""
    first = next(iter(costs.values()))
    lines = [
        f"Seconds, medians in turns ({device}):",
        "",
        "| run | steps | s per step | s of training | s per image | training over the first | image over the first |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cost in costs.items():
        total = round(steps * RECIPES[name].longer)
        training = total * cost["step"] / (round(steps * RECIPES[next(iter(costs))].longer) * first["step"])
        cells = [f"{total}", f"{cost['step']:.3f}", f"{total * cost['step']:.0f}", f"{cost['image']:.4f}"]
        lines.append(
            f"| {name} | " + " | ".join([*cells, f"{training:.2f}", f"{cost['image'] / first['image']:.2f}"]) + " |"
        )
    return "\n".join(lines) + "\n"


def plot(results: Mapping[tuple[str, int], dict[str, Any]], path: Path) -> None:
    """Two panels: the velocity's error over SiT's along t; the lowest distance of each run against GMACs per image."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sit = {seed: np.array(result["errors"]) for (name, seed), result in results.items() if name == "sit"}
    for number, name in enumerate(dict.fromkeys(name for name, _ in results)):
        runs = {seed: result for (run, seed), result in results.items() if run == name}
        style = {"color": f"C{number % 10}", "marker": "osv^D"[number // 10]}
        ratios = [np.array(run["errors"]) / sit[seed] for seed, run in runs.items() if seed in sit]
        if ratios and name != "sit":
            left.plot(TIMES, np.mean(ratios, axis=0), label=name, markersize=3, linewidth=1, **style)
        scores = [run["samples"][best_setting(run["samples"])] for run in runs.values()]
        distances = [score["distance"] for score in scores]
        error = np.std(distances, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else scores[0]["distance_error"]
        right.errorbar(scores[0]["gmacs"], np.mean(distances), error, linestyle="", capsize=2, label=name, **style)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="t (0 is noise)", ylabel="velocity error over SiT's")
    right.set(xlabel="GMACs per image", ylabel="Frechet distance, best guidance")
    right.legend(fontsize=7, ncols=2)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with complete_file(path) as temporary:
        figure.savefig(temporary, dpi=130)


# ---------------------------------------------------------------------------------------------------------------
# The command


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.quality", description="Quality of pyramids beside SiT's, in pixels.")
    add_training_args(parser)
    add = parser.add_argument
    add(
        "--runs",
        nargs="+",
        choices=list(RECIPES),
        default=list(RECIPES),
        metavar="RUN",
        help="of: " + ", ".join(RECIPES),
    )
    add("--seeds", type=cli.natural_int, nargs="+", default=[0, 1], help="seeds of each run")
    add("--steps", type=cli.positive_int, default=3000, help=f"optimizer steps, a multiple of {2 * recipes.KEEP_EVERY}")
    add(
        "--guidance",
        type=guidance_setting,
        nargs="+",
        default=["1", "1.5", "2.5", "1,2.5"],
        metavar="SCALE",
        help="guidance scales that are tried with the same noise; A,B: that of the coarsest level, that of the others",
    )
    add(
        "--moved-edges",
        type=cli.positive_float,
        nargs="*",
        default=[0.1, 0.3],
        help="edges tried at sampling (2 levels)",
    )
    add("--num-samples", type=cli.positive_int, default=2000, help="samples of a run")
    add("--sampling-steps", type=cli.positive_int, default=25, help="ab2 steps of a sample")
    add("--num-held-out", type=cli.positive_int, default=1000, help="images of the velocity's error")
    add("--classifier-epochs", type=cli.positive_int, default=10, help="epochs of the classifier's training")
    add("--repeats", type=cli.natural_int, default=5, help="timed steps and draws of each run; 0: no table of seconds")
    add("--out", type=Path, default=Path("results/quality"), help="folder for runs, measurements, tables and curves")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.steps % (2 * recipes.KEEP_EVERY):
        parser.error(f"--steps must be a multiple of {2 * recipes.KEEP_EVERY}, got {args.steps}")
    data, folder = open_study(args)
    judge = open_judge(data, folder, args.classifier_epochs)
    real = held_out_scores(judge, data, args.num_samples, folder)
    results = {}
    for seed in args.seeds:
        for name in args.runs:
            network = train_run(name, seed, args.steps, data, folder, args.batch_size, args.lr)
            results[name, seed] = measure_run(name, seed, network, judge, data, folder, args)
            with complete_file(folder / "quality.md") as temporary:
                temporary.write_text(tables(results, real))
    plot(results, folder / "quality.png")
    if args.repeats:
        key = f"seconds of {' '.join(args.runs)}, {args.batch_size} images, guidance {args.guidance[0]}"
        costs = once(folder / "results.json", key, lambda: measure_costs(args.runs, data, args))
        with complete_file(folder / "quality.md") as temporary:
            text = f"{tables(results, real)}\n{costs_table(costs, args.steps, machine(torch.device('cpu')))}"
            temporary.write_text(text)
    print((folder / "quality.md").read_text())


if __name__ == "__main__":
    run_script(main)
