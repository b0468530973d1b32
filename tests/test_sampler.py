"""Samples and likelihoods of Gaussian data against their closed forms, level by level."""

import math
import random
from collections.abc import Callable
from itertools import pairwise, product

import pytest
import torch
from closed_form import (
    DATA,
    EDGES,
    PATH_NAMES,
    QUANTITIES,
    Gaussian,
    LevelField,
    Network,
    assert_each_level_kept_to_its_time,
    default_interval,
    numbers,
    observed_order,
    sde_chain,
)
from torchdiffeq import odeint

from runtime.rng import sample_generators
from transport import (
    ADAPTIVE_METHODS,
    DIFFUSION_FORMS,
    LAST_STEPS,
    NOISE_TO_DATA_METHODS,
    ODE,
    ODE_METHODS,
    SDE,
    SDE_METHODS,
    STEPWISE_METHODS,
    Sampler,
    bits_per_dim,
    create_transport,
)

ODD_EDGES = (0.13, 0.37, 0.9)
PRECISE = {"method": "dopri5", "atol": 1e-9, "rtol": 1e-9}
EVERY_ODE = [method for method in ODE_METHODS if method not in NOISE_TO_DATA_METHODS]
EVERY_WAY = [*product(ODE_METHODS, [False]), *product(EVERY_ODE, [True])]  # method and whether it goes back to noise
EVERY_NETWORK = [*product(PATH_NAMES, QUANTITIES, EDGES)]


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(n: int, dimensions: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dimensions, generator=seeded(seed), dtype=torch.float64)


def exact_ode(
    path: str, prediction: str, x: torch.Tensor, reverse: bool = False, interval: tuple[float, float] | None = None
) -> torch.Tensor:
    """The sampler's exact result: the flow between the ends of the interval, which stand for noise and data."""
    start, stop = interval or default_interval(path, prediction)
    sigma, alpha = numbers(path, start)[1], numbers(path, stop)[0]
    if reverse:
        return DATA.flow(path, x * alpha, stop, start) / sigma
    return DATA.flow(path, x * sigma, start, stop) / alpha


def make(path: str = "Linear", prediction: str = "velocity", edges: tuple[float, ...] = ()) -> tuple[Sampler, Network]:
    transport = create_transport(path, prediction, level_edges=edges)
    return Sampler(transport), Network(DATA, path, prediction, len(edges) + 1)


def assert_moments(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, slack: float = 0.0) -> None:
    """Mean and variance of each dimension within 4.5 standard errors; `slack` is in standard deviations."""
    n = len(x)
    assert ((x.mean(0) - mean).abs() < 4.5 * (variance / n).sqrt() + slack * variance.sqrt()).all()
    assert ((x.var(0) - variance).abs() < 4.5 * variance * (2 / n) ** 0.5 + slack * variance).all()


# -- ODE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction", "levels"), EVERY_NETWORK)
def test_ode_samples_follow_the_data(path: str, prediction: str, levels: int):
    sampler, network = make(path, prediction, EDGES[levels])
    x0 = noise(4000)
    x1 = sampler.sample_ode(network, x0, method="dopri5", atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(x1, exact_ode(path, prediction, x0), atol=2e-5, rtol=0)
    # What the truncated ends leave out: VP's start has 0.0066 of the data's mean.
    assert_moments(x1, DATA.mean, DATA.variance, slack=0.01)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_default_settings_are_good_to_about_a_hundredth(path: str):
    sampler, network = make(path, edges=EDGES[2])
    x0 = noise(50).float()
    x1 = sampler.sample_ode(network, x0)
    assert x1.dtype == torch.float32
    torch.testing.assert_close(x1.double(), exact_ode(path, "velocity", x0.double()), atol=1.2e-2, rtol=0)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_there_and_back_returns_to_the_start(path: str, prediction: str):
    sampler, network = make(path, prediction, ODD_EDGES)
    x = noise(20)
    x1 = sampler.sample_ode(network, x, **PRECISE)
    torch.testing.assert_close(sampler.sample_ode(network, x1, **PRECISE, reverse=True), x, atol=1e-6, rtol=0)
    x0 = sampler.sample_ode(network, x, **PRECISE, reverse=True)
    torch.testing.assert_close(x0, exact_ode(path, prediction, x, reverse=True), atol=1e-6, rtol=0)


TOLERANCE = {"euler": 0.15, "fehlberg2": 1e-2, "explicit_adams": 5e-3, "midpoint": 5e-3, "heun2": 2e-2}
TOLERANCE |= {"ab2": 2e-2, "dpmpp_2m": 1e-2}


@pytest.mark.parametrize(("method", "reverse"), EVERY_WAY)
@pytest.mark.parametrize("path", PATH_NAMES)
def test_every_method_is_right_and_keeps_levels_to_their_time(path: str, method: str, reverse: bool):
    sampler, network = make(path, edges=ODD_EDGES)
    x = noise(20)
    found = sampler.sample_ode(network, x, method=method, num_steps=100, atol=1e-5, rtol=1e-5, reverse=reverse)
    error = (found - exact_ode(path, "velocity", x, reverse)).abs().max()
    assert error < TOLERANCE.get(method, 1e-3)
    assert_each_level_kept_to_its_time(network.calls, ODD_EDGES)


@pytest.mark.parametrize(("method", "reverse"), EVERY_WAY)
def test_levels_keep_to_their_time_in_single_precision(method: str, reverse: bool):
    sampler, network = make(edges=ODD_EDGES)
    sampler.sample_ode(network, noise(4).float(), method=method, num_steps=17, atol=1e-3, rtol=1e-3, reverse=reverse)
    assert_each_level_kept_to_its_time(network.calls, ODD_EDGES, torch.float32)


@pytest.mark.parametrize("edges", [(), (0.37,), ODD_EDGES])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun2", 2), ("midpoint", 2), ("ab2", 2)])
def test_a_method_keeps_its_order_whatever_the_edges(method: str, order: int, edges: tuple[float, ...]):
    steps = [40, 80, 160, 320]
    sampler, network = make("GVP", edges=edges)
    jumping, x = LevelField(len(edges) + 1), noise(10)
    smooth_errors, jump_errors = [], []
    for n in steps:
        found = sampler.sample_ode(network, x, method=method, num_steps=n)
        smooth_errors.append((found - exact_ode("GVP", "velocity", x)).abs().max().item())
        found = Sampler(create_transport(level_edges=edges)).sample_ode(jumping, x, method=method, num_steps=n)
        jump_errors.append((found - x * LevelField.growth(edges)).abs().max().item())
    assert observed_order(smooth_errors, steps) == pytest.approx(order, abs=0.15)
    assert observed_order(jump_errors, steps) == pytest.approx(order, abs=0.15)


def test_dpmpp_2m_keeps_its_order_whatever_the_edges():
    # Away from 0 and 1: the half log-SNR is infinite there, which costs a logarithm of the number of steps.
    steps, edges, x = [160, 320, 640], (0.3, 0.5, 0.6), noise(10)
    transport = create_transport("Linear", sample_eps=0.1, level_edges=edges)
    network, jumping = Network(DATA, "Linear", "velocity", 4), LevelField(4)
    smooth_errors, jump_errors = [], []
    for n in steps:
        found = Sampler(transport).sample_ode(network, x, method="dpmpp_2m", num_steps=n)
        smooth_errors.append((found - exact_ode("Linear", "velocity", x, interval=(0.1, 0.9))).abs().max().item())
        found = Sampler(transport).sample_ode(jumping, x, method="dpmpp_2m", num_steps=n)
        growth = math.exp(1 * 0.2 + 2 * 0.2 + 3 * 0.1 + 4 * 0.3)  # sigma at the start is alpha at the end
        jump_errors.append((found - x * growth).abs().max().item())
    assert observed_order(smooth_errors, steps) == pytest.approx(2, abs=0.15)
    assert observed_order(jump_errors, steps) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
@pytest.mark.parametrize("method", ["ab2", "dpmpp_2m"])
def test_a_multistep_method_solves_for_every_prediction(method: str, path: str, prediction: str):
    sampler, network = make(path, prediction, EDGES[2])
    x0 = noise(50).float()
    x1 = sampler.sample_ode(network, x0, method=method)
    assert x1.dtype == torch.float32
    assert len(network.calls) == 50
    torch.testing.assert_close(x1.double(), exact_ode(path, prediction, x0.double()), atol=2e-2, rtol=0)


def solve_across(x: torch.Tensor, edge: float, **settings: object) -> tuple[torch.Tensor, int]:
    """The jumping field by torchdiffeq alone, straight across the edge, and the number of evaluations."""
    calls = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return (2 if t > edge else 1) * x

    return odeint(field, x, torch.tensor([0.0, 1.0], dtype=torch.float64), **settings)[-1], len(calls)


def test_stepping_across_a_jump_would_cost_the_order():
    # The counterpart of the test above: it shows that the field is one on which a careless solver fails.
    x, steps = noise(10), [40, 80, 160, 320]
    found = [solve_across(x, 0.371, method="heun2", options={"step_size": 1 / n})[0] for n in steps]
    errors = [(f - x * LevelField.growth((0.371,))).abs().max().item() for f in found]
    assert observed_order(errors, steps) < 1.5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("edges", [(0.37,), EDGES[3], ODD_EDGES])
def test_dopri5_needs_no_more_evaluations_than_the_pieces_one_by_one(edges: tuple[float, ...], reverse: bool):
    field, x, tolerance = LevelField(len(edges) + 1), noise(10), {"method": "dopri5", "atol": 1e-6, "rtol": 1e-6}
    found = Sampler(create_transport(level_edges=edges)).sample_ode(field, x, **tolerance, reverse=reverse)
    ours = len(field.calls)
    field.calls.clear()

    state, levels, bounds = x, list(range(len(edges) + 1)), [0.0, *edges, 1.0]
    pieces = [*zip(levels, pairwise(bounds), strict=True)]
    for level, (a, b) in reversed(pieces) if reverse else pieces:
        times = torch.tensor([b, a] if reverse else [a, b], dtype=torch.float64)
        state = odeint(lambda t, x, level=level: field(x, t, level=level), state, times, **tolerance)[-1]
    assert ours <= len(field.calls)
    torch.testing.assert_close(found, state, atol=1e-4, rtol=0)
    growth = LevelField.growth(edges)
    torch.testing.assert_close(found, x / growth if reverse else x * growth, atol=1e-4, rtol=0)
    assert reverse or len(edges) > 1 or ours < solve_across(x, edges[0], **tolerance)[1]


@pytest.mark.parametrize(
    ("method", "cost"),
    [("euler", 1), ("heun2", 2), ("midpoint", 2), ("heun3", 3), ("rk4", 4), ("ab2", 1), ("dpmpp_2m", 1)],
)
def test_steps_are_counted_over_the_whole_way_or_per_level(method: str, cost: int):
    sampler, network = make(edges=EDGES[3])
    for num_steps, shares in ((20, (10, 5, 5)), ((3, 1, 4), (3, 1, 4))):
        network.calls.clear()
        sampler.sample_ode(network, noise(2), method=method, num_steps=num_steps)
        levels = [level for _, _, level, _ in network.calls]
        assert [levels.count(level) for level in range(3)] == [cost * share for share in shares]
        assert levels == sorted(levels)


@pytest.mark.parametrize(("method", "reverse"), EVERY_WAY)
def test_walks_over_some_levels_make_up_the_whole_walk(method: str, reverse: bool):
    """Bit by bit, with both ends cut off (score) and the guidance switched on within a level."""
    sampler, network = make("Linear", "score", ODD_EDGES)
    network.breakpoints = (0.5, 0.95)
    x, settings = noise(3).float(), {"method": method, "num_steps": 11, "reverse": reverse}
    whole = sampler.sample_ode(network, x, **settings)
    for cuts in ((0, 1, 4), (0, 3, 4), (0, 1, 2, 3, 4)):
        parts = [range(low, high) for low, high in pairwise(cuts)]
        state = x
        for levels in reversed(parts) if reverse else parts:
            state = sampler.sample_ode(network, state, **settings, levels=levels)
        assert torch.equal(state, whole)


def test_the_state_at_an_edge_is_the_flow_there():
    sampler, network = make("VP", edges=ODD_EDGES)  # from 0 to 0.999
    x0 = noise(20)
    state = sampler.sample_ode(network, x0, **PRECISE, levels=range(0, 2))
    expected = DATA.flow("VP", x0 * numbers("VP", 0.0)[1], 0.0, ODD_EDGES[1])
    torch.testing.assert_close(state, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("method", "reverse"), [way for way in EVERY_WAY if way[0] in STEPWISE_METHODS])
def test_each_step_is_told_and_may_be_changed(method: str, reverse: bool):
    sampler, network = make(edges=(0.5,))
    x, settings = noise(6), {"method": method, "num_steps": (2, 4), "reverse": reverse}
    seen: list[tuple[float, torch.Tensor]] = []

    def watch(t: float, state: torch.Tensor) -> torch.Tensor:
        seen.append((t, state))
        return state

    watched = sampler.sample_ode(network, x, **settings, on_step=watch)
    assert torch.equal(watched, sampler.sample_ode(network, x, **settings))
    ends = [0.25, 0.5, 0.625, 0.75, 0.875, 1.0]
    assert [t for t, _ in seen] == ([0.875, 0.75, 0.625, 0.5, 0.25, 0.0] if reverse else ends)
    assert torch.equal(seen[-1][1], watched)
    half = sampler.sample_ode(network, x, **settings, levels=range(1, 2) if reverse else range(0, 1))
    assert torch.equal(dict(seen)[0.5], half)
    doubled = sampler.sample_ode(network, x, **settings, on_step=lambda t, state: 2 * state if t == 0.5 else state)
    rest = sampler.sample_ode(network, 2 * half, **settings, levels=range(0, 1) if reverse else range(1, 2))
    assert torch.equal(doubled, rest)


def test_methods_that_do_not_tell_their_steps_say_so():
    sampler, network = make()
    with pytest.raises(ValueError, match="dopri5 does not tell its steps: choose one of euler"):
        sampler.sample_ode(network, noise(2), method="dopri5", on_step=lambda t, state: state)


def test_levels_that_are_not_there_are_refused():
    sampler, network = make(edges=(0.5,))
    for levels in (range(0), range(1, 1), range(0, 3), range(-1, 1), range(0, 2, 2)):
        with pytest.raises(ValueError, match=r"levels must be a range within range\(0, 2\)"):
            sampler.sample(network, noise(1), ODE(), levels=levels)
    with pytest.raises(ValueError, match="an SDE walks all levels at once"):
        sampler.sample(network, noise(1), SDE(), levels=range(0, 1))


def test_labels_and_samples_stay_together():
    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        return (y + level)[:, None] + 0 * x

    y, x0 = torch.tensor([5.0, -1.0, 2.0], dtype=torch.float64), noise(3)
    x1 = Sampler(create_transport(level_edges=(0.75,))).sample_ode(network, x0, num_steps=4, y=y)
    torch.testing.assert_close(x1, x0 + (y + 0.25)[:, None])


# -- SDE -----------------------------------------------------------------------------------------------------------


def check_chain(path: str, prediction: str, levels: int, form: str, method: str, last_step: str | None) -> None:
    edges, steps, norm, size = EDGES[levels], {1: (24,), 2: (13, 9), 3: (13, 5, 7)}[levels], 0.7, 0.06
    sampler, network = make(path, prediction, edges)
    counted = steps if last_step is None else (*steps[:-1], steps[-1] + 1)  # the last step is one of the finest level's

    def sample(x0: torch.Tensor) -> torch.Tensor:
        return sampler.sample_sde(
            network,
            x0,
            method=method,
            num_steps=counted,
            diffusion_form=form,
            diffusion_norm=norm,
            last_step=last_step,
            last_step_size=size,
            generator=seeded(1),
        )

    mean, variance, gain = sde_chain(DATA, path, prediction, edges, steps, form, norm, method, last_step, size)
    assert_moments(sample(noise(6000)), mean, variance)
    assert_each_level_kept_to_its_time(network.calls, edges)
    assert len(network.calls) == sum(steps) * (1 if method == "Euler" else 2) + (last_step is not None)
    # The same noise from another start: what differs is free of chance.
    difference = sample(noise(3) + 1.5) - sample(noise(3))
    torch.testing.assert_close(difference, (1.5 * gain).expand(3, 5), rtol=1e-6, atol=1e-9)


CHOOSE = random.Random(0)
EVERY_SDE = [
    (path, CHOOSE.choice(QUANTITIES), CHOOSE.choice([*EDGES]), form, method, last_step)
    for path, form, method, last_step in product(PATH_NAMES, DIFFUSION_FORMS, SDE_METHODS, LAST_STEPS)
]


@pytest.mark.parametrize(("path", "prediction", "levels", "form", "method", "last_step"), EVERY_SDE)
def test_sde_samples_have_the_moments_of_their_chain(
    path: str, prediction: str, levels: int, form: str, method: str, last_step: str | None
):
    check_chain(path, prediction, levels, form, method, last_step)


@pytest.mark.parametrize(("path", "prediction", "levels"), EVERY_NETWORK)
def test_sde_samples_have_the_moments_of_their_chain_for_every_network(path: str, prediction: str, levels: int):
    check_chain(path, prediction, levels, "sigma", "Euler", "Mean")


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize(("path", "method"), [("Linear", "Euler"), ("GVP", "Heun"), ("VP", "Euler")])
def test_at_250_steps_sde_samples_follow_the_data(path: str, method: str, form: str):
    # With Tweedie, as the last steps "Mean" and "Euler" are biased by the step's own size.
    sampler, network = make(path, edges=(0.5,))
    settings = {"method": method, "last_step": "Tweedie", "last_step_size": 0.01}
    x1 = sampler.sample_sde(network, noise(6000), num_steps=250, diffusion_form=form, generator=seeded(2), **settings)
    assert_moments(x1, DATA.mean, DATA.variance, slack=0.05)


def test_the_default_sde_follows_the_data():
    sampler, network = make()
    x1 = sampler.sample_sde(network, noise(6000), generator=seeded(3))
    assert len(network.calls) == 250
    assert_moments(x1, DATA.mean, DATA.variance, slack=0.05)


def test_without_diffusion_the_sde_is_the_ode():
    sampler, network = make("GVP", edges=(0.5,))
    x0 = noise(10)
    x1 = sampler.sample_sde(network, x0, "Heun", 400, diffusion_norm=0.0, last_step="Euler", last_step_size=1e-3)
    torch.testing.assert_close(x1, exact_ode("GVP", "velocity", x0), atol=1e-4, rtol=0)


def test_an_sde_sample_depends_on_its_own_generator_alone():
    sampler, network = make(edges=(0.5,))

    def run(rows: list[int]) -> torch.Tensor:
        generators = sample_generators(4, rows)
        return sampler.sample_sde(network, noise(6)[rows], num_steps=10, generator=generators)

    together = run([0, 1, 2, 3, 4, 5])
    torch.testing.assert_close(torch.cat([run([0, 1]), run([2]), run([3, 4, 5])]), together)


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_an_sde_keeps_levels_to_their_time_in_single_precision(method: str, last_step: str | None):
    sampler, network = make("VP", "noise", ODD_EDGES)
    sampler.sample_sde(network, noise(4).float(), method, 17, last_step=last_step, generator=seeded())
    assert_each_level_kept_to_its_time(network.calls, ODD_EDGES, torch.float32)


def test_a_last_step_may_take_the_whole_finest_level():
    # 1 - 0.93 is a little less than 0.07, and 1 - 0.44 a little more than 0.56.
    for percent in range(1, 100):
        edge = percent / 100
        sampler, network = make(edges=(edge,))
        sampler.sample_sde(network, noise(2), num_steps=4, last_step_size=round(1 - edge, 2), generator=seeded())
        assert [level for _, _, level, _ in network.calls] == [0, 0, 0, 1]
        assert_each_level_kept_to_its_time(network.calls, (edge,))


# -- Likelihood ----------------------------------------------------------------------------------------------------


def samplers_density(path: str, interval: tuple[float, float], x1: torch.Tensor) -> torch.Tensor:
    """Log-density of the sampler's output, an affine map of the noise, whose slope is taken between two points."""
    x0, beside = (exact_ode(path, "", x, reverse=True, interval=interval) for x in (x1, x1 + 1))
    return (torch.distributions.Normal(torch.zeros_like(x0), 1.0).log_prob(x0) + (beside - x0).log()).sum(1)


@pytest.mark.parametrize(("path", "prediction", "levels"), EVERY_NETWORK)
def test_the_likelihood_is_the_gaussian_density(path: str, prediction: str, levels: int):
    sampler, network = make(path, prediction, EDGES[levels])
    x1 = DATA.sample(200, seed=5)
    log_prob, x0 = sampler.log_likelihood(network, x1, generator=seeded())
    assert log_prob.shape == (200,)
    torch.testing.assert_close(x0, exact_ode(path, prediction, x1, reverse=True), atol=1e-3, rtol=0)
    own = samplers_density(path, default_interval(path, prediction), x1)
    assert (log_prob - own).abs().max() / 5 < 2e-4
    # The data's density; where the interval is cut short of 0 or 1, as the mean over samples.
    error = (log_prob - DATA.log_prob(x1)) / 5
    assert error.mean().abs() < 1e-3
    assert error.abs().max() < (1e-3 if default_interval(path, prediction) == (0.0, 1.0) else 1e-2)
    assert_each_level_kept_to_its_time(network.calls, EDGES[levels])


@pytest.mark.parametrize("path", PATH_NAMES)
def test_a_shortened_interval_changes_samples_and_density_alike(path: str):
    # What stands for noise and data at its ends is scaled, and so must be the density.
    sampler, network = Sampler(create_transport(path, sample_eps=0.1)), Network(DATA, path, "velocity")
    interval = (0.0 if path == "VP" else 0.1, 0.9)
    x1 = DATA.sample(20, seed=10)
    log_prob, x0 = sampler.log_likelihood(network, x1, **PRECISE, generator=seeded())
    torch.testing.assert_close(log_prob, samplers_density(path, interval, x1), atol=1e-6, rtol=0)
    torch.testing.assert_close(sampler.sample_ode(network, x0, **PRECISE), x1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", EVERY_ODE)
def test_the_likelihood_of_a_jumping_field_is_exact_with_every_method(method: str):
    field = LevelField(4)
    sampler = Sampler(create_transport(level_edges=ODD_EDGES))
    x1 = noise(3, 12).reshape(3, 3, 2, 2)
    log_prob, x0 = sampler.log_likelihood(field, x1, method=method, num_steps=60, atol=1e-6, rtol=1e-6)
    growth = LevelField.growth(ODD_EDGES)
    tolerance = {"euler": 0.1, "midpoint": 1e-3, "heun2": 1e-3, "ab2": 1e-3, "fehlberg2": 1e-3}.get(method, 1e-4)
    torch.testing.assert_close(x0, x1 / growth, atol=tolerance, rtol=0)
    normal = torch.distributions.Normal(torch.zeros_like(x1), 1.0)
    expected = normal.log_prob(x0).sum((1, 2, 3)) - 12 * math.log(growth)  # the divergence is constant in each level
    torch.testing.assert_close(log_prob, expected, atol=1e-3, rtol=0)
    assert_each_level_kept_to_its_time(field.calls, ODD_EDGES)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_likelihoods_noise_is_that_of_the_reverse_ode(path: str):
    sampler, network = make(path, "noise", ODD_EDGES)
    x1 = DATA.sample(10, seed=6)
    _, x0 = sampler.log_likelihood(network, x1, **PRECISE, generator=seeded())
    torch.testing.assert_close(x0, sampler.sample_ode(network, x1, **PRECISE, reverse=True), atol=1e-6, rtol=0)


def rotated() -> Gaussian:
    """Correlated data: the Jacobian of its field is not diagonal."""
    rotation, _ = torch.linalg.qr(noise(3, 3, seed=7))
    return Gaussian([0.2, 0.0, -0.3], [2.0, 0.5, 0.1], rotation)


def test_hutchinsons_estimate_is_unbiased_and_its_error_shrinks_with_the_probes():
    data = rotated()
    network, sampler = Network(data, "Linear", "velocity"), Sampler(create_transport())
    x1 = data.sample(1, seed=8)
    errors = {
        probes: sampler.log_likelihood(network, x1.expand(1500, 3), num_probes=probes, generator=seeded(probes))[0]
        - data.log_prob(x1)
        for probes in (1, 4, 16)
    }
    for error in errors.values():
        assert error.mean().abs() < 4.5 * error.std() / len(error) ** 0.5
    for few, many in ((1, 4), (4, 16)):  # a standard deviation from 1500 errors is good to 2 %, a ratio to 3 %
        assert errors[few].std() / errors[many].std() == pytest.approx(2.0, rel=0.12)


def test_probes_belong_to_their_samples():
    data = rotated()
    network, sampler, x1 = Network(data, "Linear", "velocity"), Sampler(create_transport()), data.sample(4, seed=9)

    def run(rows: list[int]) -> torch.Tensor:
        settings = {"method": "rk4", "num_steps": 5, "num_probes": 2, "generator": sample_generators(0, rows)}
        return sampler.log_likelihood(network, x1[rows], **settings)[0]

    torch.testing.assert_close(torch.cat([run([0]), run([1, 2, 3])]), run([0, 1, 2, 3]))


def test_bits_per_dim_is_the_cross_entropy_in_bits():
    assert bits_per_dim(torch.tensor([-12 * math.log(2.0)]), 4).tolist() == pytest.approx([3.0])
    x = noise(20_000, 4)
    log_prob = create_transport().noise.log_prob(x)
    entropy = 0.5 * math.log2(2 * math.pi * math.e)  # of one standard normal number
    assert bits_per_dim(log_prob, 4).mean().item() == pytest.approx(entropy, abs=0.02)


# -- What is refused -----------------------------------------------------------------------------------------------

Call = Callable[..., object]


def ode(edges: tuple[float, ...] = (), levels: int = 1, **settings: object) -> object:
    return Sampler(create_transport(level_edges=edges)).sample_ode(LevelField(levels), noise(2), **settings)


def sde(edges: tuple[float, ...] = (), levels: int = 1, **settings: object) -> object:
    return Sampler(create_transport(level_edges=edges)).sample_sde(LevelField(levels), noise(2), **settings)


def likelihood(edges: tuple[float, ...] = (), levels: int = 1, **settings: object) -> object:
    return Sampler(create_transport(level_edges=edges)).log_likelihood(LevelField(levels), noise(2), **settings)


@pytest.mark.parametrize(
    ("call", "wrong", "choices"),
    [
        (ode, {"method": "rk45"}, "choose one of euler, midpoint"),
        (likelihood, {"method": "Euler"}, "choose one of euler, midpoint"),
        (sde, {"method": "euler"}, "choose one of Euler, Heun"),
        (sde, {"diffusion_form": "increasing-decresing"}, f"choose one of {', '.join(DIFFUSION_FORMS)}"),
        (sde, {"last_step": "mean"}, "choose one of None, Mean, Tweedie, Euler"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(call: Call, wrong: dict[str, str], choices: str):
    with pytest.raises(ValueError, match=f"unknown .*{next(iter(wrong.values()))}.*{choices}"):
        call(**wrong)


@pytest.mark.parametrize(("call", "settings"), [(ode, {"reverse": True}), (likelihood, {})])
def test_dpmpp_2m_is_refused_where_noise_is_asked_for(call: Call, settings: dict[str, bool]):
    with pytest.raises(ValueError, match="dpmpp_2m goes from noise to data only: choose ab2, which costs one"):
        call(method="dpmpp_2m", num_steps=0, **settings)  # before anything else is looked at


@pytest.mark.parametrize("call", [ode, sde, likelihood])
@pytest.mark.parametrize(("levels", "edges"), [(2, ()), (1, (0.5,)), (2, (0.5, 0.75))])
def test_a_model_with_other_levels_than_the_schedule_is_refused(call: Call, levels: int, edges: tuple[float, ...]):
    with pytest.raises(ValueError, match=f"{levels} level.* but the schedule {len(edges) + 1}"):
        call(edges, levels)


@pytest.mark.parametrize(
    ("call", "num_steps"),
    [(ode, 2), (ode, (1, 1, 0)), (likelihood, 2), (sde, 3), (sde, (5, 5, 1)), (sde, 0)],
)
def test_fewer_steps_than_levels_are_refused(call: Call, num_steps: object):
    # An SDE's last step is one of the steps, and belongs to the finest level.
    note = r"\(the last step apart\) " if call is sde else ""
    settings = {"method": "rk4"} if call is likelihood else {}  # its default is adaptive
    with pytest.raises(ValueError, match=note + r"cannot cover . interval.*at least one step each"):
        call((0.5, 0.75), 3, num_steps=num_steps, **settings)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
@pytest.mark.parametrize("call", [ode, likelihood])
def test_an_adaptive_method_does_not_look_at_the_number_of_steps(call: Call, method: str):
    found = [call((0.5, 0.75), 3, method=method, **given) for given in ({}, {"num_steps": 2}, {"num_steps": None})]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0, rtol=0)


@pytest.mark.parametrize("size", [0.0, -0.1, 1.0, math.nan])
def test_a_last_step_of_no_length_or_of_all_is_refused(size: float):
    with pytest.raises(ValueError, match=r"last step's size must be in \(0, 1\)"):
        sde(last_step_size=size)


def test_a_last_step_across_a_level_edge_is_refused():
    with pytest.raises(ValueError, match=r"0\.3 would cross the level edge at 0\.75: choose at most 0\.25"):
        sde((0.5, 0.75), 3, last_step_size=0.3)


def test_a_last_step_that_is_not_taken_has_no_size():
    x = noise(3)
    sampler, network = make()
    found = [
        sampler.sample_sde(network, x, num_steps=5, last_step=None, last_step_size=size, generator=seeded())
        for size in (0.04, -1.0)
    ]
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


@pytest.mark.parametrize("norm", [-1.0, math.nan])
def test_a_negative_diffusion_is_refused(norm: float):
    with pytest.raises(ValueError, match="diffusion norm must not be negative"):
        sde(diffusion_norm=norm)


@pytest.mark.parametrize("probes", [0, -1])
def test_a_likelihood_without_probes_is_refused(probes: int):
    with pytest.raises(ValueError, match="num_probes must be at least 1"):
        likelihood(num_probes=probes)


@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_a_network_that_diverged_is_reported_by_adaptive_methods(method: str):
    with pytest.raises(FloatingPointError, match=method):
        Sampler(create_transport()).sample_ode(lambda x, t, y, level: x * math.nan, noise(2), method=method)
