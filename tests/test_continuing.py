"""Continuing a run: settings that are remembered, that may change, and that would make it another run."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY
from PIL import Image
from test_train import assert_same_state, checkpoint

from runtime import checkpoints
from runtime import run as run_folder
from runtime.checkpoints import checkpoint_path, digest_path, find_checkpoint, newest_checkpoint
from runtime.run import next_run_dir
from train import train

PICTURES = [
    "--model",
    "PPF-T-2",
    "--image-size",
    "16",
    "--vae",
    "none",
    "--global-batch-size",
    "4",
    "--num-workers",
    "0",
    "--sample-every",
    "0",
]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run, at step 20."""
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of four small random pictures."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(4):
            file = tmp_path / "pictures" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


@pytest.fixture
def picture_run(pictures: Path, tmp_path: Path) -> Path:
    """A run of two steps on the pictures."""
    train([*PICTURES, "--data-path", str(pictures), "--run-dir", str(tmp_path / "run"), "--max-steps", "2"])
    return tmp_path / "run"


# -- Settings ----------------------------------------------------------------------------------------------------


def test_what_may_change_may_change(run: Path) -> None:
    train(
        [
            *TINY,
            "--run-dir",
            str(run),
            "--max-steps",
            "21",
            "--log-every",
            "7",
            "--ckpt-every",
            "3",
            "--num-workers",
            "1",
            "--keep-last",
            "2",
            "--keep-every",
            "10",
            "--sample-every",
            "0",
        ]
    )
    assert newest_checkpoint(run).name == "0000021.pt"


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--global-batch-size", "64"),
        ("--path-type", "GVP"),
        ("--global-seed", "1"),
        ("--prediction", "noise"),
        ("--level-edges", "0.4"),
        ("--class-dropout-prob", "0.2"),
        ("--model", "PPF-T-3"),
    ],
)
def test_what_would_make_it_another_run_is_refused_by_name(flag: str, value: str, tiny_run: Path, refuses) -> None:
    line = refuses(train, *TINY, "--run-dir", tiny_run, flag, value)
    assert f"{flag} is " in line
    assert f"not {value}" in line or f"not [{value}]" in line


def test_what_was_not_given_is_remembered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The length of the run, and what is logged, kept and drawn."""
    config = json.loads((run / "config.json").read_text())["args"]
    train(["--run-dir", str(run)])
    assert "nothing to do" in capsys.readouterr().out
    now = json.loads((run / "config.json").read_text())["args"]
    for name in ("max_steps", "epochs", "ckpt_every", "log_every", "sample_every", "cfg_scales", "lr"):
        assert now[name] == config[name], name
    assert config["max_steps"] == 20


@pytest.mark.slow
def test_epochs_take_the_place_of_max_steps(run: Path) -> None:
    train(["--run-dir", str(run), "--epochs", "1", "--ckpt-every", "100"])
    assert newest_checkpoint(run).name == f"{1797 // 32:07d}.pt"


@pytest.mark.parametrize(
    ("flag", "value", "was"),
    [
        ("--lr", "0.0002", "0.001"),
        ("--max-grad-norm", "1.0", "None"),
        ("--weight-decay", "0.1", "0.0"),
        ("--ema-decay", "0.5", "0.9"),
        ("--gradient-accumulation-steps", "2", "1"),
    ],
)
def test_what_an_unstable_run_needs_may_change_with_a_line_in_the_log(
    flag: str, value: str, was: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train([*TINY, flag, value, "--run-dir", str(run), "--max-steps", "21"])
    line = f"warning: {flag} is {value} from here on; it was {was}"
    assert line in capsys.readouterr().out
    assert line in (run / "log.txt").read_text()
    train(["--run-dir", str(run), "--max-steps", "22"])  # and is remembered
    assert "from here on" not in capsys.readouterr().out
    group = checkpoint(run, 22)["opt"]["param_groups"][0]
    if flag in ("--lr", "--weight-decay"):
        assert group[flag[2:].replace("-", "_")] == float(value)


@pytest.mark.slow
def test_accumulation_changes_rounding_alone(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    train(["--run-dir", str(run), "--max-steps", "23"])
    train(["--run-dir", str(other), "--max-steps", "23", "--gradient-accumulation-steps", "4"])
    for name, tensor in checkpoint(run, 23)["model"].items():
        torch.testing.assert_close(checkpoint(other, 23)["model"][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_new_run_needs_data(tmp_path: Path, refuses) -> None:
    assert "--data-path is missing" in refuses(train, "--model", "PPF-T-2", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- Data --------------------------------------------------------------------------------------------------------


def test_data_that_moved_is_the_same_data(
    picture_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    undisturbed = shutil.copytree(picture_run, tmp_path / "undisturbed")
    train(["--run-dir", str(undisturbed), "--max-steps", "4"])
    monkeypatch.chdir(tmp_path)
    for number, spelling in enumerate(("pictures", "pictures/", "./pictures"), start=1):
        copy = shutil.copytree(picture_run, tmp_path / f"spelling-{number}")
        train(["--run-dir", str(copy), "--data-path", spelling, "--max-steps", "4"])
    assert "--data-path is" not in capsys.readouterr().out
    moved = pictures.rename(tmp_path / "elsewhere")
    train(["--run-dir", str(picture_run), "--data-path", str(moved), "--max-steps", "3"])
    assert f"--data-path is {moved} from here on; it was {pictures}" in capsys.readouterr().out
    train(["--run-dir", str(picture_run), "--max-steps", "4"])
    assert_same_state(checkpoint(picture_run, 4)["model"], checkpoint(undisturbed, 4)["model"])


def test_data_that_is_gone_is_named(picture_run: Path, pictures: Path, refuses) -> None:
    pictures.rename(pictures.with_name("elsewhere"))
    line = refuses(train, "--run-dir", picture_run, "--max-steps", "4")
    assert f"--data-path {pictures} does not exist" in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "b").rename(folder / "0_new"), "names of images or classes"),
        (lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "9.png"), "names of images or classes"),
        (lambda folder: (folder / "a" / "0.png").unlink(), "the number of images"),
    ],
)
def test_changed_data_is_refused(change: Callable, words: str, picture_run: Path, pictures: Path, refuses) -> None:
    """A renamed class folder swaps labels without a change of any number."""
    change(pictures)
    before = (picture_run / "config.json").read_bytes()
    line = refuses(train, "--run-dir", picture_run, "--max-steps", "4")
    assert str(pictures) in line
    assert words in line
    assert (picture_run / "config.json").read_bytes() == before


def test_changed_statistics_of_latents_are_refused(tmp_path: Path, refuses) -> None:
    """They scale what the network sees: weights of the old ones are of no use with the new."""
    from safetensors.torch import save_file

    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "latents"
    folder.mkdir()
    tensors = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(6) % 2}
    save_file(tensors, folder / "latents_rank00_shard000.safetensors")
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    train(
        [
            "--model",
            "PPF-T-2",
            "--data-path",
            str(folder),
            "--global-batch-size",
            "4",
            "--num-workers",
            "0",
            "--sample-every",
            "0",
            "--run-dir",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
        ]
    )
    torch.save({"mean": torch.full((1, 4, 1, 1), 5.0), "std": torch.ones(1, 4, 1, 1)}, folder / "latents_stats.pt")
    line = refuses(train, "--run-dir", tmp_path / "run", "--max-steps", "2")
    assert "the scaling of the latents changed" in line


def test_a_run_that_never_heard_of_digests_of_its_data_continues(picture_run: Path, pictures: Path, refuses) -> None:
    """The config of earlier versions tells the number of images alone."""
    path = checkpoint_path(picture_run, 2)
    saved = torch.load(path, weights_only=True)
    del saved["config"]["data"]
    saved["config"]["images"] = 8
    saved["config"]["args"]["data_path"] = os.path.relpath(pictures)
    for name in ("deterministic", "patch_level"):
        saved["config"]["args"].pop(name, None)
    checkpoints.save_checkpoint(path, saved)
    train(["--run-dir", str(picture_run), "--max-steps", "3"])
    (pictures / "a" / "0.png").unlink()
    checkpoint_path(picture_run, 3).unlink()
    assert "(8 then, 7 now)" in refuses(train, "--run-dir", picture_run, "--max-steps", "3")


# -- Following the advice ----------------------------------------------------------------------------------------


def diverge(run: Path, refuses, *flags: str) -> str:
    """The error of a run whose learning rate is absurd."""
    return refuses(train, "--run-dir", run, "--max-steps", "60", "--lr", "1e6", *flags)


def test_advice_after_a_loss_that_is_not_finite_works(run: Path, refuses) -> None:
    line = diverge(run, refuses)
    assert "the last good checkpoint is" in line
    advised = re.search(r"continue with (--max-grad-norm \S+) or a lower (--lr)", line)
    train(["--run-dir", str(run), *shlex.split(advised[1]), advised[2], "1e-4", "--max-steps", "22"])
    assert newest_checkpoint(run).name == "0000022.pt"


def test_advice_of_a_refused_flag_works(run: Path, tmp_path: Path, refuses) -> None:
    line = refuses(train, *TINY, "--run-dir", run, "--global-batch-size", "16")
    assert "leave --global-batch-size out to continue that run, or start another with a new --run-dir" in line
    flags = [flag for flag in TINY if flag not in ("--global-batch-size", "32")]
    train([*flags, "--run-dir", str(run), "--max-steps", "21"])
    train([*TINY, "--run-dir", str(tmp_path / "new"), "--global-batch-size", "16", "--max-steps", "1"])

    line = refuses(train, *TINY, "--ckpt", run, "--run-dir", tmp_path / "third", "--global-batch-size", "16")
    assert "start another without --ckpt (--initialize_from takes its weights)" in line
    train(
        [
            *TINY,
            "--initialize_from",
            str(run),
            "--run-dir",
            str(tmp_path / "third"),
            "--global-batch-size",
            "16",
            "--max-steps",
            "1",
        ]
    )


def test_advice_about_a_run_without_a_good_checkpoint_works(run: Path, refuses) -> None:
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    line = refuses(train, *TINY, "--run-dir", run)
    assert "delete them to start this run again" in line
    for path in (run / "checkpoints").glob("*.pt"):
        path.unlink()
    train([*TINY, "--run-dir", str(run), "--max-steps", "1"])
    assert newest_checkpoint(run).name == "0000001.pt"


# -- Checkpoints that cannot be read -----------------------------------------------------------------------------


@contextlib.contextmanager
def failing_reads(path: Path, number: int, times: int) -> Iterator[list[int]]:
    """Opening the file ends in this errno so many times."""
    real, calls = open, []

    def failing(file, *args, **kwargs):
        if Path(str(file)) == path and len(calls) < times:
            calls.append(number)
            raise OSError(number, os.strerror(number), str(file))
        return real(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", failing)
        patch.setattr(checkpoints, "READ_PAUSE", 0.01)
        yield calls


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_read_that_fails_is_not_damage(number: int, run: Path, refuses) -> None:
    path = checkpoint_path(run, 20)
    with failing_reads(path, number, times=checkpoints.READ_ATTEMPTS):
        line = refuses(train, *TINY, "--run-dir", run, "--max-steps", "20")
    assert str(path) in line
    assert os.strerror(number) in line
    assert path.exists()
    assert digest_path(path).exists()
    with failing_reads(path, number, times=1) as calls:
        assert find_checkpoint(run) == (path, {})
    assert calls


def test_a_digest_is_never_deleted(run: Path) -> None:
    path = checkpoint_path(run, 20)
    digest = digest_path(path).read_bytes()
    path.write_bytes(path.read_bytes()[:-7])
    train([*TINY, "--run-dir", str(run), "--max-steps", "10"])
    assert digest_path(path.with_name("0000020.pt.damaged")).read_bytes() == digest


def test_flips_in_the_directory_of_a_file_without_digest_are_damage(run: Path) -> None:
    path = checkpoint_path(run, 20)
    digest_path(path).unlink()
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # The directory of a zip archive is its end.
    directory = int.from_bytes(whole[whole.rindex(b"PK\x05\x06") + 16 :][:4], "little")
    directory = directory if directory < len(whole) else len(whole) - 8000
    other = path.with_name("copy.pt")
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(directory, len(whole))] ^= 1 << int(rng.integers(8))
        other.write_bytes(data)
        checkpoints.find_damage(other)  # raises nothing; a flip in a comment or a date is none


# -- Locks and folders -------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_chosen_once_the_folder_is_locked(run: Path, capsys, monkeypatch) -> None:
    """A predecessor that is just ending saves its last checkpoint while this process waits."""
    newest = checkpoint_path(run, 20)
    late = [newest.rename(newest.with_name("late.pt")), digest_path(newest).rename(newest.with_name("late.sha256"))]
    real = run_folder.lock_run_dir

    def lock(run_dir: Path) -> bool:
        if late[0].exists():
            late[1].rename(digest_path(newest))
            late[0].rename(newest)
        return real(run_dir)

    monkeypatch.setattr(run_folder, "lock_run_dir", lock)
    train([*TINY, "--run-dir", str(run), "--max-steps", "21"])
    assert "continuing from step 20" in capsys.readouterr().out


def test_a_run_that_began_meanwhile_is_not_overwritten(tiny_run: Path, tmp_path: Path, monkeypatch, refuses) -> None:
    real = run_folder.lock_run_dir

    def lock(run_dir: Path) -> bool:
        shutil.copytree(tiny_run, run_dir, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        return real(run_dir)

    monkeypatch.setattr(run_folder, "lock_run_dir", lock)
    assert "another process has begun a run in" in refuses(train, *TINY, "--run-dir", tmp_path / "new")


def _take(results: Path, queue: multiprocessing.Queue, barrier: threading.Barrier) -> None:
    barrier.wait()
    queue.put(next_run_dir(results, "PPF-T-2-Linear-velocity").name)


def test_starts_at_the_same_time_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue, barrier = context.Queue(), context.Barrier(4)
    starts = [context.Process(target=_take, args=(tmp_path, queue, barrier)) for _ in range(4)]
    for start in starts:
        start.start()
    names = {queue.get(timeout=60) for _ in starts}
    for start in starts:
        start.join()
    assert len(names) == 4


def test_run_1000_follows_run_999(tmp_path: Path) -> None:
    (tmp_path / "999-PPF-T-2-Linear-velocity").mkdir()
    (tmp_path / "77-of-another-program").mkdir()
    assert next_run_dir(tmp_path, "SiT-T/2-GVP-noise").name == "1000-SiT-T-2-GVP-noise"
    assert next_run_dir(tmp_path, "SiT-T/2-GVP-noise").name == "1001-SiT-T-2-GVP-noise"


def test_nothing_is_left_of_a_start_that_fails(tmp_path: Path, refuses) -> None:
    refuses(train, *TINY, "--run-dir", tmp_path / "run", "--ckpt", tmp_path / "no.pt")
    refuses(train, *TINY[2:], "--data-path", tmp_path / "no", "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# -- Ctrl-C ------------------------------------------------------------------------------------------------------


def interrupted_run(tmp_path: Path, *flags: str) -> subprocess.Popen:
    """A run that has made a few steps."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        "--run-dir",
        str(tmp_path / "run"),
        "--max-steps",
        "100000",
        "--log-every",
        "1",
        *flags,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **ENVIRONMENT}
    )
    for line in process.stdout:
        if line.startswith("step 3"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
def test_ctrl_c_saves_and_ends(tmp_path: Path) -> None:
    process = interrupted_run(tmp_path)
    process.send_signal(2)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "saving after this step" in err
    assert "Traceback" not in err
    assert "which is saved" in out
    assert newest_checkpoint(tmp_path / "run") is not None
    train(["--run-dir", str(tmp_path / "run"), "--max-steps", "1"])  # nothing to do, and nothing damaged


@pytest.mark.slow
def test_second_ctrl_c_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = interrupted_run(tmp_path)
    process.send_signal(2)
    while "saving after this step" not in (line := process.stderr.readline()):
        assert line
    process.send_signal(2)
    start = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 30


# -- Names -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_names_without_an_encoding_reach_the_log(pictures: Path, tmp_path: Path) -> None:
    """Linux's file names are bytes, and a locale may know ASCII alone."""
    folder = pictures.rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xc3\xa9tude"))
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *PICTURES,
        "--data-path",
        str(folder),
        "--max-steps",
        "1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, **ENVIRONMENT, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "tude: 8 images" in (tmp_path / "run" / "log.txt").read_text()
    command[command.index(str(folder))] = str(folder) + "x"
    done = subprocess.run([*command[:-1], str(tmp_path / "other")], env=environment, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


# -- Runs of earlier versions ------------------------------------------------------------------------------------


@pytest.fixture
def earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run at its second step, made by the code that tests/earlier_run/make.py names."""
    from earlier_run.make import SIZE

    from models import MODELS

    monkeypatch.setitem(MODELS, "PPF-T-2", {**MODELS["PPF-T-2"], **SIZE})
    return Path(shutil.copytree(ROOT / "tests" / "earlier_run", tmp_path / "earlier"))


def test_a_run_of_an_earlier_version_continues_as_it_did(earlier_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [json.loads(line) for line in (earlier_run / "metrics.jsonl").read_text().splitlines()]
    train(["--run-dir", str(earlier_run)])
    found = [json.loads(line) for line in (earlier_run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for record, other in zip(found, expected, strict=True):
        for key in ("loss", "loss_level_0", "loss_level_1", "grad_norm", "lr", "epoch"):
            assert record[key] == pytest.approx(other[key], rel=1e-5), (record["step"], key)


def test_a_run_of_an_earlier_version_is_sampled_from(earlier_run: Path) -> None:
    from pipeline import Pipeline
    from transport import ODE

    pipe = Pipeline.load(earlier_run)
    assert (pipe.step, pipe.transport.schedule.level_edges) == (2, (0.5,))
    assert pipe.images([1, 2], ODE(num_steps=4)).shape == (2, 1, 8, 8)


def test_a_run_of_an_earlier_version_can_be_evaluated(earlier_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path / "cache"))
    (checkpoint,) = (earlier_run / "checkpoints").glob("*.pt")
    stored = torch.load(checkpoint, weights_only=True)
    assert not any(name.startswith("eval_") for name in stored["config"]["args"])
    flags = ["--eval-every", "1", "--eval-num", "20", "--eval-ref", "digits", "--eval-features", "pixels"]
    train(["--run-dir", str(earlier_run), *flags])
    assert "fd20" in json.loads((earlier_run / "metrics.jsonl").read_text().splitlines()[-1])


def test_a_setting_that_an_earlier_version_did_not_know_has_its_default(
    earlier_run: Path, refuses: Callable[..., str]
) -> None:
    """Else a new flag would make it another run, without a word."""
    for flags, default in (
        (["--time-sampling", "cosmap"], "--time-sampling is uniform in "),
        (["--aug-dim", "64"], "--aug-dim is None in "),
    ):
        assert default in refuses(train, "--run-dir", earlier_run, *flags)
    train(["--run-dir", str(earlier_run), "--aug-dim", "inf", "--time-sampling", "uniform", "--deterministic"])
    assert "--deterministic is True from here on; it was False" in (earlier_run / "log.txt").read_text()
