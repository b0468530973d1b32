"""The robustness study at a toy size: what it does to samples, its continuation, its tables."""

from __future__ import annotations

import pytest
import torch

from benchmarks import robustness
from benchmarks.robustness import Disturbance, draw, round_weights
from metrics.classifiers import Classifier, ClassifierNetwork
from pipeline import Pipeline
from transport import ODE, create_transport


@pytest.fixture
def pipe(tiny_run):
    return Pipeline.load(tiny_run)


def test_undisturbed_samples_are_the_samplers(pipe):
    pipe.transport = create_transport(level_edges=(0.5,), aug_dim=8)
    samples, labels = draw(pipe, Disturbance(steps=5), 3, seed=4)
    torch.testing.assert_close(samples, pipe.latents(labels, ODE("heun2", 5), seed=4))


def test_noise_of_alpha_sigma_is_added_before_every_step(pipe, monkeypatch):
    """A field that is zero leaves the start and the noise: sigma = 1, 3/4, 1/2, 1/4 before four steps."""
    monkeypatch.setattr(type(pipe.model), "forward", lambda self, x, t, y, level: 0 * x)
    undisturbed, _ = draw(pipe, Disturbance(steps=4), 200, seed=0)
    disturbed, _ = draw(pipe, Disturbance(alpha=0.2, steps=4), 200, seed=0)
    added = disturbed - undisturbed
    assert added.std().item() == pytest.approx(0.2 * (1 + 0.75**2 + 0.5**2 + 0.25**2) ** 0.5, rel=0.03)


def test_weights_are_rounded_between_the_extremes_of_their_tensor(pipe):
    before = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    round_weights(pipe.model, 3)
    changed = set()
    for name, value in pipe.model.state_dict().items():
        if not torch.equal(value, before[name]):
            changed.add(name)
            assert len(value.unique()) <= 8
            half = (before[name].max() - before[name].min()) / 7 / 2
            assert (value - before[name]).abs().max() <= half * 1.001
    assert {name.split(".")[0] for name in changed} == {"blocks"}
    assert {name.split(".", 2)[2] for name in changed} == {
        f"{part}.weight" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    weights = {name: value.clone() for name, value in pipe.model.state_dict().items()}
    draw(pipe, Disturbance(steps=2, bits=2), 2, seed=0)  # works on a copy
    assert all(torch.equal(value, weights[name]) for name, value in pipe.model.state_dict().items())


@pytest.mark.slow
def test_the_study_makes_its_tables_and_continues(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    judge = Classifier("digits", ClassifierNetwork(10), (8, 8), 0.1)
    monkeypatch.setattr(robustness, "load_classifier", lambda *args: judge)
    flags = ["--aug-dims", "inf", "--seeds", "0", "1", "--steps", "2", "--batch-size", "8"]
    flags += ["--num-samples", "10", "--out", str(tmp_path)]
    cells = {"25": Disturbance(steps=2), "50": Disturbance(steps=3)}
    monkeypatch.setattr(
        robustness, "STUDIES", {"steps": ("steps", cells), "bits": ("bits", {"4": Disturbance(0, 2, 4)})}
    )
    robustness.main(flags)
    text = (tmp_path / "robustness.md").read_text()
    assert text.count("Frechet distance by") == text.count("Class accuracy by") == 2
    assert text.count("\n| inf") == 5
    assert text.count(" +- ") == 2 * (2 + 1) + 1
    assert (tmp_path / "robustness.png").stat().st_size > 0
    monkeypatch.setattr(robustness, "draw", None)  # nothing is made again
    robustness.main(flags)
    assert (tmp_path / "robustness.md").read_text() == text
