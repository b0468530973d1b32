"""Guidance whose null branch runs at a coarser level: the formula, its cost, what it leaves as it was, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from closed_form import DATA, Network
from test_sample import cost

import sample
import sample_ddp
from experts import ExpertPatchDiT
from models import PyramidalPatchDiT, create_model
from pipeline import Pipeline
from transport import ODE, SDE, ClassifierFreeGuidance, Guidance, Interval, Sampler, create_transport
from transport.wrappers import EvaluationCounter

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = [3, 0, 4]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """Three levels with random weights on 8x8 pixels."""
    torch.manual_seed(0)
    model = create_model("PPF-T-3", input_size=8, in_channels=1, num_classes=5).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Pipeline(model, create_transport(level_edges=(0.5, 0.75)), name="PPF-T-3")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 8, 8, generator=generator), torch.tensor([0.2, 0.6, 0.9]), torch.tensor(LABELS)


class Recorded:
    """A network that remembers the levels of its calls."""

    def __init__(self, model: PyramidalPatchDiT) -> None:
        self.model, self.num_levels, self.calls = model, model.num_levels, []

    def __call__(self, x, t, y, level=0):
        self.calls.append(level)
        return self.model(x, t, y, level)


# -- The formula ---------------------------------------------------------------------------------------------------


def test_the_null_label_is_evaluated_at_the_null_level(pipe: Pipeline) -> None:
    x, t, y = inputs()
    for level, null_level in ((2, 0), (2, 1), (1, 0)):
        null = pipe.model(x, t, torch.full_like(y, 5), level=null_level)
        conditional = pipe.model(x, t, y, level=level)
        network = Recorded(pipe.model)
        scales = [3.0 if other == level else 1.0 for other in range(3)]
        guided = ClassifierFreeGuidance(network, scales, 5, null_level=null_level)
        for found in (guided(x, t, y, level=level), guided.on_interval(Interval(level, 0.8, 0.9))(x, t, y=y)):
            torch.testing.assert_close(found, conditional + 2 * (conditional - null), atol=1e-5, rtol=1e-5)
        assert network.calls == [[level, null_level]] * 2  # both labels in one pass


def test_channels_and_interval_hold_at_any_null_level(pipe: Pipeline) -> None:
    x, t, y = inputs()
    cheap, plain = (pipe.model(x, t, label, level=level) for label, level in ((torch.full_like(y, 5), 0), (y, 2)))
    guided = ClassifierFreeGuidance(pipe.model, 3.0, 5, channels=1, interval=(0.5, 0.8), null_level=0)
    found = guided(x, t, y, level=2)
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], (cheap + 3 * (plain - cheap))[1], atol=1e-5, rtol=1e-5)
    wide = create_model("PPF-T-3", input_size=8, in_channels=3, num_classes=5).eval()
    torch.nn.init.normal_(wide.final_layer.linear[2].weight)
    x = x.expand(-1, 3, -1, -1)
    found = ClassifierFreeGuidance(wide, 3.0, 5, channels=2, null_level=0)(x, t, y, level=2)
    assert torch.equal(found[:, 2], wide(x, t, y, level=2)[:, 2])


@pytest.mark.parametrize(("scales", "null_level"), [((2.0, 1.0, 1.0), 0), ((1.0, 2.0, 1.0), 1), ((1.0, 1.0, 3.0), 2)])
def test_the_samples_own_level_is_plain_guidance_bit_for_bit(scales, null_level: int, pipe: Pipeline) -> None:
    solver, plain, cheap = ODE("heun2", 6), Guidance(scales), Guidance(scales, null_level=null_level)
    assert torch.equal(pipe.latents(LABELS, solver, cheap), pipe.latents(LABELS, solver, plain))
    finest = pipe.finest_only()
    assert torch.equal(
        finest.latents(LABELS, solver, Guidance(2.0, null_level=0)), finest.latents(LABELS, solver, Guidance(2.0))
    )


class OwnMeans:
    """The exact network of Gaussian data, whose mean the label moves; each level has a prediction of its own."""

    def __init__(self, *predictions: str) -> None:
        self.num_levels, self.predictions = len(predictions), predictions

    def __call__(self, x, t, y, level=0):
        if isinstance(level, list):
            return [self(*group) for group in zip(x, t, y, level, strict=True)]
        found = torch.empty_like(x)
        for label in y.unique():
            data = copy.copy(DATA)
            data.mean = DATA.mean + 0.1 * label
            network, rows = Network(data, "Linear", self.predictions[level]), y == label
            found[rows] = network(x[rows], t[rows])
        return found


@pytest.mark.parametrize("predictions", ["data velocity", "noise data", "velocity score"])
def test_what_the_null_level_predicts_does_not_matter(predictions: str) -> None:
    x0, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.tensor([0, 1] * 3)
    samples = []
    for words, null_level in (("velocity velocity", None), (predictions, 0), (predictions, None)):
        transport = create_transport(prediction=words, level_edges=(0.5,), sample_eps=1e-3)
        guided = ClassifierFreeGuidance(OwnMeans(*words.split()), 2.0, 7, null_level=null_level)
        samples.append(Sampler(transport).sample_ode(guided, x0, num_steps=12, y=y))
        generators = [torch.Generator().manual_seed(i) for i in range(6)]
        samples[-1] = torch.cat(
            [samples[-1], Sampler(transport).sample_sde(guided, x0, num_steps=9, y=y, generator=generators)]
        )
    torch.testing.assert_close(samples[1], samples[0], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(samples[2], samples[0], atol=1e-9, rtol=1e-9)


# -- The cost ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_guided_fine_step_of_xl_costs_what_its_levels_do() -> None:
    with torch.device("meta"):
        model = create_model("PPF-XL-2")
        x, t, y = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for null_level, gmacs in ((None, 237.2), (0, 147.6)):
        counter = EvaluationCounter(model)
        guided = Guidance(2.0, null_level=null_level).of(counter)
        guided.on_interval(Interval(1, 0.5, 1.0))(x, t, y=y)
        assert counter.gmacs(1) == pytest.approx(gmacs, abs=0.1)
        assert counter.nfe(1) == 2


def test_check_counts_the_evaluations_that_sampling_makes(pipe: Pipeline) -> None:
    solver, guidance = ODE("heun2", (2, 3, 4)), Guidance((2.0, 1.0, 3.0), interval=(0.2, 0.9), null_level=0)
    for each in (solver, SDE(num_steps=10)):
        counted = pipe.counted()
        counted.latents(LABELS, each, guidance)
        assert [3 * rows for rows in pipe.check(each, guidance).rows] == counted.model.rows
    assert pipe.check(ODE("euler", (1, 1, 4)), Guidance((1.0, 1.0, 3.0), null_level=0)).rows == [1 + 4, 1, 4]


def test_sample_reports_the_cost(tiny_run: Path, tmp_path: Path, capsys) -> None:
    flags = f"ODE --ckpt {tiny_run} --num-sampling-steps 4 6 --cfg-scales 1 2 --compare-finest --out {tmp_path}/a.png"
    sample.main([*flags.split(), "--null-level", "0"])
    text, model = capsys.readouterr().out, Pipeline.load(tiny_run).model
    assert "training showed level 0 times up to 0.5 alone" in text
    nfe, gmacs = cost(text, "pyramid")
    assert nfe == 4 + 6 * 2
    assert gmacs == pytest.approx((10 * model.macs(0) + 6 * model.macs(1)) / 1e9, abs=6e-4)
    assert cost(text, "finest level only")[1] == pytest.approx(20 * model.macs(1) / 1e9, abs=6e-4)


def test_sets_of_samples_do_not_mix(tiny_run: Path, tmp_path: Path) -> None:
    flags = f"ODE --ckpt {tiny_run} --num-fid-samples 2 --num-sampling-steps 4 --sample-dir {tmp_path}".split()
    sample_ddp.main(flags)
    sample_ddp.main([*flags, "--null-level", "0"])
    plain, cheap = sorted(tmp_path.glob("*/settings.json"), key=lambda path: len(path.parent.name))
    assert cheap.parent.name == plain.parent.name.replace("-cfg-1-3", "-cfg-1-3-null-0")
    assert json.loads(cheap.read_text())["null_level"] == 0
    assert json.loads(cheap.read_text())["gmacs_per_image"] < json.loads(plain.read_text())["gmacs_per_image"]


# -- Refusals ------------------------------------------------------------------------------------------------------


def test_a_null_level_that_cannot_be_is_refused(pipe: Pipeline, tiny_run: Path, tmp_path: Path, refuses) -> None:
    with pytest.raises(ValueError, match="number of a level"):
        Guidance(2.0, null_level=-1)
    for scales, null_level, words in (
        ((1.0, 2.0, 1.0), 2, "null level 2 is finer than level 1, which is guided with scale 2: give null level 1, or"),
        (2.0, 1, "null level 1 is finer than level 0, which is guided with scale 2"),
        (1.0, 3, r"null level 3 is none of the 3 level\(s\): 0 is the coarsest"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe.check(ODE(), Guidance(scales, null_level=null_level))
    flags = f"ODE --ckpt {tiny_run} --cfg-scales 2 --null-level 1 --out {tmp_path}/a.png"
    assert "null level 1 is finer than level 0" in refuses(sample.main, *flags.split())


def test_the_null_level_of_another_expert_is_refused() -> None:
    fields = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    parts = [PyramidalPatchDiT(patch_sizes=sizes, **fields) for sizes in ([4], [4, 2])]
    pipe = Pipeline(ExpertPatchDiT(parts, [0.5]), create_transport(level_edges=(0.5, 0.75)))
    with pytest.raises(ValueError, match="null level 0 belongs to another expert than level 1, which is guided"):
        pipe.check(ODE(), Guidance(2.0, null_level=0))
    assert pipe.check(ODE("euler", (1, 1, 1)), Guidance((1.0, 2.0, 2.0), null_level=1)).rows == [1, 3, 1]
