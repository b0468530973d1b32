"""Sampling and likelihood: walk the levels, one solver call for each interval on which the field is smooth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise

import torch

from transport.grids import Grid, equidistributed
from transport.noise import Generator, rademacher
from transport.paths import like
from transport.schedule import Interval
from transport.solvers import (
    ADAPTIVE_METHODS,
    DIFFUSION_FORMS,
    ODE,
    ORDERS,
    SDE,
    STEPWISE_METHODS,
    OnStep,
    check_grid_method,
    check_ode_method,
    go_on,
    solve_dpmpp_2m,
    solve_ode,
    solve_sde,
    steps_from,
)
from transport.transport import Model, Transport

WINDOWS = 40  # in which local errors are measured
SDE_EPS = 1e-3  # distance of the SDE from an end at which its drift is singular


class Sampler:
    """Solves a transport's ODE or SDE with a trained network.

    The network is called as model(x, t, y=..., level=...). A solver call never crosses a level edge or a breakpoint
    of guidance; at an edge each side uses its own level.

    Where the transport's interval stops short of 0 or 1, the ends are linked to noise and data to leading order:
    x = sigma x_0 at the start and x = alpha x_1 at the end. On [0, 1] both are exact.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def sample(
        self,
        model: Model,
        x0: torch.Tensor,
        solver: ODE | SDE,
        y: torch.Tensor | None = None,
        generator: Generator = None,
        levels: range | None = None,
    ) -> torch.Tensor:
        """Data (N, ...) from noise x0 (N, ...) with the solver's settings; only an SDE uses the generator.

        Args:
            levels: as in sample_ode; an SDE walks all of them (ValueError otherwise)
        """
        settings = asdict(solver)
        if isinstance(solver, ODE):
            return self.sample_ode(model, x0, **settings, y=y, levels=levels)
        if levels is not None:
            raise ValueError("an SDE walks all levels at once: choose an ODE to walk some of them")
        return self.sample_sde(model, x0, **settings, generator=generator, y=y)

    # -- ODE -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_ode(
        self,
        model: Model,
        x0: torch.Tensor,
        method: str = "ab2",
        num_steps: int | Sequence[int] = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        y: torch.Tensor | None = None,
        reverse: bool = False,
        levels: range | None = None,
        grid: Grid | None = None,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Follow the probability-flow ODE dx/dt = v(x, t) from noise to data (SiT, equation 2).

        Walks over some levels one after the other give what one walk over all of them gives, bit by bit.

        Args:
            model:     network, guided or not
            x0:        (N, ...) noise; with reverse, data; the state at the first edge of levels that do not begin there
            method:    one of ODE_METHODS
            num_steps: steps of a fixed-step method over the whole trajectory, or one number per level; an adaptive
                       method chooses its own and ignores them
            atol:      absolute tolerance of an adaptive method
            rtol:      relative tolerance of an adaptive method
            y:         (N,) class ids
            reverse:   go from data to noise
            levels:    walk these levels alone, with the steps that they have in the whole trajectory; None for all
            grid:      where the steps of one of GRID_METHODS lie, as in ODE; None for equal steps
            on_step:   called after each step with its end t and the state there; the walk goes on from what it returns.
                       For methods in STEPWISE_METHODS

        Returns:
            (N, ...) data, or noise with reverse; the state at the last edge of levels that do not end there.

        Raises:
            ValueError: if the method is unknown, does not solve in this direction or does not tell its steps, there are
                fewer steps than intervals, or the levels do not match.
            FloatingPointError: if an adaptive method fails.
        """
        check_ode_method(method, noise_to_data=not reverse, grid=grid)
        if on_step is not None and method not in STEPWISE_METHODS:
            raise ValueError(f"{method} does not tell its steps: choose one of {', '.join(STEPWISE_METHODS)}")
        start, stop = self.transport.sample_interval
        if reverse:
            start, stop = stop, start
        plan = self._plan(model, start, stop, None if method in ADAPTIVE_METHODS else num_steps, grid=grid)
        if levels is not None:
            plan = self._only(levels, plan)
        x = x0 * self._boundary(start) if plan[0][0].start == start else x0
        for interval, steps in plan:
            x = self._across(model, interval, x, y, method, steps, atol, rtol, grid, on_step or go_on)
        return x / self._boundary(stop) if plan[-1][0].stop == stop else x

    def _across(
        self,
        model: Model,
        interval: Interval,
        x: torch.Tensor,
        y: torch.Tensor | None,
        method: str,
        steps: int,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        grid: Grid | None = None,
        on_step: OnStep = go_on,
    ) -> torch.Tensor:
        """The state at the end of an interval, from that at its start."""
        if method == "dpmpp_2m":
            data = self._estimate(model, interval, y, "data")
            return solve_dpmpp_2m(data, x, interval.start, interval.stop, steps, self._alpha_sigma, grid, on_step)
        velocity = self._estimate(model, interval, y, "velocity")
        return solve_ode(velocity, x, interval.start, interval.stop, method, steps, atol, rtol, grid, on_step)

    @torch.no_grad()
    def measure_grid(self, model: Model, x0: torch.Tensor, method: str = "ab2", y: torch.Tensor | None = None) -> Grid:
        """The grid with which all steps of a method have the same local error, for ODE(grid=...).

        Follows the ODE by rk4 in windows of time. From the state at the start of each the method makes a step to its
        end: the distance from rk4's state there is its local error.

        Args:
            model:  network, guided as in sampling
            x0:     (N, ...) noise
            method: one of GRID_METHODS
            y:      (N,) class ids

        Raises:
            ValueError: if the method's steps are its own.
            FloatingPointError: if a state is not finite.
        """
        check_grid_method(method)
        start, stop = self.transport.sample_interval
        x, times, errors = x0 * self._boundary(start), [start], []
        for interval, windows in self._plan(model, start, stop, WINDOWS):
            ends = torch.linspace(*interval[1:], windows + 1, dtype=torch.float64, device="cpu").tolist()
            states = [x]
            for window in pairwise(ends):
                states.append(self._across(model, Interval(interval.level, *window), states[-1], y, "rk4", 2))
            field = self._estimate(model, interval, y, "data" if method == "dpmpp_2m" else "velocity")
            tried = steps_from(field, states[:-1], ends, method, self._alpha_sigma)
            errors += [(a - b).square().mean().sqrt().item() for a, b in zip(tried, states[1:], strict=True)]
            times += ends[1:]
            x = states[-1]
        if not all(map(math.isfinite, errors)):
            raise FloatingPointError("the states on which the step grid is measured are not finite")
        return equidistributed(times, errors, ORDERS[method])

    # -- SDE -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_sde(
        self,
        model: Model,
        x0: torch.Tensor,
        method: str = "Euler",
        num_steps: int | Sequence[int] = 250,
        diffusion_form: str = "sigma",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        generator: Generator = None,
        y: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Follow dx = [v(x, t) + w_t s(x, t)] dt + sqrt(2 w_t) dW from noise to data (SiT, equation 4).

        Every w_t >= 0 has the same marginals. The last step adds no noise.

        Args:
            model:          network, guided or not
            x0:             (N, ...) noise
            method:         "Euler" (Euler-Maruyama) or "Heun"
            num_steps:      steps over the whole trajectory, the last step included, or one number per level
            diffusion_form: w_t, one of DIFFUSION_FORMS (SiT, table 2)
            diffusion_norm: factor of w_t
            last_step:      "Mean" (the drift alone), "Tweedie" (the expected data), "Euler" (the ODE), or None
            last_step_size: length of the last step in t; without a last step it has no meaning
            generator:      source of the increments: one generator, or one per sample
            y:              (N,) class ids

        Returns:
            (N, ...) data.

        Raises:
            ValueError: if a name is unknown, a number is out of range, the last step crosses a level edge, or the
                noise is not Gaussian.
        """
        # Refuses wrong values; the steps are checked with the intervals that they are shared among.
        SDE(method, 1, diffusion_form, diffusion_norm, last_step, last_step_size)
        if self.transport.aug_dim is not None:
            raise ValueError(
                f"an SDE needs the score, which a network trained with D = {self.transport.aug_dim:g} of PFGM++ does "
                "not tell: sample with ODE"
            )
        start, stop = self._sde_interval(diffusion_form, last_step, last_step_size)
        x = x0 * self._boundary(start)
        plan = self._plan(model, start, stop, num_steps, reserve=0 if last_step is None else 1)
        for interval, steps in plan:
            drift = self._sde_drift(model, interval, y, diffusion_form, diffusion_norm)
            diffusion = partial(self.diffusion, form=diffusion_form, norm=diffusion_norm)
            x = solve_sde(drift, diffusion, x, interval.start, interval.stop, method, steps, generator)
        if last_step is None:
            return x / self._boundary(stop)

        finest = self.transport.schedule.intervals(stop, 1.0, getattr(model, "breakpoints", ()))[0]
        t = torch.full((), stop, dtype=x.dtype, device=x.device)
        if last_step == "Mean":
            return x + last_step_size * self._sde_drift(model, finest, y, diffusion_form, diffusion_norm)(t, x)
        if last_step == "Euler":
            return x + last_step_size * self._estimate(model, finest, y, "velocity")(t, x)
        return self._estimate(model, finest, y, "data")(t, x)

    def diffusion(self, t: torch.Tensor, form: str, norm: float = 1.0) -> torch.Tensor:
        """The diffusion coefficient w_t (SiT, table 2), of the shape of t."""
        return norm * DIFFUSION_FORMS[form](self.transport.path.coefficients(t), t)

    def _sde_interval(self, form: str, last_step: str | None, last_step_size: float) -> tuple[float, float]:
        start, stop = self.transport.sample_interval
        if form == "SBDM" and not self.transport.path.regular_at_noise:  # w_t is infinite where alpha = 0
            start = max(start, SDE_EPS)
        if last_step is None:
            return start, min(stop, 1 - SDE_EPS)  # the score divides by sigma
        if not 0 < last_step_size < 1 - start:
            raise ValueError(f"the last step's size must be in (0, {1 - start:g}), got {last_step_size}")
        stop, edge = 1 - last_step_size, max(edge for edge in self.transport.schedule.edges if edge < 1)
        if stop < edge - 1e-6:
            raise ValueError(
                f"a last step of {last_step_size:g} would cross the level edge at {edge:g}: choose at most {1 - edge:g}"
            )
        if start < edge and stop < edge + 1e-6:  # on the edge but for rounding, as 1 - 0.93 < 0.07 and 1 - 0.44 > 0.56
            stop = edge
        return start, stop

    def _sde_drift(self, model: Model, interval: Interval, y: torch.Tensor | None, form: str, norm: float):
        network, transport = self._network(model, interval), self.transport
        source = transport.prediction_at(interval.level)

        def drift(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            times = t.to(x.dtype).expand(len(x))
            output = network(x, times, y=y)
            velocity, score = (transport.convert(output, x, times, target, source) for target in ("velocity", "score"))
            return velocity + like(self.diffusion(times, form, norm), x) * score

        return drift

    # -- Likelihood ----------------------------------------------------------------------------------------------

    def log_likelihood(
        self,
        model: Model,
        x1: torch.Tensor,
        y: torch.Tensor | None = None,
        method: str = "dopri5",
        num_steps: int | Sequence[int] = 50,
        atol: float = 1e-5,
        rtol: float = 1e-5,
        num_probes: int = 1,
        generator: Generator = None,
        grid: Grid | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-density of data by the change of variables along the ODE, d log p / dt = -div v (arXiv:1810.01367).

        The divergence is Hutchinson's estimate with Rademacher probes, held fixed along the trajectory; it is
        unbiased, and exact where the Jacobian of v is diagonal.

        Args:
            model:      network, differentiable in x
            x1:         (N, ...) data
            y:          (N,) class ids
            method:     one of ODE_METHODS but dpmpp_2m; num_steps, atol, rtol and grid as in sample_ode
            num_probes: probes averaged for the divergence
            generator:  source of the probes: one generator, or one per sample

        Returns:
            log p(x1) in nats (N,), and the noise x0 (N, ...) that x1 comes from. See `bits_per_dim`.

        Raises:
            ValueError: as sample_ode, or if num_probes is below 1.
        """
        check_ode_method(method, noise_to_data=False, grid=grid)
        if num_probes < 1:
            raise ValueError(f"num_probes must be at least 1, got {num_probes}")
        transport, dimensions = self.transport, x1[0].numel()
        stop, start = transport.sample_interval  # from data to noise
        probes = [rademacher(x1, generator) for _ in range(num_probes)]

        x = x1 * self._boundary(start)
        change = torch.zeros(len(x1), dtype=x1.dtype, device=x1.device)  # of the log-density, from noise to data
        plan = self._plan(model, start, stop, None if method in ADAPTIVE_METHODS else num_steps, grid=grid)
        for interval, steps in plan:
            field = self._velocity_and_divergence(model, interval, y, probes)
            x, change = solve_ode(field, (x, change), interval.start, interval.stop, method, steps, atol, rtol, grid)
        alpha, sigma = self._boundary(start), self._boundary(stop)
        x0 = x / sigma
        log_prob = transport.noise.log_prob(x0) + change + dimensions * math.log(alpha / sigma)
        return log_prob, x0

    def _velocity_and_divergence(
        self, model: Model, interval: Interval, y: torch.Tensor | None, probes: list[torch.Tensor]
    ):
        velocity_at = self._estimate(model, interval, y, "velocity")

        def field(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                x = state[0].detach().requires_grad_()
                velocity = velocity_at(t, x)
                divergence = torch.zeros(len(x), dtype=x.dtype, device=x.device)
                for number, probe in enumerate(probes, start=1):
                    (product,) = torch.autograd.grad(velocity, x, probe, retain_graph=number < len(probes))
                    divergence = divergence + (product * probe).flatten(1).sum(1) / len(probes)
            return velocity.detach(), divergence.detach()

        return field

    # -- The walk ------------------------------------------------------------------------------------------------

    def _plan(
        self,
        model: Model,
        start: float,
        stop: float,
        num_steps: int | Sequence[int] | None,
        reserve: int = 0,
        grid: Grid | None = None,
    ) -> list[tuple[Interval, int]]:
        """The smooth intervals from start to stop and the steps of each, without `reserve` steps of the finest level.

        With a grid an interval gets two steps where there are enough, as a single one of a multistep method is of first
        order, and a grid may leave a level next to nothing. Without num_steps the method chooses its own, and the steps
        are 0.
        """
        self.transport.check_levels(model)
        self.transport.check_served()
        schedule = self.transport.schedule
        intervals = schedule.intervals(start, stop, getattr(model, "breakpoints", ()))
        if num_steps is None:
            return [(interval, 0) for interval in intervals]
        steps = schedule.share_steps(num_steps, intervals, reserve, grid, least=1 if grid is None else 2)
        return list(zip(intervals, steps, strict=True))

    def _only(self, levels: range, plan: list[tuple[Interval, int]]) -> list[tuple[Interval, int]]:
        """The part of a plan that is of these levels."""
        num_levels = self.transport.schedule.num_levels
        part = [(interval, steps) for interval, steps in plan if interval.level in levels]
        if levels.step != 1 or not 0 <= levels.start < levels.stop <= num_levels or not part:
            raise ValueError(f"levels must be a range within range(0, {num_levels}), got {levels}")
        return part

    def _network(self, model: Model, interval: Interval) -> Model:
        if hasattr(model, "on_interval"):
            return model.on_interval(interval, self.transport)
        return partial(model, level=interval.level)

    def _estimate(self, model: Model, interval: Interval, y: torch.Tensor | None, target: str):
        """The network's velocity or data, as a function (0-d time, x) of one interval."""
        network, transport = self._network(model, interval), self.transport
        source = transport.prediction_at(interval.level)

        def estimate(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            times = t.to(x.dtype).expand(len(x))
            return transport.convert(network(x, times, y=y), x, times, target, source)

        return estimate

    def _alpha_sigma(self, t: float) -> tuple[float, float]:
        """alpha and sigma at time t as numbers, computed on the host so that nothing waits for a GPU."""
        c = self.transport.path.coefficients(torch.tensor(t, dtype=torch.float64, device="cpu"))
        return c.alpha.item(), c.sigma.item()

    def _boundary(self, end: float) -> float:
        """The factor of the noise at the noisy end of the interval (sigma), or of the data at the clean end (alpha)."""
        alpha, sigma = self._alpha_sigma(end)
        return sigma if end < 0.5 else alpha


def bits_per_dim(log_prob: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Negative log-density in nats (N,) to bits per dimension (N,)."""
    return -log_prob / (dimensions * math.log(2))
