"""The training loss and the conversions between predictions, against Gaussian closed forms and plain linear algebra."""

import math
from collections.abc import Callable
from itertools import permutations, product

import pytest
import torch
from closed_form import DATA, EDGES, PATH_NAMES, QUANTITIES, Network, coefficients, default_interval, numbers, solve_for
from scipy import integrate, stats

from transport import Sampler, Transport, create_transport

ODD_EDGES = (0.13, 0.37, 0.9)
WEIGHTS = ["velocity", "likelihood"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(n: int, seed: int, shape: tuple[int, ...] = (5,)) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise and data in float64."""
    return tuple(torch.randn(n, *shape, generator=seeded(seed + k), dtype=torch.float64) for k in (0, 1000))


class Arbitrary:
    """A smooth network that is right about nothing, and treats every time, level and label differently."""

    def __init__(self, num_levels: int = 1) -> None:
        self.num_levels = num_levels
        self.rows_by_level: list[tuple[int, int]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        self.rows_by_level.append((level, len(x)))
        shift = t if y is None else t + 0.1 * y
        return torch.sin(x * (1 + level) + shift.reshape(-1, *[1] * (x.ndim - 1)))


# -- Building ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "choices"),
    [
        ({"path_type": "linear"}, "Linear, GVP, VP"),
        ({"prediction": "v"}, "velocity, noise, score, data"),
        ({"loss_weight": "min_snr"}, "None, velocity, likelihood"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(wrong: dict[str, str], choices: str):
    with pytest.raises(ValueError, match=f"unknown .* choose one of {choices}"):
        create_transport(**wrong)


@pytest.mark.parametrize("name", ["train_eps", "sample_eps"])
@pytest.mark.parametrize("eps", [-0.1, 0.5, math.nan])
def test_an_eps_out_of_range_is_refused(name: str, eps: float):
    with pytest.raises(ValueError, match=name):
        create_transport(**{name: eps})


@pytest.mark.parametrize("edges", [(0.75, 0.5), 0.5, "0.5", None])
def test_edges_that_are_no_schedule_are_refused(edges: object):
    with pytest.raises(ValueError, match="level edges must"):
        create_transport(level_edges=edges)


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_default_intervals_are_sits(path: str, prediction: str):
    transport = create_transport(path, prediction)
    start, stop = default_interval(path, prediction)
    assert transport.sample_interval == (start, stop)
    assert transport.train_interval == ((0.0, 1 - 1e-5) if path == "VP" else (start, stop))


def test_an_eps_that_is_given_is_used():
    transport = create_transport("VP", "noise", train_eps=0.01, sample_eps=0.02)
    assert transport.train_interval == (0.0, 0.99)
    assert transport.sample_interval == (0.0, 0.98)
    transport = create_transport("Linear", "noise", train_eps=0.0, sample_eps=0.02)
    assert transport.train_interval == (0.0, 1.0)
    assert transport.sample_interval == (0.02, 0.98)
    weighted = create_transport(loss_weight="likelihood")  # the weight is infinite at 1, the velocity is not
    assert weighted.train_interval == (1e-3, 1 - 1e-3)
    assert weighted.sample_interval == (0.0, 1.0)


def loss_at_ends(transport: Transport) -> torch.Tensor:
    """The loss of a smooth network at both ends of the training interval, in single precision."""
    x0, x1 = (part.float() for part in batch(2, seed=13))
    return transport.training_losses(Arbitrary(), x1, t=torch.tensor(transport.train_interval), x0=x0)["loss"]


@pytest.mark.parametrize(("path", "prediction", "weight"), [*product(PATH_NAMES, QUANTITIES, [None, *WEIGHTS])])
def test_a_training_interval_is_refused_where_the_loss_is_infinite(path: str, prediction: str, weight: str | None):
    for eps in (0.0, 1e-9, 1e-5, 1e-3):
        settings = {"path_type": path, "prediction": prediction, "loss_weight": weight, "train_eps": eps}
        loss = loss_at_ends(create_transport(**settings, check_ends=False))
        if loss.isfinite().all():
            create_transport(**settings)
            continue
        with pytest.raises(
            ValueError, match=f"train_eps {eps:g} is too small.*leave it out, which means (0.001|1e-05)"
        ):
            create_transport(**settings)
    assert loss_at_ends(create_transport(path, prediction, weight)).isfinite().all()


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_a_sampling_interval_is_refused_where_no_solver_could_start(path: str, prediction: str):
    def sample(transport: Transport) -> torch.Tensor:
        return Sampler(transport).sample_ode(Arbitrary(), batch(2, seed=14)[0].float(), method="euler")

    for eps in (0.0, 1e-3):
        settings = {"path_type": path, "prediction": prediction, "sample_eps": eps}
        if sample(create_transport(**settings, check_ends=False)).isfinite().all():
            create_transport(**settings)
            continue
        with pytest.raises(ValueError, match=f"sample_eps {eps:g} is too small .* at t = 0; leave it out.* 0.001"):
            create_transport(**settings)
    assert sample(create_transport(path, prediction)).isfinite().all()


def test_singular_ends_are_those_of_noise_and_score_where_the_data_vanish():
    refused = [
        (path, prediction)
        for path, prediction in product(PATH_NAMES, QUANTITIES)
        if create_transport(path, prediction, sample_eps=0.0, check_ends=False).sampling_singularity()
    ]
    assert refused == [*product(("Linear", "GVP"), ("noise", "score"))]


# -- Conversions ---------------------------------------------------------------------------------------------------

INNER_TIMES = torch.tensor([1e-3, 0.1, 0.37, 0.5, 0.75, 0.9, 1 - 1e-3], dtype=torch.float64)


@pytest.mark.parametrize(("path", "source"), [*product(PATH_NAMES, QUANTITIES)])
def test_conversions_solve_the_linear_system(path: str, source: str):
    x, value = batch(len(INNER_TIMES), seed=0, shape=(2, 3))
    expected = solve_for(path, x, INNER_TIMES, value, source)
    transport = create_transport(path, source)
    for target in QUANTITIES:
        found = transport.convert(value, x, INNER_TIMES, target)
        torch.testing.assert_close(found, expected[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_conversions_agree_with_one_another(path: str):
    transport = create_transport(path)
    x, value = batch(len(INNER_TIMES), seed=1)
    for source, middle, target in product(QUANTITIES, repeat=3):  # round trips are those with source == target
        direct = transport.convert(value, x, INNER_TIMES, target, source=source)
        halfway = transport.convert(value, x, INNER_TIMES, middle, source=source)
        detour = transport.convert(halfway, x, INNER_TIMES, target, source=middle)
        torch.testing.assert_close(detour, direct, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_exact_predictions_convert_into_one_another(path: str):
    x, _ = batch(len(INNER_TIMES), seed=2)
    exact = DATA.predictions(path, x, INNER_TIMES)
    for source, target in permutations(QUANTITIES, 2):
        converted = create_transport(path, source).convert(exact[source], x, INNER_TIMES, target)
        torch.testing.assert_close(converted, exact[target], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("path", "source", "weight"), [*product(PATH_NAMES, QUANTITIES, [None, *WEIGHTS])])
def test_conversions_are_finite_and_precise_on_the_default_intervals(path: str, source: str, weight: str | None):
    transport = create_transport(path, source, weight)
    for start, stop in (transport.train_interval, transport.sample_interval):
        t = torch.linspace(start, stop, 401)  # float32, both ends
        x, _ = batch(len(t), seed=3)
        exact = DATA.predictions(path, x, t.double())
        for target in QUANTITIES:
            rows = t < 1 if target == "score" else t <= 1  # without noise there is no score
            found = transport.convert(exact[source].float(), x.float(), t, target)[rows]
            a, b = transport.conversion(t.double()[:, None], source, target)
            size = ((a * x).abs() + (b * exact[source]).abs())[rows]  # of the two terms, which may cancel
            assert found.isfinite().all()
            assert ((found - exact[target][rows]).abs() <= 1e-5 * size + 1e-6).all()


@pytest.mark.parametrize("names", [("target", "epsilon", "noise"), ("source", "noise", "x0")])
def test_an_unknown_quantity_is_refused(names: tuple[str, str, str]):
    x, _ = batch(2, seed=0)
    with pytest.raises(ValueError, match="choose one of velocity, noise, score, data"):
        create_transport().convert(x, x, torch.rand(2), names[1], source=names[2])


# -- Times ---------------------------------------------------------------------------------------------------------


def draw_times(n: int, repeats: int, **settings: float) -> torch.Tensor:
    transport, generator = create_transport(**settings), seeded(n)
    return torch.stack([transport.sample_times(n, generator) for _ in range(repeats)]).double()


@pytest.mark.parametrize("n", range(1, 18))
def test_every_single_time_of_a_batch_is_uniform(n: int):
    times = draw_times(n, 1000)
    for place in range(n):
        assert stats.kstest(times[:, place].numpy(), "uniform").pvalue > 1e-4


@pytest.mark.parametrize("n", range(1, 18))
def test_splitting_a_batch_between_levels_is_unbiased(n: int):
    times = draw_times(n, 1500)
    for edges in (*EDGES.values(), ODD_EDGES):
        levels = create_transport(level_edges=edges).schedule.level_at(times)
        bounds = (0.0, *edges, 1.0)
        for level in range(len(edges) + 1):
            fraction = (levels == level).double().mean(1)
            error = fraction.std() / len(times) ** 0.5
            assert abs(fraction.mean() - (bounds[level + 1] - bounds[level])) <= 4.5 * error + 1e-12


@pytest.mark.parametrize("n", range(1, 18))
def test_the_mean_over_a_batch_is_unbiased_and_steadier_than_independent_times(n: int):
    def loss(t: torch.Tensor) -> torch.Tensor:
        return torch.cos(3 * t) + t**2

    mean = math.sin(3) / 3 + 1 / 3
    variance = integrate.quad(lambda t: (math.cos(3 * t) + t**2 - mean) ** 2, 0, 1)[0]
    means = loss(draw_times(n, 1500)).mean(1)
    assert abs(means.mean() - mean) < 4.5 * means.std() / len(means) ** 0.5
    if n > 1:
        assert means.var() < 0.6 * variance / n
    else:
        assert means.var() == pytest.approx(variance, rel=0.2)


def test_times_keep_to_the_training_interval():
    times = draw_times(7, 2000, train_eps=0.2)
    assert 0.2 <= times.min() < 0.201
    assert 0.799 < times.max() <= 0.8 + 1e-7
    assert stats.kstest(times.flatten().numpy(), "uniform", args=(0.2, 0.6)).pvalue > 1e-4


@pytest.mark.parametrize(("n", "parts"), [(64, 2), (64, 4), (256, 8), (32, 2), (48, 4), (12, 2)])
def test_each_rank_and_micro_batch_gets_its_share_of_the_levels(n: int, parts: int):
    for edges in (EDGES[2], EDGES[3], ODD_EDGES):
        transport, generator = create_transport(level_edges=edges), seeded(n)
        bounds = (0.0, *edges, 1.0)
        for _ in range(50):
            levels = transport.schedule.level_at(transport.sample_times(n, generator))
            for part in levels.chunk(parts):
                for level in range(len(edges) + 1):
                    # Independent times would miss by the square root of the size of the part.
                    share = len(part) * (bounds[level + 1] - bounds[level])
                    assert abs((part == level).sum() - share) < 2


# -- The loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_the_loss_is_the_mean_squared_error_of_the_prediction(path: str, prediction: str):
    x0, x1 = batch(9, seed=4, shape=(3, 2, 2))
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    found = create_transport(path, prediction).training_losses(Arbitrary(), x1, t=t, x0=x0)["loss"]
    for i in range(9):
        alpha, sigma, d_alpha, d_sigma = numbers(path, t[i].item())
        out = Arbitrary()(alpha * x1[i : i + 1] + sigma * x0[i : i + 1], t[i : i + 1])[0]
        error = {
            "velocity": out - (d_alpha * x1[i] + d_sigma * x0[i]),
            "noise": out - x0[i],
            "score": sigma * out + x0[i],  # SiT: the score's error times sigma
            "data": out - x1[i],
        }[prediction]
        torch.testing.assert_close(found[i], error.square().mean())


def noise_weight(path: str, weight: str, t: float) -> float:
    """SiT's weight of the squared error of the noise."""
    alpha, sigma, d_alpha, d_sigma = numbers(path, t)
    g = sigma * (d_alpha / alpha * sigma - d_sigma)
    return (g / sigma) ** 2 if weight == "velocity" else g / sigma**2


@pytest.mark.parametrize(("path", "prediction", "weight"), [*product(PATH_NAMES, ["noise", "score"], WEIGHTS)])
def test_noise_and_score_have_sits_weights(path: str, prediction: str, weight: str):
    x0, x1 = batch(len(INNER_TIMES), seed=5)
    plain, weighted = (
        create_transport(path, prediction, w).training_losses(Arbitrary(), x1, t=INNER_TIMES, x0=x0)["loss"]
        for w in (None, weight)
    )
    expected = torch.tensor([noise_weight(path, weight, t) for t in INNER_TIMES.tolist()], dtype=torch.float64)
    torch.testing.assert_close(weighted / plain, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("path", "weight"), [*product(PATH_NAMES, WEIGHTS)])
def test_a_weight_makes_all_predictions_of_one_network_equal(path: str, weight: str):
    x0, x1 = batch(len(INNER_TIMES), seed=6)

    def predicting(quantity: str) -> Callable[..., torch.Tensor]:
        return lambda x, t, y, level: solve_for(path, x, t, Arbitrary()(x, t), "velocity")[quantity]

    def loss(quantity: str, weight: str | None) -> torch.Tensor:
        transport = create_transport(path, quantity, weight)
        return transport.training_losses(predicting(quantity), x1, t=INNER_TIMES, x0=x0)["loss"]

    for quantity in QUANTITIES:
        torch.testing.assert_close(loss(quantity, weight), loss("noise", weight), rtol=1e-6, atol=1e-9)
    if weight == "velocity":  # which for the velocity itself is no weight
        torch.testing.assert_close(loss("noise", weight), loss("velocity", None), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("path", "prediction", "weight"), [*product(PATH_NAMES, QUANTITIES, WEIGHTS)])
def test_weights_are_finite_on_the_training_interval(path: str, prediction: str, weight: str):
    transport = create_transport(path, prediction, weight)
    weights = transport.weight(torch.linspace(*transport.train_interval, 1001))  # float32, both ends
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize(("path", "prediction", "weight"), [*product(PATH_NAMES, QUANTITIES, [None, *WEIGHTS])])
def test_the_exact_network_is_left_with_the_posterior_variance(path: str, prediction: str, weight: str | None):
    # At VP's own 1e-5 the likelihood weight is so uneven that the estimate's spread would hide an error.
    eps = 1e-3 if weight == "likelihood" else None
    transport = create_transport(path, prediction, weight, train_eps=eps, level_edges=EDGES[3])
    start, stop = transport.train_interval

    def remaining(t: float) -> float:
        # Given x_t, a x_1 + b x_0 varies as (a sigma - b alpha)^2 S / (alpha^2 S + sigma^2).
        alpha, sigma, d_alpha, d_sigma = numbers(path, t)
        a, b = {"velocity": (d_alpha, d_sigma), "noise": (0, 1), "score": (0, -1), "data": (1, 0)}[prediction]
        posterior = (DATA.variance / (alpha**2 * DATA.variance + sigma**2)).mean().item()
        result = (a * sigma - b * alpha) ** 2 * posterior
        if weight is not None:
            g = sigma * (d_alpha / alpha * sigma - d_sigma)
            noise_error = {"velocity": sigma / g, "noise": 1, "score": 1, "data": alpha / sigma}[prediction]
            result *= noise_error**2 * noise_weight(path, weight, t)
        return result

    expected = integrate.quad(remaining, start, stop, limit=200, points=[0.9, 0.99, 0.999])[0] / (stop - start)
    network, generator = Network(DATA, path, prediction, num_levels=3), seeded(8)
    means = torch.stack(
        [
            transport.training_losses(network, DATA.sample(2000, seed=k), generator=generator)["loss"].mean()
            for k in range(20)
        ]
    )
    error = means.std() / len(means) ** 0.5
    assert error < 0.05 * expected  # the test has teeth
    assert abs(means.mean() - expected) < 4.5 * error


# -- The batch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, "velocity"])
@pytest.mark.parametrize("edges", [*EDGES.values(), ODD_EDGES])
def test_a_sample_has_the_same_loss_in_any_company(edges: tuple[float, ...], weight: str | None):
    transport = create_transport("GVP", "noise", weight, level_edges=edges)
    x0, x1 = batch(13, seed=9, shape=(2, 3, 3))
    y = torch.arange(13)
    t = torch.rand(13, generator=seeded(1), dtype=torch.float64) * 0.9 + 0.05
    network = Arbitrary(len(edges) + 1)
    together = transport.training_losses(network, x1, y=y, t=t, x0=x0)

    assert together["loss"].shape == (13,)
    torch.testing.assert_close(together["t"], t, atol=0, rtol=0)
    assert together["level"].tolist() == [sum(time > edge for edge in edges) for time in t.tolist()]
    # One call for each level, with all of its samples.
    counts = together["level"].bincount(minlength=network.num_levels).tolist()
    assert network.rows_by_level == [(level, rows) for level, rows in enumerate(counts) if rows]
    for i in range(13):
        one = slice(i, i + 1)
        alone = transport.training_losses(network, x1[one], y=y[one], t=t[one], x0=x0[one])
        torch.testing.assert_close(alone["loss"][0], together["loss"][i])


def test_a_network_that_must_have_labels_gets_none_when_there_are_none():
    seen = []

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None, level: int) -> torch.Tensor:
        seen.append(y)
        return x

    create_transport().training_losses(network, torch.ones(2, 3), generator=seeded(0))
    assert seen == [None]


def test_the_loss_carries_gradients_of_every_level():
    scale = torch.ones(2, requires_grad=True)
    x0, x1 = batch(4, seed=10)
    t = torch.tensor([0.2, 0.8, 0.6, 0.4], dtype=torch.float64)
    transport = create_transport(level_edges=(0.5,))
    terms = transport.training_losses(lambda x, t, y, level: scale[level] * x, x1, t=t, x0=x0)
    (gradient,) = torch.autograd.grad(terms["loss"].sum(), scale)
    xt, velocity = t[:, None] * x1 + (1 - t[:, None]) * x0, x1 - x0
    by_hand = (2 * (xt - velocity) * xt).mean(1)  # of each sample, at scale 1
    expected = torch.stack([by_hand[[0, 3]].sum(), by_hand[[1, 2]].sum()])
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_same_seed_gives_the_same_loss():
    transport, network = create_transport("VP", "score", level_edges=(0.5,)), Arbitrary(2)
    _, x1 = batch(6, seed=11)
    first, again, other = (transport.training_losses(network, x1, generator=seeded(k)) for k in (3, 3, 4))
    for key in ("loss", "level", "t"):
        torch.testing.assert_close(first[key], again[key], atol=0, rtol=0)
    assert (first["loss"] != other["loss"]).all()


def test_drawn_times_and_noise_are_those_of_the_generator():
    # The loss for what was drawn is the loss for the same values given.
    transport, network = create_transport(level_edges=(0.3,)), Arbitrary(2)
    _, x1 = batch(6, seed=12)
    drawn = transport.training_losses(network, x1, generator=seeded(5))
    t = transport.sample_times(6, generator := seeded(5))
    x0 = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    given = transport.training_losses(network, x1, t=t, x0=x0)
    torch.testing.assert_close(drawn["t"], t, atol=0, rtol=0)
    torch.testing.assert_close(drawn["loss"], given["loss"])


@pytest.mark.parametrize(("levels", "edges"), [(1, (0.5,)), (3, (0.5,)), (2, ())])
def test_a_model_with_other_levels_than_the_schedule_is_refused(levels: int, edges: tuple[float, ...]):
    message = f"the model has {levels} level.* but the schedule {len(edges) + 1}: give {levels - 1} level edge"
    with pytest.raises(ValueError, match=message):
        create_transport(level_edges=edges).training_losses(Arbitrary(levels), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("interval", "settings", "message"),
    [
        ((0.5, 0.5), {}, "within"),
        ((-0.1, 0.5), {}, "within"),
        ((0.5, 1.1), {}, "within"),
        ((0.5, 1.0), {"level_edges": (0.4,)}, "not within the interval"),
        ((0.0, 5e-4), {"prediction": "noise"}, "leaves nothing"),
    ],
)
def test_an_interval_that_no_expert_can_serve_is_refused(interval: tuple, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_transport(interval=interval, **settings)


def test_a_lone_expert_does_not_go_all_the_way():
    transport = create_transport(interval=(0.25, 1.0))
    assert transport.train_interval == (0.25, 1.0)
    create_transport(interval=(0.0, 1.0)).check_served()
    sampler, x = Sampler(transport), torch.zeros(2, 3)
    for solve in (
        lambda: sampler.sample_ode(Arbitrary(1), x),
        lambda: sampler.sample_ode(Arbitrary(1), x, reverse=True),
        lambda: sampler.sample_sde(Arbitrary(1), x),
        lambda: sampler.log_likelihood(Arbitrary(1), x),
    ):
        with pytest.raises(ValueError, match=r"an expert for t in \[0.25, 1\] alone"):
            solve()


def test_edges_at_which_experts_take_over_do_not_move():
    model = Arbitrary(3)
    model.fixed_edges = {1: 0.3}
    create_transport(level_edges=(0.3, 0.6)).check_levels(model)
    with pytest.raises(ValueError, match=r"move 0\.3, at which another expert takes over"):
        create_transport(level_edges=(0.4, 0.6)).check_levels(model)


def test_oracle_coefficients_are_consistent():
    # Guards the oracle itself: the numbers used above are those of the vectorised form.
    for path in PATH_NAMES:
        one_by_one = torch.tensor([numbers(path, t) for t in INNER_TIMES.tolist()], dtype=torch.float64)
        torch.testing.assert_close(torch.stack(coefficients(path, INNER_TIMES), 1), one_by_one)
