"""Samples of many shapes in the training loss: each counts as it would alone."""

from __future__ import annotations

import pytest
import torch

from transport import create_transport

SHAPES = [(2, 4, 4), (2, 4, 8), (2, 8, 4), (2, 4, 8), (2, 4, 4), (2, 8, 8), (2, 4, 8)]


def model(x, t, y, level):
    """A field that depends on everything, for one group or for several."""
    if isinstance(level, (list, range)):
        return [model(*group) for group in zip(x, t, y, level, strict=True)]
    scale = (t + y + level + 1).reshape(-1, 1, 1, 1)
    return scale * x + x.mean((1, 2, 3), keepdim=True) + x.shape[-1]


@pytest.fixture
def samples():
    """Data, noise, labels and times of samples of many shapes, two levels."""
    g = torch.Generator().manual_seed(0)
    x1, x0 = ([torch.randn(shape, generator=g) for shape in SHAPES] for _ in range(2))
    return x1, x0, torch.arange(len(SHAPES)) % 3, torch.tensor([0.1, 0.9, 0.3, 0.2, 0.5, 0.7, 0.8])


@pytest.mark.parametrize("joint", [False, True])
def test_the_loss_of_each_sample_is_the_one_that_it_has_alone(samples, joint):
    x1, x0, y, t = samples
    transport = create_transport(level_edges=[0.5], prediction="data", loss_weight="velocity")
    terms = transport.training_losses(model, x1, y=y, t=t, x0=x0, joint=joint)
    for i in range(len(x1)):
        one = slice(i, i + 1)
        alone = transport.training_losses(model, x1[i][None], y=y[one], t=t[one], x0=x0[i][None])
        for name in ("loss", "velocity_error", "level", "t"):
            torch.testing.assert_close(terms[name][one], alone[name])


def test_groups_are_one_level_and_one_shape(samples):
    x1, x0, y, t = samples
    seen = []

    def watched(x, t, y, level):
        seen.extend(zip(level, (tuple(group.shape) for group in x), strict=True))
        return model(x, t, y, level)

    create_transport(level_edges=[0.5, 0.95]).training_losses(watched, x1, y=y, t=t, x0=x0, joint=True)
    assert sorted(seen[:-1]) == [
        (0, (1, 2, 4, 8)),
        (0, (1, 2, 8, 4)),
        (0, (2, 2, 4, 4)),
        (1, (1, 2, 8, 8)),
        (1, (2, 2, 4, 8)),
    ]
    assert seen[-1][0] == 2  # without samples, so that its parameters take part
    assert seen[-1][1][0] == 0


def test_a_list_of_one_shape_has_the_loss_of_the_tensor(samples):
    x1, x0, y, t = samples
    x1, x0 = ([x for x in values if x.shape == (2, 4, 8)] for values in (x1, x0))
    y, t = y[: len(x1)], t[: len(x1)]
    transport = create_transport(level_edges=[0.5])
    listed = transport.training_losses(model, x1, y=y, t=t, x0=x0)
    stacked = transport.training_losses(model, torch.stack(x1), y=y, t=t, x0=torch.stack(x0))
    assert torch.equal(listed["loss"], stacked["loss"])


def test_noise_is_drawn_for_every_shape():
    transport = create_transport()
    terms = [
        transport.training_losses(model, [torch.zeros(shape) for shape in SHAPES], y=torch.zeros(7), generator=g)
        for g in (torch.Generator().manual_seed(seed) for seed in (0, 0, 1))
    ]
    assert terms[0]["loss"].shape == (7,)
    assert torch.equal(terms[0]["loss"], terms[1]["loss"])
    assert not torch.equal(terms[0]["loss"], terms[2]["loss"])
