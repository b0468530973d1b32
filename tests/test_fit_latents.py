"""FiT's sets of latents, written here from their description, become latent files of ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.datasets import open_dataset
from data.latent_files import shard_files
from data.order import TrainingStream
from extract_latents import extract


def features(latents: torch.Tensor) -> torch.Tensor:
    """(2, h/2, w/2, 16) of latents (2, 4, h, w): one value at a time, channel, then row, then column of the patch."""
    _, channels, height, width = latents.shape
    out = torch.empty(2, height // 2, width // 2, 4 * channels)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                place = 4 * channel + 2 * (row % 2) + column % 2
                out[:, row // 2, column // 2, place] = 0.18215 * latents[:, channel, row, column]
    return out


@pytest.fixture
def published(tmp_path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A set of N = 256 with five images, two of which have square versions; their latents."""
    g = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 8), "b": (28, 36), "c": (4, 60), "d": (28, 36), "e": (6, 8)}
    whole = {name: torch.randn(2, 4, *shape, generator=g) for name, shape in shapes.items()}
    square = {name: torch.randn(2, 4, 32, 32, generator=g) for name in "bd"}
    folders = {"a": "from_16_to_256", "c": "from_16_to_256", "e": "from_16_to_256"}
    for label, (name, latents) in enumerate(whole.items()):
        folder = tmp_path / "fit" / folders.get(name, "greater_than_256_resize")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"feature": features(latents), "label": torch.tensor(label)}, folder / f"{name}.safetensors")
    (tmp_path / "fit" / "greater_than_256_crop").mkdir()
    for label, name in ((1, "b"), (3, "d")):
        file = tmp_path / "fit" / "greater_than_256_crop" / f"{name}.safetensors"
        save_file({"feature": features(square[name]), "label": torch.tensor(label)}, file)
    return tmp_path / "fit", whole, square


def convert(*flags: object) -> None:
    extract(["convert", *map(str, flags)])


def test_a_set_is_read_back_as_it_was_written(published, tmp_path):
    source, whole, square = published
    convert(source, tmp_path / "out", "--dtype", "fp32", "--shard-size", 1)
    dataset = open_dataset(str(tmp_path / "out"))
    assert (len(dataset), dataset.num_classes, dataset.image_size) == (5, 5, 256)
    assert dataset.vae == "stabilityai/sd-vae-ft-ema"
    for index, name in enumerate("abcde"):
        latents, label = dataset.load(index)
        assert label == index
        torch.testing.assert_close(latents, 0.18215 * whole[name][0], rtol=1e-5, atol=1e-6)
    drawn, labels = TrainingStream(dataset, seed=0).__getitems__(range(200))
    seen = set()
    for latents, label in zip(drawn, labels.tolist(), strict=True):
        name = "abcde"[label]
        for version in (whole, square):
            for flipped in (0, 1):
                stored = 0.18215 * version.get(name, torch.empty(2, 0))[flipped]
                if stored.shape == latents.shape and torch.allclose(latents, stored, rtol=1e-4, atol=1e-5):
                    seen.add((name, version is square, flipped))
    assert len(seen) == 2 * 5 + 2 * 2


def test_conversion_continues(published, tmp_path, capsys, refuses):
    source, _, _ = published
    convert(source, tmp_path / "out")
    before = {file.name: file.stat().st_mtime_ns for file in shard_files(tmp_path / "out")}
    shard_files(tmp_path / "out")[0].unlink()
    convert(source, tmp_path / "out")
    after = {file.name: file.stat().st_mtime_ns for file in shard_files(tmp_path / "out")}
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1
    assert "5 images" in capsys.readouterr().out
    for other in (["--dtype", "fp32"], ["--shard-size", 1]):
        assert "other data or settings" in refuses(extract, "convert", source, tmp_path / "out", *other)


def test_bad_sets_are_refused(published, tmp_path, refuses):
    source, _, square = published
    (tmp_path / "empty").mkdir()
    assert "no set of FiT's latents" in refuses(extract, "convert", tmp_path / "empty", tmp_path / "out")
    convert(source, tmp_path / "out")
    (source / "from_16_to_256" / "a.safetensors").unlink()
    assert "give another folder" in refuses(extract, "convert", source, tmp_path / "out")
    assert "give another folder" in refuses(extract, "convert", source, tmp_path / "out", "--dtype", "bf16")
    assert "in the set itself" in refuses(extract, "convert", source, source / "out")
    for name, label, latents, words in (
        ("a", -1, square["b"][:, :, :4, :4], "has the label -1"),
        ("a", 0, torch.zeros(2, 4, 40, 40), "has 20x20 tokens, in a set of images of at most 256"),
    ):
        file = source / "from_16_to_256" / f"{name}.safetensors"
        save_file({"feature": features(latents), "label": torch.tensor(label)}, file)
        assert words in refuses(extract, "convert", source, tmp_path / "other")
        file.unlink()
    lone = source / "greater_than_256_crop" / "z.safetensors"
    save_file({"feature": features(square["b"]), "label": torch.tensor(1)}, lone)
    assert "that is not there" in refuses(extract, "convert", source, tmp_path / "other")
    lone.unlink()
    (source / "from_16_to_256" / "c.safetensors").write_bytes(b"damaged")
    assert "c.safetensors" in refuses(extract, "convert", source, tmp_path / "other")
    assert not (tmp_path / "other").exists()
