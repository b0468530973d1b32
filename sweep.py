"""Find the guidance of a trained network: a scale for each level, when they guide, and the level of the null label.

    python sweep.py REF --ckpt model.pt --scales 1 1.5 2 3 --intervals none 0.3,1

Draws the same noise and classes with one setting after another, and measures the distance of each set of samples to
the reference REF, which is anything that evaluate.py takes. Scales are tried from the coarsest level to the finest and
then the intervals and null levels, always around the best so far, until a round brings nothing more. This is done for
every combination of --edges, --steps and --solvers. Settings that agree up to a level's edge go on from one state.

The best settings are measured again with more samples. The folder --out holds results.jsonl, table.md and pareto.png,
and the same command continues a sweep that was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import train_utils as cli
from metrics.collection import Collector
from metrics.evaluation import distance_name
from metrics.features import EXTRACTORS, Extractor, load_extractor
from metrics.search import Result, Results, Setting, Space, descend, in_words, plot, table
from metrics.sides import Side, check_side, open_side, reference_features
from metrics.statistics import FrechetDistance
from pipeline import Pipeline
from runtime.distributed import (
    Processes,
    agree,
    broadcast_object,
    check_same_flags,
    gather_objects,
    on_main,
    start_processes,
)
from runtime.errors import UserError, note, run_script, user_input, user_output
from runtime.files import complete_file
from runtime.logs import to_uint8
from runtime.rng import Stream, label_of, sample_generators
from runtime.speed import default_precision, precision_note
from transport import FIXED_METHODS, ODE, Guidance
from weights.layouts import fingerprint
from weights.published import cache_folder

WEIGHTS = {"inception": "inception", "dinov2": "dino", "digits": "classifier", "cifar": "classifier"}  # their flags
DEFAULT_SCALES = [1.0, 1.5, 2.0, 3.0, 4.0]
writing = partial(user_output, advice="make room there, or choose another --out; the same command goes on")
# Flags that sample_ddp.py has as well
FORWARDED = ("ckpt", "model", "vae", "weights", "precision", *cli.PROCESS_FLAGS, "cfg_channels", "label_sampling")


# ---------------------------------------------------------------------------------------------------------------
# Flags


def tuple_of(kind: Callable[[str], Any], single: bool = False) -> Callable[[str], Any]:
    """Argparse type for values with commas between them; `single` makes one value stand for itself."""

    def parse(text: str) -> Any:
        values = tuple(kind(part) for part in text.split(","))
        return values[0] if single and len(values) == 1 else values

    parse.__name__ = "list"
    return parse


def an_interval(text: str) -> tuple[float, float] | None:
    """Argparse type for LOW,HIGH or the word none."""
    if text == "none":
        return None
    interval = tuple_of(cli.finite_float)(text)
    if len(interval) != 2 or not interval[0] < interval[1]:
        raise argparse.ArgumentTypeError(f"{text} is neither LOW,HIGH nor none")
    return interval


def a_null_level(text: str) -> int | None:
    """Argparse type for the number of a level or the word none."""
    return None if text == "none" else cli.natural_int(text)


def build_parser() -> cli.ArgumentParser:
    """The flags of sweep.py."""
    parser = cli.ArgumentParser(
        prog="sweep.py",
        description="Find the guidance scale of each level and its interval, among solvers, steps and level edges.",
    )
    parser.add_argument("reference", metavar="REF", help="images or statistics to compare with, as for evaluate.py")
    add = parser.add_argument_group("search").add_argument
    add(
        "--scales",
        type=cli.natural_float,
        nargs="+",
        action="append",
        metavar="W",
        help="guidance scales to choose among: once for all levels, or once per level, coarsest first (default: 1 1.5 "
        "2 3 4)",
    )
    add(
        "--intervals",
        type=an_interval,
        nargs="+",
        default=[None, (0.3, 1.0)],
        metavar="LOW,HIGH",
        help="times between which they guide; none for all times (default: none 0.3,1)",
    )
    add(
        "--null-levels",
        type=a_null_level,
        nargs="+",
        default=[None],
        metavar="LEVEL",
        help="levels at which the null label is evaluated, 0 for the coarsest; none for the sample's (default: none)",
    )
    add(
        "--edges",
        type=tuple_of(cli.finite_float),
        nargs="+",
        metavar="T,T",
        help="times at which the patch size changes, with commas between them (default: the checkpoint's)",
    )
    add(
        "--steps",
        type=tuple_of(cli.positive_int, single=True),
        nargs="+",
        default=[50],
        metavar="STEPS",
        help="steps over all, or per level with commas between them (default: 50)",
    )
    add(
        "--solvers",
        nargs="+",
        choices=FIXED_METHODS,
        default=["ab2"],
        metavar="METHOD",
        help="ODE methods of fixed steps (default: ab2)",
    )
    add(
        "--cfg-channels",
        type=cli.positive_int,
        metavar="C",
        help="guide only the first C channels (DiT, SiT and PPFlow's published numbers: 3)",
    )
    add = parser.add_argument_group("measurement").add_argument
    known = f"{', '.join(EXTRACTORS)}, or module:function"
    add("--features", type=cli.some_text, default="inception", metavar="NAME", help=f"of the distance: {known}")
    add("--inception", type=Path, metavar="PATH", help="weights of Inception (default: in PPFLOW_CACHE)")
    add("--dino", type=Path, metavar="PATH", help="weights of DINOv2")
    add("--classifier", type=Path, metavar="PATH", help="weights of the classifier of digits or cifar")
    add("--num-samples", type=cli.number(int, 2), default=5000, help="samples of each setting")
    add("--full-num-samples", type=cli.number(int, 2), default=50_000, help="samples of the best settings")
    add("--best", type=cli.natural_int, default=3, help="settings that are measured again with --full-num-samples")
    add("--global-seed", type=cli.natural_int, default=0, help="seed of labels and noise")
    add(
        "--label-sampling",
        choices=["random", "balanced"],
        default="random",
        help="labels: uniformly random, or all classes equally often",
    )
    add("--per-proc-batch-size", type=cli.positive_int, default=64, help="samples a process solves together")
    add("--out", type=cli.some_text, help="folder of the results (default: results/sweep-MODEL-STEP)")
    cli.add_network_args(parser, files=1)
    parser.set_defaults(level_edges=None, cfg_scales=None, cfg_interval=None)  # a setting's, and not flags here
    return parser


# ---------------------------------------------------------------------------------------------------------------
# Measurement


def sampler_of(pipe: Pipeline, setting: Setting, channels: int | None) -> tuple[Pipeline, ODE, Guidance]:
    """The pipeline, solver and guidance of a setting (ValueError if it does not fit the network).

    Args:
        channels: that are guided
    """
    guidance = Guidance(setting.scales, channels, setting.interval, setting.null_level)
    return pipe.with_edges(setting.edges), ODE(setting.solver, setting.steps), guidance


class Job(NamedTuple):
    """A network, and the reference that its samples are compared with."""

    args: argparse.Namespace
    processes: Processes
    pipe: Pipeline
    side: Side
    extractor: Extractor

    def sampler_of(self, setting: Setting) -> tuple[Pipeline, ODE, Guidance]:
        """See `sampler_of`."""
        return sampler_of(self.pipe, setting, self.args.cfg_channels)


class Sweep:
    """Measures settings, each once.

    Args:
        distance: of samples' statistics to the reference; None but on the main process
        results:  what was measured; that of the main process counts
        states:   folder of states at the levels' edges
    """

    def __init__(self, job: Job, distance: FrechetDistance | None, results: Results, states: Path) -> None:
        self.job, self.distance, self.results, self.states = job, distance, results, states

    def measure(self, setting: Setting, num: int) -> float:
        """The distance of `num` samples. Collective."""
        found = broadcast_object(self.results.get(setting, num))
        if found is None:
            found = self._measured(setting, num)
            if self.job.processes.is_main:
                with writing(self.results.path):
                    self.results.add(found)
                tqdm.write(f"{found.distance:10.4f}  {in_words(setting)}  ({num:,} samples, {found.seconds:.1f} s)")
        return found.distance

    def _measured(self, setting: Setting, num: int) -> Result:
        args, processes, extractor = self.job.args, self.job.processes, self.job.extractor
        size, start = args.per_proc_batch_size, time.perf_counter()
        pipe, solver, guidance = self.job.sampler_of(setting)
        cost = pipe.check(solver, guidance)
        collector, diverged = Collector(extractor, num, [distance_name(extractor)]), False
        batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
        with tqdm(total=num, unit="sample", desc=in_words(setting), leave=False, disable=not processes.is_main) as bar:
            for number, batch in enumerate(batches[processes.rank :: processes.world_size]):
                with cli.solving("--per-proc-batch-size"):
                    try:
                        x1 = self._walk(setting, pipe.model.num_levels - 1, batch)
                    except FloatingPointError:  # the guidance is too strong, or the steps are too few
                        diverged = True
                        break
                    images = to_uint8(pipe.autoencoder.decode(x1)).expand(-1, 3, -1, -1)  # grey images become RGB
                    collector.add(batch, images)
                # The others are about as far.
                bar.update(sum(map(len, batches[number * processes.world_size :][: processes.world_size])))
        distance = math.inf
        if not broadcast_object(any(gather_objects(diverged, processes))):
            features = collector.finish(processes)
            distance = broadcast_object(self.distance and self.distance(features.pool))
        return Result(setting, num, distance, cost.nfe(1), cost.gmacs(1), time.perf_counter() - start)

    def _walk(self, setting: Setting, level: int, batch: Sequence[int]) -> torch.Tensor:
        """The state at the end of a level: the one that is kept, or solved for from the level before."""
        pipe, solver, guidance = self.job.sampler_of(setting)
        args, last = self.job.args, level == pipe.model.num_levels - 1
        key = hashlib.sha256(repr(setting.up_to(level)).encode()).hexdigest()[:16]
        kept = self.states / key / f"{batch[0]:06d}-{batch[-1]:06d}.npy"
        if not last and kept.exists():
            return torch.from_numpy(np.load(kept)).to(pipe.device)
        before = self._walk(setting, level - 1, batch) if level else None
        labels = [label_of(i, pipe.model.num_classes, args.global_seed, args.label_sampling) for i in batch]
        generators = sample_generators(args.global_seed, batch, Stream.SAMPLES)
        levels = range(level, level + 1)
        state = pipe.latents(labels, solver, guidance, generators, x0=before, levels=levels)
        if not last:
            with writing(kept), complete_file(kept) as temporary:
                np.save(temporary, state.cpu().numpy())
        return state


# ---------------------------------------------------------------------------------------------------------------
# Results


def sampling_command(args: argparse.Namespace, setting: Setting, level_edges: tuple[float, ...]) -> str:
    """The command that draws samples with a setting, from another seed than the one it was chosen by.

    Args:
        level_edges: those of the checkpoint
    """
    command, parser = ["sample_ddp.py", "ODE"], build_parser()
    for name in FORWARDED:
        value = getattr(args, name)
        if value != parser.get_default(name):
            command += ["--" + name.replace("_", "-"), *map(str, value if isinstance(value, list) else [value])]
    flags = {
        "--level-edges": setting.edges if setting.edges != level_edges else (),
        "--sampling-method": (setting.solver,),
        "--num-sampling-steps": setting.steps if isinstance(setting.steps, tuple) else (setting.steps,),
        "--cfg-scales": setting.scales,
        "--cfg-interval": setting.interval or (),
        "--null-level": () if setting.null_level is None else (setting.null_level,),
        "--num-fid-samples": (args.full_num_samples,),
        "--global-seed": (args.global_seed + 1,),
    }
    for flag, values in flags.items():
        command += [flag, *map(str, values)] if values else []
    return "python " + shlex.join(command)


def report(job: Job, results: Results, out: Path) -> None:
    """Print and write the table, the plot and the command of the best setting.

    Raises:
        UserError: if samples were finite with no setting.
    """
    args, name = job.args, distance_name(job.extractor)
    found = results.best_first(args.num_samples)
    refined = results.best_first(args.full_num_samples) if args.full_num_samples != args.num_samples else []
    refined = [result for result in refined if results.get(result.setting, args.num_samples)]
    best = (refined or found)[0]
    if not math.isfinite(best.distance):
        raise UserError("samples were finite with no setting: give smaller --scales, more --steps, or another --ckpt")
    text = table(name, args.num_samples, found, args.full_num_samples, refined)
    with writing(out):
        with complete_file(out / "table.md") as temporary:
            temporary.write_text(text)
        plot(out / "pareto.png", name, args.num_samples, found)
    print(f"\n{text}\n{out / 'table.md'} and {out / 'pareto.png'} hold the settings of this sweep.")
    print("The best one, from another seed:\n")
    print(sampling_command(args, best.setting, job.pipe.transport.schedule.level_edges))


# ---------------------------------------------------------------------------------------------------------------
# The command


def space_of(args: argparse.Namespace, level_edges: tuple[float, ...]) -> Space:
    """The settings that the flags ask for (ValueError if the lists of scales do not fit the levels).

    Args:
        level_edges: those of the checkpoint
    """
    num_levels, scales = len(level_edges) + 1, args.scales or [DEFAULT_SCALES]
    if len(scales) not in (1, num_levels):
        raise ValueError(f"--scales is given {len(scales)} times for {num_levels} level(s): give it once, or per level")
    per_level = scales * num_levels if len(scales) == 1 else scales
    return Space(args.edges or [level_edges], args.steps, args.solvers, per_level, args.intervals, args.null_levels)


def set_up(args: argparse.Namespace, processes: Processes) -> tuple[Job, Space, str]:
    """Network, reference and settings, and on the main process the digest of the weights.

    Raises:
        ValueError, OSError: if something is missing, or would fail later.
    """
    side = open_side(args.reference)
    precision = args.precision or default_precision(processes.device, training=False)
    if line := precision_note(precision, processes.device):
        note(line)
    pipe = cli.load_pipeline(args)
    digest = fingerprint(pipe.model) if processes.is_main else ""
    pipe.to(processes.device, precision, args.compile, args.offload_experts)
    space = space_of(args, pipe.transport.schedule.level_edges)
    strongest = tuple(max(options) for options in space.scales)  # a level that may be guided is
    for start in space.starts(scales_of_evaluation(space)):
        for interval, null_level in product(space.intervals, space.null_levels):
            scales = start.scales if null_level is None else strongest
            setting = replace(start, scales=scales, interval=interval, null_level=null_level)
            other, solver, guidance = sampler_of(pipe, setting, args.cfg_channels)
            other.check(solver, guidance)
    for null_level in space.null_levels:
        cli.warn_of_null_level(pipe, null_level)
    own = WEIGHTS.get(args.features)
    for flag in dict.fromkeys(WEIGHTS.values()):
        if getattr(args, flag) is not None and flag != own:
            raise ValueError(f"--{flag} has no effect with --features {args.features}: leave it out")
    extractor = load_extractor(args.features, pipe.image_size, processes.device, own and getattr(args, own))
    check_side(side, extractor)
    if side.images is not None and extractor.resize == "none" and side.images.image_size != pipe.image_size:
        sizes = ["x".join(map(str, size)) for size in (side.images.image_size, pipe.image_size)]
        raise ValueError(f"{args.reference} holds images of {sizes[0]}, and the samples are {sizes[1]}: resize them")
    return Job(args, processes, pipe, side, extractor), space, digest


def scales_of_evaluation(space: Space) -> tuple[float, ...]:
    """A scale for each level to begin with."""
    num_levels = len(space.scales)
    scales = cli.evaluation_scales(num_levels)
    return scales * num_levels if len(scales) == 1 else scales


def validity(job: Job, digest: str) -> dict[str, Any]:
    """Everything that a distance depends on besides its setting, in values that JSON has."""
    args, pipe, side = job.args, job.pipe, job.side
    if side.statistics is None:
        reference = side.images.identity()
    else:
        content = side.statistics.mean.tobytes() + side.statistics.covariance.tobytes()
        reference = hashlib.sha256(content).hexdigest()
    values = {
        "checkpoint": f"{pipe.name}, {pipe.trained}",
        "weights": digest,
        "vae": pipe.autoencoder.name,
        "precision": pipe.precision,
        "process": pipe.changed,
        "cfg_channels": args.cfg_channels,
        "global_seed": args.global_seed,
        "label_sampling": args.label_sampling,
        "features": job.extractor.name,
        "features_digest": job.extractor.digest,
        "reference": reference,
    }
    return json.loads(json.dumps(values))


def search(sweep: Sweep, space: Space) -> None:
    """Measure what the search asks for, and the best settings again with more samples."""
    args, processes = sweep.job.args, sweep.job.processes
    best, measure = None, partial(sweep.measure, num=args.num_samples)
    for start in space.starts(scales_of_evaluation(space)):
        if best is not None:  # what guides well with one solver does with another
            start = replace(start, scales=best.scales, interval=best.interval)
        best = descend(start, space.directions(), measure)
    if args.full_num_samples != args.num_samples:
        ranked = on_main(lambda: sweep.results.best_first(args.num_samples)[: args.best], processes)
        for result in ranked:
            if math.isfinite(result.distance):
                sweep.measure(result.setting, args.full_num_samples)


def main(argv: Sequence[str] | None = None) -> None:
    """Run sweep.py with these command-line arguments."""
    args = build_parser().parse_args(argv)
    processes = start_processes()
    check_same_flags(vars(args), processes, but={"ckpt", "vae", "reference", "out", *WEIGHTS.values()})
    job, space, digest = agree(lambda: set_up(args, processes), processes)
    out = Path(args.out or f"results/sweep-{job.pipe.file_name}")

    def open_results() -> Results:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        return Results(out / "results.jsonl", validity(job, digest))

    results = on_main(open_results, processes)
    key = hashlib.sha256(json.dumps(results.valid_for).encode()).hexdigest()[:16]
    with user_input():
        wanted = [distance_name(job.extractor)]
        cache = cache_folder() / "statistics"
        reference = reference_features(job.side, job.extractor, processes, wanted, args.per_proc_batch_size, cache)
        distance = FrechetDistance(reference.pool) if processes.is_main else None
    search(Sweep(job, distance, results, out / "states" / key), space)
    if processes.is_main:
        report(job, results, out)
    shutil.rmtree(out / "states" / key, ignore_errors=True)
    with contextlib.suppress(OSError):  # another sweep has states there, or there were none
        (out / "states").rmdir()


if __name__ == "__main__":
    run_script(main)
