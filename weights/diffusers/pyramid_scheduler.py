"""The process as a scheduler of diffusers: what the samples walk along, from noise to data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config

from transport.budgets import LevelErrors, at_budget
from transport.guidance import Guidance
from transport.noise import Generator
from transport.sampler import Sampler
from transport.solvers import ODE, STEPWISE_METHODS, OnStep
from transport.transport import Transport, create_transport


class PyramidScheduler(SchedulerMixin, ConfigMixin):
    """The process that a network was trained for, its levels over time, and the solver.

    diffusers' own schedulers step over a list of times. Here a walk is cut at the levels' edges and the solver starts
    anew behind each: the velocity may jump there, and a method with a memory must not carry it across.

    Args:
        path_type:     "Linear", "GVP" or "VP"
        prediction:    the network's output: "velocity", "noise", "score" or "data"; or one of these for each level
        sample_eps:    distance from the singular ends of [0, 1]; None for the path's default
        level_edges:   interior times at which the level changes; t = 0 is noise, t = 1 is data
        aug_dim:       D of PFGM++, where the noise is a Student-t; None for Gaussian noise
        method:        one of STEPWISE_METHODS
        elastic:       probability with which training drew a sample's level from all levels; level_edges may then
                       coincide, with each other and with 0 and 1
        expert_levels: numbers of levels of the experts that share the time; () is one network
        level_errors:  arguments of LevelErrors, by which budgets are met; None for a network without elastic levels

    Raises:
        ValueError: if one of them is unknown or out of range.
    """

    @register_to_config
    def __init__(
        self,
        path_type: str = "Linear",
        prediction: str = "velocity",
        sample_eps: float | None = None,
        level_edges: Sequence[float] = (),
        aug_dim: float | None = None,
        method: str = "ab2",
        elastic: float = 0.0,
        expert_levels: Sequence[int] = (),
        level_errors: Mapping[str, Any] | None = None,
    ) -> None:
        if method not in STEPWISE_METHODS:
            raise ValueError(f"unknown method {method!r}; choose one of {', '.join(STEPWISE_METHODS)}")
        self._transport(level_edges)

    @classmethod
    def of(cls, transport: Transport, level_errors: LevelErrors | None = None) -> PyramidScheduler:
        """A process as a scheduler, with the errors that its levels had in training if budgets are to be met."""
        return cls(  # by keyword: from_config forgets what was given by position
            path_type=transport.path.name,
            prediction=transport.prediction,
            sample_eps=transport.sample_eps,
            level_edges=list(transport.schedule.level_edges),
            aug_dim=transport.aug_dim,
            elastic=transport.schedule.elastic,
            expert_levels=list(transport.schedule.expert_levels),
            level_errors=None if level_errors is None else level_errors.as_dict(),
        )

    def noise(self, shape: Sequence[int], generator: Generator, device: torch.device) -> torch.Tensor:
        """Draw x_0 (N, ...) on the generator's device, one for all samples or one for each, and move it to `device`."""
        return self._transport().noise.sample(shape, generator, device)

    def walk(
        self,
        model: Any,
        num_inference_steps: int | Sequence[int] = 50,
        guidance_scale: float | Sequence[float] = 1.0,
        guidance_interval: Sequence[float] | None = None,
        level_edges: Sequence[float] | None = None,
        budget: float | None = None,
    ) -> Walk:
        """The way from noise to data with a network.

        Args:
            model:               called as model(x, t, y=..., level=...)
            num_inference_steps: over all levels, shared out by their lengths; or one number per level
            guidance_scale:      one, or one per level, coarsest first; 1 turns guidance off
            guidance_interval:   guide for t between these two alone; None for all times
            level_edges:         other times at which the level changes; None for the config's
            budget:              share of the finest level's arithmetic, which chooses the edges; None for those given

        Raises:
            ValueError: if they do not fit together, or the network; if a budget cannot be met.
        """
        transport = self._transport(level_edges)
        transport.check_levels(model)
        guidance = Guidance(guidance_scale, interval=guidance_interval)
        network = guidance.of(model)
        solver = ODE(self.config.method, num_inference_steps)
        if budget is not None:
            if level_edges is not None:
                raise ValueError("a budget chooses the level edges: give budget or level_edges, not both")
            transport = at_budget(budget, self._level_errors(), transport, model, solver, guidance)
        intervals = transport.schedule.intervals(*transport.sample_interval, network.breakpoints)
        num_steps = sum(transport.schedule.share_steps(solver.num_steps, intervals))
        return Walk(Sampler(transport), network, solver, num_steps)

    def _level_errors(self) -> LevelErrors:
        """The errors that the levels had in training (ValueError if the config does not tell them)."""
        if self.config.level_errors is None:
            raise ValueError(
                "the levels' errors, by which a budget is met, are not in this pipeline: give level_edges instead, or "
                "export a network that was trained with elastic levels"
            )
        return LevelErrors(**self.config.level_errors)

    def _transport(self, level_edges: Sequence[float] | None = None) -> Transport:
        config = self.config
        edges = config.level_edges if level_edges is None else level_edges
        return create_transport(
            config.path_type,
            config.prediction,
            sample_eps=config.sample_eps,
            level_edges=edges,
            aug_dim=config.aug_dim,
            elastic=config.elastic,
            expert_levels=config.expert_levels,
        )


@dataclass(frozen=True)
class Walk:
    """A way from noise to data that can be taken: `walk(x0, labels, on_step)`; it has `num_steps` steps."""

    sampler: Sampler
    network: Any
    solver: ODE
    num_steps: int

    def __call__(self, x0: torch.Tensor, labels: torch.Tensor, on_step: OnStep) -> torch.Tensor:
        """Data (N, ...) from noise x0 (N, ...); on_step(t, x) follows each step, and what it returns goes on."""
        settings = {"method": self.solver.method, "num_steps": self.solver.num_steps, "y": labels}
        return self.sampler.sample_ode(self.network, x0, **settings, on_step=on_step)
