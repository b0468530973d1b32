"""Images of many sizes: the rule that chooses one, the crop, and what training sees of images and of latents."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_autoencoders import save_kl

from data.autoencoder import load_autoencoder
from data.datasets import open_dataset
from data.latent_files import shard_files
from data.order import TrainingStream, posterior_generators
from data.sizes import SizeRule, cover_and_crop, draw_version
from extract_latents import extract
from runtime.rng import Stream, sample_generators

RULE = {"max_tokens": 16, "multiple": 8, "token": 8}  # sides of 8, 16, 24, ... pixels, areas up to 32x32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two classes, 14 pictures of sizes between 9x9 and 80x80."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for number in range(14):
        file = folder / ("ant", "bee")[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(exist_ok=True)
        size = tuple(rng.integers(9, 80, 2).tolist())
        Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(size).save(file)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_kl(tmp_path_factory.mktemp("vae"))


# -- The rule ------------------------------------------------------------------------------------------------------


def test_a_size_is_the_best_of_all_that_are_allowed():
    rule, rng = SizeRule(64, multiple=16, token=8), np.random.default_rng(1)
    sides = range(16, 64 * 64 // 16 + 1, 16)
    for _ in range(100):
        width, height = (int(value) for value in np.exp(rng.uniform(np.log(10), np.log(2000), 2)))
        height_of, width_of = rule.size_of(width, height)
        assert height_of * width_of <= rule.max_area

        def share_kept(h: int, w: int, width: int = width, height: int = height) -> float:
            scale = max(w / width, h / height)
            return h * w / (width * scale * height * scale)

        allowed = [
            h * w * share_kept(h, w)
            for h, w in itertools.product(sides, sides)
            if h * w <= rule.max_area and h <= max(16, height) and w <= max(16, width)
        ]
        assert height_of * width_of * share_kept(height_of, width_of) == pytest.approx(max(allowed))


def test_photographs_fill_most_of_their_tokens():
    rule = SizeRule(256)
    assert rule.size_of(500, 375) == (224, 288)
    assert rule.size_of(375, 500) == (288, 224)
    assert rule.size_of(1024, 1024) == (256, 256) == (rule.square, rule.square)
    assert rule.size_of(200, 150) == (128, 192)
    assert rule.size_of(100, 100) == (96, 96)  # not enlarged
    assert rule.size_of(10, 300) == (288, 32)  # but to the multiple


def test_only_images_larger_than_the_square_have_a_square_version():
    rule = SizeRule(256)
    assert rule.has_square(500, 375)
    assert not rule.has_square(500, 256)
    assert not rule.has_square(600, 600)  # its own size is the square


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"max_tokens": 3}, "give at least 4 tokens"),
        ({"max_tokens": 256, "crop_probability": 1.5}, "crop probability"),
    ],
)
def test_impossible_rules_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        SizeRule(**numbers)


# -- The crop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "size"), [((100, 60), (24, 40)), ((60, 100), (40, 24)), ((61, 47), (32, 40))])
def test_a_crop_is_the_middle_of_the_image_at_one_scale(stored, size):
    """Against a ramp, whose value at a point tells the place in the image that it shows."""
    width, height = stored
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    image = Image.fromarray(np.round(255 * np.stack([x, y, 0 * x], -1)).astype(np.uint8))
    shown = cover_and_crop(image, *size).astype(float) / 255
    assert shown.shape == (*size, 3)
    scale = max(size[1] / width, size[0] / height)
    for axis, (target, source) in enumerate(zip(size[::-1], stored, strict=True)):
        expected = 0.5 + (np.arange(target) + 0.5 - target / 2) / (scale * source)
        found = shown[..., axis].mean(axis)
        np.testing.assert_allclose(found[2:-2], expected[2:-2], atol=1.2 / (scale * source))


# -- Training ------------------------------------------------------------------------------------------------------


def test_versions_are_drawn_independently_with_their_probabilities():
    rule = SizeRule(**RULE, crop_probability=0.3)
    generators = sample_generators(0, range(4000), Stream.AUGMENTATION)
    drawn = np.array([draw_version(generator, rule) for generator in generators])
    counts = np.array([[(drawn == [flip, square]).all(1).sum() for square in (0, 1)] for flip in (0, 1)])
    expected = 4000 * np.array([[0.35, 0.15], [0.35, 0.15]])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-square of 3 degrees of freedom, p = 0.001


def test_items_depend_on_their_position_alone(pictures):
    dataset = open_dataset(str(pictures))
    dataset.take_sizes(SizeRule(**RULE))
    stream = TrainingStream(dataset, seed=3)
    images, labels = stream.__getitems__(range(20))
    assert len({image.shape for image in images}) > 3
    assert all(side % 8 == 0 for image in images for side in image.shape[1:])
    for position in (17, 2):
        image, label = TrainingStream(dataset, seed=3)[position]
        assert torch.equal(image, images[position])
        assert label == labels[position]


def test_latents_are_those_of_the_images_that_training_would_encode(pictures, vae, tmp_path):
    space = load_autoencoder(str(vae))
    rule = SizeRule(16, 2 * space.factor, 2 * space.factor)
    flags = ["--data-path", pictures, "--out", tmp_path, "--vae", vae, "--max-tokens", 16, "--num-workers", 0]
    flags += ["--size-multiple", 2 * space.factor, "--shard-size", 3, "--batch-size", 2, "--dtype", "fp32"]
    extract([str(flag) for flag in flags])
    latents, images = open_dataset(str(tmp_path)), open_dataset(str(pictures))
    images.take_sizes(rule)
    assert len(latents) == len(images) == 14
    assert latents.sizes == rule
    assert latents.image_size == images.image_size == rule.square
    assert latents.image_shape == space.latent_shape(images.image_shape)
    positions = range(60)
    stored, labels = TrainingStream(latents, seed=0).__getitems__(positions)
    shown, expected_labels = TrainingStream(images, seed=0).__getitems__(positions)
    assert torch.equal(labels, expected_labels)
    squares = 0
    for found, image, generator in zip(stored, shown, posterior_generators(0, positions), strict=True):
        torch.testing.assert_close(found[None], space.encode(image[None], [generator]), rtol=1e-4, atol=1e-4)
        squares += image.shape[1:] == (rule.square, rule.square)
    assert 0 < squares < 60


def test_extraction_of_many_sizes_continues(pictures, vae, tmp_path, capsys):
    def run(out):
        flags = ["--data-path", pictures, "--out", out, "--vae", vae, "--max-tokens", 16, "--size-multiple", 8]
        extract([str(flag) for flag in (*flags, "--num-workers", 0, "--shard-size", 4)])

    run(tmp_path / "whole")
    run(tmp_path / "stopped")
    files = shard_files(tmp_path / "stopped")
    files[1].unlink()
    files[-1].unlink()
    run(tmp_path / "stopped")
    assert f"{len(files) - 2} of {len(files)} shards" in capsys.readouterr().out
    for file in shard_files(tmp_path / "whole"):
        again = load_file(tmp_path / "stopped" / file.name)
        assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(file).items())


# -- Bad input -----------------------------------------------------------------------------------------------------


def test_rules_that_the_data_do_not_allow_are_refused(pictures, vae, tmp_path):
    with pytest.raises(ValueError, match="digits are 8x8"):
        open_dataset("digits").take_sizes(SizeRule(16))
    common = ["--data-path", str(pictures), "--vae", str(vae), "--num-workers", "0"]
    extract([*common, "--out", str(tmp_path / "squares"), "--image-size", "16"])
    with pytest.raises(ValueError, match="of one size"):
        open_dataset(str(tmp_path / "squares")).take_sizes(SizeRule(16))
    extract([*common, "--out", str(tmp_path / "many"), "--max-tokens", "16", "--size-multiple", "8"])
    with pytest.raises(ValueError, match="latents of many sizes, not of one"):
        open_dataset(str(tmp_path / "many"), 16)
    with pytest.raises(ValueError, match="--max-tokens 16: leave it out"):
        open_dataset(str(tmp_path / "many")).take_sizes(SizeRule(64, 8, 8))


def test_flags_that_contradict_each_other_are_refused(pictures, vae, tmp_path, refuses):
    common = ["--data-path", pictures, "--vae", vae, "--out", tmp_path / "out"]
    assert "--max-tokens" in refuses(extract, *common, "--size-multiple", 16)
    assert "leave --image-size out" in refuses(extract, *common, "--max-tokens", 16, "--image-size", 16)
    assert "does not divide" in refuses(extract, *common, "--max-tokens", 64, "--size-multiple", 3)
    assert not (tmp_path / "out").exists()


def test_files_that_hold_an_image_twice_are_refused(pictures, vae, tmp_path):
    common = ["--data-path", str(pictures), "--vae", str(vae), "--num-workers", "0", "--out", str(tmp_path)]
    extract([*common, "--max-tokens", "16", "--size-multiple", "8"])
    file = shard_files(tmp_path)[0]
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["index"] = torch.full_like(tensors["index"], int(load_file(shard_files(tmp_path)[1])["index"][0]))
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="not those of one set"):
        open_dataset(str(tmp_path))
    tensors["index"][0] = 2**60
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match="numbers an image beyond the"):
        open_dataset(str(tmp_path))
    assert json.loads(metadata["skipped"]) == []
