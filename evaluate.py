"""Compare samples with reference images: FID, sFID, Inception score, precision and recall, class accuracy.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples.npz          # ADM's numbers, without TensorFlow
    python evaluate.py digits samples --features digits
    python evaluate.py stats IMAGES OUT.npz                                 # a reference for many evaluations
    python evaluate.py classifier IMAGES OUT.pt                             # for --features cifar

Either side is an .npz with arr_0 (N, H, W, 3) uint8 or with statistics (mu, sigma), a folder of pictures, a zip archive
of pictures, a folder of sample_ddp.py, or the word digits. Images are never resized here, but by the network that
computes features. All commands run on any number of processes (torchrun), with the same result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import train_utils as cli
from metrics.classifiers import train_classifier
from metrics.collection import CHUNKS, FeatureSet
from metrics.evaluation import METRICS, choose_metrics, evaluate, warnings_about
from metrics.features import EXTRACTORS, Extractor, load_extractor
from metrics.images import Images, open_images
from metrics.references import write_statistics
from metrics.sides import (
    Side,
    as_statistics,
    check_side,
    compare_sizes,
    open_side,
    reference_features,
    side_features,
)
from runtime.distributed import agree, check_same_flags, on_main, start_processes
from runtime.errors import UserError, note, run_script, user_input
from runtime.files import complete_file
from weights.published import cache_folder

REFERENCE_IMAGES = 10_000  # of the statistics, for precision and recall; as many as ADM's references have
WEIGHTS = {"inception": "inception", "dinov2": "dino", "digits": "classifier", "cifar": "classifier"}  # their flags
NAMES = {
    "fid": "FID",
    "fd-dinov2": "FD-DINOv2",
    "fd": "FD",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "accuracy": "Class accuracy",
}


def build_parser() -> cli.ArgumentParser:
    """The flags of an evaluation."""
    parser = cli.ArgumentParser(
        prog="evaluate.py",
        description="Compare samples with reference images.",
        epilog="Other commands: evaluate.py stats --help, evaluate.py classifier --help.",
    )
    add = parser.add_argument
    add("reference", metavar="REF", type=cli.some_text, help="reference images, or statistics of them")
    add("samples", metavar="SAMPLES", type=cli.some_text, help="samples, likewise")
    add(
        "--metrics",
        nargs="+",
        type=str.lower,
        choices=METRICS,
        metavar="METRIC",
        help=f"{', '.join(METRICS)} (default: all possible)",
    )
    add("--num-samples", type=cli.positive_int, help="take so many of the samples, at random (default: all)")
    add("--k", type=cli.positive_int, default=3, help="neighbours of precision and recall")
    add("--adm-half", action="store_true", help="round distances of precision and recall to fp16, as ADM does")
    add("--errors", action="store_true", help="standard errors as well")
    add("--fid-inf", action="store_true", help="the distances of infinitely many samples as well")
    add("--json", type=Path, metavar="OUT", help="write the numbers, and all that they depend on")
    add("--cache", type=Path, metavar="DIR", help="keeps statistics of references (default: in PPFLOW_CACHE)")
    add_extractor_args(parser)
    return parser


def build_stats_parser() -> cli.ArgumentParser:
    """The flags of evaluate.py stats."""
    parser = cli.ArgumentParser(
        prog="evaluate.py stats",
        description="Write the statistics of images, and 10000 of them for precision and recall: a reference.",
    )
    parser.add_argument("images", metavar="IMAGES", type=cli.some_text, help="images, as the sides of an evaluation")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="file that ADM's and EDM's tools read as well")
    add_extractor_args(parser)
    return parser


def build_classifier_parser() -> cli.ArgumentParser:
    """The flags of evaluate.py classifier."""
    parser = cli.ArgumentParser(prog="evaluate.py classifier", description="Train a classifier for --features cifar.")
    parser.add_argument("images", metavar="IMAGES", type=cli.some_text, help="labelled images, of the samples' size")
    parser.add_argument("out", metavar="OUT.pt", type=Path, help="file for --classifier")
    parser.add_argument("--epochs", type=cli.positive_int, default=10, help="passes over the images")
    return parser


def add_extractor_args(parser: argparse.ArgumentParser) -> None:
    """Add --features, the files of weights, and --batch-size."""
    add = parser.add_argument_group("features").add_argument
    known = f"{', '.join(EXTRACTORS)}, or module:function"
    add("--features", type=cli.some_text, default="inception", metavar="NAME", help=known)
    add("--inception", type=Path, metavar="PATH", help="weights of Inception (default: in PPFLOW_CACHE)")
    add("--dino", type=Path, metavar="PATH", help="weights of DINOv2")
    add("--classifier", type=Path, metavar="PATH", help="weights of the classifier of digits or cifar")
    add("--batch-size", type=cli.positive_int, default=64, help="images a process computes together")


# ---------------------------------------------------------------------------------------------------------------
# Before the work


def check_writable(path: Path | None) -> None:
    """Refuse a file that cannot be written (OSError), before the work and not after."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file")
    try:
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}") from error


def extractor_from(args: argparse.Namespace, sides: Sequence[Side], device: torch.device) -> Extractor:
    """The extractor of --features, for the images of these sides.

    Raises:
        OSError, ValueError: if weights are missing, or not of this extractor.
    """
    own = WEIGHTS.get(args.features)
    for flag in dict.fromkeys(WEIGHTS.values()):
        if getattr(args, flag) is not None and flag != own:
            raise ValueError(f"--{flag} has no effect with --features {args.features}: leave it out")
    sizes = [side.images.image_size for side in sides if side.images is not None]
    if not sizes and args.features not in ("inception", "dinov2"):
        raise ValueError(f"--features {args.features} takes images, and both sides hold statistics alone")
    return load_extractor(args.features, sizes[-1] if sizes else (0, 0), device, own and getattr(args, own))


def chosen_samples(args: argparse.Namespace, samples: Side) -> np.ndarray | None:
    """Numbers of the samples that --num-samples asks for, ascending; None for all.

    Raises:
        ValueError: if there are not so many, or statistics where --num-samples, --errors or --fid-inf take images.
    """
    flags = {"--num-samples": args.num_samples, "--errors": args.errors, "--fid-inf": args.fid_inf}
    if samples.statistics is not None and (given := [flag for flag, value in flags.items() if value]):
        raise ValueError(f"{given[0]} takes the samples themselves, and {samples.source} holds their statistics")
    number = len(samples.images) if samples.images is not None else 0
    if args.num_samples is not None and not 2 <= args.num_samples <= number:
        raise ValueError(
            f"--num-samples {args.num_samples}: {samples.source} holds {number} images; give 2 to {number}"
        )
    if (args.errors or args.fid_inf) and (args.num_samples or number) < 2 * CHUNKS:
        raise ValueError(f"--errors and --fid-inf take {2 * CHUNKS} samples or more")
    if args.num_samples is None or args.num_samples == number:
        return None
    return np.sort(np.random.default_rng(0).permutation(number)[: args.num_samples])


class Job(NamedTuple):
    """An evaluation that the flags ask for.

    indices: numbers of the samples to take, ascending; None for all
    lines:   what to know before it
    """

    reference: Side
    samples: Side
    extractor: Extractor
    metrics: list[str]
    indices: np.ndarray | None
    cache: Path
    lines: list[str]


def prepare(args: argparse.Namespace, device: torch.device) -> Job:
    """The sides, features and metrics of an evaluation.

    Raises:
        OSError, ValueError: if something is missing, or they do not fit together.
    """
    sides = open_side(args.reference), open_side(args.samples)
    indices = chosen_samples(args, sides[1])
    extractor = extractor_from(args, sides, device)
    for side in sides:
        check_side(side, extractor)
    sizes = compare_sizes(*sides, extractor)
    metrics, lines = choose_metrics(args.metrics, *sides, extractor, args.k)
    cache = args.cache or cache_folder() / "statistics"
    return Job(*sides, extractor, metrics, indices, cache, [*lines, *([sizes] if sizes else [])])


# ---------------------------------------------------------------------------------------------------------------
# The numbers


def report(
    args: argparse.Namespace,
    job: Job,
    sets: tuple[FeatureSet, FeatureSet],
    values: dict[str, dict[str, float]],
    warnings: Sequence[str],
) -> dict[str, Any]:
    """Everything that makes the numbers comparable, in values that JSON has."""
    extractor, images = job.extractor, job.samples.images
    return {
        "metrics": values,
        "reference": args.reference,
        "samples": args.samples,
        "num_reference": sets[0].count,
        "num_samples": sets[1].count,
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "dimensions": extractor.dimensions,
        "resize": extractor.resize,
        "precision": "fp32",
        "tf32": False,
        "device": extractor.device.type,
        "k": args.k,
        "adm_half": args.adm_half,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "warnings": [*job.lines, *warnings],
        "settings": None if images is None else images.settings,
    }


def table(values: dict[str, dict[str, float]], infinity: bool) -> str:
    """Text of the values, under ADM's names."""
    errors = any("error" in numbers for numbers in values.values())
    lines = [f"{'':18}{'value':>10}{'error' if errors else '':>10}{'N = inf' if infinity else '':>10}"]
    for name, numbers in values.items():
        cells = [numbers["value"], numbers.get("error"), numbers.get("infinity")]
        lines.append(f"{NAMES[name]:18}" + "".join(f"{'' if cell is None else f'{cell:.4f}':>10}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def compare(argv: Sequence[str]) -> None:
    """Run evaluate.py REF SAMPLES."""
    args = build_parser().parse_args(argv)
    processes = start_processes()
    check_same_flags(vars(args), processes, but={"inception", "dino", "classifier", "cache", "json"})
    on_main(lambda: check_writable(args.json), processes)

    job = agree(lambda: prepare(args, processes.device), processes)
    for line in job.lines:
        note(line)
    chunks = CHUNKS if args.errors or args.fid_inf else 1
    with cli.solving("--batch-size"):
        shared = job.extractor, processes, job.metrics
        known = reference_features(job.reference, *shared, args.batch_size, job.cache)
        found = side_features(job.samples, *shared, job.indices, args.batch_size, chunks)
        if not processes.is_main:
            return
        values = evaluate(known, found, job.metrics, args.k, args.adm_half, args.errors, args.fid_inf)
    warnings = warnings_about(known, found, job.metrics, job.extractor, args.fid_inf)
    for line in warnings:
        print(f"warning: {line}")
    print(table(values, args.fid_inf))
    numbers = [f"{features.count:,}" if features.count else "unknown" for features in (found, known)]
    features = f"{job.extractor.name} {job.extractor.digest[:8]}"
    print(f"{numbers[0]} samples, {numbers[1]} reference images, features {features}")
    if args.json:
        content = report(args, job, (known, found), values, warnings)
        with user_input(), complete_file(args.json) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------
# References and classifiers


def make_statistics(argv: Sequence[str]) -> None:
    """Run evaluate.py stats."""
    args = build_stats_parser().parse_args(argv)
    processes = start_processes()
    check_same_flags(vars(args), processes, but={"inception", "dino", "classifier", "out"})

    def open_all() -> tuple[Side, Extractor]:
        if args.out.suffix != ".npz":
            raise ValueError(f"{args.out} does not end in .npz, by which others know such files")
        side = open_side(args.images)
        if side.statistics is not None:
            raise ValueError(f"{args.images} holds statistics already: give the images themselves")
        return side, extractor_from(args, [side], processes.device)

    on_main(lambda: check_writable(args.out), processes)
    side, extractor = agree(open_all, processes)
    metrics = {"sfid"} if extractor.spatial_dimensions else set()
    with cli.solving("--batch-size"):
        found = side_features(side, extractor, processes, metrics, batch_size=args.batch_size, description="images")
        if not processes.is_main:
            return
        write_statistics(args.out, as_statistics(found, extractor, args.out), side.images, kept_images(side.images))
    print(f"saved {args.out}: {found.count:,} images, features {extractor.name} {extractor.digest[:8]}")


def kept_images(images: Images) -> np.ndarray:
    """Numbers of the images that a reference keeps for precision and recall, at random, ascending."""
    return np.sort(np.random.default_rng(0).permutation(len(images))[:REFERENCE_IMAGES])


def make_classifier(argv: Sequence[str]) -> None:
    """Run evaluate.py classifier."""
    args = build_classifier_parser().parse_args(argv)
    with cli.solving("--epochs"):
        check_writable(args.out)
        images = open_images(args.images)
        if images.labels is None:
            raise UserError(f"the classes of {args.images} are unknown: a classifier cannot learn them")
        order = np.random.default_rng(0).permutation(len(images))  # the last ones are held out, of all classes
        classifier = train_classifier("cifar", lambda rows: images.read(order[rows]), images.labels[order], args.epochs)
        classifier.save(args.out)
    print(f"saved {args.out}: {classifier.num_classes} classes, {classifier.accuracy:.1%} of held-out images right")


def main(argv: Sequence[str] | None = None) -> None:
    """Run evaluate.py with these command-line arguments."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"stats": make_statistics, "classifier": make_classifier}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        compare(argv)


if __name__ == "__main__":
    run_script(main)
