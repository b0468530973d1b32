"""The study of many sizes at a toy size: training on shapes, positions at other sizes, tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digits_archive import write_digits_archive

from benchmarks import recipes, sizes
from benchmarks.recipes import RECIPES, VelocityNetwork, loss_of_step, transport_of
from data.images import ImageArchive, read_rgb
from data.sizes import cover_and_crop
from positions import RopeScaling
from runtime.rng import Stream, sample_generators

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A zip archive of 120 digits as RGB images, with their classes."""
    return write_digits_archive(tmp_path_factory.mktemp("sizes") / "digits.zip")


@pytest.fixture
def data(archive, tmp_path, monkeypatch):
    """The digits of that archive, enlarged to 16x16."""
    monkeypatch.setattr(recipes, "HELD_OUT", 20)
    monkeypatch.setattr(recipes, "KEEP_EVERY", 1)
    return recipes.Data(str(archive), 16, tmp_path)


def network_of(name: str) -> VelocityNetwork:
    """A network of a recipe whose output is not zero."""
    torch.manual_seed(0)
    network = VelocityNetwork(RECIPES[name], 16, 10, transport_of(RECIPES[name])).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.05)
    return network


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (12, 20)])
def test_images_of_a_size_are_those_of_the_commands(data, size):
    images = ImageArchive(data.path, 16)
    found = data.pixels_of(size, np.arange(5))
    for index in range(5):
        with images.open_image(index) as file:
            np.testing.assert_array_equal(found[index], cover_and_crop(read_rgb(file), *size))


def test_a_step_of_many_shapes_has_the_loss_of_the_transport(data, monkeypatch):
    """And every shape takes part."""
    network, seen = network_of("ppfit2-shapes"), {}
    path = network.transport.path
    interpolate = type(path).interpolate

    def watch(self, x0, x1, t):
        seen.setdefault(tuple(x1.shape[2:]), (x0, x1, t))
        return interpolate(self, x0, x1, t)

    monkeypatch.setattr(type(path), "interpolate", watch)
    labels = []
    network.inner.y_embedder.register_forward_hook(lambda module, inputs, output: labels.append(inputs[0]))
    loss = loss_of_step(RECIPES["ppfit2-shapes"], network, data, step=3, seed=0, batch_size=16)
    monkeypatch.undo()
    assert set(seen) == {(16, 16), (20, 12), (12, 20)}
    total = 0.0
    for number, (x0, x1, t) in enumerate(seen.values()):
        level, y = network.transport.schedule.level_at(t), torch.empty(len(t), dtype=torch.long)
        for index in range(2):
            y[level == index] = labels[2 * number + index]
        total += network.transport.training_losses(network, x1, y, t=t, x0=x0)["loss"].sum()
    torch.testing.assert_close(loss, total / 16)


def test_a_step_of_squares_is_what_it_was(data):
    """The same samples, times, labels and noise, drawn in the same order."""
    network = network_of("ppfit2")
    (g,) = sample_generators(0, [3], Stream.NOISE)
    t = network.transport.sample_times(16, g)
    x1, y = data.batch(torch.randint(data.num_training, (16,), generator=g))
    mirrored = torch.rand(16, generator=g) < 0.5
    x1 = torch.stack([x.flip(2) if flip else x for x, flip in zip(x1, mirrored, strict=True)])
    y = y.masked_fill(torch.rand(16, generator=g) < 0.1, 10)
    x0 = torch.randn(x1.shape, generator=g)
    expected = network.transport.training_losses(network, x1, y, t=t, x0=x0)["loss"].mean()
    torch.testing.assert_close(loss_of_step(RECIPES["ppfit2"], network, data, 3, 0, 16), expected)


def test_stretched_positions_end_where_those_of_training_do():
    network = network_of("ppf2")
    before = {level: getattr(network.inner, f"pos_embed_{level}") for level in range(2)}
    stretched = sizes.at_size(network, (32, 32), "stretched").inner
    for level, side in ((0, 4), (1, 8)):  # of twice as many tokens every other one stands where one stood
        grid = getattr(stretched, f"pos_embed_{level}").unflatten(0, (2 * side, 2 * side))
        torch.testing.assert_close(grid[::2, ::2].flatten(0, 1), before[level])
    on = sizes.at_size(network, (20, 24), sizes.AS_TRAINED).inner
    grid = on.pos_embed_1.unflatten(0, (10, 12))
    torch.testing.assert_close(grid[:8, :8].flatten(0, 1), before[1])
    torch.testing.assert_close(on.pos_embed_0, on.position_embedding(0))


def test_rotary_positions_are_scaled_as_named():
    network, x = network_of("ppfit2"), torch.randn(2, 3, 20, 20)
    t, y = torch.full((2,), 0.7), torch.tensor([1, 2])
    for positions, scaling in sizes.ROTARY.items():
        if positions == sizes.FADING:
            continue
        placed = sizes.at_size(network, (20, 20), positions)
        assert placed.inner.sample_shape == (3, 20, 20)
        network.inner.rope_scaling = scaling
        torch.testing.assert_close(placed(x, t, y, level=1), network(x, t, y, level=1))


def test_the_fading_scale_is_s_squared_in_noise_and_one_at_the_end():
    network, x, y = network_of("ppfit2"), torch.randn(1, 3, 24, 24), torch.tensor([1])
    placed = sizes.at_size(network, (24, 24), sizes.FADING)
    for time, s in ((0.0, 1.5**2), (0.5, 1.5**0.5), (1.0, 1.0)):
        found = placed(x, torch.tensor([time]), y, level=0)
        network.inner.rope_scaling = RopeScaling("ntk")
        network.inner.train_tokens = (12 / s) ** 2  # 24 pixels are 12 tokens
        torch.testing.assert_close(found, network(x, torch.tensor([time]), y, level=0))


@pytest.mark.slow
def test_the_study_makes_its_tables_and_repeats_nothing(data, archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizes, "ROTARY", {name: sizes.ROTARY[name] for name in (sizes.AS_TRAINED, "yarn")})
    monkeypatch.setattr(sizes, "INSIDE", ((4, 4), (3, 5)))
    monkeypatch.setattr(sizes, "BEYOND", ((5, 5),))
    flags = ["--steps", "2", "--batch-size", "6", "--num-samples", "20", "--sampling-steps", "2"]
    flags += ["--classifier-epochs", "1", "--runs", "ppf2", "ppfit2-shapes", "--out", str(tmp_path)]
    sizes.main([str(archive), *flags])
    folder = tmp_path / "16x16"
    text = (folder / "sizes.md").read_text()
    assert "| run | training GMACs per image | 16x16 | 12x20 |" in text
    assert "| ppfit2-shapes | yarn |" in text
    for name in ("ppf2-0-20x20-stretched", "ppfit2-shapes-0-12x20-as-trained", "sizes"):
        assert (folder / f"{name}.png").stat().st_size > 0
    for function in ("draw", "train_classifier"):
        monkeypatch.setattr(sizes, function, lambda *args: pytest.fail("made again"))
    monkeypatch.setattr(recipes, "loss_of_step", lambda *args: pytest.fail("trained again"))
    sizes.main([str(archive), *flags])
    assert (folder / "sizes.md").read_text() == text
