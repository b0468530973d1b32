"""Step grids: where steps lie, the orders that solvers keep, what is measured, what is kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import DATA, EDGES, LevelField, Network, assert_each_level_kept_to_its_time, observed_order
from test_solvers import X, equation, solution

import sample
import sample_ddp
from models import create_model
from pipeline import Pipeline
from transport import GRID_METHODS, ODE, Guidance, Sampler, create_transport, shifted_grid
from transport.grids import equidistributed, steps_between
from transport.solvers import ADAMS, ADAPTIVE_METHODS, ORDERS, solve_ode, steps_from

pytestmark = pytest.mark.usefixtures("one_thread")

QUADRATIC = tuple((i / 64) ** 2 * 0.5 + i / 64 * 0.5 for i in range(65))  # denser near noise, from 0.5 to 1.5


def alternating(n: int) -> tuple[float, ...]:
    """Times of n steps of which every other one is three times as long."""
    lengths = np.where(np.arange(n) % 2, 3.0, 1.0)
    times = [0.0, *(lengths.cumsum() / lengths.sum()).tolist()]
    return (*times[:-1], 1.0)


# -- Where steps lie -----------------------------------------------------------------------------------------------


def test_as_many_steps_as_the_grid_has_are_its_own() -> None:
    assert steps_between(QUADRATIC, 0.0, 1.0, 64) == pytest.approx(QUADRATIC, abs=1e-15)
    assert steps_between(QUADRATIC, 1.0, 0.0, 64) == pytest.approx(QUADRATIC[::-1], abs=1e-15)
    assert steps_between(QUADRATIC, 0.0, 1.0, 32) == pytest.approx(QUADRATIC[::2], abs=1e-15)


def test_a_shifted_grid_has_the_noise_levels_of_sd3() -> None:
    for shift in (0.3, 1.0, 3.0):
        u = 1 - np.arange(65) / 64
        assert shifted_grid(shift) == pytest.approx(1 - shift * u / (1 + (shift - 1) * u), abs=1e-12)
    with pytest.raises(ValueError, match="shift of a step grid must be above 0, got -1"):
        shifted_grid(-1)


@pytest.mark.parametrize("method", GRID_METHODS)
@pytest.mark.parametrize("grid", [QUADRATIC, shifted_grid(0.3), (0.0, 0.9, 1.0)])
def test_no_step_crosses_an_edge(method: str, grid: tuple[float, ...]) -> None:
    field, x0 = LevelField(3), torch.ones(2, 3, dtype=torch.float64)
    Sampler(create_transport(level_edges=EDGES[3])).sample_ode(field, x0, method, 11, grid=grid)
    assert_each_level_kept_to_its_time(field.calls, EDGES[3])


def test_steps_are_shared_by_the_grid_and_a_level_has_two() -> None:
    sampler, model = Sampler(create_transport(level_edges=(0.5, 0.75))), LevelField(3)

    def steps(number: int | tuple[int, ...], grid: tuple[float, ...] | None) -> list[int]:
        return [count for _, count in sampler._plan(model, 0.0, 1.0, number, grid=grid)]

    assert steps(20, None) == steps(20, (0.0, 1.0)) == [10, 5, 5]
    assert steps(20, (0.0, 0.5, 1.0)) == [10, 5, 5]
    assert steps(20, (0.0, 0.25, 0.5, 0.625, 0.75, 1.0)) == [8, 8, 4]  # shares 2, 2 and 1 of 5
    assert steps(20, (0.0, 0.9, *np.linspace(0.91, 1, 30))) == [2, 2, 16]
    assert steps(5, (0.0, 0.9, *np.linspace(0.91, 1, 30))) == [1, 1, 3]  # not enough for two each
    assert steps((3, 1, 4), QUADRATIC) == [3, 1, 4]


def test_equal_steps_are_bit_for_bit_those_without_a_grid() -> None:
    x0 = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transport = create_transport(level_edges=(0.5,))
    for method in GRID_METHODS:
        samples = [
            Sampler(transport).sample(Network(DATA, "Linear", "velocity", 2), x0, ODE(method, 16, grid=grid))
            for grid in (None, (0.0, 1.0), tuple(i / 16 for i in range(17)))
        ]
        assert torch.equal(samples[0], samples[1])
        assert torch.equal(samples[0], samples[2])


# -- Orders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", [method for method in GRID_METHODS if method != "dpmpp_2m"])
def test_orders_hold_on_uneven_steps(method: str, reverse: bool) -> None:
    errors, steps = [], [16, 32, 64]
    start, stop = (1.0, 0.0) if reverse else (0.0, 1.0)
    for n in steps:
        found = solve_ode(equation, X, start, stop, method, n, 0.0, 0.0, grid=alternating(n))
        errors.append((found - solution(X, start, stop)).abs().max().item())
    assert observed_order(errors, steps) == pytest.approx(ORDERS[method], abs=0.3)


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("method", ["ab2", "dpmpp_2m", "heun2"])
def test_orders_hold_on_smooth_grids_across_levels(method: str, path: str) -> None:
    transport = create_transport(path, level_edges=(0.3, 0.6))
    start = transport.sample_interval[0]
    x0 = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    network, errors, steps = Network(DATA, path, "velocity", 3), [], [30, 60, 120]
    sampler = Sampler(transport)
    exact = DATA.flow(path, x0 * sampler._boundary(start), start, 0.6)
    for n in steps:  # up to t = 0.6: at t = 1 the clock of dpmpp_2m is infinite
        found = sampler.sample_ode(network, x0, method, n, levels=range(2), grid=QUADRATIC)
        errors.append((found - exact).abs().max().item())
    assert observed_order(errors, steps) == pytest.approx(2, abs=0.3)


def test_ab2_takes_the_steps_of_its_textbook_formula() -> None:
    """x_{n+1} = x_n + h/2 ((2 + r) f_n - r f_{n-1}), r = h / h_before (Hairer, Norsett, Wanner, III.5)."""
    times, field = [0.0, 0.1, 0.4, 0.5, 1.1], lambda t, x: torch.cos(t) * x
    states = [torch.tensor([float(i + 1)], dtype=torch.float64) for i in range(4)]
    slopes = [math.cos(t) * state for t, state in zip(times, states, strict=False)]
    found = steps_from(field, states, times, "ab2")
    for n in (1, 2, 3):
        h, before = times[n + 1] - times[n], times[n] - times[n - 1]
        expected = states[n] + h / 2 * ((2 + h / before) * slopes[n] - h / before * slopes[n - 1])
        torch.testing.assert_close(found[n], expected)


# -- What is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4])
def test_equidistribution_finds_the_density_of_a_known_error(order: int) -> None:
    """Errors (1 + 3 t)^(p + 1) h^(p + 1) want steps whose density is 1 + 3 t: u = (t + 1.5 t^2) / 2.5."""
    times = np.linspace(0, 1, 401)
    middle, h = (times[1:] + times[:-1]) / 2, np.diff(times)
    grid = np.array(equidistributed(times.tolist(), ((1 + 3 * middle) * h) ** (order + 1), order))
    assert (grid + 1.5 * grid**2) / 2.5 == pytest.approx(np.linspace(0, 1, 65), abs=1e-4)
    errors = 2.0 * np.diff([0, *np.sort(np.random.default_rng(0).random(30)), 1])  # uneven windows, the same error rate
    uneven = [0.0, *np.cumsum(errors / 2.0)[:-1], 1.0]
    grid = equidistributed(uneven, [length ** (order + 1) for length in np.diff(uneven)], order)
    assert grid == pytest.approx(np.linspace(0, 1, 65), abs=1e-5)
    assert equidistributed([0.0, 0.5, 1.0], [0.0, 0.0], order) == pytest.approx(np.linspace(0, 1, 65))


@pytest.mark.parametrize("method", ["ab2", "dpmpp_2m", "rk4"])
def test_a_measured_grid_levels_out_the_local_errors(method: str) -> None:
    """True local errors of steps, from the exact flow of Gaussian data, are less uneven than those of equal steps."""
    transport, x0 = (
        create_transport("VP"),
        torch.randn(32, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    network = Network(DATA, "VP", "velocity")
    grid = Sampler(transport).measure_grid(network, x0, method)
    start, stop = transport.sample_interval
    start_state = x0 * Sampler(transport)._boundary(start)

    def spread(ends: list[float]) -> float:
        field = Sampler(transport)._estimate(
            network,
            transport.schedule.intervals(start, stop)[0],
            None,
            "data" if method == "dpmpp_2m" else "velocity",
        )
        states = [DATA.flow("VP", start_state, start, t) for t in ends]
        found = steps_from(field, states[:-1], ends, method, Sampler(transport)._alpha_sigma)
        errors = [(a - b).square().mean().sqrt().item() for a, b in zip(found, states[1:], strict=True)]
        return max(errors[2:-2]) / float(np.median(errors[2:-2]))

    assert spread(steps_between(grid, start, stop, 24)) < 0.6 * spread(np.linspace(start, stop, 25).tolist())


@pytest.mark.parametrize("method", ["ab2", "heun2"])
def test_twenty_evaluations_of_a_measured_grid_beat_thirty_of_equal_steps(method: str) -> None:
    """On the VP path, whose Gaussian data change late; the exact flow is the judge."""
    transport = create_transport("VP", level_edges=(0.5,))
    network, sampler = Network(DATA, "VP", "velocity", 2), Sampler(transport)
    noise = torch.randn(2, 32, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = sampler.measure_grid(network, noise[0], method)
    start, stop = transport.sample_interval
    exact = DATA.flow("VP", noise[1] * sampler._boundary(start), start, stop) / sampler._boundary(stop)
    stages = 2 if method == "heun2" else 1
    errors = [
        (sampler.sample_ode(network, noise[1], method, nfe // stages, grid=each) - exact).square().mean().sqrt()
        for nfe, each in ((20, grid), (30, None))
    ]
    assert errors[0] < errors[1]


@pytest.fixture
def pipe() -> Pipeline:
    """Two levels with random weights on 8x8 pixels."""
    torch.manual_seed(0)
    fields = {"input_size": 8, "in_channels": 1, "num_classes": 5, "depth": 1, "hidden_size": 16, "num_heads": 2}
    model = create_model("PPF-T-2", **fields).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Pipeline(model, create_transport(level_edges=(0.5,)), name="PPF-T-2")


def test_a_pipeline_measures_and_samples_with_a_grid(pipe: Pipeline, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.GRID_SAMPLES", 4)
    solver, guidance = ODE(num_steps=9), Guidance((1.0, 2.0), interval=(0.2, 0.9))
    grid = pipe.step_grid(solver, guidance)
    assert grid == pipe.step_grid(ODE(num_steps=30), guidance)  # one for any number of steps
    assert grid != pipe.step_grid(solver)
    solver = replace(solver, grid=grid)
    whole = pipe.latents([3, 0, 4], solver, guidance)
    state = pipe.latents([3, 0, 4], solver, guidance, levels=range(1))
    assert torch.equal(pipe.latents([3, 0, 4], solver, guidance, x0=state, levels=range(1, 2)), whole)
    assert not torch.equal(pipe.latents([3, 0, 4], replace(solver, grid=None), guidance), whole)
    assert pipe.log_prob(whole, [3, 0, 4], solver).isfinite().all()
    pipe.model.final_layer.linear[1].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="states on which the step grid is measured are not finite"):
        pipe.step_grid(solver)


# -- What is kept --------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path, monkeypatch) -> Path:
    """A run whose folder has room for grids, which four samples make in four windows."""
    monkeypatch.setattr("pipeline.GRID_SAMPLES", 4)
    monkeypatch.setattr("transport.sampler.WINDOWS", 4)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for file in (*tiny_run.glob("checkpoints/*"), tiny_run / "config.json"):
        (tmp_path / "run" / file.relative_to(tiny_run)).write_bytes(file.read_bytes())
    return tmp_path / "run"


def test_a_grid_is_measured_once_and_found_again(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    flags = f"ODE --ckpt {run} --class-labels 1 --num-sampling-steps 4 --cfg-scales 2 --step-grid auto".split()
    flags += ["--out", f"{tmp_path}/a.png"]
    sample.main(flags)
    assert "measuring where the steps should lie" in capsys.readouterr().out
    (file,) = run.glob("checkpoints/*-grid-*.json")
    assert file.name.startswith("0000020-grid-")
    first = (tmp_path / "a.png").read_bytes()
    with monkeypatch.context() as context:
        context.setattr(Pipeline, "step_grid", None)
        sample.main(flags)
    assert (tmp_path / "a.png").read_bytes() == first
    sample.main([*flags, "--cfg-scales", "3"])  # another guidance has another grid
    assert len(list(run.glob("checkpoints/*-grid-*.json"))) == 2
    file.write_text(file.read_text()[:50])  # damaged: measured again
    sample.main(flags)
    assert (tmp_path / "a.png").read_bytes() == first
    assert json.loads(file.read_text())["measured_for"]["method"] == "ab2"


def test_samples_of_a_grid_have_a_folder_and_settings_of_their_own(run: Path, tmp_path: Path) -> None:
    flags = f"ODE --ckpt {run} --num-fid-samples 2 --num-sampling-steps 4 --sample-dir {tmp_path}/samples".split()
    sample_ddp.main(flags)
    sample_ddp.main([*flags, "--step-grid", "auto"])
    plain, auto = sorted((tmp_path / "samples").glob("*/settings.json"), key=lambda path: len(path.parent.name))
    assert auto.parent.name == plain.parent.name.replace("ODE-ab2-4", "ODE-ab2-4-auto")
    assert "grid" not in json.loads(plain.read_text())
    (file,) = run.glob("checkpoints/*-grid-*.json")
    assert json.loads(auto.read_text())["grid"] == json.loads(file.read_text())["grid"]
    sample_ddp.main([*flags, "--step-grid", "auto"])  # complete, and the same folder


# -- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0), (0.0, math.nan, 1.0), ()])
def test_a_grid_that_does_not_ascend_from_0_to_1_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="a step grid ascends strictly from 0 to 1"):
        ODE(grid=grid)


@pytest.mark.parametrize("method", [*ADAMS, *ADAPTIVE_METHODS])
def test_methods_whose_steps_are_their_own_are_refused(method: str, tiny_run: Path, tmp_path: Path, refuses) -> None:
    sampler, field = Sampler(create_transport(level_edges=(0.5,))), LevelField(2)
    with pytest.raises(ValueError, match=f"{method} .*: leave the step grid out, or choose one of euler"):
        ODE(method, grid=(0.0, 1.0))
    with pytest.raises(ValueError, match="leave the step grid out"):
        sampler.sample_ode(field, torch.ones(2, 3), method, grid=(0.0, 1.0))
    with pytest.raises(ValueError, match="leave the step grid out"):
        sampler.measure_grid(field, torch.ones(2, 3), method)
    if method in ("explicit_adams", "dopri5"):
        flags = f"ODE --ckpt {tiny_run} --sampling-method {method} --step-grid auto --out {tmp_path}/a.png"
        assert f"{method} " in refuses(sample.main, *flags.split())


def test_pairs_of_steps_ascend() -> None:
    for grid in (QUADRATIC, shifted_grid(0.3), shifted_grid(3.0)):
        for start, stop in ((0.0, 0.5), (0.5, 1.0), (0.001, 0.999)):
            assert all(low < high for low, high in pairwise(steps_between(grid, start, stop, 40)))
