"""What sample.py and sample_ddp.py share: solver flags, models out of checkpoints, samples and their cost."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from autoencoder import Autoencoder, Scaling, load_autoencoder
from compilation import compile_levels, replay_levels
from download import load_pretrained
from models import PyramidalPatchDiT, canonical_name
from train_utils import (
    PRECISIONS,
    ArgumentParser,
    UserError,
    add_cfg_args,
    add_level_edges,
    guided,
    natural_float,
    optional_choice,
    positive_float,
    positive_int,
    some_text,
)
from transport import (
    ADAPTIVE_METHODS,
    DIFFUSION_FORMS,
    LAST_STEPS,
    ODE_METHODS,
    SDE_METHODS,
    Sampler,
    Transport,
    check_ode_method,
    create_transport,
    sample_generators,
)

OTHER_METHODS = [method for method in ODE_METHODS if method not in ("ab2", "dpmpp_2m", "euler")]
SAMPLES, LABELS, PROBES = 7, 8, 10  # streams of random numbers; the others are in data.py and train.py

# ---------------------------------------------------------------------------------------------------------------
# Flags


def add_model_args(parser: ArgumentParser, cfg_scale: float | None, cfg_note: str = "") -> None:
    """Which network, and how it is guided: the same for ODE and SDE."""
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt", type=some_text,
                       help="weights: a checkpoint of train.py, a run's folder for its newest one, or a file in the "
                       "layout of SiT or PPFlow (default: the published weights of --model)")  # fmt: skip
    group.add_argument("--model", help="name of the model, checked against --ckpt (default without --ckpt: PPF-XL-2)")
    group.add_argument("--image-size", type=positive_int, help="side of the images, checked against the checkpoint")
    group.add_argument("--num-classes", type=positive_int, help="number of classes, checked against the checkpoint")
    group.add_argument(
        "--vae", type=some_text, help="autoencoder: ema, mse, a hub id or a local folder (default: the checkpoint's)"
    )
    group.add_argument("--weights", choices=["ema", "model"], default="ema", help="averaged weights, or the last ones")
    group.add_argument("--precision", choices=PRECISIONS,
                       help="of the network; solvers compute in fp32 (default: tf32 on CUDA, else fp32)")  # fmt: skip
    group.add_argument(
        "--compile", action="store_true", help="compile the blocks first: seconds of waiting, then faster evaluations"
    )
    group.add_argument(
        "--cuda-graphs", action="store_true", help="launch each evaluation as one CUDA graph: helps small batches"
    )
    add_level_edges(group)
    add_cfg_args(parser, cfg_scale, cfg_note)


def add_ode_args(parser: ArgumentParser, default: str = "ab2") -> None:
    """The ODE solver's flags; `default` says which method is."""
    group = parser.add_argument_group("ODE solver")
    group.add_argument("--sampling-method", choices=ODE_METHODS, metavar="METHOD",
                       help="one evaluation a step: ab2 (Adams-Bashforth), dpmpp_2m (DPM-Solver++(2M)), euler; more: "
                       f"{', '.join(OTHER_METHODS)} (default: {default})")  # fmt: skip
    group.add_argument("--num-sampling-steps", type=positive_int, nargs="+", metavar="STEPS",
                       help="steps of a fixed-step method, over all or one number per level (default: 50)")  # fmt: skip
    group.add_argument("--atol", type=positive_float, help="absolute tolerance of an adaptive method (default: 1e-6)")
    group.add_argument("--rtol", type=positive_float, help="relative tolerance of an adaptive method (default: 1e-3)")


def add_sde_args(parser: ArgumentParser) -> None:
    """The SDE solver's flags."""
    group = parser.add_argument_group("SDE solver")
    group.add_argument("--sampling-method", choices=SDE_METHODS, default="Euler", help="Euler-Maruyama or Heun")
    group.add_argument("--num-sampling-steps", type=positive_int, nargs="+", metavar="STEPS", default=[250],
                       help="steps over the whole way, the last one included, or one number per level")  # fmt: skip
    group.add_argument("--diffusion-form", choices=DIFFUSION_FORMS, default="sigma", help="shape of w_t")
    group.add_argument("--diffusion-norm", type=natural_float, default=1.0, help="factor of w_t")
    names = [name for name in LAST_STEPS if name]
    group.add_argument("--last-step", default="Mean", help="how the last stretch is taken", **optional_choice(*names))
    group.add_argument("--last-step-size", type=positive_float, help="length of the last step in t (default: 0.04)")


def check_solver_args(parser: ArgumentParser, args: argparse.Namespace, noise_to_data: bool = True) -> None:
    """Refuse solver flags that cannot work or would have no effect, and fill in those that were left out.

    Args:
        noise_to_data: whether samples are all that is asked for, rather than a likelihood or the way back
    """
    if args.mode == "SDE":
        if args.last_step is None and args.last_step_size is not None:
            parser.error("--last-step-size has no effect with --last-step None: leave it out")
        args.last_step_size = args.last_step_size or 0.04
        return
    args.sampling_method = args.sampling_method or "ab2"
    try:
        check_ode_method(args.sampling_method, noise_to_data)
    except ValueError as error:
        parser.error(str(error))
    adaptive = is_adaptive(args)
    if adaptive and args.num_sampling_steps:
        parser.error(f"--num-sampling-steps has no effect with {args.sampling_method}, which chooses its own steps")
    for name in ("atol", "rtol"):
        if not adaptive and getattr(args, name):
            parser.error(f"--{name} has no effect with {args.sampling_method}: it takes --num-sampling-steps")
    args.num_sampling_steps = args.num_sampling_steps or [50]
    args.atol, args.rtol = args.atol or 1e-6, args.rtol or 1e-3


def is_adaptive(args: argparse.Namespace) -> bool:
    """Whether the solver chooses its own steps, from the whole batch."""
    return args.mode == "ODE" and args.sampling_method in ADAPTIVE_METHODS


# ---------------------------------------------------------------------------------------------------------------
# Models out of checkpoints


@dataclass(frozen=True)
class TrainedModel:
    """A network with the process it was trained for and the autoencoder of its latents."""

    name: str
    model: PyramidalPatchDiT
    transport: Transport
    autoencoder: Autoencoder
    step: int

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.model.input_size
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    @property
    def image_channels(self) -> int:
        """Colour channels of the images."""
        return self.model.in_channels if self.autoencoder.name == "none" else 3


def load_trained(args: argparse.Namespace, device: torch.device) -> TrainedModel:
    """The network of --ckpt (or the published one of --model), its transport and its autoencoder.

    The network is prepared as --precision, --compile and --cuda-graphs ask; call it under `use_precision`.

    Raises:
        OSError, ValueError: if something is missing, damaged, or not what the flags say.
    """
    if args.cuda_graphs and device.type != "cuda":
        raise ValueError("--cuda-graphs needs a CUDA device: leave it out")
    source = args.ckpt or canonical_name(args.model or "PPF-XL-2")
    pretrained = load_pretrained(source, weights=args.weights)
    model = pretrained.model
    transport_config = pretrained.transport
    if args.level_edges is not None:
        transport_config = {**transport_config, "level_edges": args.level_edges}
    transport = create_transport(**transport_config)
    transport.check_levels(model)
    guided(model, args)  # refuses a wrong number of scales now, and not after minutes
    claims = {
        "--model": (args.model and canonical_name(args.model), pretrained.name),
        "--num-classes": (args.num_classes, model.num_classes),
    }
    check_claims(claims, source)
    autoencoder = load_autoencoder(args.vae or pretrained.vae, device)
    if pretrained.scaling is not None and autoencoder.name != "none":
        autoencoder = autoencoder.with_scaling(Scaling.from_dict(pretrained.scaling))
    if autoencoder.channels not in (None, model.in_channels):
        raise ValueError(
            f"the autoencoder {autoencoder.name} has {autoencoder.channels} channels, {source} {model.in_channels}"
        )
    model = model.to(device).eval().requires_grad_(False)
    trained = TrainedModel(pretrained.name, model, transport, autoencoder, pretrained.step)
    check_claims({"--image-size": (args.image_size, trained.image_size[0])}, source)
    if trained.image_channels not in (1, 3):
        raise ValueError(f"{source} makes {trained.image_channels} channels, which no picture holds: give --vae")
    if args.precision == "bf16":
        model.blocks.bfloat16()  # once, where autocast would at every evaluation; they hold linear layers alone
    if args.compile:
        torch._functorch.config.donated_buffer = False  # a likelihood goes backward once for each of its probes
        compile_levels(model, tell=tqdm.write if int(os.environ.get("RANK", 0)) == 0 else None)
    if args.cuda_graphs:
        replay_levels(model)
    return trained


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


class EvaluationCounter:
    """A network that counts its evaluations, level by level, and moves a progress bar.

    Args:
        model:    the network
        progress: updated by one for each call
    """

    def __init__(self, model: PyramidalPatchDiT, progress: tqdm | None = None) -> None:
        self.model = model
        self.num_levels = model.num_levels
        self.num_classes = model.num_classes
        self.progress = progress
        self.rows = [0] * self.num_levels  # samples evaluated at each level; a guided one counts two

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        self.rows[level] += len(x)
        if self.progress is not None:
            self.progress.update(1)
        return self.model(x, t, y=y, level=level)

    def nfe(self, num_samples: int) -> float:
        """Network evaluations per sample."""
        return sum(self.rows) / num_samples

    def gmacs(self, num_samples: int) -> float:
        """Billions of multiply-accumulates per sample."""
        return sum(rows * self.model.macs(level) for level, rows in enumerate(self.rows)) / num_samples / 1e9


# ---------------------------------------------------------------------------------------------------------------
# Samples


def per_level(values: Sequence[int]) -> int | Sequence[int]:
    """One number stands for the whole way, several for one level each."""
    return values[0] if len(values) == 1 else values


def draw_samples(
    trained: TrainedModel,
    counter: EvaluationCounter,
    args: argparse.Namespace,
    labels: Sequence[int],
    indices: Sequence[int],
    seed: int,
    device: torch.device,
) -> torch.Tensor:
    """Samples (N, C, H, W) as the network sees them: each a function of (network, solver, seed, index) and its label.

    Args:
        labels:  N class ids
        indices: the samples' N numbers
    """
    generators = sample_generators(seed, indices, SAMPLES)
    model, transport = trained.model, trained.transport
    x0 = transport.noise.sample((len(labels), model.in_channels, *model.input_size), generators, device)
    y = torch.tensor(labels, device=device)
    sampler, network, steps = Sampler(transport), guided(counter, args), per_level(args.num_sampling_steps)
    if args.mode == "ODE":
        x1 = sampler.sample_ode(network, x0, args.sampling_method, steps, args.atol, args.rtol, y=y)
    else:
        x1 = sampler.sample_sde(
            network,
            x0,
            method=args.sampling_method,
            num_steps=steps,
            diffusion_form=args.diffusion_form,
            diffusion_norm=args.diffusion_norm,
            last_step=args.last_step,
            last_step_size=args.last_step_size,
            generator=generators,
            y=y,
        )
    if not torch.isfinite(x1).all():
        raise UserError("the samples are not finite: lower --cfg-scales, or take more steps")
    return x1


def dry_run(trained: TrainedModel, args: argparse.Namespace, device: torch.device) -> None:
    """Raise now what the solver would refuse later (ValueError), by walking a field that is zero."""

    class Zero:
        num_levels, num_classes = trained.model.num_levels, trained.model.num_classes

        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
            return torch.zeros_like(x)

    draw_samples(trained, Zero(), args, labels=[0], indices=[0], seed=0, device=device)
