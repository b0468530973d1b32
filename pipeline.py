"""The Python door: a trained network with its process and its autoencoder. Labels in, images or log-densities out.

pipe = Pipeline.load("PPF-XL-2").to("cuda", precision="bf16")
images = pipe.images([207, 360], ODE(num_steps=50), Guidance(4.0), seed=1)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from data.autoencoder import (
    Autoencoder,
    LatentSpace,
    RawLatents,
    Scaling,
    autoencoder_name,
    load_autoencoder,
    load_raw_latents,
)
from experts import Network, OneExpertAtATime
from positions import RopeScaling
from runtime.errors import note
from runtime.memory import check_evaluation
from runtime.rng import Stream, sample_generators
from runtime.speed import compile_levels, default_precision, use_precision
from transport import ODE, SDE, Guidance, LevelErrors, Sampler, Transport, at_budget
from transport.grids import Grid
from transport.solvers import check_ode_method
from transport.wrappers import EvaluationCounter, FinestLevel, Wrapper, Zero
from weights.pretrained import load_pretrained, process_of

DEFAULT_ODE = ODE()
UNGUIDED = Guidance()
LIKELIHOOD_SOLVER = ODE("dopri5", atol=1e-5, rtol=1e-5)
Solver = ODE | SDE
GRID_SAMPLES = 64  # on which a step grid is measured


class Pipeline:
    """A trained network, the process it was trained for, and the autoencoder of its latents.

    Args:
        model:        the network
        transport:    the process
        autoencoder:  or its name ("none" for pixels): it is then read or fetched when first needed
        scaling:      of the latents, where it is not the autoencoder's own
        name:         of the network, for people
        source:       the file that it comes from, for messages
        step:         of training; 0 if unknown; of experts that were trained alone the smallest
        changed:      settings of the process that `load` changed
        steps:        of each of the experts that were trained alone
        level_errors: of elastic levels in training, by which budgets are met
    """

    def __init__(
        self,
        model: Network,
        transport: Transport,
        autoencoder: Autoencoder | RawLatents | str = "none",
        scaling: Scaling | None = None,
        name: str = "",
        step: int = 0,
        changed: Mapping[str, Any] | None = None,
        source: str = "",
        steps: Sequence[int] = (),
        level_errors: LevelErrors | None = None,
    ) -> None:
        self.model = model
        self.transport = transport
        self.name = name
        self.source = source or name
        self.step = step
        self.steps = tuple(steps) if len(set(steps)) > 1 else (step,)
        self.scaling = scaling
        self.changed = dict(changed or {})
        self.level_errors = level_errors
        self.precision = "fp32"
        self.offloaded: OneExpertAtATime | None = None
        self._autoencoder = autoencoder

    @classmethod
    def load(
        cls,
        source: str | Path | Sequence[str | Path] = "PPF-XL-2",
        weights: str = "ema",
        vae: str | None = None,
        level_edges: Sequence[float] | None = None,
        process: Mapping[str, Any] | None = None,
        rope: RopeScaling | None = None,
        cache_dir: str | Path | None = None,
        **overrides: Any,
    ) -> Pipeline:
        """Read trained weights, onto the CPU.

        Args:
            source:      a published name, a file of any layout, a run's folder, or a folder of save_pretrained; several
                         of them for experts that were trained alone
            weights:     "ema", or "model" for the last ones of a training checkpoint
            vae:         another autoencoder than the weights': "ema", "mse", a hub id or a local folder
            level_edges: other times at which the patch size changes
            process:     arguments of create_transport, for files that say nothing of theirs; sample_eps for any
            rope:        scaling of rotary positions beyond the sizes of training; None for the weights' own
            cache_dir:   where downloads are kept
            overrides:   arguments of the network that win over the file's, as num_heads

        Raises:
            FileNotFoundError: if there is no such file or published model.
            ValueError:        if the file is damaged, or does not fit what else is given.
            ConnectionError:   if a download fails.
        """
        file = load_pretrained(source, weights, cache_dir, **overrides)
        source = str(source) if isinstance(source, (str, Path)) else ", ".join(map(str, source))
        if rope is not None:
            if file.model.position != "rope":
                raise ValueError(f"{source} has sine-cosine positions: a scaling is for rotary ones, leave it out")
            file.model.rope_scaling = rope
        transport, changed = process_of(file, source, level_edges, process)
        scaling = None if file.scaling is None else Scaling.from_dict(file.scaling)
        origin = file.name, file.step, changed, source, file.steps, file.level_errors
        return cls(file.model, transport, vae or file.vae, scaling, *origin)

    def to(
        self,
        device: str | torch.device,
        precision: str | None = None,
        compile: bool = False,
        offload_experts: bool = False,
    ) -> Pipeline:
        """Prepare the network for a device, in place; solvers compute in fp32 whatever the precision.

        Args:
            precision:       "fp32", "tf32" or "bf16"; None for tf32 on CUDA, else fp32
            compile:         compile the blocks: seconds of waiting at the first evaluation, then faster ones
            offload_experts: keep one expert at a time on the device

        Raises:
            ValueError: if the weights were rounded to bf16 before, or there are no experts to offload, or they are
                        offloaded already.
        """
        device = torch.device(device)
        precision = precision or default_precision(device, training=False)
        if self.precision == "bf16" and precision != "bf16":
            raise ValueError("the weights are in bf16 already: load them again for another precision")
        if offload_experts and len(self.model.networks) == 1:
            raise ValueError(f"{self.source} has no experts that could be offloaded: leave --offload-experts out")
        if self.offloaded:
            raise ValueError("the experts are offloaded already: load them again for another device")
        self.model.eval().requires_grad_(False)
        self.precision = precision
        if precision == "bf16":
            self.model.blocks.bfloat16()  # once, where autocast would at every evaluation: they are linear layers
        if offload_experts:
            self.offloaded = OneExpertAtATime(self.model, device)
        else:
            self.model.to(device)
        if compile:
            torch._functorch.config.donated_buffer = False  # a likelihood goes backward once for each of its probes
            compile_levels(self.model, tell=note)
        if isinstance(self._autoencoder, LatentSpace):
            self._autoencoder.model.to(device)
        return self

    # -- Parts ---------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> str:
        """The step of training in words, or the steps of experts that differ in it."""
        return f"step {self.step}" if len(self.steps) == 1 else f"steps {' + '.join(map(str, self.steps))}"

    @property
    def file_name(self) -> str:
        """Name and step of training, as files and folders are called after them."""
        return f"{self.name.replace('/', '-')}-{'+'.join(f'{step:07d}' for step in self.steps)}"

    @property
    def device(self) -> torch.device:
        """Device on which the network computes."""
        return self.offloaded.device if self.offloaded else next(self.model.parameters()).device

    @property
    def autoencoder(self) -> Autoencoder | RawLatents:
        """The autoencoder, with the scaling that the weights were trained with.

        Raises:
            ValueError: if it cannot be had, or has other channels than the network.
        """
        if isinstance(self._autoencoder, str):
            autoencoder = load_autoencoder(self._autoencoder, self.device)
            if self.scaling is not None and autoencoder.name != "none":
                autoencoder = autoencoder.with_scaling(self.scaling)
            self._autoencoder = autoencoder
        if self._autoencoder.channels not in (None, self.model.in_channels):
            raise ValueError(
                f"the autoencoder {self._autoencoder.name} has {self._autoencoder.channels} channels, "
                f"{self.source} {self.model.in_channels}"
            )
        return self._autoencoder

    def keep_latents(self, vae: str | None = None) -> None:
        """From here on samples stay latents, scaled as their autoencoder decodes them; it need not be here.

        Args:
            vae: whose config tells the scaling, where the weights' file does not

        Raises:
            ValueError: if nothing tells how the latents are scaled.
        """
        name = self._autoencoder if isinstance(self._autoencoder, str) else self._autoencoder.name
        if self.scaling is not None:
            if vae is not None:
                raise ValueError(f"{self.source} tells how its latents are scaled: leave --vae out with --latents")
            self._autoencoder = RawLatents(name, self.scaling)
            return
        name = autoencoder_name(vae or name)
        if name == "none":
            raise ValueError(
                f"{self.source} makes images, or does not tell how its latents are scaled: leave --latents out, "
                "or give --vae"
            )
        self._autoencoder = load_raw_latents(name)

    def use_size(self, size: Sequence[int]) -> None:
        """From here on samples are images of this height and width, unless a call says otherwise.

        Raises:
            ValueError: if the network does not take it: its positions are not rotary, or a patch does not divide it.
        """
        self.model.input_size = self.model.input_size_of(size, self.autoencoder.factor)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.model.input_size
        return height * self.autoencoder.factor, width * self.autoencoder.factor

    @property
    def image_channels(self) -> int:
        """Colour channels of the images."""
        return self.model.in_channels if self.autoencoder.name == "none" else 3

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return (self.image_channels, *self.image_size)

    # -- Samples -------------------------------------------------------------------------------------------------

    def images(
        self,
        labels: Sequence[int],
        solver: Solver = DEFAULT_ODE,
        guidance: Guidance = UNGUIDED,
        generators: Sequence[torch.Generator] | None = None,
        seed: int = 0,
        size: Sequence[int] | None = None,
        budget: float | None = None,
    ) -> torch.Tensor:
        """Draw images (N, C, H, W) in about [-1, 1]; see `latents`.

        Args:
            size:   height and width of the images, for networks with rotary positions; None for `image_size`
            budget: share of the finest level's arithmetic, see `at_budget`; None for the level edges as they are
        """
        if budget is not None:
            return self.at_budget(budget, solver, guidance).images(labels, solver, guidance, generators, seed, size)
        if size is not None:
            size = self.model.input_size_of(size, self.autoencoder.factor)
        return self.autoencoder.decode(self.latents(labels, solver, guidance, generators, seed, size=size))

    @torch.no_grad()
    def latents(
        self,
        labels: Sequence[int],
        solver: Solver = DEFAULT_ODE,
        guidance: Guidance = UNGUIDED,
        generators: Sequence[torch.Generator] | None = None,
        seed: int = 0,
        x0: torch.Tensor | None = None,
        levels: range | None = None,
        size: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Draw samples (N, C, h, w) as the network sees them.

        Args:
            labels:     N class ids
            generators: of noise and increments, one per sample; then sample i depends on its own alone (but for
                        adaptive solvers, whose steps follow the batch)
            seed:       of the generators where none are given
            x0:         (N, C, h, w) noise to start from, instead of the generators'; the state at the first edge of
                        levels that do not begin with level 0
            levels:     walk these levels alone, with an ODE: the result is the state at their last edge; None for all
            size:       (h, w), where no x0 tells it; None for the network's input_size

        Raises:
            ValueError: if the solver, the guidance, the levels or the size do not fit the network.
            FloatingPointError: if the solver fails, or a sample is not finite.
        """
        if generators is None:
            generators = sample_generators(seed, range(len(labels)), Stream.SAMPLES)
        if x0 is None and levels is not None and levels.start > 0:
            raise ValueError(f"{levels} begin at an edge: give x0, the state there")
        if x0 is None:
            size = self.model.input_size if size is None else self.model.input_size_of(size)
            shape = (len(labels), self.model.in_channels, *size)
            x0 = self.transport.noise.sample(shape, generators, self.device)
        y = self._labels(labels)
        network, sampler = guidance.of(self.model), Sampler(self.transport)
        return self._solve("samples", solver, lambda: sampler.sample(network, x0, solver, y, generators, levels))

    @torch.no_grad()
    def noise(
        self,
        x1: torch.Tensor,
        labels: Sequence[int],
        solver: ODE = DEFAULT_ODE,
        guidance: Guidance = UNGUIDED,
    ) -> torch.Tensor:
        """Follow the ODE from data x1 (N, C, h, w) back to noise of the same shape; raises as `latents`."""
        y = self._labels(labels)
        network, sampler = guidance.of(self.model), Sampler(self.transport)
        settings = asdict(solver)
        return self._solve(
            "noise's values", solver, lambda: sampler.sample_ode(network, x1, **settings, y=y, reverse=True)
        )

    def log_prob(
        self,
        x1: torch.Tensor,
        labels: Sequence[int],
        solver: ODE = LIKELIHOOD_SOLVER,
        guidance: Guidance = UNGUIDED,
        num_probes: int = 1,
        generators: Sequence[torch.Generator] | None = None,
        seed: int = 0,
    ) -> torch.Tensor:
        """Log-density in nats (N,) of data x1 (N, C, h, w), as the network sees it; raises as `latents`.

        Args:
            num_probes: probes averaged for the divergence
            generators: of the probes, one per sample
            seed:       of the generators where none are given
        """
        if generators is None:
            generators = sample_generators(seed, range(len(x1)), Stream.PROBES)
        y = self._labels(labels)
        network, sampler = guidance.of(self.model), Sampler(self.transport)
        settings = asdict(solver)
        settings |= {"num_probes": num_probes, "generator": generators}
        return self._solve("log-densities", solver, lambda: sampler.log_likelihood(network, x1, y, **settings)[0])

    def step_grid(self, solver: ODE = DEFAULT_ODE, guidance: Guidance = UNGUIDED) -> Grid:
        """Measure where the solver's steps should lie: the grid of `Sampler.measure_grid` on 64 noise vectors.

        replace(solver, grid=pipe.step_grid(solver, guidance)) then samples with any number of steps. It takes about as
        long as 64 samples of 360 steps; raises as `latents`.
        """
        labels = torch.arange(GRID_SAMPLES) * self.model.num_classes // GRID_SAMPLES
        generators = sample_generators(0, range(GRID_SAMPLES), Stream.GRID)
        shape = (GRID_SAMPLES, self.model.in_channels, *self.model.input_size)
        x0, y = self.transport.noise.sample(shape, generators, self.device), self._labels(labels)
        network, sampler = guidance.of(self.model), Sampler(self.transport)
        with use_precision(self.precision, self.device):
            return sampler.measure_grid(network, x0, solver.method, y)

    def _labels(self, labels: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """The class ids on the network's device; the null label counts as one (ValueError for others)."""
        y = torch.as_tensor(labels, dtype=torch.long)
        if y.numel() and not 0 <= int(y.min()) <= int(y.max()) <= self.model.num_classes:
            raise ValueError(f"class labels must be between 0 and {self.model.num_classes - 1}, got {y.tolist()}")
        return y.to(self.device)

    def _solve(self, what: str, solver: Solver, solve: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The solver's result, in the network's precision, if it comes to an end and all of it is finite."""
        try:
            with use_precision(self.precision, self.device):
                result = solve()
            if result.isfinite().all():
                return result
            reason = f"the {what} are not finite"
        except FloatingPointError as error:
            reason = str(error)
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            weights = f"the weights of {self.name} at {self.trained} are not finite either"
            raise FloatingPointError(f"{reason}, and {weights}: give a checkpoint from before the training diverged")
        advice = "give another --sampling-method, as ab2" if solver.adaptive else "take more steps"
        raise FloatingPointError(f"{reason}: lower --cfg-scales, or {advice}")

    # -- Variants ------------------------------------------------------------------------------------------------

    def check(
        self,
        solver: Solver = DEFAULT_ODE,
        guidance: Guidance = UNGUIDED,
        likelihood: bool = False,
        reverse: bool = False,
        batch: int = 1,
        size: Sequence[int] | None = None,
    ) -> EvaluationCounter:
        """Raise now what would fail after an hour (ValueError), by walking a field that is zero.

        Args:
            batch:      samples that are drawn together, which the device's free memory must hold
            likelihood: `log_prob` is wanted
            reverse:    `noise` is wanted
            size:       (h, w) of the samples, as for `latents`; the memory is that for the network's own size

        Returns:
            the count of the evaluations that a sample takes, unless the solver chooses its own steps.
        """
        if isinstance(solver, ODE):
            check_ode_method(solver.method, noise_to_data=not (likelihood or reverse))
        zero = self._with_model(Zero(self.model))
        counter = EvaluationCounter(zero.model)
        try:
            x1 = self._with_model(counter).latents([0], solver, guidance, size=size)
            if likelihood:
                zero.log_prob(x1, [0], solver, guidance)
            if reverse:
                zero.noise(x1, [0], solver, guidance)
        except FloatingPointError as error:  # it is not the network's fault
            process = f"the {self.transport.path.name} path with {self.transport.prediction} prediction"
            flag = "--sample-eps 0.001" if isinstance(solver, ODE) else "a larger --last-step-size"
            raise ValueError(f"{solver.method} comes to an end of {process} that is infinite: give {flag}") from error
        where = self.precision, self.device, lambda: self.autoencoder.factor
        check_evaluation(self.model, counter.together, batch, *where)
        return counter

    def at_budget(self, budget: float, solver: Solver = DEFAULT_ODE, guidance: Guidance = UNGUIDED) -> Pipeline:
        """The same network with level edges for a share of the arithmetic that the finest level alone would take.

        The edges are those of `transport.budgets`, for samples of the network's own size with this solver and this
        guidance; they meet the budget within a step of the finest level. The network is trained with elastic levels.

        Raises:
            ValueError: if it was not, the share cannot be had, or the solver has not one number of steps for all.
        """
        if not self.transport.schedule.elastic:
            raise ValueError(
                f"{self.source} was trained at its level edges alone: leave --budget out, or train --elastic"
            )
        if self.level_errors is None:
            raise ValueError(f"{self.source} does not tell its levels' errors: give --level-edges instead of --budget")
        other = self._with_model(self.model)
        other.transport = at_budget(budget, self.level_errors, self.transport, self.model, solver, guidance)
        other.check(solver, guidance)
        return other

    def with_edges(self, level_edges: Sequence[float]) -> Pipeline:
        """The same network with other level edges, as `load` takes them.

        Raises:
            ValueError: if they do not ascend between 0 and 1, or are not those of the network's number of levels.
        """
        other = self._with_model(self.model)
        other.transport = self.transport.with_edges(level_edges)
        other.transport.check_levels(self.model)
        return other

    def finest_only(self) -> Pipeline:
        """The same network at its finest level all the way: what the pyramid saves on.

        Raises:
            ValueError: if experts share the times: the last one does not serve all.
        """
        if len(self.model.networks) > 1:
            raise ValueError(f"no level of {self.source} serves all times, as its experts share them")
        other = self._with_model(FinestLevel(self.model))
        other.transport = self.transport.finest_only()
        return other

    def counted(self, progress: tqdm | None = None) -> Pipeline:
        """The same with an EvaluationCounter for a network."""
        return self._with_model(EvaluationCounter(self.model, progress))

    def _with_model(self, model: nn.Module | Wrapper) -> Pipeline:
        other = copy.copy(self)
        other.model = model
        return other
