"""Elastic levels: how training draws them, what it measures of them, and the edges that budgets choose."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from closed_form import DATA, Network
from conftest import TINY, start_script
from scipy import stats
from sklearn.isotonic import isotonic_regression
from test_train import assert_same_state, checkpoint, losses

import sample
import sample_ddp
from experts import ExpertPatchDiT
from models import create_model
from pipeline import Pipeline
from runtime.logs import LevelMeter
from runtime.rng import draw_step
from train import train
from transport import ODE, SDE, Guidance, LevelErrors, PatchSchedule, Sampler, create_transport, edges_for
from transport.budgets import BINS, ascending
from weights.pretrained import convert, load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

ELASTIC = [*TINY, "--elastic", "0.5", "--sample-every", "0", "--ckpt-every", "3", "--log-every", "1"]


# -- Draws of training ---------------------------------------------------------------------------------------------

LAWS = {
    "three levels": ({"level_edges": (0.5, 0.75)}, [range(3)]),
    "two experts": ({"level_edges": (0.3, 0.7), "expert_levels": (1, 2)}, [range(1), range(1, 3)]),
    "a level left out": ({"level_edges": (0.0, 0.6)}, [range(3)]),
    "other times": (
        {"level_edges": (0.5, 0.75), "time_sampling": "logit-normal", "time_params": (-0.8, 0.8)},
        [range(3)],
    ),
}


@pytest.mark.parametrize(("name", "n"), list(zip(LAWS, (1, 8, 37, 16), strict=True)))
def test_levels_and_their_densities_of_t_are_as_stated(name: str, n: int) -> None:
    """One place of the batch alone, so that the draws are independent: chi-square over (level, tenth of t)."""
    settings, experts = LAWS[name]
    transport, p, draws = create_transport(**settings, elastic=0.6), 0.6, 1500
    generator, place = torch.Generator().manual_seed(n), n // 2
    t, level = [], []
    for _ in range(draws):
        times = transport.sample_times(n, generator)
        level.append(transport.schedule.sample_levels(times, generator)[place].item())
        t.append(times[place].item())
    cuts = np.linspace(0, 1, 11)
    cdf = (
        (lambda x: stats.norm.cdf((np.log(x / (1 - x)) + 0.8) / 0.8)) if "time_sampling" in settings else (lambda x: x)
    )
    edges, expected = (0.0, *settings["level_edges"], 1.0), np.zeros((3, 10))

    def mass(low: float, high: float) -> float:
        with np.errstate(divide="ignore"):
            return max(0.0, float(cdf(np.float64(high)) - cdf(np.float64(low)))) if low < high else 0.0

    for levels in experts:
        begin, end = edges[levels.start], edges[levels.stop]
        for each in levels:
            for tenth, (low, high) in enumerate(pairwise(cuts)):
                everywhere = mass(max(low, begin), min(high, end)) * p / len(levels)
                own = mass(max(low, edges[each]), min(high, edges[each + 1])) * (1 - p)
                expected[each, tenth] = everywhere + own
    assert expected.sum() == pytest.approx(1)
    found, _, _ = np.histogram2d(level, t, bins=[np.arange(4) - 0.5, cuts])
    assert not found[expected == 0].any()
    seen = expected > 0
    assert stats.chisquare(found[seen], draws * expected[seen] / expected[seen].sum()).pvalue > 1e-4
    assert transport.level_probabilities() == pytest.approx(expected.sum(1).tolist(), abs=1e-6)


def test_the_levels_of_a_batch_and_of_its_parts_are_stratified() -> None:
    """Counts vary far less than those of independent samples do."""
    transport, counts, parts = create_transport(level_edges=(0.5,), elastic=0.5), [], []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        level = transport.schedule.sample_levels(transport.sample_times(128, generator), generator)
        counts.append(level.sum().item())
        parts += [part.sum().item() for part in level.chunk(4)]  # of four processes
    assert np.mean(counts) == pytest.approx(64, abs=1)
    assert np.std(counts) < 0.4 * math.sqrt(128 / 4)
    assert np.std(parts) < 0.7 * math.sqrt(32 / 4)


@pytest.mark.parametrize("rank", range(2))
def test_levels_do_not_depend_on_the_processes_and_none_are_drawn_at_zero(rank: int) -> None:
    settings, shape = {"seed": 3, "batch_size": 32, "dropout": 0.1}, (1, 2, 2)
    drawn = {}
    for elastic in (0.0, 0.7):
        transport = create_transport(level_edges=(0.5,), elastic=elastic)
        drawn[elastic] = draw_step(5, range(160, 192), shape, transport, **settings)
        part = draw_step(5, range(160 + 16 * rank, 176 + 16 * rank), shape, transport, **settings)
        for whole, own in zip(drawn[elastic], part, strict=True):
            assert torch.equal(whole.chunk(2)[rank], own)
    for name, plain, elastic in zip(("t", "level", "x0", "drop"), drawn[0.0], drawn[0.7], strict=True):
        assert torch.equal(plain, elastic) == (name != "level")
    assert torch.equal(drawn[0.0][1], (drawn[0.0][0] > 0.5).long())
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    PatchSchedule((0.5,)).sample_levels(torch.rand(8), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("many_sizes", [False, True])
def test_the_loss_is_that_of_each_sample_at_its_level(joint: bool, many_sizes: bool) -> None:
    transport = create_transport(level_edges=(0.5, 0.75), elastic=0.9)
    g = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 12, 1, 4, 4, generator=g)
    t = transport.sample_times(12, g)
    level = transport.schedule.sample_levels(t, g)
    assert (level != transport.schedule.level_at(t)).sum() >= 4

    def model(x, t, y=None, level=0):
        if isinstance(level, list):
            return [model(*group[:2], level=group[2]) for group in zip(x, t, level, strict=True)]
        return (level + 1) * x.tanh() + t.reshape(-1, 1, 1, 1)

    ends = [list(x1.unbind()), list(x0.unbind())] if many_sizes else [x1, x0]
    if many_sizes:
        ends = [[x[..., : 4 - i % 2] for i, x in enumerate(each)] for each in ends]
    found = transport.training_losses(model, ends[0], t=t, x0=ends[1], joint=joint, level=level)
    assert torch.equal(found["level"], level)
    for i in range(12):
        a, b, s = ends[0][i], ends[1][i], t[i]
        output = (level[i] + 1) * (s * a + (1 - s) * b).tanh() + s
        assert found["loss"][i].item() == pytest.approx((output - (a - b)).square().mean().item(), rel=1e-5)


def test_ends_that_are_singular_for_any_level_are_left_out() -> None:
    """A coarse level that predicts data has an infinite velocity at t = 1, where elastic training takes it, too."""
    plain, elastic = (
        create_transport(prediction="data velocity", level_edges=(0.5,), elastic=p).train_interval for p in (0, 0.5)
    )
    assert (plain, elastic) == ((0.0, 1.0), (1e-3, 1 - 1e-3))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"elastic": 1.5, "level_edges": (0.5,)}, "elastic is a probability"),
        ({"elastic": 0.5}, "leave elastic out"),
        ({"elastic": 0.5, "level_edges": (0.5,), "expert_levels": (1, 1)}, "leave elastic out"),
        (
            {"expert_levels": (2, 2), "level_edges": (0.5,)},
            "experts of [2, 2] levels, but the edges make 2: give 3 level edge(s)",
        ),
        ({"elastic": 0.5, "level_edges": (0.7, 0.5)}, "level edges must ascend between 0 and 1"),
        ({"elastic": 0.5, "level_edges": (-0.1, 0.5)}, "level edges must ascend between 0 and 1"),
        ({"elastic": 0.5, "level_edges": (math.nan,)}, "level edges must ascend between 0 and 1"),
    ],
)
def test_elastic_settings_that_do_not_fit_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        create_transport(**settings)


# -- Sampling with any edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("edges", [(0.2, 0.6), (0.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.4, 0.4), (0.3, 1.0)])
def test_one_field_at_all_levels_has_the_same_samples_at_any_edges(edges: tuple[float, float]) -> None:
    oracle, x0 = Network(DATA, "Linear", "velocity", 3), torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    x0 = x0.double()
    at = {}
    for each in ((0.5, 0.75), edges):
        transport = create_transport(level_edges=each, elastic=0.5)
        at[each] = Sampler(transport).sample_ode(oracle, x0, "dopri5", atol=1e-9, rtol=1e-9)
        pieces = transport.schedule.intervals(0.0, 1.0)
        assert sum(transport.schedule.share_steps(20, pieces)) == 20
        assert all(transport.schedule.edges[piece.level] <= piece.start for piece in pieces)
    torch.testing.assert_close(at[edges], at[0.5, 0.75], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(at[edges], DATA.flow("Linear", x0, 0.0, 1.0), atol=1e-6, rtol=1e-6)


def test_a_level_without_time_has_no_steps_of_its_own() -> None:
    schedule = PatchSchedule((0.0, 0.5), elastic=0.5)
    with pytest.raises(ValueError, match="level 0 has no time for its steps"):
        schedule.share_steps((5, 5, 5), schedule.intervals(0.0, 1.0))


# -- Edges for a budget ----------------------------------------------------------------------------------------------


def table(*excess: object, samples: float = 100.0) -> LevelErrors:
    """Errors 1 + excess(t) of coarse levels and 1 of the finest one."""
    t = (np.arange(BINS) + 0.5) / BINS
    rows = np.array([*(1 + each(t) for each in excess), np.ones(BINS)])
    return LevelErrors(samples * rows, np.full_like(rows, samples))


COSTS = np.array([0.25, 0.5, 1.0])
SMOOTH = table(lambda t: 0.5 * t**3, lambda t: 0.2 * t**3)


def lengths(edges: tuple[float, ...]) -> float:
    return float((np.diff([0.0, *edges, 1.0]) * COSTS).sum())


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.77, 0.95])
def test_edges_cost_the_budget_and_are_where_all_levels_exceed_by_the_same_margin(budget: float) -> None:
    edges = edges_for(budget, SMOOTH, [range(3)], [0, 1], lengths)
    assert lengths(edges) == pytest.approx(budget, abs=1e-3)
    t, at = (np.arange(BINS) + 0.5) / BINS, np.array(edges)
    margins = [np.interp(edge, t, factor * t**3) for edge, factor in zip(at, (0.5, 0.2), strict=True)]
    if t[0] < edges[0] and edges[1] < t[-1]:
        assert margins[0] == pytest.approx(margins[1], rel=0.01)
    assert 0 < edges[0] < edges[1] <= 1


def test_the_ends_of_the_range_are_a_level_alone_and_beyond_is_refused() -> None:
    assert edges_for(1, SMOOTH, [range(3)], [0, 1], lengths) == (0, 0)
    assert edges_for(0.25, SMOOTH, [range(3)], [0, 1], lengths) == (1, 1)
    for budget in (0.2, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"here from 0.25 \(the coarsest level alone\) to 1, got"):
            edges_for(budget, SMOOTH, [range(3)], [0, 1], lengths)


def test_errors_are_made_to_ascend_as_scikit_learn_does_it() -> None:
    g = np.random.default_rng(0)
    for length in range(1, BINS + 1):
        values, weights = g.normal(size=length).round(1), g.uniform(0.1, 5, length)  # with ties
        np.testing.assert_allclose(
            ascending(values, weights), isotonic_regression(values, sample_weight=weights), atol=1e-12
        )


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_the_table_leaves_edges_ascending_and_the_budget_met(seed: int) -> None:
    """A level that is never worse, ties, and bins without samples included."""
    g = np.random.default_rng(seed)
    sums, counts = g.uniform(0.5, 1, (3, BINS)), g.integers(0, 3, (3, BINS)).astype(float)
    counts[:, seed] = 1.0
    if seed == 4:
        sums = np.ones_like(sums)
    errors = LevelErrors(sums * counts, counts)
    for budget in (0.26, 0.4, 0.6, 0.9):
        edges = edges_for(budget, errors, [range(3)], [0, 1], lengths)
        assert list(edges) == sorted(edges)
        assert lengths(edges) == pytest.approx(budget, abs=0.02)


def test_experts_choose_each_for_itself_at_one_margin() -> None:
    """Both parts have the same curve, so the margin is reached at the same excess, and no level leaves its expert."""
    errors = table(lambda t: t, lambda t: 0 * t, lambda t: t)
    costs = np.array([0.5, 1.0, 0.5, 1.0])
    for budget in (0.55, 0.7, 0.9):
        edges = edges_for(
            budget, errors, [range(2), range(2, 4)], [0, 0.5, 1], lambda e: float((np.diff([0, *e, 1]) * costs).sum())
        )
        cheap = 2 * (1 - budget)  # the share of time of the two coarse levels together, whose excess is t
        assert edges == pytest.approx((min(cheap, 0.5), 0.5, max(cheap, 0.5)), abs=2e-3)


def test_levels_that_never_met_and_tables_of_another_shape_are_refused() -> None:
    errors = LevelErrors([[1.0] + 9 * [0.0], 9 * [0.0] + [1.0]], [[1.0] + 9 * [0.0], 9 * [0.0] + [1.0]])
    with pytest.raises(ValueError, match="have not met at any time in training: train longer"):
        edges_for(0.5, errors, [range(2)], [0, 1], lengths)
    with pytest.raises(ValueError, match="tables of 10 columns"):
        LevelErrors([[1.0]], [[1.0]])


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """Three levels with random weights on 8x8 pixels, and a table of errors."""
    torch.manual_seed(0)
    model = create_model("PPF-T-3", input_size=8, in_channels=1, num_classes=5).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    transport = create_transport(level_edges=(0.5, 0.75), elastic=0.5)
    return Pipeline(model, transport, name="PPF-T-3", level_errors=SMOOTH)


@pytest.mark.parametrize(
    ("budget", "solver", "guidance"),
    [
        (0.45, ODE(num_steps=20), Guidance(1.0)),
        (0.3, ODE("heun2", 11), Guidance((1.0, 1.5, 2.0))),
        (0.7, ODE("dpmpp_2m", 25), Guidance(3.0, interval=(0.25, 0.9))),
        (0.4, SDE(num_steps=30), Guidance(1.5)),
    ],
)
def test_budgets_are_met_within_a_step(pipe: Pipeline, budget: float, solver: ODE | SDE, guidance: Guidance) -> None:
    """Counted while samples are drawn, and compared with the finest level alone."""
    counted, finest = pipe.at_budget(budget, solver, guidance).counted(), pipe.finest_only().counted()
    x1 = counted.latents([1], solver, guidance)
    finest.latents([1], solver, Guidance(guidance.scales[-1], interval=guidance.interval))
    whole = finest.model.gmacs(1)
    step = (2 if solver.method == "heun2" else 1) * (1 + (guidance.scales[-1] != 1)) * pipe.model.macs(2) / 1e9
    assert abs(counted.model.gmacs(1) - budget * whole) <= step
    assert x1.isfinite().all()


def test_a_network_without_a_table_has_no_budgets(pipe: Pipeline) -> None:
    other = Pipeline(pipe.model, pipe.transport, name="x")
    with pytest.raises(ValueError, match="x does not tell its levels' errors"):
        other.at_budget(0.5)


def test_images_at_a_budget_are_those_at_its_edges(pipe: Pipeline) -> None:
    solver, guidance = ODE(num_steps=10), Guidance(2.0)
    at = pipe.at_budget(0.5, solver, guidance)
    edges = at.transport.schedule.level_edges
    assert 0 < edges[0] < edges[1] < 1
    other = Pipeline(pipe.model, create_transport(level_edges=edges), name="")
    expected = other.images([1, 2], solver, guidance, seed=4)
    assert torch.equal(pipe.images([1, 2], solver, guidance, seed=4, budget=0.5), expected)
    assert torch.equal(
        pipe.images([1, 2], solver, guidance, budget=1), pipe.finest_only().images([1, 2], solver, guidance)
    )
    assert pipe.transport.schedule.level_edges == (0.5, 0.75)


@pytest.mark.parametrize(
    ("budget", "solver", "words"),
    [
        (0.1, ODE(), "a budget is a share of the finest level's arithmetic"),
        (1.2, ODE(), "to 1, got 1.2"),
        (0.5, ODE("dopri5"), "a method of fixed steps"),
        (0.5, ODE(num_steps=(5, 5, 5)), "one number for all levels"),
    ],
)
def test_budgets_that_cannot_be_are_refused(pipe: Pipeline, budget: float, solver: ODE, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        pipe.at_budget(budget, solver)


# -- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elastic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an elastic PPF-T-2 after 6 steps on the digits, with a checkpoint every 3."""
    run_dir = tmp_path_factory.mktemp("runs") / "elastic"
    train([*ELASTIC, "--run-dir", str(run_dir), "--max-steps", "6"])
    return run_dir


def test_an_interrupted_run_goes_on_with_its_table(elastic_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(elastic_run, again)
    for path in (again / "checkpoints").glob("0000006.pt*"):
        path.unlink()
    train([*ELASTIC, "--run-dir", str(again), "--max-steps", "6"])
    first, second = checkpoint(elastic_run, 6), checkpoint(again, 6)
    for part in ("model", "ema", "opt", "level_errors", "step"):
        assert_same_state(first[part], second[part])
    assert losses(again) == losses(elastic_run)
    errors = LevelErrors(**first["level_errors"])
    decay = 1 - 1 / LevelMeter.WINDOW
    assert np.sum(errors.counts) == pytest.approx(32 * sum(decay**k for k in range(6)), rel=1e-5)
    assert (elastic_run / "levels.png").stat().st_size > 1000


@pytest.mark.slow
def test_gradient_accumulation_leaves_the_table(elastic_run: Path, tmp_path: Path) -> None:
    flags = ["--run-dir", str(tmp_path / "run"), "--max-steps", "3", "--gradient-accumulation-steps", "2"]
    train([*ELASTIC, *flags])
    for part in ("sums", "counts"):
        found, expected = (checkpoint(run, 3)["level_errors"][part] for run in (tmp_path / "run", elastic_run))
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_the_meter_has_the_errors_of_each_level_and_tenth() -> None:
    meter, g = LevelMeter(2, torch.device("cpu")), torch.Generator().manual_seed(0)
    meter.WINDOW = math.inf
    t, level, errors = torch.rand(500, generator=g), torch.randint(2, (500,), generator=g), torch.rand(500, generator=g)
    t[0] = 1.0
    for part in torch.arange(500).chunk(7):
        meter.add({"velocity_error": errors[part], "level": level[part]}, t[part])
    means = meter.read().means
    for each in range(2):
        for tenth in range(10):
            mine = errors[(level == each) & ((10 * t).floor().clamp(max=9) == tenth)]
            assert means[each][tenth] == pytest.approx(mine.mean().item(), rel=1e-5)


def test_a_run_without_elastic_levels_has_no_table(tiny_run: Path) -> None:
    assert "level_errors" not in checkpoint(tiny_run, 20)
    assert not (tiny_run / "levels.png").exists()
    assert load_pretrained(tiny_run).level_errors is None


def test_a_converted_file_keeps_the_table(elastic_run: Path, tmp_path: Path) -> None:
    expected = LevelErrors(**checkpoint(elastic_run, 6)["level_errors"])
    for name in ("a.pt", "a.safetensors"):
        convert(elastic_run, tmp_path / name, "ours")
        pipe = Pipeline.load(tmp_path / name)
        assert (pipe.level_errors, pipe.transport.schedule.elastic) == (expected, 0.5)


def test_edges_that_were_not_trained_are_named(tiny_run: Path, elastic_run: Path, capsys) -> None:
    capsys.readouterr()
    Pipeline.load(tiny_run, level_edges=(0.7,))
    assert f"{tiny_run} was not trained with level 0 for t in [0.5, 0.7]" in capsys.readouterr().out
    Pipeline.load(tiny_run, level_edges=(0.3,))
    assert "level 1 for t in [0.3, 0.5]" in capsys.readouterr().out
    Pipeline.load(tiny_run, level_edges=(0.5,))
    Pipeline.load(elastic_run, level_edges=(0.9,))
    Pipeline.load(elastic_run, level_edges=(1.0,))
    assert not capsys.readouterr().out


def test_a_row_of_images_for_each_budget(elastic_run: Path, tmp_path: Path, capsys) -> None:
    out, labels = tmp_path / "grid.png", ["--class-labels", "3", "1", "4", "--num-sampling-steps", "6"]
    sample.main(["ODE", "--ckpt", str(elastic_run), *labels, "--out", str(out), "--budget", "1", "0.6"])
    printed = capsys.readouterr().out
    assert "budget 1: --level-edges 0\n" in printed
    assert 0 < float(re.search(r"budget 0.6: --level-edges (\S+)", printed)[1]) < 1
    gmacs = {row[1]: float(row[3]) for line in printed.splitlines() if len(row := line.split()) == 5}
    assert gmacs["0.6"] == pytest.approx(0.6 * gmacs["1"], abs=gmacs["1"] / 6)
    with sample.Image.open(out) as grid:
        assert (grid.width > 3 * 64, grid.height > 2 * 64, grid.height < 3 * 64) == (True, True, True)


def test_many_samples_at_a_budget(elastic_run: Path, tmp_path: Path) -> None:
    flags = ["--num-fid-samples", "4", "--num-sampling-steps", "6", "--sample-dir", str(tmp_path), "--no-png"]
    sample_ddp.main(["ODE", "--ckpt", str(elastic_run), *flags, "--budget", "0.6"])
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "-ab2-6-budget-0.6-" in folder.name


@pytest.mark.slow
def test_a_budget_is_met_with_measured_steps(elastic_run: Path, tmp_path: Path, capsys) -> None:
    """A grid moves steps between the levels: the edges are chosen with it. It is measured once for all budgets."""
    run = shutil.copytree(elastic_run, tmp_path / "run")
    flags = ["--num-fid-samples", "4", "--num-sampling-steps", "12", "--sample-dir", str(tmp_path / "samples")]
    flags += ["--cfg-scales", "1"]
    gmacs = {}
    for budget in ("0.6", "1"):
        sample_ddp.main(["ODE", "--ckpt", str(run), *flags, "--no-png", "--step-grid", "auto", "--budget", budget])
        (folder,) = (tmp_path / "samples").glob(f"*-ab2-12-auto-budget-{budget}-*/")
        gmacs[budget] = json.loads((folder / "settings.json").read_text())["gmacs_per_image"]
    assert gmacs["0.6"] == pytest.approx(0.6 * gmacs["1"], abs=gmacs["1"] / 12)
    capsys.readouterr()
    flags = ["--num-sampling-steps", "12", "--cfg-scales", "1", "--class-labels", "3", "--out", str(tmp_path / "a.png")]
    sample.main(["ODE", "--ckpt", str(run), *flags, "--step-grid", "auto", "--budget", "1", "0.6"])
    printed = capsys.readouterr().out
    found = [
        float(line.split()[-2]) for line in printed.splitlines() if line.startswith("budget") and "edges" not in line
    ]
    assert found == pytest.approx([gmacs["1"], gmacs["0.6"]], abs=6e-4)
    assert len(list(run.rglob("*-grid-*.json"))) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "0.4"], "was trained at its level edges alone"),
        (["--budget", "0.4", "--level-edges", "0.4"], "--budget chooses the level edges"),
        (["--budget", "0.4", "--likelihood", "--data-path", "digits"], "--budget has no effect with --likelihood"),
        (["--budget", "0"], "0 is not above 0"),
    ],
)
def test_budgets_of_a_checkpoint_without_elastic_levels_are_refused(
    flags: list[str], words: str, tiny_run: Path, refuses
) -> None:
    assert words in refuses(sample.main, "ODE", "--ckpt", tiny_run, *flags)


@pytest.mark.parametrize("script", [sample, pytest.param(sample_ddp, marks=pytest.mark.slow)])
def test_a_budget_out_of_range_is_refused(script, elastic_run: Path, tmp_path: Path, refuses) -> None:
    where = ["--out", tmp_path / "x.png"] if script is sample else ["--sample-dir", tmp_path]
    assert "here from" in refuses(script.main, "ODE", "--ckpt", elastic_run, *where, "--budget", "0.01")
    assert not list(tmp_path.iterdir())


def test_elastic_flags_that_make_no_run_are_refused(elastic_run: Path, tmp_path: Path, refuses) -> None:
    run_dir = ["--run-dir", tmp_path / "run", "--max-steps", "3"]
    assert "between 0 and 1" in refuses(train, *TINY, *run_dir, "--elastic", "1.5")
    assert "leave elastic out" in refuses(train, *TINY, *run_dir, "--model", "SiT-T/2", "--elastic", "0.5")
    other = ["--run-dir", elastic_run, "--max-steps", "9", "--elastic", "0.3"]
    assert "--elastic is 0.5" in refuses(train, *TINY, *other)


@pytest.mark.slow
def test_experts_meet_a_budget_within_each(tmp_path: Path) -> None:
    """Trained together and alone: the coarse level of the one that has two serves no time of the other."""
    flags = [
        *ELASTIC[:-4],
        "--expert-edges",
        "0.3",
        "--model",
        "PPF-T-2",
        "--level-edges",
        "0.6",
        "--sample-every",
        "0",
    ]
    short = ["--max-steps", "2", "--global-batch-size", "8"]
    train([*flags, *short, "--run-dir", str(tmp_path / "both")])
    train([*flags, *short, "--run-dir", str(tmp_path / "1"), "--expert", "1"])
    train([*flags[:-2], *short, "--elastic", "0", "--run-dir", str(tmp_path / "0"), "--expert", "0"])
    for source in (tmp_path / "both", [tmp_path / "0", tmp_path / "1"]):
        pipe = Pipeline.load(source)
        assert isinstance(pipe.model, ExpertPatchDiT)
        assert pipe.transport.schedule.experts == [range(1), range(1, 3)]
        counts = np.array(pipe.level_errors.counts)
        assert not counts[0, 4:].any()
        assert not counts[1:, :3].any()
        for budget, edge in ((pipe.model.macs(0) / pipe.model.macs(2) * 0.7 + 0.3, 1.0), (1.0, 0.3)):
            if edge == 1.0:  # all is coarse
                budget = 1.0
            edges = pipe.at_budget(budget, ODE(num_steps=10)).transport.schedule.level_edges
            assert edges[0] == 0.3
            assert 0.3 <= edges[1] <= 1
        assert pipe.at_budget(0.5, ODE(num_steps=10)).images([1], ODE(num_steps=10)).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("shard", [[], ["--shard"]])
def test_two_processes_have_the_table_of_one(shard: list[str], elastic_run: Path, tmp_path: Path) -> None:
    flags = [*ELASTIC, "--run-dir", tmp_path / "run", "--max-steps", 3, *shard]
    done = start_script("train.py", *flags, processes=2)
    if shard and "newer torch" in done.stderr:
        pytest.skip("gloo of this torch takes sums for means")
    assert done.returncode == 0, done.stderr
    done = start_script("train.py", *flags[: -1 - len(shard)], 6, *shard, processes=2)  # and after an interruption
    assert done.returncode == 0, done.stderr
    for step in (3, 6):
        for part in ("sums", "counts"):
            found, expected = (checkpoint(run, step)["level_errors"][part] for run in (tmp_path / "run", elastic_run))
            np.testing.assert_allclose(found, expected, rtol=1e-3)
