"""Draw the many samples that an FID needs, on any number of processes.

    torchrun --nnodes=1 --nproc_per_node=N sample_ddp.py ODE --ckpt model.pt --num-fid-samples 50000 --cfg-scales 1.5

Writes a folder of PNG files and an .npz whose arr_0 is (N, H, W, 3) uint8 in sample order, as ADM's evaluation suite
reads it. Sample i is a function of (checkpoint, solver, seed, i): the number of processes and the batch size do not
matter, and a run that was interrupted makes what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from models import PyramidalPatchDiT
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
    load_trained,
    per_level,
)
from train_utils import (
    ArgumentParser,
    Processes,
    broadcast_object,
    complete_file,
    guided,
    natural_int,
    positive_int,
    run_script,
    start_processes,
    to_uint8,
    use_precision,
    user_input,
)
from transport import Sampler, bits_per_dim, sample_generators

PNGS_PER_FOLDER = 1000
NATS = "log-density in nats"  # key of a PNG file's text

# Flags that do not change what sample i looks like.
NOT_SETTINGS = {"sample_dir", "per_proc_batch_size", "num_fid_samples", "ckpt", "tf32", "model", "image_size",
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
        output.add_argument("--sample-dir", default="samples", help="folder for the PNG folder and the .npz")
        output.add_argument("--num-fid-samples", type=positive_int, default=50_000, help="number of samples")
        output.add_argument(
            "--per-proc-batch-size", type=positive_int, default=32, help="samples a process solves together"
        )
        output.add_argument("--global-seed", type=natural_int, default=0, help="seed of labels and noise")
        output.add_argument("--label-sampling", choices=["random", "balanced"], default="random",
                            help="labels: uniformly random, or all classes equally often")  # fmt: skip
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


def png_path(folder: Path, index: int) -> Path:
    """Where sample `index` lies: a thousand files to a folder."""
    return folder / f"{index // PNGS_PER_FOLDER:03d}" / f"{index:06d}.png"


def write_npz(path: Path, folder: Path, num_samples: int, shape: tuple[int, int]) -> None:
    """Stream the PNG files into an .npz: arr_0 (N, H, W, 3) uint8 in sample order, one image in memory at a time."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (num_samples, *shape, 3)}
    with (
        complete_file(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for index in tqdm(range(num_samples), desc="npz", unit="image"):
            with Image.open(png_path(folder, index)) as image:
                file.write(np.asarray(image).tobytes())


def write_likelihoods(path: Path, folder: Path, num_samples: int, dimensions: int) -> None:
    """Collect the samples' log-densities into an .npz: nats (N,) and bits_per_dim (N,), in sample order."""
    nats = []
    for index in range(num_samples):
        with Image.open(png_path(folder, index)) as image:
            nats.append(float(image.text[NATS]))
    bits = bits_per_dim(torch.tensor(nats, dtype=torch.float64), dimensions).numpy()
    with complete_file(path) as temporary:
        np.savez(temporary, nats=np.array(nats), bits_per_dim=bits)
    print(f"saved {path}: mean {np.mean(nats):.2f} nats, {bits.mean():.4f} bits per dimension")


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


def generate(
    args: argparse.Namespace, trained: TrainedModel, folder: Path, indices: list[int], processes: Processes
) -> None:
    """Draw this process's share of the samples `indices` and write each as a PNG file."""
    size = args.per_proc_batch_size
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    mine = batches[processes.rank :: processes.world_size]
    counter = EvaluationCounter(trained.model)
    with tqdm(total=len(indices), unit="image", desc="samples", disable=not processes.is_main) as progress:
        for number, batch in enumerate(mine):
            labels = [label_of(index, trained.model.num_classes, args) for index in batch]
            with use_precision(args.precision, processes.device):
                x1 = draw_samples(trained, counter, args, labels, batch, args.global_seed, processes.device)
                images = trained.autoencoder.decode(x1)
                nats = log_density(trained, args, x1, labels, batch) if args.mode == "ODE" and args.likelihood else None
            for row, (index, pixels) in enumerate(
                zip(batch, to_uint8(images).permute(0, 2, 3, 1).numpy(), strict=True)
            ):
                text = PngInfo()
                if nats is not None:
                    text.add_text(NATS, repr(nats[row]))  # with its image: both are there, or neither
                with complete_file(png_path(folder, index)) as temporary:
                    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))  # grey images become RGB
                    Image.fromarray(np.ascontiguousarray(rgb)).save(temporary, pnginfo=text)
            # The others are about as far.
            round_of_batches = batches[number * processes.world_size : (number + 1) * processes.world_size]
            progress.update(sum(map(len, round_of_batches)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run sample_ddp.py with these command-line arguments."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.mode == "ODE" and args.num_probes and not args.likelihood:
        parser.error("--num-probes has no effect without --likelihood")
    check_solver_args(parser, args)
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
            missing = [i for i in range(args.num_fid_samples) if not png_path(folder, i).exists()]
            print(f"{folder}: {len(missing):,} of {args.num_fid_samples:,} samples to make", flush=True)
        else:
            folder, missing = None, None
    folder, missing = broadcast_object((folder, missing))
    generate(args, trained, folder, missing, processes)
    if dist.is_initialized():
        dist.barrier()
    if processes.is_main:
        npz = folder.with_name(folder.name + ".npz")
        write_npz(npz, folder, args.num_fid_samples, trained.image_size)
        if args.mode == "ODE" and args.likelihood:
            likelihoods = npz.with_name(folder.name + "-likelihood.npz")
            model = trained.model
            write_likelihoods(
                likelihoods, folder, args.num_fid_samples, model.in_channels * math.prod(model.input_size)
            )
        print(f"saved {npz}: arr_0 {(args.num_fid_samples, *trained.image_size, 3)} uint8")


if __name__ == "__main__":
    run_script(main)
