"""The benchmark of the solvers: its mixture is exact, its counts are counts, and it shows what it measured."""

import math

import pytest
import torch
from closed_form import PATH_NAMES, numbers, solve_for
from PIL import Image

from benchmarks import solvers

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch):
    """Few methods, paths and samples: the real ones take a minute."""
    monkeypatch.setattr(solvers, "PATHS", {"GVP": solvers.PATHS["GVP"]})
    monkeypatch.setattr(solvers, "METHODS", ("euler", "heun2", "rk4", "ab2", "dpmpp_2m"))
    monkeypatch.setattr(solvers, "RUNGE_KUTTA_ADAPTIVE", ("bosh3",))
    monkeypatch.setattr(solvers, "TOLERANCES", (1e-1, 1e-2))


@pytest.fixture(autouse=True)
def little_work(monkeypatch):
    for name, value in {"SAMPLES": 5, "DIMENSIONS": 2, "MODES": 3, "IMAGES": 2, "REFERENCE_STEPS": 8}.items():
        monkeypatch.setattr(solvers, name, value)


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_mixtures_velocity_is_that_of_its_density(path: str):
    mixture = solvers.GaussianMixture(path, 1, CPU)
    mean_square = mixture.mean.square().mean() + mixture.std.square().mean()
    assert mean_square.item() == pytest.approx(1)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    log_density = 0
    for point, time in zip(x, t.tolist(), strict=True):
        alpha, sigma, *_ = numbers(path, time)
        variance = alpha**2 * mixture.std**2 + sigma**2
        modes = torch.distributions.Normal(alpha * mixture.mean, variance.sqrt())
        log_density = log_density + modes.log_prob(point).sum(1).logsumexp(0) - math.log(3)
    (score,) = torch.autograd.grad(log_density, x)
    x = x.detach()
    torch.testing.assert_close(mixture(x, t), solve_for(path, x, t, score, "score")["velocity"])


def test_a_solver_gets_the_steps_that_its_evaluations_pay_for():
    case = solvers.mixture_case("Linear", 3, CPU)
    for method, cost in (("euler", 1), ("heun2", 2), ("heun3", 3), ("rk4", 4), ("ab2", 1), ("dpmpp_2m", 1)):
        steps = solvers.steps_within(case, method, 31)
        assert steps == 31 // cost
        assert case.solve(method, num_steps=steps).nfe == cost * steps
    steps = solvers.steps_within(case, "explicit_adams", 31)  # starts each level with rk4
    assert (
        case.solve("explicit_adams", num_steps=steps).nfe <= 31 < case.solve("explicit_adams", num_steps=steps + 1).nfe
    )
    assert case.solve("rk4", num_steps=solvers.steps_within(case, "rk4", 6)) is solvers.REFUSED


def test_the_error_is_that_of_the_samples():
    case = solvers.mixture_case("GVP", 2, CPU)
    errors = [case.solve("ab2", num_steps=steps).error for steps in (50, 400)]
    assert errors[1] < errors[0] / 30
    assert case.solve("dopri5", atol=1e-9, rtol=1e-9).error < 1e-7
    assert case.solve("euler", num_steps=2).error > 0.05


def test_a_guided_evaluation_counts_once(tiny_run):
    case = solvers.network_case(str(tiny_run), [1.5, 2.0], CPU)
    rows = []
    case.field.model.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    assert case.solve("heun2", num_steps=3).nfe == 6
    assert rows == [4] * 6  # two images, each with its label and without


def test_tables_and_plot(small, capsys, tmp_path, tiny_run):
    out = tmp_path / "plots" / "solvers.png"
    flags = ["--nfe", "13", "6", "--ckpt", tiny_run, "--cfg-scales", "1.5", "2", "--out", out]
    solvers.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out
    mixtures = [f"mixture, GVP, {count}" for count in ("1 level", "2 levels", "3 levels")]
    found = {}
    for name in (*mixtures, "PPF-T-2, Linear, guidance 1.5 2", "3 Gaussian mixtures, geometric mean"):
        head, *lines = printed.split(f"\n{name}\n")[1].split("\n\n")[0].splitlines()
        assert head.split() == ["evaluations", "6", "13"]
        found[name] = {method: cells for method, *cells in map(str.split, lines)}
        assert list(found[name]) == ["euler", "heun2", "rk4", "ab2", "dpmpp_2m"]
    for name in (mixtures[2], "3 Gaussian mixtures, geometric mean"):
        assert found[name]["rk4"][0] == "-"  # six evaluations are one step, for three levels
    assert found[mixtures[2]]["heun2"][2] == "@12"
    errors = [float(found[name]["ab2"][1]) for name in mixtures]
    assert float(found["3 Gaussian mixtures, geometric mean"]["ab2"][1]) == pytest.approx(
        math.prod(errors) ** (1 / 3), rel=0.1
    )
    assert printed.count("tolerance") == 4
    with Image.open(out) as image:
        assert 900 < image.width < 1400  # two panels, at the width of a README


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--cfg-scales", "2"], "--cfg-scales has no effect without --ckpt"),
        (["--nfe", "0"], "0 is not at least 1"),
        (["--device", "abacus"], "cannot be used"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
)
def test_bad_flags_are_answered_in_one_line(refuses, flags, what):
    assert what in refuses(solvers.main, *flags)
