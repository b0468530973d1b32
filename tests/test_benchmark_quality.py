"""The study of quality at a toy size: its losses, its continuation, its tables."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from digits_archive import write_digits_archive
from PIL import Image

from benchmarks import quality, recipes

STEPS = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip archive of 120 digits as RGB images, with their classes."""
    return write_digits_archive(tmp_path_factory.mktemp("quality") / "digits.zip")


@pytest.fixture
def study(archive, tmp_path, monkeypatch):
    """The study's command on that archive, its images, and its folder."""
    monkeypatch.setattr(recipes, "HELD_OUT", 20)
    monkeypatch.setattr(recipes, "KEEP_EVERY", 1)
    flags = ["--image-size", "8", "--steps", STEPS, "--batch-size", "8", "--num-samples", "20", "--out", tmp_path]
    flags += [
        "--sampling-steps",
        "3",
        "--num-held-out",
        "5",
        "--classifier-epochs",
        "1",
        "--seeds",
        "0",
        "--repeats",
        "1",
    ]

    def run(*more):
        quality.main([str(flag) for flag in (archive, *flags, *more)])
        return (tmp_path / "8x8" / "quality.md").read_text()

    return run, recipes.Data(str(archive), 8, tmp_path), tmp_path


def test_a_plain_step_has_the_loss_of_the_transport(study, monkeypatch):
    _, data, _ = study
    recipe = recipes.RECIPES["ppf2"]
    network = recipes.VelocityNetwork(recipe, 8, 10, recipes.transport_of(recipe))
    torch.nn.init.normal_(network.inner.final_layer.linear[1].weight)
    seen = {}
    monkeypatch.setattr(
        type(network.transport.path),
        "interpolate",
        lambda path, x0, x1, t: seen.update(x0=x0, x1=x1, t=t) or t_x(x0, x1, t),
    )

    def t_x(x0, x1, t):
        t = t[:, None, None, None]
        return t * x1 + (1 - t) * x0

    labels = []
    network.inner.y_embedder.embedding_table.register_forward_hook(
        lambda module, inputs, output: labels.append(inputs[0])
    )
    loss = recipes.loss_of_step(recipe, network, data, step=3, seed=0, batch_size=16)
    level = network.transport.schedule.level_at(seen["t"])
    y = torch.empty(16, dtype=torch.long)
    for index, group in enumerate(labels):
        y[level == index] = group
    given = {name: seen[name].clone() for name in ("x1", "x0", "t")}
    expected = network.transport.training_losses(network, given["x1"], y, t=given["t"], x0=given["x0"])["loss"].mean()
    torch.testing.assert_close(loss, expected)


def test_more_samples_at_the_coarse_level_leave_the_mean_loss(study):
    _, data, _ = study
    plain, more = recipes.RECIPES["ppf2"], recipes.RECIPES["ppf2-coarse-batch"]
    network = recipes.VelocityNetwork(plain, 8, 10, recipes.transport_of(plain))  # predicts zero
    losses = torch.tensor(
        [
            [recipes.loss_of_step(recipe, network, data, step, 0, 16).item() for step in range(40)]
            for recipe in (plain, more)
        ]
    )
    error = (losses.var(1) / losses.shape[1]).sum().sqrt()
    assert (losses.mean(1)[0] - losses.mean(1)[1]).abs() < 4 * error


def test_a_level_that_predicts_data_gives_its_velocity():
    recipe = recipes.RECIPES["ppf2-coarse-data"]
    network = recipes.VelocityNetwork(recipe, 8, 10, recipes.transport_of(recipe))
    x0, x1 = torch.randn(2, 6, 3, 8, 8).unbind()
    t = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    x = network.transport.path.interpolate(x0, x1, t)
    network.inner.forward = lambda *args, level: x1 if level == 0 else x1 - x0
    for level in (0, 1):
        torch.testing.assert_close(network(x, t, None, level=level), x1 - x0, rtol=1e-4, atol=1e-5)


def test_shared_levels_take_turns_around_an_edge_alone(study, monkeypatch):
    _, data, _ = study
    recipe = recipes.RECIPES["ppf2-shared"]
    network = recipes.VelocityNetwork(recipe, 8, 10, recipes.transport_of(recipe))
    seen = []
    forward = network.inner.forward
    monkeypatch.setattr(
        network.inner, "forward", lambda x, t, y, level: seen.append(t) or forward(x, t, y, level=level)
    )
    for step in range(20):
        recipes.loss_of_step(recipe, network, data, step, 0, 16)
    coarse, fine = (torch.cat([times[level] for times in seen]) for level in (0, 1))
    assert 0.5 < coarse.max() < 0.6
    assert 0.4 < fine.min() < 0.5


def check_costs(text, names):
    """The table of seconds says what its own columns say."""
    lines = text[text.index("Seconds, medians") :].splitlines()[4:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[0] for row in rows] == names
    assert [int(row[1]) for row in rows] == [round(STEPS * recipes.RECIPES[name].longer) for name in names]
    first = [float(cell) for cell in rows[0][1:]]
    for row in rows:
        steps, step, training, image, training_ratio, image_ratio = map(float, row[1:])
        assert min(step, image) > 0
        assert training == pytest.approx(steps * step, abs=0.5 + steps * 0.0005)
        assert training_ratio == pytest.approx(steps * step / (first[0] * first[1]), abs=0.2)
        assert image_ratio == pytest.approx(image / first[3], abs=0.2)


@pytest.mark.slow
def test_the_command_makes_tables_and_curves_and_repeats_nothing(study, monkeypatch, capsys):
    run, _, folder = study
    names = ["sit", "ppf2-equal-cost", "ppf3-from-sit", "ppf2-wide", "ppf2-experts-equal-cost"]
    flags = ["--runs", *names, "--moved-edges", "0.3", "--guidance", "2", "1,2"]
    first = run(*flags)
    for name in names:
        assert f"| {name} | 1 | 2 |" in first
        assert (f"| {name} | 1 | 1,2 |" in first) == (name != "sit")
    check_costs(first, names)
    assert (folder / "8x8" / "quality.png").exists()
    assert np.asarray(Image.open(folder / "8x8" / "ppf2-equal-cost-0-guidance-1-2.png")).ndim == 3
    monkeypatch.setattr(recipes, "loss_of_step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(quality, "draw", lambda *args: pytest.fail("sampled again"))
    assert run(*flags) == first


def test_guidance_of_the_coarsest_level_may_be_that_of_its_own():
    assert quality.guidance_of("2.5", 3).scales == (2.5,)
    assert quality.guidance_of("1,2.5", 3).scales == (1.0, 2.5, 2.5)


def test_the_error_of_a_distance_is_its_spread_over_draws():
    """Classes lie far apart, and a draw has as many samples of each: parts that were classes would err by far more."""
    means = 4.0 * torch.arange(10)

    def draw(seed, number):
        features = torch.randn(number, 3, generator=torch.Generator().manual_seed(seed))
        features[:, 0] += means[torch.arange(number) % 10]
        return features[:, :, None, None]

    def classifier(images):
        return SimpleNamespace(pool=images.flatten(1), probabilities=torch.ones(len(images), 10))

    reference = draw(0, 2000).permute(0, 2, 3, 1).numpy()
    judge = quality.Judge(classifier, SimpleNamespace(pixels=reference, num_training=2000), neighbours=20)
    scores = [judge(draw(seed, 400) + 0.5, torch.zeros(400)) for seed in range(1, 31)]
    spread = torch.tensor([score["distance"] for score in scores]).std().item()
    error = torch.tensor([score["distance_error"] for score in scores]).mean().item()
    assert 0.6 < error / spread < 1.6


def test_a_run_that_is_continued_is_the_run_that_never_stopped(study):
    _, data, folder = study
    settings = {"data": data, "batch_size": 8, "lr": 1e-3}
    recipes.train_run("ppf2", 0, 2, folder=folder / "stopped", **settings)
    continued = recipes.train_run("ppf2", 0, 4, folder=folder / "stopped", **settings)
    whole = recipes.train_run("ppf2", 0, 4, folder=folder / "whole", **settings)
    for one, other in zip(continued.state_dict().values(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_bad_input_is_one_line(study, archive, tmp_path, refuses):
    refuses(quality.main, archive, "--out", tmp_path, "--steps", "3", "--image-size", "8", "--runs", "nothing")
    assert "missing.zip" in refuses(quality.main, "missing.zip", "--out", tmp_path)
