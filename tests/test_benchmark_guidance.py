"""The benchmarks of cheap guidance and of step grids, at a toy size."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import grids, guidance, solvers
from benchmarks.recipes import RECIPES, VelocityNetwork, open_network, transport_of
from pipeline import Pipeline
from transport import ODE, Guidance

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def little_work(monkeypatch) -> None:
    for name, value in {"SAMPLES": 5, "DIMENSIONS": 2, "MODES": 3, "IMAGES": 2, "REFERENCE_STEPS": 8}.items():
        monkeypatch.setattr(solvers, name, value)
    monkeypatch.setattr(grids, "GRID_SAMPLES", 4)


def test_the_weak_level_guides_by_the_samples_label_at_level_0(tiny_run: Path) -> None:
    pipe, labels = Pipeline.load(tiny_run), torch.arange(3)
    found, _, cost = guidance.draw(pipe, "weak-level", ODE("euler", (1, 1)), Guidance(2.0, null_level=0), 3)
    x, y, t = pipe.latents(labels, ODE("euler", (1, 1)), Guidance(2.0), levels=range(1)), labels, torch.full((3,), 0.5)
    fine, coarse = (pipe.model(x, t, y, level=level) for level in (1, 0))
    x1 = x + 0.5 * (coarse + 2 * (fine - coarse))
    torch.testing.assert_close(found[:, :1].float(), (x1 * 127.5 + 127.5).round().clamp(0, 255), atol=1.0, rtol=0)
    assert cost.rows == [9, 3]  # two labels at level 0, then a sample of each level


def test_a_network_of_the_study_of_quality_is_read(tmp_path: Path) -> None:
    for name in ("ppf2", "ppf2-coarse-data", "ppf2-elastic"):
        recipe = RECIPES[f"{name}-equal-cost"]
        network = VelocityNetwork(recipe, 8, 10, transport_of(recipe)).eval()
        torch.nn.init.normal_(network.inner.final_layer.linear[0].weight)
        file = tmp_path / "8x8" / f"{name}-3" / "000004.pt"
        file.parent.mkdir(parents=True)
        torch.save(network.state_dict(), file)
        pipe = open_network(file)
        x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.4]), torch.tensor([1, 2])
        assert torch.equal(pipe.model(x, t, y, level=0), network(x, t, y, level=0))
        images, labels, _ = guidance.draw(pipe, "cfg", ODE(num_steps=2), Guidance(2.0), 4)
        assert images.shape == (4, 3, 8, 8)
        assert labels.tolist() == [0, 1, 2, 3]


def test_settings_are_measured_once_and_the_best_is_marked(tiny_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    def classifier(images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(pool=images.float().flatten(2).mean(2), probabilities=torch.eye(10)[: len(images)])

    monkeypatch.setattr(guidance, "load_classifier", lambda *_, **__: classifier)
    flags = f"digits --ckpt {tiny_run} --kinds cfg null-level --scales 1.5 3 --intervals none".split()
    flags += f"--num-samples 20 --steps 2 --out {tmp_path}".split()
    monkeypatch.setattr(
        guidance,
        "Judge",
        lambda *_: lambda images, _: {"distance": images.float().mean().item(), "distance_error": 0.1, "accuracy": 0.5},
    )
    guidance.main(flags)
    table = (tmp_path / "guidance.md").read_text()
    assert [line.count("**") for line in table.splitlines()[2:]].count(2) == 3  # none, and one of each kind
    monkeypatch.setattr(guidance, "draw", None)
    guidance.main(flags)
    assert (tmp_path / "guidance.md").read_text() == table


def test_a_network_of_one_level_has_cfg_alone(tiny_run: Path, tmp_path: Path, monkeypatch, refuses) -> None:
    one = Pipeline.load(tiny_run).finest_only()
    monkeypatch.setattr(guidance, "open_network", lambda _: one)
    words = refuses(guidance.main, "digits", "--ckpt", tiny_run, "--out", tmp_path)
    assert "has one level, where all guidance is cfg: give --kinds cfg" in words


@pytest.mark.slow
def test_grids_are_compared_with_equal_steps(tiny_run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(grids, "PATHS", ["VP"])
    monkeypatch.setattr(grids, "METHODS", ("euler",))
    monkeypatch.setattr(grids, "NFE", (5, 20, 30))
    grids.main(["--ckpt", str(tiny_run)])
    text = capsys.readouterr().out
    for name in ("PPF-T-2, Linear, guidance 1.5", "mixture, VP, 1 level", "mixture, VP, 3 levels"):
        assert name in text
    assert text.count("euler, auto") == text.count("euler, uniform") == 4
    points = {("uniform", 30): solvers.Point(30, 2.0), ("uniform", 20): solvers.Point(20, 3.0)}
    points |= {("uniform", 5): solvers.Point(5, 8.0)}
    assert grids.rows_of("ab2", points) == [["ab2, uniform", "8.0e+00", "3.0e+00", "2.0e+00", "1.50"]]
