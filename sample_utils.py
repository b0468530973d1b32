"""What sample.py and sample_ddp.py share: flags, samples and their cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from models import PyramidalPatchDiT
from sample_models import TrainedModel
from train_utils import (
    PRECISIONS,
    ArgumentParser,
    UserError,
    add_cfg_args,
    add_level_edges,
    finite_float,
    guided,
    natural_float,
    note,
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
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    Sampler,
    check_ode_method,
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
    process = parser.add_argument_group(
        "process", "as given to train.py; a checkpoint tells them, and they are checked against it (but --sample-eps)"
    )
    process.add_argument("--path-type", choices=list(PATHS), help="interpolant between noise and data")
    process.add_argument("--prediction", choices=PREDICTIONS, help="what the network predicts")
    process.add_argument("--loss-weight", help="of the training alone", **optional_choice("velocity", "likelihood"))
    process.add_argument("--train-eps", type=finite_float, help="of the training alone")
    process.add_argument(
        "--sample-eps", type=finite_float, help="distance from singular ends of [0, 1] (default: the checkpoint's)"
    )
    add_level_edges(process)
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
        note(f"{args.sampling_method} chooses its own steps: --num-sampling-steps has no effect")
    for name in ("atol", "rtol"):
        if not adaptive and getattr(args, name):
            reason = f"--{name} has no effect with {args.sampling_method}, which takes --num-sampling-steps"
            parser.error(f"{reason}: leave it out, or give --sampling-method dopri5 as well")
    # Folders of sample_ddp.py have always been named after 50 steps of an adaptive method: so they are found again.
    args.num_sampling_steps = [50] if adaptive else args.num_sampling_steps or [50]
    args.atol, args.rtol = args.atol or 1e-6, args.rtol or 1e-3


def is_adaptive(args: argparse.Namespace) -> bool:
    """Whether the solver chooses its own steps, from the whole batch."""
    return args.mode == "ODE" and args.sampling_method in ADAPTIVE_METHODS


# ---------------------------------------------------------------------------------------------------------------
# Samples and their cost


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


def per_level(values: Sequence[int]) -> int | Sequence[int]:
    """One number stands for the whole way, several for one level each."""
    return values[0] if len(values) == 1 else values


def solved(
    trained: TrainedModel, args: argparse.Namespace, what: str, solve: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What a solver returns, if it comes to an end and all of it is finite; `what` it is, in the plural.

    Raises:
        UserError: if not, with what to do about it.
    """
    try:
        result = solve()
        if result.isfinite().all():
            return result
        reason = f"the {what} are not finite"
    except FloatingPointError as error:
        reason = str(error)
    if not all(parameter.isfinite().all() for parameter in trained.model.parameters()):
        weights = f"the weights of {trained.name} at step {trained.step} are not finite either"
        raise UserError(f"{reason}, and {weights}: give a checkpoint from before the training diverged")
    advice = "give another --sampling-method, as ab2" if is_adaptive(args) else "take more steps"
    raise UserError(f"{reason}: lower --cfg-scales, or {advice}")


def follow_ode(
    trained: TrainedModel,
    network: EvaluationCounter,
    args: argparse.Namespace,
    x: torch.Tensor,
    y: torch.Tensor,
    reverse: bool = False,
) -> torch.Tensor:
    """Data from noise x (N, C, H, W) with labels y (N,), or with `reverse` noise from data.

    Raises:
        UserError: if the solver fails.
    """
    sampler, network, steps = Sampler(trained.transport), guided(network, args), per_level(args.num_sampling_steps)
    settings = {"method": args.sampling_method, "num_steps": steps, "atol": args.atol, "rtol": args.rtol}
    what = "noise's values" if reverse else "samples"
    return solved(trained, args, what, lambda: sampler.sample_ode(network, x, **settings, y=y, reverse=reverse))


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

    Raises:
        UserError: if the solver fails, or a sample is not finite.
    """
    generators = sample_generators(seed, indices, SAMPLES)
    model, transport = trained.model, trained.transport
    x0 = transport.noise.sample((len(labels), model.in_channels, *model.input_size), generators, device)
    y = torch.tensor(labels, device=device)
    if args.mode == "ODE":
        return follow_ode(trained, counter, args, x0, y)
    settings = {
        "method": args.sampling_method,
        "num_steps": per_level(args.num_sampling_steps),
        "diffusion_form": args.diffusion_form,
        "diffusion_norm": args.diffusion_norm,
        "last_step": args.last_step,
        "last_step_size": args.last_step_size,
    }
    sampler, network = Sampler(transport), guided(counter, args)
    return solved(
        trained, args, "samples", lambda: sampler.sample_sde(network, x0, **settings, generator=generators, y=y)
    )


def log_density(
    trained: TrainedModel,
    network: EvaluationCounter,
    args: argparse.Namespace,
    x1: torch.Tensor,
    y: torch.Tensor,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """Log-density in nats (N,) of data x1 (N, C, H, W) with labels y (N,), as the network sees them.

    Raises:
        UserError: if the solver fails, or a density is not finite.
    """
    sampler, network, steps = Sampler(trained.transport), guided(network, args), per_level(args.num_sampling_steps)
    settings = {"method": args.sampling_method, "num_steps": steps, "atol": args.atol, "rtol": args.rtol}
    settings |= {"num_probes": args.num_probes or 1, "generator": generators}
    return solved(trained, args, "log-densities", lambda: sampler.log_likelihood(network, x1, y, **settings)[0])


def dry_run(trained: TrainedModel, args: argparse.Namespace, device: torch.device) -> None:
    """Raise now what the solver would refuse later (ValueError), by walking a field that is zero."""

    class Zero:
        num_levels, num_classes = trained.model.num_levels, trained.model.num_classes

        def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
            return 0 * x

    try:
        x = draw_samples(trained, Zero(), args, labels=[0], indices=[0], seed=0, device=device)
        y = torch.zeros(1, dtype=torch.long, device=device)
        if args.mode == "ODE" and args.likelihood:
            log_density(trained, Zero(), args, x, y, sample_generators(0, [0], PROBES))
        if args.mode == "ODE" and getattr(args, "reverse", False):  # of sample.py alone
            follow_ode(trained, Zero(), args, x, y, reverse=True)
    except UserError as error:  # it is not the network's fault
        process = f"the {trained.transport.path.name} path with {trained.transport.prediction} prediction"
        flag = "--sample-eps 0.001" if args.mode == "ODE" else "a larger --last-step-size"
        raise ValueError(
            f"{args.sampling_method} comes to an end of {process} that is infinite: give {flag}"
        ) from error
