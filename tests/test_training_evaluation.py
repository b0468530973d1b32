"""train.py --eval-every: distances of samples while a run trains."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, start_script
from safetensors.torch import save_file
from sklearn.datasets import load_digits

import train
from metrics.features import Pixels
from metrics.references import StoredStatistics, write_statistics
from metrics.training import TrainingEvaluation
from pipeline import Pipeline
from runtime.distributed import Processes
from runtime.logs import DISTANCE
from runtime.rng import Stream, sample_generators
from runtime.run import Run
from transport import ODE

NUMBER = 41  # no multiple of the processes or the batches, which have 32 samples of one process or 16 of two
EVALUATION = ["--eval-num", str(NUMBER), "--eval-ref", "digits", "--eval-features", "pixels"]
SHORT = [*TINY, "--sample-every", "0", "--max-steps", "4", "--log-every", "1", "--ckpt-every", "2"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path / "cache"))


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def distances(run_dir: Path, name: str = f"fd{NUMBER}") -> dict[int, float]:
    return {record["step"]: record[name] for record in records(run_dir) if name in record}


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir) if "loss" in record]


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that is measured after the second and the fourth."""
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PPFLOW_CACHE", str(folder / "cache"))
        train.train([*SHORT, *EVALUATION, "--eval-every", "2", "--run-dir", str(folder / "run")])
    return folder / "run"


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m - m'|^2 + tr S + tr S' - 2 tr (S S')^(1/2) of rows of features; the roots of a product's eigenvalues."""
    (m, s), (m_r, s_r) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(s @ s_r).real.clip(min=0))
    return float(((m - m_r) ** 2).sum() + np.trace(s) + np.trace(s_r) - 2 * roots.sum())


def test_distances_are_those_of_samples_drawn_after_the_run(evaluated_run: Path) -> None:
    digits = np.repeat((load_digits().images / 8 - 1)[:, None], 3, axis=1)
    digits = (digits * 127.5 + 127.5).round() / 127.5 - 1  # as bytes
    for step, measured in distances(evaluated_run).items():
        pipe = Pipeline.load(evaluated_run / "checkpoints" / f"{step:07d}.pt")
        labels = [number * 10 // NUMBER for number in range(NUMBER)]
        generators = sample_generators(0, range(NUMBER), Stream.EVALUATION)
        images = pipe.images(labels, ODE(num_steps=train.EVALUATION_STEPS), generators=generators)
        pixels = ((images * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1).expand(-1, 3, -1, -1).numpy()
        expected = frechet_distance(pixels.reshape(NUMBER, -1), digits.reshape(len(digits), -1))
        assert measured == pytest.approx(expected, rel=1e-4)
    assert set(distances(evaluated_run)) == {2, 4}


@pytest.mark.parametrize(
    ("features", "number", "name"),
    [
        ("inception", 5000, "fid5k"),
        ("inception", 500, "fid500"),
        ("inception", 2500, "fid2500"),
        ("digits", 50_000, "fd50k"),
        ("dinov2", 10_000, "fd10k"),
    ],
)
def test_a_distance_is_named_after_its_features_and_samples(features, number, name, tmp_path, monkeypatch) -> None:
    extractor = Pixels((8, 8))
    extractor.name = features
    monkeypatch.setattr("metrics.training.load_extractor", lambda *_: extractor)
    reference = statistics(tmp_path / "a.npz", extractor=features, digest="pixels")
    alone = Processes(0, 1, torch.device("cpu"))
    assert TrainingEvaluation(str(reference), features, None, number, 10, (1, 8, 8), alone).name == name
    assert re.fullmatch(DISTANCE, name)


def test_a_run_shows_its_distances(evaluated_run: Path) -> None:
    assert f"step 4: fd{NUMBER} " in (evaluated_run / "log.txt").read_text()
    assert (evaluated_run / "eval.png").stat().st_size > 1000
    assert not list((evaluated_run / "samples").iterdir())


def test_evaluations_leave_training_as_it_is(evaluated_run: Path, tmp_path: Path) -> None:
    train.train([*SHORT, "--run-dir", str(tmp_path / "plain")])
    assert losses(evaluated_run) == losses(tmp_path / "plain")
    assert not (tmp_path / "plain" / "eval.png").exists()
    a, b = (torch.load(run / "checkpoints" / "0000004.pt") for run in (evaluated_run, tmp_path / "plain"))
    assert all(torch.equal(a["ema"][name], b["ema"][name]) for name in a["ema"])


def test_a_continued_run_measures_as_one_that_never_stopped(evaluated_run: Path, tmp_path: Path) -> None:
    continued = shutil.copytree(evaluated_run, tmp_path / "run")
    for file in (continued / "checkpoints").glob("0000004.pt*"):
        file.unlink()
    train.train(["--run-dir", str(continued)])  # the settings are remembered
    assert distances(continued) == distances(evaluated_run)
    train.train(["--run-dir", str(continued), "--max-steps", "6", "--eval-num", "12"])
    assert set(distances(continued, "fd12")) == {6}
    train.train(["--run-dir", str(continued), "--max-steps", "7", "--eval-every", "0"])
    assert max(distances(continued, "fd12")) == 6


def test_evaluations_are_not_the_steps_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(TrainingEvaluation, "measure", lambda *_: time.sleep(0.5))
    train.train([*SHORT, *EVALUATION, "--eval-every", "1", "--run-dir", str(tmp_path / "run")])
    assert sorted(record["step_time"] for record in records(tmp_path / "run"))[1] < 0.4  # the machine may be busy


def test_what_cannot_be_measured_is_left_out_with_a_line(tmp_path: Path, monkeypatch) -> None:
    draw = train.draw
    answers = iter([False, True] + 100 * [False])  # the run is asked to stop after the first batch of step 1
    monkeypatch.setattr(Run, "any_should_stop", lambda _: next(answers))

    def diverging(t: train.Training, *args, **how) -> torch.Tensor:
        if len(list((tmp_path / "run" / "checkpoints").glob("0000002.pt"))):
            raise FloatingPointError("the samples are not finite")
        return draw(t, *args, **how)

    monkeypatch.setattr(train, "draw", diverging)
    train.train([*SHORT, *EVALUATION, "--eval-every", "1", "--max-steps", "3", "--run-dir", str(tmp_path / "run")])
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"fd{NUMBER} of step 1 is left out: the run is asked to stop" in log
    assert f"warning: fd{NUMBER} of step 3 is left out: the samples are not finite" in log
    assert 1 not in distances(tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--shard"])
def test_two_processes_measure_what_one_does(tiny_run: Path, tmp_path: Path, flags: str) -> None:
    """At a learning rate that leaves the weights alone: other sums of gradients would make other weights."""
    start = ["--ckpt", tiny_run / "checkpoints" / "0000010.pt", "--lr", "1e-30", "--max-steps", "12", *EVALUATION]
    start += ["--data-path", "digits", "--model", "PPF-T-2", "--num-workers", "0", "--sample-every", "0"]
    start += ["--eval-every", "1", *flags.split()]
    for processes in (1, 2):
        alone = [flag for flag in start if flag != "--shard"] if processes == 1 else start
        done = start_script("train.py", *alone, "--run-dir", tmp_path / str(processes), processes=processes)
        assert done.returncode == 0, done.stderr
    one, two = (distances(tmp_path / str(processes)) for processes in (1, 2))
    assert set(one) == set(two) == {11, 12}
    assert [two[step] for step in one] == pytest.approx(list(one.values()), rel=1e-6)


# -- Refused before the first step -------------------------------------------------------------------------------


def statistics(path: Path, **says: object) -> Path:
    """A file of statistics of 192 features."""
    write_statistics(path, StoredStatistics(str(path), np.zeros(192), np.eye(192), num_images=9, **says))
    return path


def images_of_16(path: Path) -> Path:
    np.savez(path, arr_0=np.zeros((3, 16, 16, 3), np.uint8))
    return path


REFUSED = {
    "needs --eval-ref": lambda _: ["--eval-every", 2],
    "--eval-num has no effect without --eval-every": lambda _: ["--eval-num", 5],
    "--eval-ref has no effect without --eval-every": lambda _: ["--eval-ref", "digits", "--eval-every", 0],
    "--eval-num: 1 is not at least 2": lambda _: [*EVALUATION, "--eval-every", 2, "--eval-num", 1],
    "nowhere.npz": lambda path: ["--eval-every", 2, "--eval-ref", path / "nowhere.npz", "--eval-features", "pixels"],
    r"--eval-features inception: .* --eval-weights": lambda _: ["--eval-every", 2, "--eval-ref", "digits"],
    "--eval-features nothing is unknown|--features nothing is unknown": lambda _: [
        *["--eval-every", 2, "--eval-ref", "digits", "--eval-features", "nothing"]
    ],
    "statistics of digits": lambda path: [
        *["--eval-every", 2, "--eval-features", "pixels"],
        *["--eval-ref", statistics(path / "a.npz", extractor="digits", digest="0123456789")],
    ],
    "does not say of which features": lambda path: [
        *["--eval-every", 2, "--eval-features", "pixels", "--eval-ref", statistics(path / "a.npz")],
    ],
    "images of 16x16, the samples are 8x8": lambda path: [
        *["--eval-every", 2, "--eval-features", "pixels", "--eval-ref", images_of_16(path / "a.npz")],
    ],
}


def test_latents_that_nothing_decodes_are_refused(tmp_path: Path, refuses) -> None:
    latents, folder = torch.randn(6, 4, 8, 8), tmp_path / "latents"
    folder.mkdir()
    tensors = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(6) % 2}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    flags = [*SHORT, "--data-path", folder, "--run-dir", tmp_path / "run"]
    line = refuses(train.train, *flags, "--eval-every", 1, "--eval-ref", "digits")
    assert "does not say which autoencoder decodes it: give --vae" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reason", REFUSED)
def test_an_evaluation_that_cannot_work_is_refused_before_the_run(reason: str, tmp_path: Path, refuses) -> None:
    line = refuses(train.train, *SHORT, "--run-dir", tmp_path / "run", *REFUSED[reason](tmp_path))
    assert re.search(reason, line), line
    assert not (tmp_path / "run").exists()
