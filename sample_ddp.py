"""Draw the many samples that an FID needs, on any number of processes.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py ODE --ckpt model.pt --num-fid-samples 50000 --cfg-scales 1.5

Writes a folder of PNG files (none with --no-png) and an .npz whose arr_0 is (N, H, W, 3) uint8 in sample order, as
ADM's evaluation suite reads it. With --latents nothing is decoded: arr_0 of NAME-latents.npz is (N, C, h, w) float32,
the latents as their autoencoder decodes them, and that autoencoder need not be here.

Sample i is a function of (checkpoint, solver, seed, i): the number of processes and the batch size do not matter, and a
run that was interrupted makes what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from models import PyramidalPatchDiT
from sample_models import TrainedModel, load_trained
from sample_store import PngStore, SampleStore, ShardStore, write_likelihoods, write_npz
from sample_utils import (
    LABELS,
    PROBES,
    EvaluationCounter,
    add_model_args,
    add_ode_args,
    add_sde_args,
    check_solver_args,
    draw_samples,
    dry_run,
    is_adaptive,
    log_density,
)
from train_utils import (
    ArgumentParser,
    Processes,
    UserError,
    agree,
    check_same_flags,
    complete_file,
    natural_int,
    on_main,
    positive_int,
    precision_note,
    run_script,
    some_text,
    start_processes,
    to_uint8,
    use_precision,
    user_input,
)
from transport import sample_generators

# Flags that do not change what sample i looks like, or stand among the settings as what they led to.
NOT_SETTINGS = {
    *("sample_dir", "per_proc_batch_size", "num_fid_samples", "ckpt", "tf32", "model", "image_size", "num_classes"),
    *("compile", "cuda_graphs", "vae", "latents"),
    *("path_type", "prediction", "loss_weight", "train_eps", "sample_eps"),
}


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
        text = "a PNG file of each sample (the default); without, small .npz shards"
        output.add_argument("--png", action=argparse.BooleanOptionalAction, help=text)
        text = "the latents before decoding instead of images, in NAME-latents.npz"
        output.add_argument("--latents", action="store_true", help=text)
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
    network = f"{trained.name.replace('/', '-')}-{trained.step:07d}"
    kind = "-latents" if args.latents else ""
    return f"{network}-{args.mode}-{args.sampling_method}{steps}-cfg-{scales}-seed-{args.global_seed}{kind}"


def earlier_fingerprints(model: PyramidalPatchDiT) -> set[str]:
    """What folders that are older than `fingerprint` may say of these weights.

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


def prepare_folder(args: argparse.Namespace, trained: TrainedModel) -> Path:
    """The PNG folder, with the settings it belongs to; other settings in it are refused (ValueError)."""
    folder = Path(args.sample_dir) / folder_name(args, trained)
    settings = {name: value for name, value in sorted(vars(args).items()) if name not in NOT_SETTINGS}
    if is_adaptive(args):
        settings["per_proc_batch_size"] = args.per_proc_batch_size  # its steps follow the batch
    settings |= {"checkpoint": f"{trained.name}, step {trained.step}", "weights": trained.fingerprint,
                 "vae": trained.autoencoder.name, "level_edges": trained.transport.schedule.level_edges}  # fmt: skip
    settings |= trained.changed
    if args.latents:
        settings["scaling"] = asdict(trained.autoencoder.scaling)
    settings = json.loads(json.dumps(settings))
    file = folder / "settings.json"
    if file.exists():
        try:
            stored = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: remove {folder}, or choose another --sample-dir") from error
        if len(stored["weights"]) == 16 and stored["weights"] in earlier_fingerprints(trained.model):
            stored["weights"] = trained.fingerprint
        for name in sorted(settings.keys() | stored.keys()):
            if settings.get(name) != stored.get(name):
                raise ValueError(
                    f"{folder} holds samples with {name} {stored.get(name)}, not {settings.get(name)}: "
                    f"choose another --sample-dir, or remove that folder"
                )
    with complete_file(file) as temporary:
        temporary.write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def make_store(args: argparse.Namespace, folder: Path) -> SampleStore:
    """Where the samples are kept."""
    return PngStore(folder) if args.png else ShardStore(folder, "latents" if args.latents else "pixels")


def content_of(trained: TrainedModel, x1: torch.Tensor, latents: bool) -> np.ndarray:
    """What is kept of samples x1 (N, C, h, w): pixels (N, H, W, 3) uint8, or latents (N, C, h, w) float32."""
    decoded = trained.autoencoder.decode(x1)
    if latents:
        return decoded.cpu().numpy()
    return to_uint8(decoded).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # grey images become RGB


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A disk that does not take what is written is the user's to mend: one line (UserError)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; mend that, and the same command goes on") from error


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
                content = content_of(trained, x1, args.latents)
                nats = None
                if args.mode == "ODE" and args.likelihood:
                    y, generators = (
                        torch.tensor(labels, device=x1.device),
                        sample_generators(args.global_seed, batch, PROBES),
                    )
                    nats = log_density(trained, EvaluationCounter(trained.model), args, x1, y, generators).tolist()
            rows = [row for row, index in enumerate(batch) if index in wanted]
            with writing(store.folder):
                store.write([batch[row] for row in rows], content[rows], nats and [nats[row] for row in rows])
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
    if args.latents and args.png is not None:
        parser.error("--png and --no-png are about images, and --latents makes none: leave it out")
    args.png = not args.latents if args.png is None else args.png
    processes = start_processes()
    args.precision = args.precision or ("tf32" if processes.device.type == "cuda" else "fp32")
    if processes.is_main and (line := precision_note(args.precision, processes.device)):
        print(line, flush=True)
    check_same_flags(args, processes, but={"ckpt", "vae", "sample_dir"})

    def load() -> TrainedModel:
        trained = load_trained(
            args, processes.device, pictures=not args.latents, latents=args.latents, identify=processes.is_main
        )
        dry_run(trained, args, processes.device)
        return trained

    trained = agree(load, processes)
    folder, missing = on_main(lambda: prepare(args, trained), processes)
    store = make_store(args, folder)
    generate(args, trained, store, missing, processes)
    if dist.is_initialized():
        dist.barrier()
    # The others are done. They do not wait for these files, which may take longer than a process group's patience.
    if processes.is_main:
        finish(args, trained, folder)


def prepare(args: argparse.Namespace, trained: TrainedModel) -> tuple[Path, list[int]]:
    """The folder of the samples, and the numbers of those that are not there yet (ValueError, OSError)."""
    folder = prepare_folder(args, trained)
    present = make_store(args, folder).present(args.num_fid_samples)
    missing = [index for index in range(args.num_fid_samples) if index not in present]
    print(f"{folder}: {len(missing):,} of {args.num_fid_samples:,} samples to make", flush=True)
    return folder, missing


def finish(args: argparse.Namespace, trained: TrainedModel, folder: Path) -> None:
    """Write the .npz of all samples, and that of their log-densities.

    Raises:
        UserError: if a sample is missing or damaged, or the disk does not take them.
    """
    store = make_store(args, folder)
    lost = set(range(args.num_fid_samples)) - store.present(args.num_fid_samples)
    if lost:
        raise UserError(f"{folder}: {len(lost)} samples were lost while others were made; run the command again")
    npz = folder.with_name(folder.name + ".npz")
    with user_input(), writing(npz):
        array, nats = write_npz(npz, store, args.num_fid_samples)
    print(f"saved {npz}: arr_0 {array}")
    if args.mode == "ODE" and args.likelihood:
        model = trained.model
        dimensions = model.in_channels * math.prod(model.input_size)
        likelihoods = npz.with_name(folder.name + "-likelihood.npz")
        with writing(likelihoods):
            print(write_likelihoods(likelihoods, nats, dimensions))


if __name__ == "__main__":
    run_script(main)
