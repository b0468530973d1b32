"""One network for digits of several sizes: what it is trained on, and that its digits are recognised at every size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import digit_sizes
from benchmarks.digit_sizes import TRAINED, UNSEEN, Judge, crop, draw, train_network
from data.datasets import Digits
from transport import Transport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", TRAINED)
def test_crops_are_the_middle(size):
    images = Digits().images[:5]
    top, left = (8 - size[0]) // 2, (8 - size[1]) // 2
    assert torch.equal(crop(images, size), images[:, :, top : top + size[0], left : left + size[1]])


def test_a_batch_is_digits_of_all_sizes_of_which_none_is_mirrored(monkeypatch):
    batches, losses = [], Transport.training_losses
    monkeypatch.setattr(
        Transport, "training_losses", lambda *args, **how: batches.append(args[2:]) or losses(*args, **how)
    )
    train_network(2)
    digits = Digits()
    known = {size: {image.numpy().tobytes() for image in crop(digits.images, size)} for size in TRAINED}
    assert len(batches) == 2
    for x1, y in batches:
        assert {tuple(x.shape[1:]) for x in x1} == set(TRAINED)
        assert all(x.numpy().tobytes() in known[tuple(x.shape[1:])] for x in x1)
        assert 0 < (y == 10).sum() < 40


def test_the_command_makes_its_table_and_pictures_and_trains_once(tmp_path, monkeypatch, capsys):
    flags = ["--steps", "1", "--num-samples", "20", "--sampling-steps", "2", "--out", str(tmp_path)]
    digit_sizes.main(flags)
    text = (tmp_path / "digit-sizes.md").read_text()
    assert "|  | 8x8 | 8x6 | 6x8 | 10x8 | 8x10 |" in text
    assert "| held-out digits | 0.9" in text
    for name in ("samples-10x8", "one-class"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
    monkeypatch.setattr(digit_sizes, "train_network", lambda steps: pytest.fail("trained again"))
    digit_sizes.main(flags)
    assert (tmp_path / "digit-sizes.md").read_text() == text


@pytest.mark.slow
def test_digits_are_recognised_at_every_size_of_training(record_property):
    """Nine of ten at least; at sizes that training never saw the share is only told (pytest -s)."""
    model = train_network(digit_sizes.STEPS)
    judges = {size: Judge(size) for size in TRAINED}
    for size in (*TRAINED, *UNSEEN):
        images = draw(model, size, 500, digit_sizes.GUIDANCE, digit_sizes.SAMPLING_STEPS)
        share = judges.get(size, judges[8, 8])(images)
        record_property(digit_sizes.named(size), share)
        print(f"{digit_sizes.named(size)}: {share:.3f}")
        assert size in UNSEEN or share >= 0.9
