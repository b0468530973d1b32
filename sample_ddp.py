"""Draw the many samples that an FID needs, on any number of processes.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py ODE --ckpt model.pt --num-fid-samples 50000 --cfg-scales 1.5

Writes a folder of PNG files (none with --no-png) and an .npz whose arr_0 is (N, H, W, 3) uint8 in sample order, as
ADM's evaluation suite reads it. Sample i is a function of (checkpoint, solver, seed, i): the number of processes and
the batch size do not matter, and a run that was interrupted makes what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from models import PyramidalPatchDiT
from sample_store import PngStore, SampleStore, ShardStore, write_likelihoods, write_npz
from sample_utils import (
    LABELS,
    PROBES,
    EvaluationCounter,
    TrainedModel,
    add_model_args,
    add_ode_args,
    add_sde_args,
    check_solver_args,
    draw_samples,
    dry_run,
    is_adaptive,
    load_trained,
    per_level,
)
from train_utils import (
    ArgumentParser,
    Processes,
    UserError,
    broadcast_object,
    complete_file,
    guided,
    natural_int,
    positive_int,
    run_script,
    some_text,
    start_processes,
    to_uint8,
    use_precision,
    user_input,
)
from transport import Sampler, sample_generators

# Flags that do not change what sample i looks like.
NOT_SETTINGS = {"sample_dir", "per_proc_batch_size", "num_fid_samples", "ckpt", "tf32", "model", "image_size",
                "compile", "cuda_graphs",
                "num_classes", "vae"}  # fmt: skip


def build_parser() -> ArgumentParser:
    """The flags of sample_ddp.py."""
    parser = ArgumentParser(prog="sample_ddp.py", description="Draw many samples, as PNG files and one .npz.")
    modes = parser.add_subparsers(dest="mode", required=True, metavar="{ODE,SDE}")
    for mode, text in (("ODE", "the deterministic sampler"), ("SDE", "the stochastic sampler")):
        command = modes.add_parser(
            mode, help=f"{text}; see sample_ddp.py {mode} --help", description=f"Sample with {text}."
        )
        output = command.add_argument_group("output")
        output.add_argument(
            "--sample-dir", type=some_text, default="samples", help="folder for the PNG folder and the .npz"
        )
        output.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="number of samples")
        output.add_argument(
            "--per-proc-batch-size", type=positive_int, default=32, help="samples a process solves together"
        )
        output.add_argument("--global-seed", type=natural_int, default=0, help="seed of labels and noise")
        output.add_argument("--label-sampling", choices=["random", "balanced"], default="random",
                            help="labels: uniformly random, or all classes equally often")  # fmt: skip
        output.add_argument("--png", action=argparse.BooleanOptionalAction, default=True,
                            help="a PNG file of each sample; without, small .npz shards")  # fmt: skip
        output.add_argument("--tf32", action=argparse.BooleanOptionalAction, help="short for --precision tf32 or fp32")
        add_model_args(command, 1.0)
        if mode == "SDE":
            add_sde_args(command)
            continue
        add_ode_args(command)
        likelihood = command.add_argument_group("likelihood")
        likelihood.add_argument("--likelihood", action="store_true",
                                help="also the log-density of each sample, in NAME-likelihood.npz")  # fmt: skip
        likelihood.add_argument("--num-probes", type=positive_int, help="probes of the divergence (default: 1)")
    return parser


def label_of(index: int, num_classes: int, args: argparse.Namespace) -> int:
    """The class of sample `index`."""
    if args.label_sampling == "balanced":
        return index % num_classes
    (generator,) = sample_generators(args.global_seed, [index], LABELS)
    return int(torch.randint(num_classes, (), generator=generator))


def folder_name(args: argparse.Namespace, trained: TrainedModel) -> str:
    """A name that tells the settings one would compare."""
    steps = "" if args.num_sampling_steps is None else "-" + "-".join(map(str, args.num_sampling_steps))
    scales = "-".join(f"{scale:g}" for scale in args.cfg_scales)
    name = trained.name.replace("/", "-")
    return f"{name}-{trained.step:07d}-{args.mode}-{args.sampling_method}{steps}-cfg-{scales}-seed-{args.global_seed}"


def fingerprint(model: PyramidalPatchDiT) -> str:
    """Tells one set of weights from another."""
    sums = [parameter.double().sum().item() for parameter in model.parameters()]
    return hashlib.sha256(repr(sums).encode()).hexdigest()[:16]


def prepare_folder(args: argparse.Namespace, trained: TrainedModel) -> Path:
    """The PNG folder, with the settings it belongs to; other settings in it are refused (ValueError)."""
    folder = Path(args.sample_dir) / folder_name(args, trained)
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    if is_adaptive(args):
        settings["per_proc_batch_size"] = args.per_proc_batch_size  # its steps follow the batch
    settings |= {"checkpoint": f"{trained.name}, step {trained.step}", "weights": fingerprint(trained.model),
                 "vae": trained.autoencoder.name, "level_edges": trained.transport.schedule.level_edges}  # fmt: skip
    settings = json.loads(json.dumps(settings))
    file = folder / "settings.json"
    if file.exists():
        stored = json.loads(file.read_text())
        for name in sorted(settings.keys() | stored.keys()):
            if settings.get(name) != stored.get(name):
                raise ValueError(
                    f"{folder} holds samples with {name} {stored.get(name)}, not {settings.get(name)}: "
                    f"choose another --sample-dir, or remove that folder"
                )
    with complete_file(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def log_density(
    trained: TrainedModel, args: argparse.Namespace, x1: torch.Tensor, labels: list[int], indices: list[int]
) -> list[float]:
    """Log-density in nats of samples x1 (N, C, H, W) under the process that drew them."""
    generators = sample_generators(args.global_seed, indices, PROBES)
    log_prob, _ = Sampler(trained.transport).log_likelihood(
        guided(trained.model, args), x1, torch.tensor(labels, device=x1.device), args.sampling_method,
        per_level(args.num_sampling_steps), args.atol, args.rtol, args.num_probes or 1, generators,
    )  # fmt: skip
    return log_prob.tolist()


def make_store(args: argparse.Namespace, folder: Path) -> SampleStore:
    """Where the samples are kept."""
    return PngStore(folder) if args.png else ShardStore(folder)


def plan_batches(missing: Sequence[int], args: argparse.Namespace) -> list[list[int]]:
    """What is solved together: missing samples whose numbers share a block of --per-proc-batch-size.

    The steps of an adaptive method follow the whole batch, so there the whole block is solved, as if nothing of it were
    there: its images are the same after an interruption, and on any number of processes.
    """
    size = args.per_proc_batch_size
    if not is_adaptive(args):
        return [list(missing[start : start + size]) for start in range(0, len(missing), size)]
    return [list(range(block * size, (block + 1) * size)) for block in sorted({index // size for index in missing})]


def generate(
    args: argparse.Namespace, trained: TrainedModel, store: SampleStore, missing: list[int], processes: Processes
) -> None:
    """Draw this process's share of the missing samples and store them."""
    batches = plan_batches(missing, args)
    counter, wanted = EvaluationCounter(trained.model), set(missing)
    with tqdm(total=len(missing), unit="image", desc="samples", disable=not processes.is_main) as progress:
        for number, batch in enumerate(batches[processes.rank :: processes.world_size]):
            labels = [label_of(index, trained.model.num_classes, args) for index in batch]
            with use_precision(args.precision, processes.device):
                x1 = draw_samples(trained, counter, args, labels, batch, args.global_seed, processes.device)
                images = trained.autoencoder.decode(x1)
                nats = log_density(trained, args, x1, labels, batch) if args.mode == "ODE" and args.likelihood else None
            pixels = to_uint8(images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # grey images become RGB
            rows = [row for row, index in enumerate(batch) if index in wanted]
            store.write([batch[row] for row in rows], pixels[rows], nats and [nats[row] for row in rows])
            # The others are about as far.
            round_of_batches = batches[number * processes.world_size : (number + 1) * processes.world_size]
            progress.update(sum(len(wanted.intersection(indices)) for indices in round_of_batches))


def main(argv: Sequence[str] | None = None) -> None:
    """Run sample_ddp.py with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.mode == "ODE" and args.num_probes and not args.likelihood:
        parser.error("--num-probes has no effect without --likelihood")
    check_solver_args(parser, args, noise_to_data=not (args.mode == "ODE" and args.likelihood))
    if args.tf32 is not None:
        if args.precision is not None:
            parser.error("--tf32 and --precision say the same: give one of them")
        args.precision = "tf32" if args.tf32 else "fp32"
    processes = start_processes()
    args.precision = args.precision or ("tf32" if processes.device.type == "cuda" else "fp32")
    with user_input():
        trained = load_trained(args, processes.device)
        dry_run(trained, args, processes.device)
        if processes.is_main:
            folder = prepare_folder(args, trained)
            present = make_store(args, folder).present(args.num_fid_samples)
            missing = [index for index in range(args.num_fid_samples) if index not in present]
            print(f"{folder}: {len(missing):,} of {args.num_fid_samples:,} samples to make", flush=True)
        else:
            folder, missing = None, None
    folder, missing = broadcast_object((folder, missing))
    store = make_store(args, folder)
    generate(args, trained, store, missing, processes)
    if dist.is_initialized():
        dist.barrier()
    if processes.is_main:
        lost = set(range(args.num_fid_samples)) - store.present(args.num_fid_samples)
        if lost:
            raise UserError(f"{folder}: {len(lost)} samples were lost while others were made; run the command again")
        npz = folder.with_name(folder.name + ".npz")
        with user_input():
            nats = write_npz(npz, store, args.num_fid_samples, trained.image_size)
        print(f"saved {npz}: arr_0 {(args.num_fid_samples, *trained.image_size, 3)} uint8")
        if args.mode == "ODE" and args.likelihood:
            model = trained.model
            dimensions = model.in_channels * math.prod(model.input_size)
            print(write_likelihoods(npz.with_name(folder.name + "-likelihood.npz"), nats, dimensions))


if __name__ == "__main__":
    run_script(main)
