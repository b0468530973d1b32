"""The study of quality against cost at a toy size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from digits_archive import write_digits_archive

from benchmarks import budgets, recipes
from benchmarks.budgets import ELASTIC, REFERENCE, Setting

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = (
    replace(REFERENCE, num_steps=2),
    ELASTIC("elastic", num_steps=10, budget=1.0),
    ELASTIC("elastic", num_steps=10, budget=0.6),
    ELASTIC("everything", num_steps=4, budget=0.6, null_level=0, measured=True),
)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The study's command on 120 digits, which returns its table, and the images."""
    monkeypatch.setattr(recipes, "HELD_OUT", 20)
    monkeypatch.setattr(recipes, "KEEP_EVERY", 10)
    monkeypatch.setattr(budgets, "SETTINGS", FEW)
    monkeypatch.setattr(budgets, "REFERENCE", FEW[0])
    monkeypatch.setattr(budgets, "TIMED_IMAGES", 1)
    archive = write_digits_archive(tmp_path / "digits.zip")
    flags = f"{archive} --image-size 8 --steps 2 --batch-size 8 --num-samples 20 --num-held-out 20 --repeats 1".split()
    flags += f"--classifier-epochs 1 --series {FEW[0].series} elastic everything --out {tmp_path}".split(" ")
    flags[flags.index("SiT,") : flags.index("elastic")] = [FEW[0].series]

    def run():
        budgets.main(flags)
        return (tmp_path / "8x8" / "budgets.md").read_text()

    return run, recipes.Data(str(archive), 8, tmp_path), tmp_path / "8x8"


@pytest.mark.slow
def test_settings_are_measured_once_and_meet_their_budgets(study, monkeypatch) -> None:
    run, _, folder = study
    text = run()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    gmacs = {row[0]: float(row[4]) for row in rows[1 : 1 + len(FEW)]}
    fine, part = (gmacs[f"PPF-T-2, elastic, 10 steps of ab2, budget {budget}"] for budget in ("1", "0.6"))
    assert part / fine == pytest.approx(0.6, abs=0.1)  # a step of ten
    assert "PPF-T-2, elastic, 4 measured steps of ab2, budget 0.6, null level 0" in gmacs
    assert text.count("x |") == 2 * sum(line.endswith("x |") for line in text.splitlines())
    assert (folder / "budgets.png").exists()
    assert len(list(folder.glob("*.png"))) == 1 + len(FEW)
    monkeypatch.setattr(budgets, "draw", None)
    monkeypatch.setattr(budgets, "level_errors", None)
    assert run() == text


def test_errors_of_levels_are_those_of_held_out_images(study) -> None:
    _, data, _ = study
    recipe = recipes.RECIPES["ppf2-elastic-equal-cost"]
    network = recipes.VelocityNetwork(recipe, 8, 10, recipes.transport_of(recipe))  # which predicts zero at first
    errors = budgets.level_errors(network, data, 20)
    x1, _ = data.batch(torch.arange(100, 120))
    x0 = torch.randn(x1.shape, generator=torch.Generator().manual_seed(1))
    expected = (x1 - x0).square().mean().item()
    for mean in (value for row in errors.means for value in row):
        assert mean == pytest.approx(expected, rel=1e-5)


def test_the_cheapest_setting_is_as_good_as_the_reference() -> None:
    near, far, seconds = (Setting("near", "sit", "ab2", steps) for steps in (30, 20, 10))
    results = {
        setting: [{"distance": value, "distance_error": 0.1, "accuracy": 0.5, "gmacs": cost, "edges": []}]
        for setting, value, cost in ((REFERENCE, 1.0, 8.0), (near, 1.05, 4.0), (far, 1.2, 2.0), (seconds, 0.9, 6.0))
    }
    costs = {REFERENCE: 1.0, near: 0.25, far: 0.1, seconds: 0.5}
    assert budgets.cheapest(results, costs, list(results)) == near
    assert "| near | SiT-T/2, 30 steps of ab2 | 1.050 | 2.0x | 4.0x |" in budgets.table(
        results, {"distance": 0.1, "accuracy": 0.7}, costs
    )
    results = {REFERENCE: results[REFERENCE], far: results[far]}
    assert "| near | none; the best is SiT-T/2, 20 steps of ab2 | 1.200 | | |" in budgets.table(
        results, {"distance": 0.1, "accuracy": 0.7}, costs
    )


def test_a_level_of_the_elastic_recipe_sees_a_quarter_of_its_samples_at_other_times(study) -> None:
    _, data, _ = study
    recipe = recipes.RECIPES["ppf2-elastic-equal-cost"]
    network = recipes.VelocityNetwork(recipe, 8, 10, recipes.transport_of(recipe))
    seen = []
    network.inner.register_forward_hook(lambda module, inputs, _: seen.append(inputs[1]))
    for step in range(4):
        recipes.loss_of_step(recipe, network, data, step, 0, 64)
    coarse, fine = (torch.cat(times) for times in zip(*seen, strict=True))
    assert (coarse > 0.5).double().mean().item() == pytest.approx(0.25, abs=0.04)
    assert (fine < 0.5).double().mean().item() == pytest.approx(0.25, abs=0.04)
