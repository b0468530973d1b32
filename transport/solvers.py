"""ODE and SDE solvers over one interval on which the field is smooth.

They know nothing of levels: the sampler makes one call per interval, so no step straddles an edge. All but the ones of
torchdiffeq (adaptive methods, Adams methods of higher order) never wait for a GPU: times are numbers on the host, and
the field gets them as tensors filled in on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from transport.grids import Grid, checked_grid, steps_between
from transport.noise import Generator, randn
from transport.paths import Coefficients
from transport.schedule import whole_numbers


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method (Butcher): stage i is at t + nodes[i] h and x + h sum_j matrix[i][j] k_j."""

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


RUNGE_KUTTA = {
    "euler": Tableau((0,), ((),), (1,)),
    "midpoint": Tableau((0, 1 / 2), ((), (1 / 2,)), (0, 1)),
    "heun2": Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2)),
    "heun3": Tableau((0, 1 / 3, 2 / 3), ((), (1 / 3,), (0, 2 / 3)), (1 / 4, 0, 3 / 4)),
    # Kutta's 3/8 rule: a smaller error than that of the better known method
    "rk4": Tableau((0, 1 / 3, 2 / 3, 1), ((), (1 / 3,), (-1 / 3, 1), (1, -1, 1)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
STEPWISE_METHODS = (*RUNGE_KUTTA, "ab2", "dpmpp_2m")  # solved here, step by step
FIXED_METHODS = (*STEPWISE_METHODS, *ADAMS)
RUNGE_KUTTA_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ADAPTIVE_METHODS = (*RUNGE_KUTTA_ADAPTIVE, "scipy_solver")
ODE_METHODS = (*FIXED_METHODS, *ADAPTIVE_METHODS)
GRID_METHODS = STEPWISE_METHODS  # those of torchdiffeq want equal steps
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "ab2": 2, "dpmpp_2m": 2}
NOISE_TO_DATA_METHODS = ("dpmpp_2m",)  # the others solve any ODE, in either direction
SDE_METHODS = ("Euler", "Heun")

# w_t by the path's coefficients and t (SiT, table 2); every w_t >= 0 has the same marginals.
DIFFUSION_FORMS: dict[str, Callable[[Coefficients, torch.Tensor], torch.Tensor]] = {
    "constant": lambda c, t: torch.ones_like(t),
    "SBDM": lambda c, t: c.sigma * (c.d_alpha / c.alpha * c.sigma - c.d_sigma),
    "sigma": lambda c, t: c.sigma,
    "linear": lambda c, t: 1 - t,
    "decreasing": lambda c, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda c, t: torch.sin(math.pi * t) ** 2,
}
LAST_STEPS = (None, "Mean", "Tweedie", "Euler")

State = torch.Tensor | tuple[torch.Tensor, ...]
Field = Callable[[torch.Tensor, State], State]  # (time as a 0-d tensor, state) -> derivative
AlphaSigma = Callable[[float], tuple[float, float]]
OnStep = Callable[[float, State], State]  # (time, state) after a step -> the state to go on from


def go_on(t: float, state: State) -> State:
    """Leave the state as a step left it: the OnStep of a walk that nobody watches."""
    return state


# -- Settings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ODE:
    """Settings of an ODE solver for the probability-flow ODE.

    Args:
        method:    one of ODE_METHODS
        num_steps: steps of a fixed-step method over the whole trajectory, or one number per level; an adaptive method
                   ignores it
        atol:      absolute tolerance of an adaptive method
        rtol:      relative tolerance of an adaptive method
        grid:      where the steps lie: times (0, ..., 1) at equal shares of them (transport/grids.py); None for equal
                   steps

    Raises:
        ValueError: if the method is unknown, a number is out of range, the grid does not ascend from 0 to 1, or the
            method's steps are its own.
    """

    method: str = "ab2"
    num_steps: int | tuple[int, ...] = 50
    atol: float = 1e-6
    rtol: float = 1e-3
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.method not in ODE_METHODS:
            raise ValueError(f"unknown ODE method {self.method!r}; choose one of {', '.join(ODE_METHODS)}")
        _set_steps(self)
        for name in ("atol", "rtol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.grid is not None:
            check_grid_method(self.method)
            object.__setattr__(self, "grid", checked_grid(self.grid))

    @property
    def adaptive(self) -> bool:
        """True for a method that chooses its own steps, from the whole batch."""
        return self.method in ADAPTIVE_METHODS


@dataclass(frozen=True)
class SDE:
    """Settings of a solver for the reverse SDE: dx = [v(x, t) + w_t s(x, t)] dt + sqrt(2 w_t) dW (SiT, equation 4).

    Args:
        method:         "Euler" (Euler-Maruyama) or "Heun"
        num_steps:      steps over the whole trajectory, the last one included, or one number per level
        diffusion_form: w_t, one of DIFFUSION_FORMS
        diffusion_norm: factor of w_t
        last_step:      "Mean" (the drift alone), "Tweedie" (the expected data), "Euler" (the ODE), or None
        last_step_size: length of the last step in t; without a last step it has no meaning

    Raises:
        ValueError: if a name is unknown or a number is out of range.
    """

    method: str = "Euler"
    num_steps: int | tuple[int, ...] = 250
    diffusion_form: str = "sigma"
    diffusion_norm: float = 1.0
    last_step: str | None = "Mean"
    last_step_size: float = 0.04
    adaptive = False

    def __post_init__(self) -> None:
        for name, known in (("method", SDE_METHODS), ("diffusion_form", DIFFUSION_FORMS), ("last_step", LAST_STEPS)):
            if getattr(self, name) not in known:
                what = {"method": "SDE method"}.get(name, name.replace("_", " "))
                raise ValueError(f"unknown {what} {getattr(self, name)!r}; choose one of {', '.join(map(str, known))}")
        _set_steps(self)
        if not self.diffusion_norm >= 0:
            raise ValueError(f"the diffusion norm must not be negative, got {self.diffusion_norm}")
        if self.last_step is not None and not 0 < self.last_step_size < 1:
            raise ValueError(f"the last step's size must be in (0, 1), got {self.last_step_size}")


def _set_steps(solver: ODE | SDE) -> None:
    """Make num_steps plain numbers, which must be at least 1 (ValueError)."""
    steps = whole_numbers(solver.num_steps)
    if min([steps] if isinstance(steps, int) else steps, default=0) < 1:
        raise ValueError(f"steps must be at least 1, got {solver.num_steps}")
    object.__setattr__(solver, "num_steps", steps if isinstance(steps, int) else tuple(steps))


# -- ODE -----------------------------------------------------------------------------------------------------------


def check_ode_method(method: str, noise_to_data: bool, grid: Grid | None = None) -> None:
    """Refuse a method that is unknown, or that cannot solve the ODE at hand (ValueError).

    Args:
        method:        one of ODE_METHODS
        noise_to_data: True if the ODE is solved from noise to data, and for the samples alone
        grid:          where its steps are to lie; None for equal steps
    """
    if method not in ODE_METHODS:
        raise ValueError(f"unknown ODE method {method!r}; choose one of {', '.join(ODE_METHODS)}")
    if method in NOISE_TO_DATA_METHODS and not noise_to_data:
        raise ValueError(
            f"{method} goes from noise to data only: choose ab2, which costs one evaluation a step as well"
        )
    if grid is not None:
        check_grid_method(method)


def check_grid_method(method: str) -> None:
    """Refuse a method whose steps a grid cannot place (ValueError)."""
    if method not in GRID_METHODS:
        kind = "chooses its own steps" if method in ADAPTIVE_METHODS else "takes equal steps alone"
        raise ValueError(f"{method} {kind}: leave the step grid out, or choose one of {', '.join(GRID_METHODS)}")


def solve_ode(
    field: Field,
    state: State,
    start: float,
    stop: float,
    method: str,
    num_steps: int,
    atol: float,
    rtol: float,
    grid: Grid | None = None,
    on_step: OnStep = go_on,
) -> State:
    """Solve d state / dt = field(t, state) from start to stop, in either direction.

    Args:
        field:     evaluated within [start, stop] only
        state:     tensor or tuple of tensors
        method:    one of ODE_METHODS, but for NOISE_TO_DATA_METHODS: see `solve_dpmpp_2m`
        num_steps: steps of a fixed-step method; the adaptive ones choose their own
        atol:      absolute error tolerance per element of the state, adaptive methods
        rtol:      relative error tolerance
        grid:      where the steps of one of GRID_METHODS lie; None for equal steps
        on_step:   called after each step of the methods in STEPWISE_METHODS; the others keep their steps to themselves

    Raises:
        ValueError: if the method is unknown, or is not for every ODE.
        FloatingPointError: if an adaptive method meets non-finite values or needs steps too small to represent.
    """
    check_ode_method(method, noise_to_data=False)
    if method in RUNGE_KUTTA:
        return _solve_runge_kutta(field, state, _step_ends(start, stop, num_steps, grid), RUNGE_KUTTA[method], on_step)
    if method == "ab2":
        return _solve_multistep(field, state, _step_ends(start, stop, num_steps, grid), AB2, on_step)
    return _solve_torchdiffeq(field, state, start, stop, method, num_steps, atol, rtol)


def solve_dpmpp_2m(
    expected_data: Field,
    x: torch.Tensor,
    start: float,
    stop: float,
    num_steps: int,
    alpha_sigma: AlphaSigma,
    grid: Grid | None = None,
    on_step: OnStep = go_on,
) -> torch.Tensor:
    """Follow the probability-flow ODE by DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2).

    A step solves the ODE exactly for constant data D: x_b - alpha_b D = (sigma_b / sigma_a) (x_a - alpha_a D). In this
    form, unlike the paper's, it is regular at alpha = 0 and at sigma_b = 0.

    Args:
        expected_data: the expected data at (t, x)
        start:         towards noise; sigma is not zero there
        stop:          towards data
        alpha_sigma:   the path's two factors at a time
        grid:          where the steps lie; None for equal steps of t
        on_step:       called after each step
    """
    times = _step_ends(start, stop, num_steps, grid)
    return _solve_multistep(expected_data, x, times, _dpmpp_2m(alpha_sigma), on_step)


def steps_from(
    field: Field, states: Sequence[State], times: Sequence[float], method: str, alpha_sigma: AlphaSigma | None = None
) -> list[State]:
    """One step of a method from each of these states to the next time, as if the solver had come there exactly.

    Args:
        field:       the velocity; for dpmpp_2m the expected data
        states:      on one trajectory, at the times but the last
        times:       ends of the steps
        method:      one of GRID_METHODS
        alpha_sigma: as for solve_dpmpp_2m, which alone needs it

    Raises:
        ValueError: if the method's steps are its own.
    """
    check_grid_method(method)
    if method in RUNGE_KUTTA:
        steps = zip(states, pairwise(times), strict=True)
        return [_solve_runge_kutta(field, state, step, RUNGE_KUTTA[method]) for state, step in steps]
    rule = AB2 if method == "ab2" else _dpmpp_2m(alpha_sigma)
    slopes = [field(_scalar(t, state), state) for t, state in zip(times[:-1], states, strict=True)]
    ends = [_heun_step(field, states[0], slopes[0], rule, *times[:2])]
    for n in range(1, len(states)):
        slope = rule.extrapolate(slopes[n - 1], slopes[n], times[n - 1 : n + 2])
        ends.append(rule.advance(states[n], slope, *times[n : n + 2]))
    return ends


def _solve_runge_kutta(
    field: Field, state: State, times: Sequence[float], tableau: Tableau, on_step: OnStep = go_on
) -> State:
    for a, b in pairwise(times):
        h, slopes = b - a, []
        for node, row in zip(tableau.nodes, tableau.matrix, strict=True):
            stage = _add(state, *((h * weight, slope) for weight, slope in zip(row, slopes, strict=True)))
            slopes.append(field(_scalar(b if node == 1 else a + node * h, state), stage))
        state = _add(state, *((h * weight, slope) for weight, slope in zip(tableau.weights, slopes, strict=True)))
        state = on_step(b, state)
    return state


class Multistep(NamedTuple):
    """A method of second order for one evaluation a step.

    Slopes d are extrapolated to the middle of the step, linearly in a clock c, which is exact for steps of any lengths:

        d' = d_n + (d_n - d_{n-1}) (c_{n+1} - c_n) / (2 (c_n - c_{n-1}))

    Args:
        clock:   c at a time; it may be infinite at the first time and the last
        advance: (state, slope, a, b) -> state at time b from the state at a, with a constant slope
        longest: a step that is longer than the one before by this factor, by the clock, is not extrapolated
    """

    clock: Callable[[float], float]
    advance: Callable[[State, State, float, float], State]
    longest: float

    def extrapolate(self, previous: State, current: State, times: Sequence[float]) -> State:
        """d' from d_{n-1} and d_n, at the times n - 1, n and n + 1."""
        before, now, after = map(self.clock, times)
        near = abs(after - now) < self.longest * abs(now - before)
        weight = (after - now) / (2 * (now - before)) if near else 0.0
        return _add(current, (weight, current), (-weight, previous))


AB2 = Multistep(lambda t: t, lambda x, slope, a, b: _add(x, (b - a, slope)), math.inf)


def _dpmpp_2m(alpha_sigma: AlphaSigma) -> Multistep:
    """DPM-Solver++(2M): slopes are the expected data, the clock is half the log-SNR.

    A step more than twice as long as the one before is of first order, like the published step to sigma = 0, which is
    infinitely long. VP's last step, to t = 0.999, is one: extrapolation could triple the error of 50 steps. After a
    start from alpha = 0 the weight is 0, as published; a larger one gains nothing.
    """

    def half_log_snr(t: float) -> float:
        alpha, sigma = alpha_sigma(t)
        return -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)

    def advance(x: torch.Tensor, data: torch.Tensor, a: float, b: float) -> torch.Tensor:
        (alpha_a, sigma_a), (alpha_b, sigma_b) = alpha_sigma(a), alpha_sigma(b)
        decay = sigma_b / sigma_a
        return _add(decay * x, (alpha_b - alpha_a * decay, data))

    return Multistep(half_log_snr, advance, 2.0)


def _solve_multistep(slope: Field, state: State, times: Sequence[float], rule: Multistep, on_step: OnStep) -> State:
    """Follow a multistep rule over steps that end at these times.

    The first step has no previous slope, so it is a Heun step. The second step reuses its d_1, whose error of second
    order counts for one step only, so N steps cost N evaluations; a single step is of first order. An Euler first step
    keeps the order too, but on Gaussian mixtures with 2 or 3 levels it raises the error of ab2 by a tenth at 50
    evaluations and by a quarter at 10; evaluating d_1 again lowers it by a hundredth, for one evaluation per interval.
    """
    current = slope(_scalar(times[0], state), state)
    tried = rule.advance(state, current, *times[:2])
    if len(times) == 2:
        return on_step(times[1], tried)
    previous, current = current, slope(_scalar(times[1], state), tried)
    state = on_step(times[1], rule.advance(state, _add(current, (-0.5, current), (0.5, previous)), *times[:2]))
    for n in range(1, len(times) - 1):
        if n > 1:
            previous, current = current, slope(_scalar(times[n], state), state)
        state = rule.advance(state, rule.extrapolate(previous, current, times[n - 1 : n + 2]), *times[n : n + 2])
        state = on_step(times[n + 1], state)
    return state


def _heun_step(slope: Field, state: State, first: State, rule: Multistep, a: float, b: float) -> State:
    """The first step of a multistep rule, from the slope at its start."""
    second = slope(_scalar(b, state), rule.advance(state, first, a, b))
    return rule.advance(state, _add(second, (-0.5, second), (0.5, first)), a, b)


def _solve_torchdiffeq(
    field: Field, state: State, start: float, stop: float, method: str, num_steps: int, atol: float, rtol: float
) -> State:
    from torchdiffeq import odeint  # here: exported pipelines, whose users need not have it, do without these methods

    low, high = min(start, stop), max(start, stop)
    device = _parts(state)[0].device
    times = torch.tensor([start, stop], dtype=torch.float64, device=device)
    options = {}
    if method in ADAMS:
        # A grid instead of many output times: only the last state is kept.
        grid = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64, device=device)
        options["grid_constructor"] = lambda func, y0, t: grid
        if method == "explicit_adams":
            # Four slopes, fourth order. With torchdiffeq's eleven, errors grow from step to step and explode.
            options["max_order"] = 5
    elif method in RUNGE_KUTTA_ADAPTIVE:
        # End exactly at `stop`: by default torchdiffeq steps past it and interpolates back.
        options["step_t"] = times[1:]

    def within(t: torch.Tensor, y: State) -> State:  # rounding or a trial step may leave the interval slightly
        slope = field(t.clamp(low, high), y)
        if method == "scipy_solver" and not all(part.isfinite().all() for part in _parts(slope)):
            raise FloatingPointError(f"{method} met non-finite values at t = {t:g}")  # scipy would go on, or never end
        return slope

    try:
        solution = odeint(within, state, times, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # torchdiffeq's failed integration; some messages end in a tensor
        reason = str(error).partition(":")[0]
        raise FloatingPointError(f"{method} failed between t = {start:g} and {stop:g}: {reason}") from error
    return solution[-1] if isinstance(solution, torch.Tensor) else tuple(part[-1] for part in solution)


def _step_ends(start: float, stop: float, num_steps: int, grid: Grid | None = None) -> list[float]:
    """Ends of the steps, as numbers on the host."""
    if grid is not None:
        return steps_between(grid, start, stop, num_steps)
    return torch.linspace(start, stop, num_steps + 1, dtype=torch.float64, device="cpu").tolist()


def _scalar(t: float, state: State) -> torch.Tensor:
    """A time as a 0-d tensor, filled in on the state's device: a copy would wait for the GPU."""
    return torch.full((), t, dtype=torch.float64, device=_parts(state)[0].device)


def _add(state: State, *terms: tuple[float, State]) -> State:
    """state + sum of weight * slope over (weight, slope), part by part."""
    for weight, slope in terms:
        if weight == 0:
            continue
        if isinstance(state, torch.Tensor):
            state = torch.add(state, slope, alpha=weight)
        else:
            state = tuple(torch.add(part, d, alpha=weight) for part, d in zip(state, slope, strict=True))
    return state


def _parts(state: State) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else state


# -- SDE -----------------------------------------------------------------------------------------------------------


def solve_sde(
    drift: Field,
    diffusion: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    start: float,
    stop: float,
    method: str,
    num_steps: int,
    generator: Generator,
) -> torch.Tensor:
    """Solve dx = drift(t, x) dt + sqrt(2 diffusion(t)) dW from start to stop in equal steps.

    Args:
        method:    "Euler" (Euler-Maruyama), or "Heun": noise is added first, then the drift takes a Heun step
        generator: source of the increments; one per sample makes them independent of the batch

    Raises:
        ValueError: if the method is unknown.
    """
    if method not in SDE_METHODS:
        raise ValueError(f"unknown SDE method {method!r}; choose one of {', '.join(SDE_METHODS)}")
    step = (stop - start) / num_steps
    for a, b in pairwise(_step_ends(start, stop, num_steps)):
        t, t_next = (torch.full((), time, dtype=x.dtype, device=x.device) for time in (a, b))
        increment = torch.sqrt(2 * step * diffusion(t)) * randn(x.shape, generator, x.device, x.dtype)
        if method == "Euler":
            x = x + step * drift(t, x) + increment
        else:
            noisy = x + increment
            slope = drift(t, noisy)
            x = noisy + step / 2 * (slope + drift(t_next, noisy + step * slope))
    return x
