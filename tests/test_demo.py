"""`make demo` as the README gives it: what it leaves, and that its samples are digits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT
from PIL import Image
from scipy.spatial.distance import cdist, pdist
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from sample_ddp import main as sample_ddp

pytestmark = pytest.mark.slow

SAMPLES = 500
GREY_LEVELS = 16


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's run folder and what it printed, made with the interpreter that runs this test.

    The environment's DEMO_FLAGS are given to train.py: the other ways of training must lead to digits as well.
    """
    folder = tmp_path_factory.mktemp("demo")
    (folder / "venv").mkdir()
    (folder / "venv" / ".installed").touch()
    command = [
        "make",
        "--no-print-directory",
        "demo",
        f"RUN={folder / 'run'}",
        f"FLAGS={os.environ.get('DEMO_FLAGS', '')}",
        f"VENV={folder / 'venv'}",
        f"BIN={Path(sys.executable).parent}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.fixture(scope="module", params=[(), ("--precision", "bf16", "--compile")], ids=["plain", "fast"])
def digits(
    request: pytest.FixtureRequest, demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[np.ndarray, np.ndarray]:
    """Guided samples of the demo's network at the demo's scale, (N, 64) in grey levels, and their labels."""
    folder = tmp_path_factory.mktemp("samples")
    sample_ddp(
        [
            *(
                f"ODE --ckpt {demo[0]} --cfg-scales 1.5 --num-fid-samples {SAMPLES} "
                f"--label-sampling balanced --per-proc-batch-size 250 --sample-dir {folder}"
            ).split(),
            *request.param,
        ]
    )
    (file,) = folder.glob("*.npz")
    images = np.load(file)["arr_0"][..., 0].reshape(SAMPLES, 64) * (GREY_LEVELS / 255)
    return images, np.arange(SAMPLES) % 10


def test_demo_leaves_a_whole_run(demo: tuple[Path, str]) -> None:
    run, _ = demo
    for name in (
        "config.json",
        "log.txt",
        "metrics.jsonl",
        "loss.png",
        "samples.png",
        "samples/0000400.png",
        "samples/0001400.png",
        "checkpoints/0001400.pt",
    ):
        assert (run / name).stat().st_size > 0, name
    assert Image.open(run / "samples.png").size == (10 * 66 + 2, 10 * 66 + 2)
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 14
    assert losses[-1] < 0.5


def test_demo_ends_with_what_the_pyramid_saves(demo: tuple[Path, str]) -> None:
    def row(name: str) -> list[float]:
        (line,) = [line for line in demo[1].splitlines() if line.startswith(name)]
        return [float(word.rstrip("x")) for word in line[22:].split()]

    nfe, gmacs, _ = row("pyramid")
    finest_nfe, finest_gmacs, _ = row("finest level only")
    assert nfe == finest_nfe == 100  # 50 steps, each on two labels
    assert finest_gmacs / gmacs == pytest.approx(row("the pyramid saves")[0], abs=0.01)
    assert finest_gmacs / gmacs > 1.5


def test_samples_have_the_label_that_was_asked_for(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    real = load_digits()
    judge = KNeighborsClassifier(3).fit(real.data, real.target)
    assert (judge.predict(images) == labels).mean() >= 0.95


def test_samples_have_the_brightness_and_contrast_of_digits(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, real = digits[0], load_digits().data
    assert abs(images.mean() - real.mean()) < 0.05 * real.mean()
    assert abs(images.std() - real.std()) < 0.05 * real.std()


def test_samples_of_a_class_differ_as_real_ones_do(digits: tuple[np.ndarray, np.ndarray]) -> None:
    """Not ten prototypes: distances within a class are those of real digits; and not copies of training images."""
    images, labels = digits
    real = load_digits()
    for label in range(10):
        ratio = pdist(images[labels == label]).mean() / pdist(real.data[real.target == label]).mean()
        assert 0.7 < ratio < 1.2, label
    to_training = cdist(images, real.data).min(1)
    among_real = np.sort(cdist(real.data, real.data), axis=1)[:, 1]
    assert np.median(to_training) > 0.6 * np.median(among_real)
