"""A prediction of its own for each level: converted, every network is the one that predicts the velocity throughout."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from closed_form import DATA, EDGES, PATH_NAMES, Network, solve_for

from transport import PREDICTIONS, Guidance, Sampler, create_transport
from transport.predictions import predictions_of

MIXED = ["data velocity", "noise data velocity", "data score noise"]
CASES = pytest.mark.parametrize(("path", "mixed"), [*product(PATH_NAMES, MIXED)])
EPS = {"train_eps": 1e-3, "sample_eps": 1e-3}  # for both networks of a pair


def edges_of(mixed: str) -> tuple[float, ...]:
    return EDGES[len(mixed.split())]


def transports(path: str, mixed: str, **settings: object) -> tuple:
    """The process of mixed predictions, and that of velocities."""
    given = {**EPS, "level_edges": edges_of(mixed), **settings}
    return create_transport(path, mixed, **given), create_transport(path, "velocity", **given)


class Exact(Network):
    """The exact network for Gaussian data with an own prediction at each level."""

    def __init__(self, path: str, mixed: str) -> None:
        super().__init__(DATA, path, "", num_levels=len(mixed.split()))
        self.at = mixed.split()

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        return DATA.predictions(self.path, x, t)[self.at[level]]


class Wrong:
    """A smooth field that knows labels and levels and is right about nothing, told as each level's prediction."""

    num_classes = 3

    def __init__(self, path: str, mixed: str) -> None:
        self.path, self.at, self.num_levels = path, mixed.split(), len(mixed.split())

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        velocity = torch.sin(x * (1 + level) + t[:, None] + 0.5 * y[:, None])
        return solve_for(self.path, x, t, velocity, "velocity")[self.at[level]]


def all_velocity(mixed: str) -> str:
    return " ".join("velocity" for _ in mixed.split())


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@CASES
@pytest.mark.parametrize("method", ["ab2", "dpmpp_2m"])
def test_an_exact_network_draws_the_samples_of_one_that_tells_velocities(path: str, mixed: str, method: str):
    mixed_process, process = transports(path, mixed)
    found = Sampler(mixed_process).sample_ode(Exact(path, mixed), noise(3), method, num_steps=24)
    expected = Sampler(process).sample_ode(Network(DATA, path, "velocity", len(mixed.split())), noise(3), method, 24)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@CASES
def test_its_samples_are_those_of_the_exact_flow(path: str, mixed: str):
    process = transports(path, mixed)[0]
    start, stop = process.sample_interval
    found = Sampler(process).sample_ode(Exact(path, mixed), noise(4), "rk4", num_steps=120)
    alpha, sigma = (process.path.coefficients(torch.tensor(t, dtype=torch.float64)) for t in (stop, start))
    expected = DATA.flow(path, noise(4) * sigma.sigma, start, stop) / alpha.alpha
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@CASES
@pytest.mark.parametrize(("method", "last_step"), [("Euler", "Mean"), ("Heun", "Tweedie"), ("Euler", "Euler")])
def test_its_sde_makes_the_same_steps(path: str, mixed: str, method: str, last_step: str):
    def draw(process, network) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        settings = {"method": method, "num_steps": 20, "last_step": last_step, "generator": generator}
        return Sampler(process).sample_sde(network, noise(3), **settings)

    mixed_process, process = transports(path, mixed)
    expected = draw(process, Network(DATA, path, "velocity", len(mixed.split())))
    torch.testing.assert_close(draw(mixed_process, Exact(path, mixed)), expected, rtol=1e-8, atol=1e-8)


@CASES
def test_its_likelihood_and_its_noise_are_the_same(path: str, mixed: str):
    mixed_process, process = transports(path, mixed)
    x1, settings = DATA.sample(3, seed=2), {"method": "heun2", "num_steps": 60}
    found = Sampler(mixed_process).log_likelihood(Exact(path, mixed), x1, **settings)
    expected = Sampler(process).log_likelihood(Network(DATA, path, "velocity", len(mixed.split())), x1, **settings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found[0], DATA.log_prob(x1), rtol=0.02, atol=0.02)


@CASES
def test_guidance_acts_on_what_a_level_predicts(path: str, mixed: str):
    mixed_process, process = transports(path, mixed)
    y = torch.tensor([0, 1, 2])
    guidance = Guidance(tuple(1.0 + level for level in range(len(mixed.split()))), channels=2, interval=(0.2, 0.9))

    def draw(process, network: Wrong) -> torch.Tensor:
        return Sampler(process).sample_ode(guidance.of(network), noise(3), "ab2", 12, y=y)

    found, expected = draw(mixed_process, Wrong(path, mixed)), draw(process, Wrong(path, all_velocity(mixed)))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@CASES
@pytest.mark.parametrize("weight", [None, "min-snr", "likelihood"])
@pytest.mark.parametrize("joint", [False, True])
def test_its_loss_compares_like_with_like(path: str, mixed: str, weight: str | None, joint: bool):
    """Without a weight the loss of mixed predictions is that of the velocity, as a network of velocities has it."""
    mixed_process, process = transports(path, mixed, loss_weight=weight)
    t = torch.linspace(0.02, 0.98, 12, dtype=torch.float64)
    y = torch.arange(12) % 3

    def terms(process, network: Wrong) -> dict[str, torch.Tensor]:
        def call(x, t, y, level):
            return [network(*each) for each in zip(x, t, y, level, strict=True)]

        call.num_levels = network.num_levels
        return process.training_losses(call if joint else network, noise(12, 1), y=y, t=t, x0=noise(12, 2), joint=joint)

    found, expected = terms(mixed_process, Wrong(path, mixed)), terms(process, Wrong(path, all_velocity(mixed)))
    for name in ("loss", "velocity_error"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9)


# -- Values --------------------------------------------------------------------------------------------------------


def test_a_prediction_in_words_and_by_level():
    for given in ("data velocity", ("data", "velocity"), ["data", "velocity"]):
        transport = create_transport(prediction=given, level_edges=(0.5,))
        assert transport.prediction == "data velocity"
        assert [transport.prediction_at(level) for level in range(2)] == ["data", "velocity"]
    for given in ("noise", ("noise",), "noise noise"):
        transport = create_transport(prediction=given, level_edges=(0.5,))
        assert (transport.prediction, transport.prediction_at(1)) == ("noise", "noise")
        assert transport.loss_weight is None
    assert create_transport(prediction="data velocity", level_edges=(0.5,)).loss_weight == "velocity"


@pytest.mark.parametrize(
    ("mixed", "singular"),
    [
        ("data velocity", False),
        ("velocity noise", False),
        ("data noise", False),
        ("noise velocity", True),
        ("velocity data", True),
        ("score data", True),
        ("velocity data velocity", False),
    ],
)
def test_an_interval_is_cut_where_the_level_at_an_end_is_singular(mixed: str, singular: bool):
    """Noise tells no velocity at t = 0, data none at t = 1; the levels in between reach neither."""
    for path in ("Linear", "GVP"):
        transport = create_transport(path, mixed, level_edges=edges_of(mixed))
        interval = (1e-3, 1 - 1e-3) if singular else (0.0, 1.0)
        assert (transport.train_interval, transport.sample_interval) == (interval, interval)
        network: Callable[..., torch.Tensor] = Wrong(path, mixed)
        network.at = all_velocity(mixed).split()  # finite at the ends, whatever it is taken for
        x, t = noise(2), torch.tensor(interval, dtype=torch.float64)
        terms = transport.training_losses(network, x, y=torch.zeros(2), t=t, x0=noise(2, 1))
        assert terms["loss"].isfinite().all()
        assert Sampler(transport).sample_ode(network, x, "euler", 6, y=torch.zeros(2)).isfinite().all()


def test_the_finest_level_alone_has_its_own_prediction_and_interval():
    mixed = create_transport(prediction="velocity noise", level_edges=(0.5,))
    assert mixed.sample_interval == (0.0, 1.0)
    finest = mixed.finest_only()
    assert (finest.prediction, finest.schedule.num_levels) == ("noise", 1)
    assert finest.sample_interval == (1e-3, 1 - 1e-3)
    assert mixed.prediction == "velocity noise"
    network = Network(DATA, "Linear", "noise")
    found = Sampler(finest).sample_ode(network, noise(3), "rk4", 300)
    torch.testing.assert_close(found, DATA.flow("Linear", noise(3), 0.0, 1.0), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data velocity noise", "3 predictions for 2 level.*give one, or one per level, coarsest first"),
        ((), "0 predictions for 2 level"),
        ("data epsilon", "unknown prediction 'epsilon'; choose one of velocity, noise, score, data"),
        ("", "unknown prediction ''"),
    ],
)
def test_predictions_that_do_not_go_with_the_levels_are_refused(given: object, message: str):
    with pytest.raises(ValueError, match=message):
        create_transport(prediction=given, level_edges=(0.5,))


def test_an_output_of_mixed_predictions_is_converted_with_its_source_alone():
    transport = create_transport(prediction="data velocity", level_edges=(0.5,))
    x, t = noise(2), torch.tensor([0.3, 0.6])
    with pytest.raises(ValueError, match="unknown quantity 'data velocity'"):
        transport.convert(x, x, t, "velocity")
    torch.testing.assert_close(transport.convert(x, x, t, "data", source="data"), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aug_dim": 8, "prediction": "data score"}, "score prediction needs Gaussian noise"),
        ({"aug_dim": 1.5, "prediction": "data velocity"}, "the expected loss of velocity prediction is infinite"),
        ({"prediction": "noise velocity", "sample_eps": 0.0}, "path with noise prediction: the velocity is infinite"),
        ({"prediction": "velocity data", "train_eps": 0.0}, "path with data prediction and loss weight velocity"),
    ],
)
def test_what_no_level_may_be_is_refused_of_one(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_transport(**settings, level_edges=(0.5,))


def test_one_prediction_is_that_of_every_level():
    for prediction in PREDICTIONS:
        assert predictions_of(prediction, 3) == (prediction,) * 3
