"""The benchmark of the solvers: its mixture is exact, its counts are counts, and it shows what it measured."""

import math

import pytest
import torch
from closed_form import PATH_NAMES, numbers, solve_for
from PIL import Image

from benchmarks import solvers
from transport import PatchSchedule


@pytest.fixture
def small(monkeypatch):
    """Few methods and paths: the real ones take a minute."""
    monkeypatch.setattr(solvers, "PATHS", {"GVP": solvers.PATHS["GVP"]})
    monkeypatch.setattr(solvers, "METHODS", ("heun2", "rk4", "ab2", "explicit_adams"))
    monkeypatch.setattr(solvers, "RUNGE_KUTTA_ADAPTIVE", ("bosh3",))
    monkeypatch.setattr(solvers, "TOLERANCES", (1e-1, 1e-2))
    monkeypatch.setattr(solvers, "SPLIT_NFE", (12,))


def small_args(*flags: object):
    return solvers.parse(["--nfe", "6", "13", "--samples", "5", "--dimensions", "2", "--modes", "3", *map(str, flags)])


@pytest.mark.parametrize("path", PATH_NAMES)
def test_the_mixtures_velocity_is_that_of_its_density(path: str):
    mixture = solvers.GaussianMixture(path, 1, modes=3, dimensions=2, seed=0, device=torch.device("cpu"))
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
    case = solvers.mixture_case("Linear", 3, small_args(), torch.device("cpu"))
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
    case = solvers.mixture_case("GVP", 2, small_args(), torch.device("cpu"))
    errors = [case.solve("ab2", num_steps=steps).error for steps in (50, 400)]
    assert errors[1] < errors[0] / 30
    assert case.solve("dopri5", atol=1e-9, rtol=1e-9).error < 1e-7
    assert case.solve("euler", num_steps=2).error > 0.05


@pytest.mark.parametrize("costs", [(1.0, 1.0, 1.0), (1.0, 2.1, 4.3)])
def test_splits_of_the_steps_cost_the_same(costs: tuple[float, ...]):
    schedule = PatchSchedule((0.5, 0.75))
    found = solvers.splits(schedule, costs, 80)
    assert (40, 20, 20) in found
    assert len(found) == len(solvers.SPLITS)
    spent = [sum(steps * cost for steps, cost in zip(split, costs, strict=True)) for split in found]
    assert max(spent) - min(spent) <= 2 * max(costs)
    assert [split[-1] for split in found] == [10, 15, 20, 25, 30]


def test_tables_and_plot(small, capsys, tmp_path, tiny_run):
    out = tmp_path / "plots" / "solvers.png"
    flags = ["--nfe", "6", "13", "--samples", "5", "--dimensions", "2", "--modes", "3", "--ckpt", tiny_run,
             "--images", "2", "--reference-steps", "8", "--cfg-scales", "1.5", "2", "--cfg-interval", "0.2", "0.9",
             "--out", out]  # fmt: skip
    solvers.main([str(flag) for flag in flags])
    printed = capsys.readouterr().out
    names = [
        *(f"mixture, GVP, {count}" for count in ("1 level", "2 levels", "3 levels")),
        "PPF-T-2, Linear, guidance 1.5 2",
    ]
    for name in names:
        assert f"\n{name}\n" in printed
    block = printed.split(f"\n{names[2]}\n")[1].splitlines()
    assert block[0].split() == ["method", "6", "13"]
    assert [line.split()[0] for line in block[1:5]] == ["heun2", "rk4", "ab2", "explicit_adams"]
    assert block[2].split()[1:2] == ["-"]  # six evaluations are one step, for three levels
    assert block[1].split()[-1] == "@12"
    assert printed.count("All cases") == 2
    assert "13 evaluations (mixtures: geometric mean)\nmethod" in printed
    assert printed.count("12 evaluations shared out between the levels") == 3
    with Image.open(out) as image:
        assert min(image.size) > 500


REFUSED = [
    (["--cfg-scales", "2"], "--cfg-scales has no effect without --ckpt"),
    (["--reference-steps", "9"], "--reference-steps has no effect without --ckpt"),
    (["--nfe", "0"], "0 is not at least 1"),
    (["--device", "abacus"], "cannot be used"),
    (["--samples", "2", "--ckpt", "nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("flags", "what"), REFUSED)
def test_bad_flags_are_answered_in_one_line(small, refuses, flags, what):
    assert what in refuses(solvers.main, *flags)
