"""The solvers on one smooth interval, against known solutions of small equations."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from closed_form import observed_order
from scipy import integrate
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS

from transport import ADAPTIVE_METHODS, FIXED_METHODS, ODE_METHODS, SDE_METHODS
from transport.solvers import solve_ode, solve_sde

START, STOP = 0.3, 1.1


def equation(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """dx/dt = cos(t) x - x^2 / 4, a Bernoulli equation: curved in both arguments, no stiffness."""
    return torch.cos(t) * x - x**2 / 4


def solution(x: torch.Tensor, start: float, stop: float) -> torch.Tensor:
    """Exactly: u = 1 / x has u' = -cos(t) u + 1/4, and so exp(sin t) u has the derivative exp(sin t) / 4."""
    growth = integrate.quad(lambda t: math.exp(math.sin(t)) / 4, start, stop)[0]
    return math.exp(math.sin(stop)) / (math.exp(math.sin(start)) / x + growth)


X = torch.tensor([[0.5, 1.0], [2.0, 0.1]], dtype=torch.float64)


def solve(method: str, field: Callable = equation, x: torch.Tensor = X, **settings: float) -> torch.Tensor:
    settings = {"start": START, "stop": STOP, "num_steps": 40, "atol": 1e-7, "rtol": 1e-7, **settings}
    return solve_ode(field, x, method=method, **settings)


# -- ODE -----------------------------------------------------------------------------------------------------------


def test_every_method_of_torchdiffeq_is_offered():
    assert set(ODE_METHODS) == set(SOLVERS)
    assert set(FIXED_METHODS).isdisjoint(ADAPTIVE_METHODS)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", sorted(SOLVERS))
def test_every_method_finds_the_solution_in_both_directions(method: str, backwards: bool):
    start, stop = (STOP, START) if backwards else (START, STOP)
    error = (solve(method, start=start, stop=stop) - solution(X, start, stop)).abs().max()
    # torchdiffeq's fehlberg2 underestimates its error.
    tolerance = {"euler": 2e-2, "midpoint": 2e-4, "heun2": 2e-4, "fehlberg2": 1e-4, "explicit_adams": 1e-5}
    assert error < tolerance.get(method, 2e-6)


ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "explicit_adams": 4, "implicit_adams": 4}


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_a_fixed_method_converges_with_its_order(method: str, order: int):
    steps = [10, 20, 40, 80]
    errors = [(solve(method, num_steps=n) - solution(X, START, STOP)).abs().max().item() for n in steps]
    slope = observed_order(errors, steps)
    assert slope > order - 0.2
    if "adams" not in method:  # those reach higher orders, after a start of order four
        assert slope < order + 0.3


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_a_fixed_method_takes_equal_steps_and_stays_within(method: str, backwards: bool):
    start, stop = (STOP, START) if backwards else (START, STOP)
    seen = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(t.item())
        return equation(t, x)

    solve(method, field, start=start, stop=stop, num_steps=5)
    grid = torch.linspace(start, stop, 6, dtype=torch.float64)
    for t in grid[:-1].tolist():  # every step evaluates at its start
        assert min(abs(t - s) for s in seen) < 1e-12
    assert min(seen) >= START
    assert max(seen) <= STOP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_an_adaptive_method_never_looks_beyond_its_interval(method: str, backwards: bool, dtype: torch.dtype):
    start, stop = (STOP, START) if backwards else (START, STOP)
    seen = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(t.item())
        return 0.01 * equation(t, x)  # so smooth that the solvers would like to step far past the end

    solve(method, field, X.to(dtype), start=start, stop=stop, atol=1e-4, rtol=1e-4)
    low, high = torch.tensor([START, STOP], dtype=torch.float64).to(dtype).tolist()
    assert low <= min(seen) < max(seen) <= high


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_tighter_tolerances_give_smaller_errors(method: str):
    loose, tight = ((solve(method, atol=tol, rtol=tol) - solution(X, START, STOP)).abs().max() for tol in (1e-3, 1e-7))
    assert tight < loose / 20 or loose < 1e-8  # dopri8 needs but one step


@pytest.mark.parametrize("steps", [50, 100, 200, 400])
def test_explicit_adams_stays_stable_in_single_precision(steps: int):
    # torchdiffeq's default, order eleven, amplifies rounding errors to hundreds on this equation.
    found = solve("explicit_adams", lambda t, x: -4 * x, X.float(), start=0.0, stop=1.0, num_steps=steps)
    torch.testing.assert_close(found, X.float() * math.exp(-4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ODE_METHODS)
def test_a_tuple_of_states_is_solved_together(method: str):
    def field(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return equation(t, state[0]), torch.cos(t).expand(3)

    x, integral = solve(method, field, (X, torch.zeros(3, dtype=torch.float64)))
    assert x.shape == X.shape
    tolerance = {"euler": 2e-2, "fehlberg2": 1e-4}.get(method, 2e-4)
    torch.testing.assert_close(x, solution(X, START, STOP), atol=tolerance, rtol=0)
    torch.testing.assert_close(
        integral, torch.full_like(integral, math.sin(STOP) - math.sin(START)), atol=tolerance, rtol=0
    )


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_ending_exactly_costs_no_more_than_torchdiffeqs_interpolation(method: str):
    calls = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return equation(t, x)

    solve(method, field)
    ours = len(calls)
    calls.clear()
    odeint(field, X, torch.tensor([START, STOP], dtype=torch.float64), method=method, atol=1e-7, rtol=1e-7)
    assert ours <= len(calls)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_an_adaptive_method_reports_non_finite_values(method: str, bad: float):
    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(t > 0.5, bad, 1.0) * x

    with pytest.raises(FloatingPointError, match=method):
        solve(method, field)


@pytest.mark.parametrize("method", ["Euler", "heun", "", "dopri"])
def test_an_unknown_ode_method_is_refused_with_the_choices(method: str):
    with pytest.raises(ValueError, match=r"unknown ODE method .* choose one of euler, .*dopri5"):
        solve(method)


# -- SDE -----------------------------------------------------------------------------------------------------------


def ornstein_uhlenbeck(method: str, num_steps: int, n: int = 40_000, seed: int = 0) -> torch.Tensor:
    """dx = -x dt + sqrt(2 * 0.7) dW from N(3, 0.25) over one unit of time."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return solve_sde(lambda t, x: -x, lambda t: torch.full_like(t, 0.7), x, 0.0, 1.0, method, num_steps, generator)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_an_sde_has_the_known_mean_and_variance(method: str):
    x = ornstein_uhlenbeck(method, num_steps=100)
    mean, variance = 3 * math.exp(-1), 0.25 * math.exp(-2) + 0.7 * (1 - math.exp(-2))
    bias = 0.01  # of order one step
    assert abs(x.mean() - mean) < 4.5 * (variance / len(x)) ** 0.5 + bias * mean
    assert abs(x.var() - variance) < 4.5 * variance * (2 / len(x)) ** 0.5 + bias * variance


@pytest.mark.parametrize("method", SDE_METHODS)
def test_a_coarse_sde_has_the_moments_of_its_own_chain(method: str):
    # x <- a x + b (the noise); both factors known by hand for this linear drift.
    h, steps = 0.25, 4
    a, b = (1 - h, 1.0) if method == "Euler" else (1 - h + h**2 / 2, 1 - h + h**2 / 2)
    mean, variance = 3.0, 0.25
    for _ in range(steps):
        mean, variance = a * mean, a**2 * variance + b**2 * 2 * 0.7 * h
    x = ornstein_uhlenbeck(method, num_steps=steps)
    assert abs(x.mean() - mean) < 4.5 * (variance / len(x)) ** 0.5
    assert abs(x.var() - variance) < 4.5 * variance * (2 / len(x)) ** 0.5


@pytest.mark.parametrize(("method", "order"), [("Euler", 1), ("Heun", 2)])
def test_without_noise_an_sde_solver_is_the_ode_solver_of_its_name(method: str, order: int):
    steps = [10, 20, 40, 80]
    errors = [
        (solve_sde(equation, torch.zeros_like, X, START, STOP, method, n, None) - solution(X, START, STOP)).abs().max()
        for n in steps
    ]
    assert observed_order([error.item() for error in errors], steps) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("method", SDE_METHODS)
def test_an_sde_stays_within_its_interval(method: str):
    seen = []

    def drift(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        seen.append(t.item())
        return equation(t, x)

    solve_sde(drift, torch.zeros_like, X, START, STOP, method, 7, None)
    grid = torch.linspace(START, STOP, 8, dtype=torch.float64).tolist()
    ends = grid[:-1] if method == "Euler" else [t for step in pairwise(grid) for t in step]
    assert seen == pytest.approx(ends, abs=1e-12)
    assert min(seen) >= START
    assert max(seen) <= STOP


def test_one_generator_per_sample_makes_an_sde_independent_of_the_batch():
    def run(rows: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        return solve_sde(equation, torch.ones_like, X[rows], START, STOP, "Heun", 6, generators)

    torch.testing.assert_close(run([0, 1]), torch.cat([run([0]), run([1])]))


@pytest.mark.parametrize("method", ["euler", "heun", "Milstein"])
def test_an_unknown_sde_method_is_refused_with_the_choices(method: str):
    with pytest.raises(ValueError, match=r"unknown SDE method .* choose one of Euler, Heun"):
        solve_sde(equation, torch.zeros_like, X, START, STOP, method, 5, None)
