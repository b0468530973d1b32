"""Draw the many samples that an FID needs, on any number of processes.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py ODE --ckpt model.pt --num-fid-samples 50000

Writes a folder of PNG files (none with --no-png) and an .npz as ADM's evaluation suite reads it: arr_0 (N, H, W, 3)
uint8 in sample order, arr_1 (N,) int64 the classes. With --latents nothing is decoded: arr_0 of NAME-latents.npz is
(N, C, h, w) float32, the latents as their autoencoder decodes them, and that autoencoder need not be here.

Sample i is a function of (checkpoint, solver, seed, i): the number of processes and the batch size do not matter, and a
run that was interrupted makes what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import train_utils as cli
from experts import Network
from pipeline import EvaluationCounter, Pipeline, Solver
from runtime.distributed import Processes, agree, check_same_flags, on_main, start_processes
from runtime.errors import UserError, note, run_script, user_input, user_output
from runtime.files import complete_file
from runtime.logs import to_uint8
from runtime.rng import Stream, label_of, sample_generators
from runtime.sample_store import PngStore, SampleStore, ShardStore, write_likelihoods, write_npz
from runtime.speed import default_precision, precision_note
from transport import ODE, SDE, Guidance
from transport.grids import Grid
from weights.layouts import fingerprint

# Flags that do not change what sample i looks like, or stand among the settings as what they led to.
NOT_SETTINGS = {
    *("sample_dir", "per_proc_batch_size", "num_fid_samples", "ckpt", "tf32", "model", "image_size", "num_classes"),
    *("compile", "offload_experts", "vae", "latents", "step_grid"),
    *("rope", "decouple", "attention_scale", "interpolation", "ori_max_pe_len"),
    *("path_type", "prediction", "loss_weight", "train_eps", "sample_eps"),
}
SCALES_NOTE = "default: as in PPFlow's evaluation 1 3 for 2 levels, 1 3.5 3.75 for 3; else, and with --likelihood, 1"
writing = partial(
    user_output, advice="make room there, or choose another --sample-dir; the same command makes what is missing"
)
# Settings that describe the samples and decide nothing; folders of earlier versions do not have them.
DESCRIPTIONS = {"num_classes", "nfe_per_image", "gmacs_per_image"}


def build_parser() -> cli.ArgumentParser:
    """The flags of sample_ddp.py."""
    parser = cli.ArgumentParser(prog="sample_ddp.py", description="Draw many samples, as PNG files and one .npz.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{ODE,SDE}")
    for mode, text in (("ODE", "the deterministic sampler"), ("SDE", "the stochastic sampler")):
        command = modes.add_parser(
            mode, help=f"{text}; see sample_ddp.py {mode} --help", description=f"Sample with {text}."
        )
        add = command.add_argument_group("output").add_argument
        add("--sample-dir", type=cli.some_text, default="samples", help="folder for the PNG folder and the .npz")
        add("--num-fid-samples", type=cli.positive_int, default=50_000, help="number of samples")
        add("--per-proc-batch-size", type=cli.positive_int, default=32, help="samples a process solves together")
        add("--global-seed", type=cli.natural_int, default=0, help="seed of labels and noise")
        add(
            "--label-sampling",
            choices=["random", "balanced"],
            default="random",
            help="labels: uniformly random, or all classes equally often",
        )
        add(
            "--png",
            action=argparse.BooleanOptionalAction,
            help="a PNG file of each sample (the default); without, small .npz files",
        )
        add(
            "--latents",
            action="store_true",
            help="the latents before decoding instead of images, in NAME-latents.npz",
        )
        add("--tf32", action=argparse.BooleanOptionalAction, help="short for --precision tf32 or fp32")
        cli.add_model_args(command, None, SCALES_NOTE)
        if mode == "SDE":
            cli.add_sde_args(command)
            continue
        cli.add_ode_args(command)
        add = command.add_argument_group("likelihood").add_argument
        add("--likelihood", action="store_true", help="also the log-density of each sample, in NAME-likelihood.npz")
        add("--num-probes", type=cli.positive_int, help="probes of the divergence (default: 1)")
    return parser


def check_flags(parser: cli.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or would have no effect."""
    if args.mode == "ODE" and args.num_probes and not args.likelihood:
        parser.error("--num-probes has no effect without --likelihood")
    if args.tf32 is not None and args.precision is not None:
        parser.error("--tf32 and --precision say the same: give one of them")
    if args.latents and args.png is not None:
        parser.error("--png and --no-png are about images, and --latents makes none: leave it out")


class Job(NamedTuple):
    """The samples that the flags ask for: network, solver and guidance, and the evaluations that one sample takes."""

    args: argparse.Namespace
    pipe: Pipeline
    solver: Solver
    guidance: Guidance
    cost: EvaluationCounter

    @property
    def png(self) -> bool:
        """Each sample is a PNG file."""
        return not self.args.latents if self.args.png is None else self.args.png

    @property
    def likelihood(self) -> bool:
        """Log-densities are wanted as well."""
        return self.args.mode == "ODE" and self.args.likelihood


# ---------------------------------------------------------------------------------------------------------------
# The folder of the samples


def grid_of(solver: Solver) -> Grid | None:
    """Grid of an ODE's steps; None for equal steps."""
    return solver.grid if isinstance(solver, ODE) else None


def folder_name(job: Job) -> str:
    """A name that tells the settings one would compare."""
    # Folders of adaptive methods have always been named after the default of 50 steps: so they are found again.
    steps = job.solver.num_steps if not job.solver.adaptive else 50
    steps = str(steps) if isinstance(steps, int) else "-".join(map(str, steps))
    scales = "-".join(f"{scale:g}" for scale in job.guidance.scales)
    if job.guidance.null_level is not None:
        scales += f"-null-{job.guidance.null_level}"
    network = job.pipe.file_name
    if job.pipe.model.position == "rope":
        scaling = job.pipe.model.rope_scaling
        parts = ("x".join(map(str, job.pipe.image_size)), scaling.kind, scaling.attention_scale)
        network = "-".join([network, *filter(None, parts)])
    kind = "-latents" if job.args.latents else ""
    sampler = f"{job.args.mode}-{job.solver.method}-{steps}"
    sampler += "-auto" if grid_of(job.solver) else ""
    sampler += "" if job.args.budget is None else f"-budget-{job.args.budget:g}"
    return f"{network}-{sampler}-cfg-{scales}-seed-{job.args.global_seed}{kind}"


def settings_of(job: Job, digest: str) -> dict[str, Any]:
    """Everything that sample i depends on besides i, and `DESCRIPTIONS` of the samples, in values that JSON has.

    Args:
        digest: of the weights
    """
    args, pipe, solver = job.args, job.pipe, job.solver
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    steps = 50 if solver.adaptive else solver.num_steps
    settings |= {
        "precision": pipe.precision,
        "png": job.png,
        "cfg_scales": list(job.guidance.scales),
        "sampling_method": solver.method,
        "num_sampling_steps": [steps] if isinstance(steps, int) else list(steps),
    }
    if isinstance(solver, SDE):
        settings |= {"last_step_size": solver.last_step_size}
    else:
        settings |= {"atol": solver.atol, "rtol": solver.rtol}
    if grid := grid_of(solver):  # as above: folders of equal steps do not have it
        settings["grid"] = grid
    if solver.adaptive:
        settings["per_proc_batch_size"] = args.per_proc_batch_size  # its steps follow the batch
    settings |= {
        "checkpoint": f"{pipe.name}, {pipe.trained}",
        "weights": digest,
        "vae": pipe.autoencoder.name,
        "level_edges": pipe.transport.schedule.level_edges,
    }
    settings |= pipe.changed
    settings |= {
        "num_classes": pipe.model.num_classes,
        "nfe_per_image": None if solver.adaptive else job.cost.nfe(1),
        "gmacs_per_image": None if solver.adaptive else job.cost.gmacs(1),
    }
    if pipe.model.position == "rope":
        settings |= {"size": pipe.model.input_size, "train_tokens": pipe.model.train_tokens}
        settings["rope_scaling"] = asdict(pipe.model.rope_scaling)
    if pipe.transport.aug_dim is not None:  # folders of Gaussian noise are older than this setting
        settings["aug_dim"] = pipe.transport.aug_dim
    if args.latents:
        settings["scaling"] = asdict(pipe.autoencoder.scaling)
    return json.loads(json.dumps(settings))


def earlier_fingerprints(model: Network) -> set[str]:
    """Digests of these weights in folders that are older than `fingerprint`.

    A hash of sums whose last bit depends on the device and the number of threads. The likely numbers are tried: those
    of a process alone and of one among torchrun's. Started with yet another, the folder is not recognised.
    """
    found, before = set(), torch.get_num_threads()
    for threads in {before, 1, os.cpu_count() or 1}:
        torch.set_num_threads(threads)
        sums = [parameter.double().sum().item() for parameter in model.parameters()]
        found.add(hashlib.sha256(repr(sums).encode()).hexdigest()[:16])
    torch.set_num_threads(before)
    return found


def prepare_folder(job: Job, digest: str) -> Path:
    """Make the samples' folder, with the settings it belongs to; other settings in it are refused (ValueError)."""
    folder, settings = Path(job.args.sample_dir) / folder_name(job), settings_of(job, digest)
    file = folder / "settings.json"
    if file.exists():
        try:
            stored = dict(json.loads(file.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged: remove {folder}, or choose another --sample-dir") from error
        if len(stored.get("weights", "")) == 16 and stored["weights"] in earlier_fingerprints(job.pipe.model):
            stored["weights"] = digest
        for name in sorted((settings.keys() | stored.keys()) - DESCRIPTIONS):
            if settings.get(name) != stored.get(name):
                raise ValueError(
                    f"{folder} holds samples with {name} {stored.get(name)}, not {settings.get(name)}: "
                    f"choose another --sample-dir, or remove that folder"
                )
    with writing(folder), complete_file(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def make_store(job: Job, folder: Path) -> SampleStore:
    """The store of the samples."""
    return PngStore(folder) if job.png else ShardStore(folder, "latents" if job.args.latents else "pixels")


# ---------------------------------------------------------------------------------------------------------------
# Samples


def labels_of(job: Job, indices: Iterable[int]) -> list[int]:
    """The classes of these samples."""
    args, num_classes = job.args, job.pipe.model.num_classes
    return [label_of(index, num_classes, args.global_seed, args.label_sampling) for index in indices]


def plan_batches(missing: Sequence[int], size: int, adaptive: bool) -> list[list[int]]:
    """Numbers of samples that are solved together, `size` of the missing ones at a time.

    The steps of an adaptive method follow the whole batch, so there a block of numbers is solved as if nothing of it
    were there: its images are the same after an interruption, and on any number of processes.
    """
    if not adaptive:
        return [list(missing[start : start + size]) for start in range(0, len(missing), size)]
    return [list(range(block * size, (block + 1) * size)) for block in sorted({index // size for index in missing})]


def content_of(job: Job, x1: torch.Tensor) -> np.ndarray:
    """Content to store of samples x1 (N, C, h, w): pixels (N, H, W, 3) uint8, or latents (N, C, h, w) float32."""
    decoded = job.pipe.autoencoder.decode(x1)
    if job.args.latents:
        return decoded.cpu().numpy()
    return to_uint8(decoded).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # grey images become RGB


def generate(job: Job, store: SampleStore, missing: list[int], processes: Processes) -> None:
    """Draw this process's share of the missing samples and store them."""
    args, pipe, wanted = job.args, job.pipe, set(missing)
    batches = plan_batches(missing, args.per_proc_batch_size, job.solver.adaptive)
    with tqdm(total=len(missing), unit="sample", desc="samples", disable=not processes.is_main) as progress:
        for number, batch in enumerate(batches[processes.rank :: processes.world_size]):
            labels = labels_of(job, batch)
            generators = sample_generators(args.global_seed, batch, Stream.SAMPLES)
            probes = sample_generators(args.global_seed, batch, Stream.PROBES)
            with cli.solving("--per-proc-batch-size"):
                x1 = pipe.latents(labels, job.solver, job.guidance, generators)
                nats = None
                if job.likelihood:
                    num_probes = args.num_probes or 1
                    nats = pipe.log_prob(x1, labels, job.solver, job.guidance, num_probes, probes).tolist()
            content = content_of(job, x1)
            rows = [row for row, index in enumerate(batch) if index in wanted]
            with writing(store.folder):
                store.write([batch[row] for row in rows], content[rows], nats and [nats[row] for row in rows])
            # The others are about as far.
            round_of_batches = batches[number * processes.world_size : (number + 1) * processes.world_size]
            progress.update(sum(len(wanted.intersection(indices)) for indices in round_of_batches))


def finish(job: Job, folder: Path) -> None:
    """Write the .npz of all samples, and that of their log-densities.

    Raises:
        UserError: if a sample is missing or damaged, or the disk does not take them.
    """
    store, number = make_store(job, folder), job.args.num_fid_samples
    lost = set(range(number)) - store.present(number)
    if lost:
        raise UserError(f"{folder}: {len(lost)} samples were lost while others were made; run the command again")
    npz = folder.with_name(folder.name + ".npz")
    with user_input(), writing(npz):
        array, nats = write_npz(npz, store, labels_of(job, range(number)))
    print(f"saved {npz}: arr_0 {array}, arr_1 the classes")
    if job.likelihood:
        model = job.pipe.model
        dimensions = model.in_channels * math.prod(model.input_size)
        likelihoods = npz.with_name(folder.name + "-likelihood.npz")
        with writing(likelihoods):
            print(write_likelihoods(likelihoods, nats, dimensions))


# ---------------------------------------------------------------------------------------------------------------
# The command


def set_up(args: argparse.Namespace, processes: Processes) -> tuple[Job, str]:
    """The job that the flags describe, and on the main process the digest of its weights.

    Raises:
        ValueError, OSError: if something is missing, or would fail later.
    """
    likelihood = args.mode == "ODE" and args.likelihood
    solver = cli.solver_from(args)
    precision = args.precision or default_precision(processes.device, training=False)
    if args.tf32 is not None:
        precision = "tf32" if args.tf32 else "fp32"
    if line := precision_note(precision, processes.device):
        note(line)
    pipe = cli.load_pipeline(args, pictures=not args.latents, latents=args.latents, any_size=True)
    num_levels = pipe.model.num_levels if len(pipe.model.networks) == 1 else 1  # no scales of experts are known
    # A likelihood is that of the network alone, unless guidance is asked for.
    guidance = cli.guidance_from(args, 1.0 if likelihood else cli.evaluation_scales(num_levels))
    digest = fingerprint(pipe.model) if processes.is_main else ""
    pipe.to(processes.device, precision, args.compile, args.offload_experts)
    together = min(args.per_proc_batch_size, args.num_fid_samples)
    cost = cli.at_budget(pipe, args.budget, solver, guidance).check(solver, guidance, likelihood, batch=together)
    cli.warn_of_null_level(pipe, guidance.null_level)
    return Job(args, pipe, solver, guidance, cost), digest


def settle(job: Job, solver: Solver) -> Job:
    """The job with measured steps, and with the level edges of its budget for these (ValueError if it has none)."""
    pipe = cli.at_budget(job.pipe, job.args.budget, solver, job.guidance)
    return job._replace(pipe=pipe, solver=solver, cost=pipe.check(solver, job.guidance))


def main(argv: Sequence[str] | None = None) -> None:
    """Run sample_ddp.py with these command-line arguments."""
    parser = build_parser()
    args = cli.parse_mode_first(parser, argv)
    check_flags(parser, args)
    processes = start_processes()
    check_same_flags(vars(args), processes, but={"ckpt", "vae", "sample_dir"})
    job, digest = agree(lambda: set_up(args, processes), processes)
    solver = on_main(lambda: cli.step_grid_from(args, job.pipe, job.solver, job.guidance, digest), processes)
    with user_input():
        job = settle(job, solver)

    def find_missing() -> tuple[Path, list[int]]:
        folder = prepare_folder(job, digest)
        present = make_store(job, folder).present(args.num_fid_samples)
        missing = [index for index in range(args.num_fid_samples) if index not in present]
        print(f"{folder}: {len(missing):,} of {args.num_fid_samples:,} samples to make", flush=True)
        return folder, missing

    folder, missing = on_main(find_missing, processes)
    generate(job, make_store(job, folder), missing, processes)
    if dist.is_initialized():
        dist.barrier()
    # The others are done. They do not wait for these files, which may take longer than a process group's patience.
    if processes.is_main:
        finish(job, folder)


if __name__ == "__main__":
    run_script(main)
