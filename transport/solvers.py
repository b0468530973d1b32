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
STEPWISE_METHODS = (*RUNGE_KUTTA, "ab2", "dpmpp_2m")  # solved here, step by step
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
FIXED_METHODS = (*STEPWISE_METHODS, *ADAMS)
RUNGE_KUTTA_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ADAPTIVE_METHODS = (*RUNGE_KUTTA_ADAPTIVE, "scipy_solver")
ODE_METHODS = (*FIXED_METHODS, *ADAPTIVE_METHODS)
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

    Raises:
        ValueError: if the method is unknown or a number is out of range.
    """

    method: str = "ab2"
    num_steps: int | tuple[int, ...] = 50
    atol: float = 1e-6
    rtol: float = 1e-3

    def __post_init__(self) -> None:
        if self.method not in ODE_METHODS:
            raise ValueError(f"unknown ODE method {self.method!r}; choose one of {', '.join(ODE_METHODS)}")
        _set_steps(self)
        for name in ("atol", "rtol"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

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


def check_ode_method(method: str, noise_to_data: bool) -> None:
    """Refuse a method that is unknown, or that cannot solve the ODE at hand (ValueError).

    Args:
        method:        one of ODE_METHODS
        noise_to_data: True if the ODE is solved from noise to data, and for the samples alone
    """
    if method not in ODE_METHODS:
        raise ValueError(f"unknown ODE method {method!r}; choose one of {', '.join(ODE_METHODS)}")
    if method in NOISE_TO_DATA_METHODS and not noise_to_data:
        raise ValueError(
            f"{method} goes from noise to data only: choose ab2, which costs one evaluation a step as well"
        )


def solve_ode(
    field: Field,
    state: State,
    start: float,
    stop: float,
    method: str,
    num_steps: int,
    atol: float,
    rtol: float,
    on_step: OnStep = go_on,
) -> State:
    """Solve d state / dt = field(t, state) from start to stop, in either direction.

    Args:
        field:     evaluated within [start, stop] only
        state:     tensor or tuple of tensors
        method:    one of ODE_METHODS, but for NOISE_TO_DATA_METHODS: see `solve_dpmpp_2m`
        num_steps: equal steps of a fixed-step method; the adaptive ones choose their own
        atol:      absolute error tolerance per element of the state, adaptive methods
        rtol:      relative error tolerance
        on_step:   called after each step of the methods in STEPWISE_METHODS; the others keep their steps to themselves

    Raises:
        ValueError: if the method is unknown, or is not for every ODE.
        FloatingPointError: if an adaptive method meets non-finite values or needs steps too small to represent.
    """
    check_ode_method(method, noise_to_data=False)
    if method in RUNGE_KUTTA:
        return _solve_runge_kutta(field, state, _grid(start, stop, num_steps), RUNGE_KUTTA[method], on_step)
    if method == "ab2":
        times = _grid(start, stop, num_steps)
        return _solve_multistep(field, state, times, times, lambda x, slope, a, b: _add(x, (b - a, slope)), on_step)
    return _solve_torchdiffeq(field, state, start, stop, method, num_steps, atol, rtol)


def solve_dpmpp_2m(
    expected_data: Field,
    x: torch.Tensor,
    start: float,
    stop: float,
    num_steps: int,
    alpha_sigma: Callable[[float], tuple[float, float]],
    on_step: OnStep = go_on,
) -> torch.Tensor:
    """Follow the probability-flow ODE by DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) in equal steps of t.

    A step solves the ODE exactly for constant data D: x_b - alpha_b D = (sigma_b / sigma_a) (x_a - alpha_a D). In this
    form, unlike the paper's, it is regular at alpha = 0 and at sigma_b = 0.

    Args:
        expected_data: the expected data at (t, x)
        start:         towards noise; sigma is not zero there
        stop:          towards data
        alpha_sigma:   the path's two factors at a time
        on_step:       called after each step
    """

    def half_log_snr(t: float) -> float:
        alpha, sigma = alpha_sigma(t)
        return -math.inf if alpha == 0 else math.inf if sigma == 0 else math.log(alpha / sigma)

    def advance(x: torch.Tensor, data: torch.Tensor, a: float, b: float) -> torch.Tensor:
        (alpha_a, sigma_a), (alpha_b, sigma_b) = alpha_sigma(a), alpha_sigma(b)
        decay = sigma_b / sigma_a
        return _add(decay * x, (alpha_b - alpha_a * decay, data))

    times = _grid(start, stop, num_steps)
    return _solve_multistep(expected_data, x, times, [half_log_snr(t) for t in times], advance, on_step)


def _solve_runge_kutta(field: Field, state: State, times: Sequence[float], tableau: Tableau, on_step: OnStep) -> State:
    for a, b in pairwise(times):
        h, slopes = b - a, []
        for node, row in zip(tableau.nodes, tableau.matrix, strict=True):
            stage = _add(state, *((h * weight, slope) for weight, slope in zip(row, slopes, strict=True)))
            slopes.append(field(_scalar(b if node == 1 else a + node * h, state), stage))
        state = _add(state, *((h * weight, slope) for weight, slope in zip(tableau.weights, slopes, strict=True)))
        state = on_step(b, state)
    return state


def _solve_multistep(
    slope: Field,
    state: State,
    times: Sequence[float],
    clock: Sequence[float],
    advance: Callable[[State, State, float, float], State],
    on_step: OnStep,
) -> State:
    """Second order for one evaluation a step: slopes d are extrapolated to the middle of the step, linearly in a clock.

        d' = d_n + (d_n - d_{n-1}) (c_{n+1} - c_n) / (2 (c_n - c_{n-1}))

    The first step has no previous slope, so it is a Heun step. The second step reuses its d_1, whose error of second
    order counts for one step only, so N steps cost N evaluations; a single step is of first order. An Euler first step
    keeps the order too, but on Gaussian mixtures with 2 or 3 levels it raises the error of ab2 by a tenth at 50
    evaluations and by a quarter at 10; evaluating d_1 again lowers it by a hundredth, for one evaluation per interval.

    Args:
        times:   ends of the steps
        clock:   c at these times; it may be infinite at the first and the last
        advance: (state, slope, a, b) -> state at time b from the state at a, with a constant slope
    """
    current = slope(_scalar(times[0], state), state)
    tried = advance(state, current, times[0], times[1])
    if len(times) == 2:
        return on_step(times[1], tried)
    previous, current = current, slope(_scalar(times[1], state), tried)
    state = advance(state, _add(current, (-0.5, current), (0.5, previous)), times[0], times[1])
    state = on_step(times[1], state)
    for n in range(1, len(times) - 1):
        if n > 1:
            previous, current = current, slope(_scalar(times[n], state), state)
        weight = _extrapolation(*clock[n - 1 : n + 2])
        slopes = _add(current, (weight, current), (-weight, previous))
        state = on_step(times[n + 1], advance(state, slopes, times[n], times[n + 1]))
    return state


def _extrapolation(before: float, now: float, after: float) -> float:
    """The weight of d_n - d_{n-1}: half the ratio of a step to the one before, by the clock.

    A step more than twice as long as the one before is not extrapolated but of first order, like the published step to
    sigma = 0, which is infinitely long. VP's last step, to t = 0.999, is one: extrapolation could triple the error of
    50 steps. After a start from alpha = 0 the weight is 0, as published; a larger one gains nothing.
    """
    return (after - now) / (2 * (now - before)) if abs(after - now) < 2 * abs(now - before) else 0.0


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


def _grid(start: float, stop: float, num_steps: int) -> list[float]:
    """Ends of equal steps, as numbers on the host."""
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
    for a, b in pairwise(_grid(start, stop, num_steps)):
        t, t_next = (torch.full((), time, dtype=x.dtype, device=x.device) for time in (a, b))
        increment = torch.sqrt(2 * step * diffusion(t)) * randn(x.shape, generator, x.device, x.dtype)
        if method == "Euler":
            x = x + step * drift(t, x) + increment
        else:
            noisy = x + increment
            slope = drift(t, noisy)
            x = noisy + step / 2 * (slope + drift(t_next, noisy + step * slope))
    return x
