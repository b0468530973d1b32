"""Training on images of many sizes: a step is a function of its number, whoever makes it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from conftest import start_script
from PIL import Image
from small_autoencoders import save_kl

import sample
from data.datasets import Digits
from extract_latents import extract
from pipeline import Pipeline
from train import train
from transport import ODE

SIZES = [(8, 8), (8, 4), (4, 8)]


def digits_of(path: Path, sizes: list[tuple[int, int]], number: int) -> Path:
    """A zip archive of digits, whose middle is cropped to these sizes in turn."""
    digits, labels = Digits(), []
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(number):
            height, width = sizes[index % len(sizes)]
            top, left = (8 - height) // 2, (8 - width) // 2
            pixels = ((digits.images[index, 0] + 1) * 127.5).round().byte().numpy()
            stream = io.BytesIO()
            image = Image.fromarray(pixels[top : top + height, left : left + width]).convert("RGB")
            image.save(stream, "PNG")
            archive.writestr(f"{index:04d}.png", stream.getvalue())
            labels.append([f"{index:04d}.png", int(digits.labels[index])])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return digits_of(tmp_path_factory.mktemp("digits") / "digits.zip", SIZES, 60)


def flags(archive: Path, run_dir: Path, *more: object) -> list[str]:
    common = ["--data-path", archive, "--vae", "none", "--model", "PPFiT-T-2", "--max-tokens", 16, "--run-dir", run_dir]
    common += ["--global-batch-size", 8, "--max-steps", 4, "--log-every", 1, "--ckpt-every", 2, "--num-workers", 0]
    return [str(flag) for flag in (*common, "--sample-every", 0, *more)]


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(archive, tmp_path_factory) -> Path:
    """A finished run."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train(flags(archive, run_dir))
    return run_dir


def test_a_continued_run_is_the_run_that_never_stopped(archive, run, tmp_path):
    train(flags(archive, tmp_path / "run", "--max-steps", 2))
    train(flags(archive, tmp_path / "run", "--max-steps", 4, "--crop-probability", 0.5))  # which is the default
    assert losses(tmp_path / "run") == losses(run)


def test_accumulated_passes_and_checkpointed_blocks_are_one_step(archive, run, tmp_path):
    train(flags(archive, tmp_path / "run", "--gradient-accumulation-steps", 4, "--activation-checkpointing"))
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-5)


@pytest.mark.slow
def test_two_processes_follow_the_loss_curve_of_one(archive, run, tmp_path):
    done = start_script("train.py", *flags(archive, tmp_path / "run"), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard"], ["--precision", "bf16"]])
def test_sharded_and_bf16_runs_follow_the_loss_curve(more, archive, run, tmp_path):
    done = start_script("train.py", *flags(archive, tmp_path / "run", *more), processes=2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(run), rel=2e-2 if "bf16" in more else 1e-5)


def test_a_run_says_how_many_tokens_it_saw_and_remembers_the_largest_size(run):
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    tokens = record["tokens_per_second"] / record["images_per_second"]
    assert 2 <= tokens <= 16  # 4x8 pixels have two 4x4 patches, 8x8 have sixteen 2x2 patches
    pipe = Pipeline.load(run)
    assert pipe.model.train_tokens == 16
    assert pipe.images([1, 2], ODE("euler", num_steps=2), size=(4, 8)).shape == (2, 3, 4, 8)


def test_likelihood_of_images_is_that_of_squares(archive, run, refuses):
    measured = ["ODE", "--ckpt", run, "--likelihood", "--data-path", archive]
    assert "not to 4x8: give --image-size 4" in refuses(sample.main, *measured, "--image-size", 4, 8)


def test_previews_come_in_three_shapes(archive, tmp_path):
    train(flags(archive, tmp_path / "run", "--max-steps", 1, "--sample-every", 1))
    names = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert names == ["0000001-4x8.png", "0000001-8x4.png", "0000001.png"]


def test_any_model_trains_with_rotary_positions(archive, tmp_path):
    train(flags(archive, tmp_path / "run", "--model", "PPF-T-2", "--position", "rope", "--max-steps", 1))
    assert Pipeline.load(tmp_path / "run").model.position == "rope"


def test_latents_of_many_sizes_train(archive, tmp_path, refuses):
    vae = save_kl(tmp_path / "vae")
    common = ["--data-path", archive, "--vae", vae, "--out", tmp_path / "latents", "--num-workers", 0]
    extract([str(flag) for flag in (*common, "--max-tokens", 4, "--size-multiple", 4, "--dtype", "fp32")])
    stored = ["--data-path", tmp_path / "latents", "--model", "PPFiT-T-2", "--patch-sizes", 2, 1]
    settings = flags(archive, tmp_path / "run")[6:]
    more = [flag for flag in settings if flag not in ("--max-tokens", "16", "--model", "PPFiT-T-2")]
    train([str(flag) for flag in (*stored, *more, "--crop-probability", 0)])
    assert len(losses(tmp_path / "run")) == 4
    measured = ["ODE", "--ckpt", tmp_path / "run", "--likelihood", "--data-path"]
    assert "latents of many sizes" in refuses(sample.main, *measured, tmp_path / "latents")


# -- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "PPF-T-2"], "give --position rope"),
        (["--size-multiple", 2], "multiple of 4"),
        (["--image-size", 8], "leave --image-size out"),
        (["--compile"], "leave it out"),
        (["--max-tokens", 1], "give at least 4 tokens"),
        (["--data-path", "digits"], "digits are 8x8"),
    ],
)
def test_wrong_sizes_are_refused_before_the_run(more, words, archive, tmp_path, refuses):
    message = refuses(train, *flags(archive, tmp_path / "run"), *more)
    assert words in message
    assert not (tmp_path / "run").exists()


def test_flags_about_sizes_without_sizes_are_refused(archive, tmp_path, refuses):
    common = [flag for flag in flags(archive, tmp_path / "run") if flag not in ("--max-tokens", "16")]
    assert "give --max-tokens" in refuses(train, *common, "--crop-probability", 0.5)
    assert "give --max-tokens" in refuses(train, *common, "--size-multiple", 4)
