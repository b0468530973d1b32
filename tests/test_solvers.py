"""The solvers on one smooth interval, against known solutions of small equations; and that no GPU waits for them."""

import math
from collections.abc import Callable
from itertools import cycle, pairwise, product

import pytest
import torch
from closed_form import DATA, EDGES, PATH_NAMES, numbers, observed_order
from diffusers import DPMSolverMultistepScheduler
from scipy import integrate
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS

from transport import (
    ADAPTIVE_METHODS,
    DIFFUSION_FORMS,
    FIXED_METHODS,
    LAST_STEPS,
    NOISE_TO_DATA_METHODS,
    ODE_METHODS,
    PATHS,
    SDE_METHODS,
    ClassifierFreeGuidance,
    Sampler,
    create_transport,
)
from transport.solvers import ADAMS, RUNGE_KUTTA, solve_dpmpp_2m, solve_ode, solve_sde

START, STOP = 0.3, 1.1
EVERY_ODE = [method for method in ODE_METHODS if method not in NOISE_TO_DATA_METHODS]
EVERY_ODE_FIXED = [method for method in EVERY_ODE if method in FIXED_METHODS]


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
    assert set(SOLVERS) == set(ODE_METHODS) - {"ab2", "dpmpp_2m"}
    assert set(FIXED_METHODS).isdisjoint(ADAPTIVE_METHODS)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", EVERY_ODE)
def test_every_method_finds_the_solution_in_both_directions(method: str, backwards: bool):
    start, stop = (STOP, START) if backwards else (START, STOP)
    error = (solve(method, start=start, stop=stop) - solution(X, start, stop)).abs().max()
    # torchdiffeq's fehlberg2 underestimates its error.
    tolerance = {"euler": 2e-2, "midpoint": 2e-4, "heun2": 2e-4, "ab2": 4e-4, "fehlberg2": 1e-4, "explicit_adams": 1e-5}
    assert error < tolerance.get(method, 2e-6)


ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "ab2": 2}
ORDERS |= {"explicit_adams": 4, "implicit_adams": 4}


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_a_fixed_method_converges_with_its_order(method: str, order: int):
    steps = [10, 20, 40, 80]
    errors = [(solve(method, num_steps=n) - solution(X, START, STOP)).abs().max().item() for n in steps]
    slope = observed_order(errors, steps)
    assert slope > order - 0.2
    if "adams" not in method:  # those reach higher orders, after a start of order four
        assert slope < order + 0.3


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", EVERY_ODE_FIXED)
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


@pytest.mark.parametrize("method", EVERY_ODE)
def test_a_tuple_of_states_is_solved_together(method: str):
    def field(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return equation(t, state[0]), torch.cos(t).expand(3)

    x, integral = solve(method, field, (X, torch.zeros(3, dtype=torch.float64)))
    assert x.shape == X.shape
    tolerance = {"euler": 2e-2, "fehlberg2": 1e-4, "ab2": 4e-4}.get(method, 2e-4)
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

    with pytest.raises(FloatingPointError, match=method) as error:
        solve(method, field)
    assert "\n" not in str(error.value)
    assert "tensor" not in str(error.value)


@pytest.mark.parametrize("method", ["Euler", "heun", "", "dopri"])
def test_an_unknown_ode_method_is_refused_with_the_choices(method: str):
    with pytest.raises(ValueError, match=r"unknown ODE method .* choose one of euler, .*dopri5"):
        solve(method)


# -- Our own loops -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", RUNGE_KUTTA)
def test_a_runge_kutta_method_is_torchdiffeqs_to_rounding(method: str, backwards: bool):
    def field(t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return equation(t, state[0]), torch.cos(t) * state[1] + state[0].sum()

    start, stop = (STOP, START) if backwards else (START, STOP)
    times, options = torch.tensor([start, stop], dtype=torch.float64), {"step_size": (STOP - START) / 7}
    expected = odeint(equation, X, times, method=method, options=options)[-1]
    found = solve(method, start=start, stop=stop, num_steps=7)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    expected = odeint(field, (X, X[0]), times, method=method, options=options)
    found = solve(method, field, (X, X[0]), start=start, stop=stop, num_steps=7)
    for part, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(part, whole[-1], atol=1e-13, rtol=0)


def test_ab2_integrates_a_straight_line_exactly():
    found = solve("ab2", lambda t, x: 2 * t.expand(2, 2), num_steps=5)
    torch.testing.assert_close(found, X + STOP**2 - START**2, atol=1e-14, rtol=0)


def test_a_single_step_of_ab2_is_eulers():
    torch.testing.assert_close(solve("ab2", num_steps=1), solve("euler", num_steps=1), atol=0, rtol=0)


@pytest.mark.parametrize("backwards", [False, True])
def test_ab2_has_no_first_order_step_at_its_start(backwards: bool):
    # The error of two steps h is of order h^3. With a first step of Euler it would be of order h^2.
    inverse, errors = [20, 40, 80, 160], []
    for n in inverse:
        stop = START + (-2 if backwards else 2) / n
        errors.append((solve("ab2", stop=stop, num_steps=2) - solution(X, START, stop)).abs().max().item())
    assert observed_order(errors, inverse) == pytest.approx(3, abs=0.15)


def follow_data(
    path: str, start: float, stop: float, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Gaussian data by DPM-Solver++(2M): its result, the exact one, and the points and values of its evaluations."""
    states, data = [], []

    def expected_data(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        states.append(x)
        data.append(DATA.predictions(path, x, t.expand(len(x)))["data"])
        return data[-1]

    def alpha_sigma(t: float) -> tuple[float, float]:
        c = PATHS[path].coefficients(torch.tensor(t, dtype=torch.float64))
        return c.alpha.item(), c.sigma.item()

    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = solve_dpmpp_2m(expected_data, x, start, stop, num_steps, alpha_sigma)
    assert len(data) == num_steps
    return found, DATA.flow(path, x, start, stop), states, data


@pytest.mark.parametrize("path", PATH_NAMES)
def test_dpmpp_2m_converges_with_its_order_where_its_clock_is_finite(path: str):
    steps = [20, 40, 80, 160]
    errors = [
        (found - exact).abs().max().item() for found, exact, *_ in (follow_data(path, 0.3, 0.8, n) for n in steps)
    ]
    assert observed_order(errors, steps) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_dpmpp_2m_has_no_first_order_step_at_its_start(path: str):
    inverse, errors = [40, 80, 160, 320], []  # as for ab2
    for n in inverse:
        found, exact, *_ = follow_data(path, 0.3, 0.3 + 2 / n, 2)
        errors.append((found - exact).abs().max().item())
    assert observed_order(errors, inverse) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("path", ["Linear", "GVP"])
@pytest.mark.parametrize("num_steps", [2, 5])
def test_the_last_step_of_dpmpp_2m_to_clean_data_is_its_last_estimate(path: str, num_steps: int):
    found, _, _, data = follow_data(path, 0.0, 1.0, num_steps)  # with two, the clock is infinite on both sides
    torch.testing.assert_close(found, data[-1], atol=0, rtol=0)


def diffusers_step(
    path: str, times: list[float], data: list[torch.Tensor], x: torch.Tensor, order: int
) -> torch.Tensor:
    """The step between the last two of these times by another library; the path must have alpha^2 + sigma^2 = 1."""
    scheduler = DPMSolverMultistepScheduler(solver_order=2)
    ratios = [sigma / alpha for alpha, sigma, *_ in (numbers(path, t) for t in times)]
    scheduler.sigmas, scheduler._step_index = torch.tensor(ratios, dtype=torch.float64), len(times) - 2
    if order == 1:
        return scheduler.dpm_solver_first_order_update(data[-1], sample=x)
    return scheduler.multistep_dpm_solver_second_order_update(data, sample=x)


@pytest.mark.parametrize(("path", "start", "stop"), [("GVP", 0.2, 0.8), ("VP", 0.0, 0.9), ("VP", 0.5, 0.999)])
def test_dpmpp_2m_takes_the_steps_of_diffusers(path: str, start: float, stop: float):
    times = torch.linspace(start, stop, 9, dtype=torch.float64).tolist()
    found, _, states, data = follow_data(path, start, stop, 8)
    states.append(found)
    tried = diffusers_step(path, times[:2], data[:1], states[0], 1)
    torch.testing.assert_close(states[1], tried, atol=1e-12, rtol=0)
    for n in range(2, 8):
        order = 1 if times[n + 1] == 0.999 else 2  # by the clock this last step is four times as long as the one before
        expected = diffusers_step(path, times[n - 1 : n + 2], data[n - 1 : n + 1], states[n], order)
        torch.testing.assert_close(states[n + 1], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("path", PATH_NAMES)
def test_dpmpp_2m_is_exact_for_a_single_datum(path: str, num_steps: int):
    datum, noise = X[0], X + 1
    (alpha, sigma, *_), start = numbers(path, 0.8), numbers(path, 0.0)
    found = solve_dpmpp_2m(
        lambda t, x: datum.expand(2, 2),
        start[0] * datum + start[1] * noise,
        0.0,
        0.8,
        num_steps,
        lambda t: numbers(path, t)[:2],
    )
    torch.testing.assert_close(found, alpha * datum + sigma * noise, atol=1e-13, rtol=0)


def test_dpmpp_2m_is_refused_for_an_ode_of_another_kind():
    with pytest.raises(ValueError, match="dpmpp_2m goes from noise to data only: choose ab2"):
        solve("dpmpp_2m")


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


# -- A GPU is never waited for -------------------------------------------------------------------------------------


class NoWaiting(TorchFunctionMode):
    """Fails on a copy between the host and "meta", which stands for a GPU: without values, so reading one fails too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        before, after = (
            {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), found)
        )
        from_host = func in (torch.tensor, torch.as_tensor, torch.asarray) and "meta" in after
        if from_host or (before and after - before) or (func is torch.Tensor.copy_ and len(before) > 1):
            raise AssertionError(f"{func} copies from {before or 'the host'} to {after}")
        return found


def on_meta(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
    return x * (t + level)[:, None] + y[:, None]


META = {"x": torch.empty(3, 5, device="meta"), "y": torch.zeros(3, dtype=torch.long, device="meta")}
OURS = [method for method in FIXED_METHODS if method not in ADAMS]  # those are torchdiffeq's


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0, 0] > 0),
        lambda x: x[x > 0],
        lambda x: torch.tensor([0.5], device=x.device),
        lambda x: torch.as_tensor(0.5, device=x.device),
        lambda x: torch.zeros(5, device="cpu").to(x.device),
        lambda x: torch.empty_like(x).copy_(torch.zeros(3, 5, device="cpu")),
        lambda x: x.cpu(),
    ],
)
def test_a_wait_would_be_seen(waits: Callable[[torch.Tensor], object]):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoWaiting():
        waits(META["x"])


@pytest.mark.parametrize(("path", "prediction"), [("Linear", "velocity"), ("GVP", "noise"), ("VP", "score")])
def test_an_ode_never_waits(path: str, prediction: str):
    sampler = Sampler(create_transport(path, prediction, level_edges=EDGES[3]))
    guided = ClassifierFreeGuidance(on_meta, (2.0, 1.0, 3.0), null_class=0, interval=(0.2, 0.9))
    with NoWaiting():
        for method, reverse in product(OURS, [False, True]):
            if not (reverse and method in NOISE_TO_DATA_METHODS):
                x1 = sampler.sample_ode(guided, META["x"], method=method, num_steps=7, y=META["y"], reverse=reverse)
                assert x1.shape == (3, 5)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_an_sde_never_waits(path: str):
    sampler = Sampler(create_transport(path, level_edges=EDGES[2]))
    guided = ClassifierFreeGuidance(on_meta, (2.0, 3.0), null_class=0, channels=2)
    with NoWaiting():
        for (method, last_step), form in zip(product(SDE_METHODS, LAST_STEPS), cycle(DIFFUSION_FORMS)):
            settings = {"method": method, "diffusion_form": form, "last_step": last_step}
            assert sampler.sample_sde(guided, META["x"], num_steps=4, y=META["y"], **settings).shape == (3, 5)


@pytest.mark.parametrize("method", ["heun2", "ab2"])
def test_a_likelihood_never_waits(method: str):
    sampler = Sampler(create_transport("VP", level_edges=EDGES[2]))
    with NoWaiting():
        log_prob, x0 = sampler.log_likelihood(on_meta, META["x"], META["y"], method, num_steps=5, num_probes=2)
    assert (log_prob.shape, x0.shape) == ((3,), (3, 5))
