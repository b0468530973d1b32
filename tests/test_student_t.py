"""PFGM++: the process with Student-t noise, against closed forms that are exact at finite D."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import DATA, EDGES, Gaussian, GaussianInStudentNoise, Network, TwoPoints, numbers
from conftest import TINY
from scipy import stats

import download
import sample
import sample_ddp
import train
from pipeline import Pipeline
from runtime.rng import sample_generators
from transport import (
    ODE,
    SDE,
    ClassifierFreeGuidance,
    GaussianNoise,
    PatchSchedule,
    Sampler,
    StudentTNoise,
    create_transport,
)
from weights.pretrained import convert, load_pretrained

ONE = Gaussian([0.3], [0.25])


pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def column(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values))[:, None]


# -- The noise -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dimensions", "dof"), [(2, 1), (2, 3), (64, 8), (64, 0.7), (300, 128), (300, 3e6)])
def test_the_squared_radius_has_fishers_distribution(dimensions: int, dof: float):
    """F(N, D): the paper's perturbation kernel, R^2 / r^2 ~ BetaPrime(N / 2, D / 2), at r = sqrt(D)."""
    x0 = StudentTNoise(dof).sample((3000, dimensions), seeded(1), dtype=torch.float64)
    square = x0.square().sum(1).numpy()
    assert stats.kstest(square / dimensions, stats.f(dimensions, dof).cdf).pvalue > 1e-3
    assert stats.kstest(square / dof, stats.betaprime(dimensions / 2, dof / 2).cdf).pvalue > 1e-3


def test_a_samples_values_share_one_chi_square_and_samples_do_not():
    x0 = StudentTNoise(4.0).sample((4000, 3, 2, 2), seeded(2))
    squares = x0.square().flatten(1).numpy()
    assert stats.spearmanr(squares[:, 0], squares[:, 11]).statistic > 0.1  # with one for each value, 0 +- 0.016
    assert abs(stats.spearmanr(squares[:-1, 0], squares[1:, 0]).statistic) < 0.07
    angles = x0.flatten(1) / x0.flatten(1).norm(dim=1, keepdim=True)
    assert angles.mean(0).abs().max() < 4.5 / math.sqrt(12 * 4000)  # no direction is preferred


def test_a_row_is_the_same_in_any_batch():
    noise, rows = StudentTNoise(3.0), [0, 1, 2, 3, 4]
    together = noise.sample((5, 2, 3), sample_generators(7, rows))
    for part in ([0], [1, 2], [4, 3]):
        torch.testing.assert_close(
            noise.sample((len(part), 2, 3), sample_generators(7, part)), together[part], rtol=0, atol=0
        )
    assert noise.sample((0, 2), []).shape == (0, 2)


def test_the_same_seed_draws_the_same_picture_at_every_d_and_the_gaussian_one_at_infinity():
    for generators in (lambda: seeded(3), lambda: sample_generators(3, range(50))):
        gaussian = GaussianNoise().sample((50, 8), generators())
        for dof in (3.0, 50.0, 1e10):
            x0 = StudentTNoise(dof).sample((50, 8), generators())
            assert x0.dtype == torch.float32
            torch.testing.assert_close(x0 / x0.norm(dim=1, keepdim=True), gaussian / gaussian.norm(dim=1, keepdim=True))
        torch.testing.assert_close(x0, gaussian, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("generators", [None, seeded(), sample_generators(0, range(3))])
def test_noise_goes_to_a_gpu_from_pinned_memory_in_one_copy(monkeypatch, generators):
    """No GPU is needed: what is asked of torch is recorded."""
    moved, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)

    def record(x: torch.Tensor, *args: object, **settings: object) -> torch.Tensor:
        if args[0] == "cuda:0":
            moved.append(settings)
            return x
        return to(x, *args, **settings)

    monkeypatch.setattr(torch.Tensor, "to", record)
    StudentTNoise(5.0).sample((3, 2), generators, "cuda:0")
    assert moved == [{"non_blocking": True}]


def test_a_uniform_number_of_zero_gives_noise_that_is_zero(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, **settings: torch.zeros(*shape, dtype=torch.float64))
    assert StudentTNoise(5.0).sample((2, 3), seeded()).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(("dimensions", "dof"), [*product((1, 64, 4096), (1.0, 8.0, 128.0, 3_072_000.0))])
def test_the_log_density_is_scipys(dimensions: int, dof: float):
    x0 = StudentTNoise(dof).sample((5, dimensions), seeded(4), dtype=torch.float64)
    square = x0.square().sum(1).numpy()
    if dimensions <= 64:
        exact = stats.multivariate_t(np.zeros(dimensions), np.eye(dimensions), df=dof).logpdf(x0.numpy())
    else:  # by the law of the radius: the density times the area of the sphere
        radial = stats.f(dimensions, dof).logpdf(square / dimensions) - math.log(dimensions)
        area = math.log(math.pi) * dimensions / 2 - math.lgamma(dimensions / 2)
        exact = radial - area - (dimensions / 2 - 1) * np.log(square)
    noise = StudentTNoise(dof)
    np.testing.assert_allclose(noise.log_prob(x0).numpy(), exact, atol=1e-5, rtol=1e-9)
    assert (noise.log_prob(x0.float()).double().numpy() - exact).max() < 1e-2


def test_the_log_density_approaches_the_gaussian_one():
    x0 = torch.randn(4, 4096, generator=seeded(5), dtype=torch.float64)
    gaussian, square = GaussianNoise().log_prob(x0), x0.square().sum(1)
    for dof in (1e8, 1e10, 1e16):
        correction = ((square - 4096) ** 2 - 2 * 4096) / (4 * dof)
        torch.testing.assert_close(StudentTNoise(dof).log_prob(x0) - gaussian, correction, atol=1e-4, rtol=0)


# -- Samples and densities -----------------------------------------------------------------------------------------

# path, prediction, D, and the error of samples by rk4, of samples by dpmpp_2m, and of densities
EXACT = [
    ("Linear", "velocity", 3.0, 1e-6, 1e-2, 1e-5),
    ("Linear", "velocity", 128.0, 1e-6, 5e-3, 1e-5),
    ("GVP", "velocity", 8.0, 1e-5, 1e-2, 1e-4),
    ("Linear", "data", 1.5, 2e-3, 2e-2, 2e-2),
    ("Linear", "noise", 3.0, 2e-3, 2e-2, 2e-2),
    ("VP", "noise", 8.0, 1e-2, 2e-2, 2e-2),
]


@pytest.mark.parametrize(("path", "prediction", "dof", "by_rk4", "by_dpmpp", "in_density"), EXACT)
def test_gaussian_data_come_back_from_student_noise(
    path: str, prediction: str, dof: float, by_rk4: float, by_dpmpp: float, in_density: float
):
    sampler = Sampler(create_transport(path, prediction, level_edges=EDGES[2], aug_dim=dof))
    network = GaussianInStudentNoise(ONE, path, prediction, dof, num_levels=2)
    u = np.linspace(0.01, 0.99, 25)
    x0, x1 = column(stats.t(dof).ppf(u)), column(stats.norm(0.3, 0.5).ppf(u))
    for method, tolerance in (("rk4", by_rk4), ("dpmpp_2m", by_dpmpp)):
        found = sampler.sample_ode(network, x0, method=method, num_steps=100)
        torch.testing.assert_close(found, x1, atol=tolerance, rtol=0)
    log_prob, start = sampler.log_likelihood(network, x1, method="rk4", num_steps=60)
    np.testing.assert_allclose(log_prob.numpy(), stats.norm(0.3, 0.5).logpdf(x1[:, 0].numpy()), atol=in_density)
    torch.testing.assert_close(start, sampler.sample_ode(network, x1, "rk4", 60, reverse=True), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dof", [3.0, 8.0])
def test_the_exact_network_is_what_training_asks_for(dof: float):
    """The posterior mean's error is uncorrelated with any function of x_t, under the noise that training draws."""
    transport, n = create_transport(aug_dim=dof), 40_000
    x1, x0 = ONE.sample(n, seed=1), transport.noise.sample((n, 1), seeded(2), dtype=torch.float64)
    exact = GaussianInStudentNoise(ONE, "Linear", "velocity", dof, nodes=60)
    for time in (0.2, 0.6):
        t = torch.full((n,), time, dtype=torch.float64)
        x = transport.path.interpolate(x0, x1, t)
        velocity, of_gaussian_noise = exact(x, t), Network(ONE, "Linear", "velocity")(x, t)
        for found, wrong in ((velocity, False), (of_gaussian_noise, True)):
            product = (x1 - x0 - found) * torch.tanh(5 * (of_gaussian_noise - velocity))
            z = (product.mean() / product.std() * n**0.5).abs()
            assert z > 5 if wrong else z < 4


@pytest.mark.parametrize("dof", [3.0, 128.0])
def test_a_linear_field_makes_a_student_of_a_student(dof: float):
    sampler = Sampler(create_transport(level_edges=EDGES[3], aug_dim=dof))
    network = Network(DATA, "Linear", "velocity", 3)
    x0 = StudentTNoise(dof).sample((2000, 5), seeded(6), dtype=torch.float64)
    x1 = sampler.sample_ode(network, x0, "rk4", 60)
    torch.testing.assert_close(x1, DATA.mean + DATA.variance.sqrt() * x0, atol=1e-4, rtol=1e-5)
    fisher = (((x1 - DATA.mean) ** 2 / DATA.variance).sum(1) / 5).numpy()
    assert stats.kstest(fisher, stats.f(5, dof).cdf).pvalue > 1e-3
    log_prob, _ = sampler.log_likelihood(network, x1[:64], method="rk4", num_steps=60)
    exact = stats.multivariate_t(DATA.mean.numpy(), np.diag(DATA.variance.numpy()), df=dof).logpdf(x1[:64].numpy())
    np.testing.assert_allclose(log_prob.numpy(), exact, atol=1e-4)


def test_a_point_mass_leaves_the_noise_itself():
    transport = create_transport(prediction="data", aug_dim=3.0)
    x1 = torch.randn(20, 4, generator=seeded(7), dtype=torch.float64) * 1e-3
    log_prob, _ = Sampler(transport).log_likelihood(lambda x, t, y, level: 0 * x, x1, atol=1e-9, rtol=1e-9)
    alpha, sigma, _, _ = numbers("Linear", transport.sample_interval[1])
    start = numbers("Linear", transport.sample_interval[0])
    assert start[1] < 1  # the sampler takes x = sigma x_0 for the start
    exact = stats.multivariate_t(np.zeros(4), np.eye(4) * (sigma / alpha) ** 2, df=3).logpdf(x1.numpy())
    np.testing.assert_allclose(log_prob.numpy(), exact, atol=1e-6)


@pytest.mark.parametrize("dof", [3.0, 8.0, 1e6])
def test_two_points_are_separated_at_the_noises_quantile(dof: float):
    sampler = Sampler(create_transport(prediction="data", aug_dim=dof))
    threshold = stats.t(dof).ppf(0.3)
    x0 = torch.tensor([[threshold - 3e-3], [threshold + 3e-3], [-0.55]], dtype=torch.float64)
    x1 = sampler.sample_ode(TwoPoints("Linear", dof), x0, "rk4", 400)
    torch.testing.assert_close(x1[:2], torch.tensor([[-1.0], [1.0]], dtype=torch.float64), atol=1e-2, rtol=0)
    assert (x1[2] > 0) == (threshold < -0.55)  # at D = 3 this noise is to the right of the threshold


@pytest.mark.parametrize("dimensions", [1, 5])
def test_cauchy_data_stay_cauchy(dimensions: int):
    """D = 1 is stable: data t_1(m, s^2 I) have E[x_1 | x_t] = m + s (x - alpha m) / (alpha s + sigma)."""
    m, s, path = 0.4, 0.7, "Linear"

    def network(x: torch.Tensor, t: torch.Tensor, y: object, level: int) -> torch.Tensor:
        alpha, sigma, _, _ = numbers(path, t[0].item())
        return m + s * (x - alpha * m) / (alpha * s + sigma)

    transport = create_transport(path, "data", aug_dim=1.0, sample_eps=0.0)
    x0 = StudentTNoise(1.0).sample((30, dimensions), seeded(8), dtype=torch.float64).clamp(-20, 20)
    # At t = 1 the velocity of data prediction is 0 / 0: Euler's steps and rk4's would meet it, dpmpp_2m's do not.
    torch.testing.assert_close(
        Sampler(transport).sample_ode(network, x0, "dpmpp_2m", 400), m + s * x0, atol=1e-2, rtol=1e-3
    )
    transport = create_transport(path, "data", aug_dim=1.0)
    x1 = m + s * x0
    log_prob, _ = Sampler(transport).log_likelihood(network, x1, atol=1e-8, rtol=1e-8)
    exact = stats.multivariate_t(np.full(dimensions, m), np.eye(dimensions) * s**2, df=1).logpdf(x1.numpy())
    np.testing.assert_allclose(log_prob.numpy(), exact, atol=2e-2)


def test_guidance_and_every_prediction_agree():
    """Guidance is affine in the prediction, and so are the conversions."""

    def field(prediction: str) -> Callable[..., torch.Tensor]:
        networks = [GaussianInStudentNoise(Gaussian([m], [0.25]), "GVP", prediction, 5.0, 2) for m in (0.5, -0.2)]

        def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
            return torch.where(y[:, None] == 0, *(each(x, t) for each in networks))

        network.num_levels = 2
        return ClassifierFreeGuidance(network, (2.0, 3.0), null_class=1)

    x0, y = column(stats.t(5).ppf(np.linspace(0.05, 0.95, 9))), torch.zeros(9, dtype=torch.long)
    found = [
        Sampler(create_transport("GVP", prediction, sample_eps=1e-3, level_edges=EDGES[2], aug_dim=5.0)).sample_ode(
            field(prediction), x0, "rk4", 40, y=y
        )
        for prediction in ("velocity", "noise", "data")
    ]
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[2], found[0], atol=1e-6, rtol=0)
    assert (found[0].mean() > 0.6).item()  # guided past the class's mean


def test_infinity_is_gaussian_noise():
    assert type(create_transport(aug_dim=math.inf).noise) is type(create_transport().noise) is GaussianNoise
    network = Network(DATA, "Linear", "velocity")
    gaussian, student = (create_transport(aug_dim=d) for d in (None, 1e10))
    x1 = DATA.sample(6, seed=9)
    losses = [t.training_losses(network, x1.float(), generator=seeded(9))["loss"] for t in (gaussian, student)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
    log_probs = [Sampler(t).log_likelihood(network, x1, method="rk4", num_steps=20)[0] for t in (gaussian, student)]
    torch.testing.assert_close(*log_probs, atol=1e-6, rtol=0)


def test_edms_preconditioning_is_velocity_on_the_gvp_path():
    """EDM (arXiv:2206.00364, table 1) at unit data variance: input c_in (y + n), target F, weight 1."""
    generator = seeded(10)
    x1, x0 = (torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(2))
    std = (torch.randn(50, dtype=torch.float64, generator=generator) * 1.2 - 0.5).exp()
    noisy = x1 + std * x0
    c_skip, c_out, c_in = 1 / (std**2 + 1), std / (std**2 + 1).sqrt(), 1 / (std**2 + 1).sqrt()
    t = 2 / math.pi * torch.atan(1 / std)
    transport = create_transport("GVP")
    torch.testing.assert_close(transport.path.interpolate(x0, x1, t), c_in * noisy)
    c = transport.path.coefficients(t)
    torch.testing.assert_close(c.d_alpha * x1 + c.d_sigma * x0, math.pi / 2 * (x1 - c_skip * noisy) / c_out)
    torch.testing.assert_close(c_out**2 * (std**2 + 1) / std**2, torch.ones_like(std))  # its weight, times c_out^2


# -- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aug_dim": 0}, "aug_dim.* must be above 0, got 0"),
        ({"aug_dim": -3.0}, "must be above 0"),
        ({"aug_dim": math.nan}, "must be above 0, got nan"),
        ({"aug_dim": 2}, "with aug_dim 2 the expected loss of velocity prediction is infinite"),
        ({"aug_dim": 1.0, "prediction": "noise"}, "aug_dim above 2, or predict data"),
        ({"aug_dim": 8, "prediction": "score"}, "score prediction needs Gaussian noise"),
        ({"aug_dim": 8, "loss_weight": "likelihood"}, "likelihood weights need Gaussian noise"),
    ],
)
def test_what_does_not_go_with_finite_d_is_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        create_transport(**settings)
    assert create_transport(prediction="data", aug_dim=0.5).aug_dim == 0.5


def test_the_score_and_sdes_are_refused():
    transport, x, t = create_transport(aug_dim=8.0), torch.ones(2, 3), torch.full((2,), 0.5)
    for source, target in (("score", "velocity"), ("velocity", "score")):
        with pytest.raises(ValueError, match="the score at D = 8 is no function"):
            transport.convert(x, x, t, target, source)
    for call in (Sampler(transport).sample_sde, lambda *args: Sampler(transport).sample(*args, SDE())):
        with pytest.raises(ValueError, match=r"D = 8 of PFGM.*sample with ODE"):
            call(Network(DATA, "Linear", "velocity"), x)
    for dof in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="finite number above 0"):
            StudentTNoise(dof)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aug-dim", "0"], "0 is not above 0"),
        (["--aug-dim", "nan"], "nan is not above 0"),
        (["--aug_dim", "2"], "give an aug_dim above 2, or predict data"),
        (["--aug-dim", "8", "--prediction", "score"], "score prediction needs Gaussian noise"),
        (["--aug-dim", "8", "--loss-weight", "likelihood"], "likelihood weights need Gaussian noise"),
        (["--time-sampling", "cosmap", "--time-params", "0", "1"], "those of logit-normal times"),
        (["--time-sampling", "logit-normal", "--time-params", "0", "0"], "standard deviation above 0"),
        (["--time-sampling", "cosmap", "--loss-weight", "likelihood"], "likelihood weights bound the likelihood"),
    ],
)
def test_the_command_refuses_in_one_line_before_the_run_begins(refuses, tmp_path, flags: list[str], message: str):
    assert message in refuses(train.train, *TINY, "--run-dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


# -- Commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of three steps at D = 8 with logit-normal times that hardly reach the fine level."""
    run_dir = tmp_path_factory.mktemp("student") / "run"
    flags = ["--aug_dim", "8", "--time-sampling", "logit-normal", "--time-params", "-3", "1", "--sample-every", "3"]
    train.train([*TINY, *flags, "--run-dir", str(run_dir), "--max-steps", "3"])
    return run_dir


def test_a_level_that_training_hardly_sees_is_named(student_run: Path, tiny_run: Path):
    share = stats.norm(-3, 1).sf(0)
    (line,) = [line for line in (student_run / "log.txt").read_text().splitlines() if "has on average only" in line]
    assert f"a batch of 32 has on average only {32 * share:.2g} of level 1" in line
    assert "has on average only" not in (tiny_run / "log.txt").read_text()


def test_the_checkpoint_tells_d_wherever_it_goes(student_run: Path, tmp_path: Path):
    pipe = Pipeline.load(student_run)
    assert (pipe.transport.aug_dim, pipe.finest_only().transport.aug_dim) == (8.0, 8.0)
    assert pipe.finest_only().transport.schedule == PatchSchedule()
    for name in ("exported.pt", "exported.safetensors"):
        convert(student_run, tmp_path / name, "ours")
        assert Pipeline.load(tmp_path / name).transport.aug_dim == 8.0
    model, transport = pipe.model, load_pretrained(student_run).transport
    assert (transport["aug_dim"], transport["time_sampling"], transport["time_params"]) == (8, "logit-normal", [-3, 1])
    model.save_pretrained(tmp_path / "hub", config={**model.config, "transport": transport})
    assert Pipeline.load(tmp_path / "hub").transport.aug_dim == 8.0
    x0 = StudentTNoise(8.0).sample((2, 1, 8, 8), sample_generators(1, range(2), 7))
    torch.testing.assert_close(
        pipe.latents([1, 2], ODE(num_steps=4), seed=1), pipe.latents([1, 2], ODE(num_steps=4), x0=x0)
    )
    x1 = pipe.latents([1, 2], ODE(num_steps=4), seed=1)
    assert pipe.log_prob(x1, [1, 2], ODE(num_steps=4)).isfinite().all()


@pytest.mark.parametrize("layout", ["sit", "ppflow"])
def test_layouts_that_do_not_tell_d_are_refused(refuses, student_run: Path, tmp_path: Path, layout: str):
    out = tmp_path / "weights.pt"
    line = refuses(download.main, "convert", student_run, out, "--layout", layout)
    assert f"D = 8 of PFGM++, which the layout of {layout} does not tell" in line
    assert not out.exists()


def test_weights_that_say_nothing_of_their_process_can_be_told_d(student_run: Path, tiny_run: Path, tmp_path: Path):
    Pipeline.load(student_run).model.save_pretrained(tmp_path)
    pipe = Pipeline.load(tmp_path, process={"aug_dim": 8})
    assert (pipe.transport.aug_dim, pipe.changed) == (8.0, {"aug_dim": 8.0})
    with pytest.raises(ValueError, match=r"--aug-dim is 4, but .* was trained with 8.0: leave --aug-dim out"):
        Pipeline.load(student_run, process={"aug_dim": 4})


def test_sampling_refuses_an_sde_before_any_work(refuses, student_run: Path, tmp_path: Path):
    flags = ["SDE", "--ckpt", student_run]
    for main, out in ((sample.main, ["--out", tmp_path / "a.png"]), (sample_ddp.main, ["--sample-dir", tmp_path])):
        assert "D = 8 of PFGM++ does not tell: sample with ODE" in refuses(main, *flags, *out)
    assert not list(tmp_path.iterdir())


def test_sample_folders_know_d_and_those_of_gaussian_noise_are_as_before(student_run: Path, tiny_run: Path):
    def settings(run: Path) -> dict[str, object]:
        args = sample_ddp.build_parser().parse_args(["ODE", "--ckpt", str(run)])
        pipe, guidance = Pipeline.load(run), sample_ddp.cli.guidance_from(args)
        job = sample_ddp.Job(args, pipe, ODE(), guidance, pipe.check(ODE(), guidance))
        return sample_ddp.settings_of(job, "digest")

    assert settings(student_run)["aug_dim"] == 8.0
    assert not {"aug_dim", "time_sampling", "time_params"} & settings(tiny_run).keys()


def test_a_run_continues_with_its_own_noise_and_refuses_another(refuses, student_run: Path, tmp_path: Path):
    again = [*TINY, "--run-dir", student_run, "--max-steps", "3"]
    assert "--aug-dim is 8.0 in " in refuses(train.train, *again, "--aug-dim", "16")
    assert "--aug-dim is 8.0 in " in refuses(train.train, *again, "--aug-dim", "inf")
    train.train([*map(str, again), "--aug-dim", "8", "--time-params", "-3", "1"])
