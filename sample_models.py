"""Networks out of checkpoints, with the process and the autoencoder they belong to, as sampling uses them."""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from autoencoder import Autoencoder, RawLatents, Scaling, autoencoder_name, load_autoencoder, load_raw_latents
from compilation import compile_levels, replay_levels
from download import Pretrained, load_pretrained
from layouts import own_state_dict
from models import PyramidalPatchDiT, canonical_name
from train_utils import guided, note
from transport import Transport, create_transport


@dataclass(frozen=True)
class TrainedModel:
    """A network with the process it was trained for and the autoencoder of its latents.

    Args:
        changed:     what flags changed of the process that the weights were trained for
        fingerprint: tells the weights from others; "" where it was not asked for
    """

    name: str
    model: PyramidalPatchDiT
    transport: Transport
    autoencoder: Autoencoder | RawLatents
    step: int
    changed: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.model.input_size
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    @property
    def image_channels(self) -> int:
        """Colour channels of the images."""
        return self.model.in_channels if self.autoencoder.name == "none" else 3


def load_trained(
    args: argparse.Namespace,
    device: torch.device,
    pictures: bool = True,
    latents: bool = False,
    identify: bool = False,
) -> TrainedModel:
    """The network of --ckpt (or the published one of --model), its transport and its autoencoder.

    The network is prepared as --precision, --compile and --cuda-graphs ask; call it under `use_precision`.

    Args:
        pictures: samples are to be shown, for which they must have one channel or three
        latents:  samples are to stay latents: no autoencoder is read
        identify: compute the weights' fingerprint, some seconds for XL

    Raises:
        OSError, ValueError: if something is missing, damaged, or not what the flags say.
    """
    if args.cuda_graphs and device.type != "cuda":
        raise ValueError("--cuda-graphs needs a CUDA device: leave it out")
    source = args.ckpt or canonical_name(args.model or "PPF-XL-2")
    pretrained = load_pretrained(source, weights=args.weights)
    model = pretrained.model
    claims = {
        "--model": (args.model and canonical_name(args.model), pretrained.name),
        "--num-classes": (args.num_classes, model.num_classes),
    }
    check_claims(claims, source)
    transport, changed = load_transport(args, pretrained, source)
    transport.check_levels(model)
    guided(model, args)  # refuses a wrong number of scales now, and not after minutes
    autoencoder = find_raw_latents(args, pretrained, source) if latents else find_autoencoder(args, pretrained, device)
    if autoencoder.channels not in (None, model.in_channels):
        raise ValueError(
            f"the autoencoder {autoencoder.name} has {autoencoder.channels} channels, {source} {model.in_channels}"
        )
    trained = TrainedModel(
        pretrained.name, model, transport, autoencoder, pretrained.step, changed, fingerprint(model) if identify else ""
    )
    if not latents:
        check_claims({"--image-size": (args.image_size, trained.image_size[0])}, source)
    if pictures and trained.image_channels not in (1, 3):
        raise ValueError(
            f"{source} makes {trained.image_channels} channels, which no picture holds: give --vae, "
            f"or take the latents themselves with sample_ddp.py --latents"
        )
    model.to(device).eval().requires_grad_(False)
    if args.precision == "bf16":
        model.blocks.bfloat16()  # once, where autocast would at every evaluation; they hold linear layers alone
    if args.compile:
        torch._functorch.config.donated_buffer = False  # a likelihood goes backward once for each of its probes
        compile_levels(model, tell=tqdm.write if int(os.environ.get("RANK", 0)) == 0 else None)
    if args.cuda_graphs:
        replay_levels(model)
    return trained


def load_transport(args: argparse.Namespace, pretrained: Pretrained, source: str) -> tuple[Transport, dict[str, Any]]:
    """The process of the weights, completed and changed by flags, and the settings that these changed.

    Raises:
        ValueError: if a flag says something else of the training than the file, or there is no such process.
    """
    own = create_transport(**pretrained.transport, check_ends=False)
    trained_with = {
        "path_type": own.path.name,
        "prediction": own.prediction,
        "loss_weight": own.loss_weight,
        "train_eps": own.train_eps,
    }
    stated = [name for name in trained_with if name in pretrained.stated]
    flags = {f"--{name.replace('_', '-')}": (getattr(args, name), trained_with[name]) for name in stated}
    check_claims(flags, source)
    config = {
        **pretrained.transport,
        "train_eps": None,
    }  # of no matter here, and an earlier version may have allowed it
    if own.sampling_singularity() and args.sample_eps is None:
        config["sample_eps"], before = None, own.sample_eps
        own = create_transport(**config)
        note(f"{source} has sample_eps {before:g}, from which no solver can start: {own.sample_eps:g} is used")
    changes = {name: getattr(args, name) for name in ("path_type", "prediction", "sample_eps", "level_edges")}
    transport = create_transport(**config | {name: value for name, value in changes.items() if value is not None})
    before, after = (
        {"path_type": process.path.name, "prediction": process.prediction, "sample_eps": process.sample_eps}
        for process in (own, transport)
    )
    return transport, {name: value for name, value in after.items() if value != before[name]}


def find_autoencoder(args: argparse.Namespace, pretrained: Pretrained, device: torch.device) -> Autoencoder:
    """The autoencoder of --vae or the weights, with the scaling that the weights were trained with."""
    autoencoder = load_autoencoder(args.vae or pretrained.vae, device)
    if pretrained.scaling is not None and autoencoder.name != "none":
        autoencoder = autoencoder.with_scaling(Scaling.from_dict(pretrained.scaling))
    return autoencoder


def find_raw_latents(args: argparse.Namespace, pretrained: Pretrained, source: str) -> RawLatents:
    """The scaling that the weights were trained with, or that of the autoencoder's config.

    Raises:
        ValueError: if there is neither, or a flag has no effect.
    """
    if args.image_size is not None:
        raise ValueError("--image-size is the side of images, and --latents makes none: leave it out")
    if pretrained.scaling is not None:
        if args.vae is not None:
            raise ValueError(f"{source} tells how its latents are scaled: leave --vae out with --latents")
        return RawLatents(pretrained.vae, Scaling.from_dict(pretrained.scaling))
    vae = autoencoder_name(args.vae or pretrained.vae)
    if vae == "none":
        raise ValueError(
            f"{source} makes images, or does not tell how its latents are scaled: leave --latents out, or give --vae"
        )
    return load_raw_latents(vae)


def fingerprint(model: PyramidalPatchDiT) -> str:
    """The sha256 of a network's names and weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(own_state_dict(model).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_claims(claims: dict[str, tuple[Any, Any]], source: str) -> None:
    """Refuse flags that say something else of the weights than the weights themselves (ValueError)."""
    for flag, (claimed, actual) in claims.items():
        if claimed is not None and claimed != actual:
            raise ValueError(f"{flag} is {claimed}, but {source} was trained with {actual}: leave {flag} out")


def finest_only(trained: TrainedModel) -> TrainedModel:
    """The same network run at its finest level all the way, as a model with one level: what the pyramid saves on."""
    transport = trained.transport
    flat = create_transport(
        transport.path.name, transport.prediction, transport.loss_weight, transport.train_eps, transport.sample_eps
    )
    return replace(trained, model=_OneLevel(trained.model, trained.model.num_levels - 1), transport=flat)


class _OneLevel:
    num_levels = 1

    def __init__(self, model: PyramidalPatchDiT, level: int) -> None:
        self.model, self.level = model, level
        self.num_classes, self.in_channels, self.input_size = model.num_classes, model.in_channels, model.input_size

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        return self.model(x, t, y, level=self.level)

    def macs(self, level: int) -> int:
        return self.model.macs(self.level)

    def parameters(self) -> Iterator[torch.Tensor]:
        return self.model.parameters()
