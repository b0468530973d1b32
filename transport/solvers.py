"""ODE and SDE solvers over one interval on which the field is smooth.

They know nothing of levels: the sampler makes one call per interval, so no step straddles an edge.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torchdiffeq import odeint

from transport.noise import Generator, randn

FIXED_METHODS = ("euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams", "fixed_adams")
RUNGE_KUTTA_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ADAPTIVE_METHODS = (*RUNGE_KUTTA_ADAPTIVE, "scipy_solver")
ODE_METHODS = (*FIXED_METHODS, *ADAPTIVE_METHODS)
SDE_METHODS = ("Euler", "Heun")

State = torch.Tensor | tuple[torch.Tensor, ...]
Field = Callable[[torch.Tensor, State], State]  # (time as a 0-d tensor, state) -> derivative


def solve_ode(
    field: Field, state: State, start: float, stop: float, method: str, num_steps: int, atol: float, rtol: float
) -> State:
    """Solve d state / dt = field(t, state) from start to stop, in either direction, with torchdiffeq.

    Args:
        field:     evaluated within [start, stop] only
        state:     tensor or tuple of tensors
        method:    one of ODE_METHODS
        num_steps: equal steps of a fixed-step method; the adaptive ones choose their own
        atol:      absolute error tolerance per element of the state, adaptive methods
        rtol:      relative error tolerance

    Raises:
        ValueError: if the method is unknown.
        FloatingPointError: if an adaptive method meets non-finite values or needs steps too small to represent.
    """
    if method not in ODE_METHODS:
        raise ValueError(f"unknown ODE method {method!r}; choose one of {', '.join(ODE_METHODS)}")
    low, high = min(start, stop), max(start, stop)
    device = _parts(state)[0].device
    times = torch.tensor([start, stop], dtype=torch.float64, device=device)
    options = {}
    if method in FIXED_METHODS:
        # A grid instead of many output times: only the last state is kept.
        grid = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64, device=device)
        options["grid_constructor"] = lambda func, y0, t: grid
        if method == "explicit_adams":
            # Four slopes, fourth order. With torchdiffeq's eleven, errors grow from step to step and explode.
            options["max_order"] = 5
    elif method in RUNGE_KUTTA_ADAPTIVE:
        # End exactly at `stop`: by default torchdiffeq steps past it and interpolates back.
        options["step_t"] = times[1:]

    def within(t: torch.Tensor, y: State) -> State:  # rounding, or a trial step, may leave the interval by a little
        slope = field(t.clamp(low, high), y)
        if method == "scipy_solver" and not all(part.isfinite().all() for part in _parts(slope)):
            raise FloatingPointError(f"{method} met non-finite values at t = {t:g}")  # it would go on, or never end
        return slope

    try:
        solution = odeint(within, state, times, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # how torchdiffeq reports a failed integration
        raise FloatingPointError(f"{method} failed between t = {start:g} and {stop:g}: {error}") from error
    return solution[-1] if isinstance(solution, torch.Tensor) else tuple(part[-1] for part in solution)


def _parts(state: State) -> tuple[torch.Tensor, ...]:
    return (state,) if isinstance(state, torch.Tensor) else state


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
    grid = torch.linspace(start, stop, num_steps + 1, dtype=torch.float64).to(x.device, x.dtype)
    step = (stop - start) / num_steps
    for t, t_next in pairwise(grid):
        increment = torch.sqrt(2 * step * diffusion(t)) * randn(x.shape, generator, x.device, x.dtype)
        if method == "Euler":
            x = x + step * drift(t, x) + increment
        else:
            noisy = x + increment
            slope = drift(t, noisy)
            x = noisy + step / 2 * (slope + drift(t_next, noisy + step * slope))
    return x
