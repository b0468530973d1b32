"""Weights of the loss, against the forms in which they were published: functions of the signal-to-noise ratio."""

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from closed_form import DATA, PATH_NAMES, QUANTITIES, Network, coefficients, numbers, solve_for
from scipy import integrate, stats

from transport import LOSS_WEIGHTS, Transport, create_transport

TIMES = torch.tensor([1e-3, 0.1, 0.37, 0.5, 0.75, 0.9, 1 - 1e-3], dtype=torch.float64)

# (name, number, weight of the data's squared error by the SNR and half the derivative of its logarithm)
PUBLISHED = [
    ("data", None, lambda snr, half: torch.ones_like(snr)),
    ("noise", None, lambda snr, half: snr),
    ("snr", None, lambda snr, half: snr),
    ("sqrt-snr", None, lambda snr, half: snr.sqrt()),
    ("snr+1", None, lambda snr, half: snr + 1),
    ("truncated-snr", None, lambda snr, half: snr.clamp(min=1)),
    ("p2", None, lambda snr, half: snr / (1 + snr).sqrt()),
    ("p2", 1.0, lambda snr, half: snr / (1 + snr)),
    ("min-snr", None, lambda snr, half: snr.clamp(max=5)),
    ("min-snr", 2.0, lambda snr, half: snr.clamp(max=2)),
    ("soft-min-snr", None, lambda snr, half: snr / (1 + snr)),
    ("soft-min-snr", 4.0, lambda snr, half: snr / (1 + snr / 4)),
    ("edm", None, lambda snr, half: snr + 1),
    ("edm", 0.5, lambda snr, half: snr + 4),
    ("sigmoid", None, lambda snr, half: half * snr * torch.sigmoid(-snr.log())),
    ("sigmoid", -1.0, lambda snr, half: half * snr * torch.sigmoid(-1 - snr.log())),
    ("likelihood", None, lambda snr, half: half * snr),
]
NUMBERED = {"p2": 0.5, "min-snr": 5.0, "soft-min-snr": 1.0, "edm": 1.0, "sigmoid": 0.0}


def velocity_field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth velocity that is right about nothing."""
    return torch.sin(3 * x + t[:, None])


def predicting(path: str, quantity: str) -> Callable[..., torch.Tensor]:
    return lambda x, t, y, level: solve_for(path, x, t, velocity_field(x, t), "velocity")[quantity]


def ends(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(2))


def terms_of(transport: Transport, path: str, prediction: str) -> dict[str, torch.Tensor]:
    x0, x1 = ends(len(TIMES))
    return transport.training_losses(predicting(path, prediction), x1, t=TIMES, x0=x0)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_losses_are_the_published_weights_of_the_datas_error(path: str, prediction: str):
    x0, x1 = ends(len(TIMES))
    alpha, sigma, d_alpha, d_sigma = coefficients(path, TIMES)
    x = alpha[:, None] * x1 + sigma[:, None] * x0
    found = solve_for(path, x, TIMES, velocity_field(x, TIMES), "velocity")
    square = (found["data"] - x1).square().mean(1)
    snr, half = (alpha / sigma) ** 2, d_alpha / alpha - d_sigma / sigma
    for name, number, weight in PUBLISHED:
        transport = create_transport(path, prediction, name, loss_weight_value=number)
        terms = terms_of(transport, path, prediction)
        torch.testing.assert_close(terms["loss"], weight(snr, half) * square, rtol=1e-6, atol=1e-12, msg=name)
        velocity = d_alpha[:, None] * x1 + d_sigma[:, None] * x0
        expected = (velocity_field(x, TIMES) - velocity).square().mean(1)  # whatever the weight and the prediction
        torch.testing.assert_close(terms["velocity_error"], expected, rtol=1e-6, atol=1e-12)


def test_every_weight_is_tested():
    assert {name for name, _, _ in PUBLISHED} | {"velocity", None} == set(LOSS_WEIGHTS)
    assert {name for name, number, _ in PUBLISHED if number is not None} == set(NUMBERED)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_weights_at_their_limits_are_one_another(path: str):
    def weight(name: str, number: float | None = None) -> torch.Tensor:
        return create_transport(path, "velocity", name, loss_weight_value=number).weight(TIMES)

    close = torch.testing.assert_close
    close(weight("truncated-snr") + weight("min-snr", 1.0), weight("snr+1"))
    close(weight("edm", 1.0), weight("snr+1"))
    close(weight("min-snr", 1e30), weight("snr"))
    close(weight("soft-min-snr", 1e30), weight("snr"))
    close(weight("p2", 1e-30), weight("snr"))
    close(weight("sigmoid", 60.0), weight("likelihood"))
    close(weight("velocity"), torch.ones_like(TIMES))
    if path == "GVP":
        close(weight("snr+1") * (math.pi / 2) ** 2, weight("velocity"))
    for name, number in NUMBERED.items():
        close(weight(name), weight(name, number), rtol=0, atol=0)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_every_weight_is_finite_on_its_training_interval(path: str, prediction: str):
    for name in LOSS_WEIGHTS:
        transport = create_transport(path, prediction, name)
        start, stop = transport.train_interval
        weights = transport.weight(torch.linspace(start, stop, 1001))  # float32, both ends
        assert weights.isfinite().all(), name
        assert (weights >= 0).all(), name
        if prediction == "velocity" and path != "VP":
            assert (start == 0) == (name != "likelihood"), name
            assert transport.sample_interval == (0.0, 1.0), name


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_velocity_weights_on_straight_lines_keep_their_bits(prediction: str):
    """Runs that were begun with the weight of an earlier version, 1 / n^2 with n the alpha or sigma of t, continue."""
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    n = t if prediction == "noise" else 1 - t
    assert torch.equal(create_transport("Linear", prediction, "velocity").weight(t), (1 / n) ** 2)


JIT = {"time_sampling": "logit-normal", "time_params": (-0.8, 0.8)}


@pytest.mark.parametrize(
    ("path", "prediction", "name", "number", "times"),
    [
        ("Linear", "data", "velocity", None, JIT),
        ("GVP", "noise", "min-snr", 2.0, {}),
        ("Linear", "score", "sigmoid", -1.0, {}),
        ("GVP", "velocity", "edm", 0.5, JIT),
    ],
)
def test_the_exact_network_is_left_with_the_weighted_posterior_variance(
    path: str, prediction: str, name: str, number: float | None, times: dict
):
    """Given x_t, x_1 of N(m, S) varies by S sigma^2 / (alpha^2 S + sigma^2) around what the network tells."""
    transport = create_transport(path, prediction, name, loss_weight_value=number, **times)
    start, stop = transport.train_interval
    published = {(each, value): weight for each, value, weight in PUBLISHED}
    # The velocity's on straight lines: there alpha is sqrt(snr) / (1 + sqrt(snr)), and 1 / sigma is half * alpha.
    published["velocity", None] = lambda snr, half: (half * snr.sqrt() / (1 + snr.sqrt())) ** 2
    weight = published[name, number]
    law = stats.norm(-0.8, 0.8)

    def density(t: float) -> float:  # of log(alpha / sigma), not normalised
        alpha, sigma, d_alpha, d_sigma = numbers(path, t)
        return law.pdf(math.log(alpha / sigma)) * (d_alpha / alpha - d_sigma / sigma) if times else 1.0

    def remaining(t: float) -> float:
        alpha, sigma, d_alpha, d_sigma = numbers(path, t)
        variance = (DATA.variance * sigma**2 / (alpha**2 * DATA.variance + sigma**2)).mean().item()
        snr = torch.tensor((alpha / sigma) ** 2, dtype=torch.float64)
        half = torch.tensor(d_alpha / alpha - d_sigma / sigma, dtype=torch.float64)
        return weight(snr, half).item() * variance

    inside = (max(start, 1e-6), min(stop, 1 - 1e-6))
    total, mass = (
        integrate.quad(f, *inside, limit=200, points=[0.5, 0.9])[0]
        for f in (lambda t: density(t) * remaining(t), density)
    )
    network, generator = Network(DATA, path, prediction), torch.Generator().manual_seed(3)
    losses = torch.stack(
        [
            transport.training_losses(network, DATA.sample(2000, seed=k), generator=generator)["loss"].mean()
            for k in range(20)
        ]
    )
    error = losses.std() / len(losses) ** 0.5
    assert error < 0.02 * total / mass  # the test has teeth
    assert abs(losses.mean() - total / mass) < 4.5 * error


@pytest.mark.parametrize(
    ("name", "number", "message"),
    [
        (
            None,
            1.0,
            "has no effect without a loss weight: leave it out, or choose p2, min-snr, soft-min-snr, edm, sigm",
        ),
        ("velocity", 5.0, "has no effect with loss weight velocity: leave it out"),
        ("snr", 0.0, "has no effect with loss weight snr"),
        ("min-snr", 0.0, "loss_weight_value of min-snr must be a number above 0, got 0"),
        ("p2", -0.5, "must be a number above 0, got -0.5"),
        ("soft-min-snr", math.inf, "must be a number above 0, got inf"),
        ("edm", math.nan, "must be a number above 0, got nan"),
        ("sigmoid", 1000.0, "of sigmoid must be a number between -80 and 80, got 1000"),
    ],
)
def test_numbers_that_a_weight_does_not_have_are_refused(name: str | None, number: float, message: str):
    with pytest.raises(ValueError, match=message):
        create_transport(loss_weight=name, loss_weight_value=number)


def test_an_interval_on_which_a_weight_is_infinite_is_refused():
    with pytest.raises(ValueError, match=r"train_eps 0 is too small .* data prediction and loss weight min-snr"):
        create_transport(prediction="data", loss_weight="min-snr", train_eps=0.0)
