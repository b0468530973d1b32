"""Checkpoints and signals: complete or absent, verified, written in the background, kept or deleted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY

from data.datasets import Digits
from data.order import StepSampler, TrainingStream
from runtime import checkpoints
from runtime.checkpoints import (
    CheckpointWriter,
    checkpoint_path,
    checkpoints_of,
    digest_path,
    find_damage,
    newest_checkpoint,
    newest_good,
    remove_leftovers,
    save_checkpoint,
)
from runtime.errors import UserError
from runtime.preemption import EXIT_PREEMPTED, Preemption
from train import train
from weights.pretrained import load_pretrained

CORRUPTIONS = int(os.environ.get("CHAOS_CORRUPTIONS", 24))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def state(step: int, size: int = 50_000) -> dict:
    """A small checkpoint that tells its step in every tensor."""
    tensors = {"a": torch.full((size,), float(step)), "b": torch.full((3,), step, dtype=torch.int64)}
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.zeros(size)}
    opt = {"state": {0: moments}, "param_groups": [{"lr": 0.1}]}
    return {"model": tensors, "ema": dict(tensors), "opt": opt, "config": {"args": {}}, "step": step}


def flip_a_bit(path: Path, rng: random.Random) -> int:
    """Change one bit of a file; returns where."""
    data = bytearray(path.read_bytes())
    offset = rng.randrange(len(data))
    data[offset] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return offset


# -- Damage ------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_truncation_is_noticed(run_dir: Path) -> None:
    good, bad = checkpoint_path(run_dir, 1), checkpoint_path(run_dir, 2)
    save_checkpoint(good, state(1))
    save_checkpoint(bad, state(2))
    whole = bad.read_bytes()
    assert newest_good(run_dir) == (bad, {})
    for seed in range(CORRUPTIONS):
        rng = random.Random(seed)
        if seed % 3:
            flip_a_bit(bad, rng)
        else:
            bad.write_bytes(whole[: rng.randrange(len(whole))])
        found, damaged = newest_good(run_dir)
        assert found == good, seed
        assert set(damaged) == {bad}
        bad.write_bytes(whole)
    flip_a_bit(digest_path(bad), random.Random(0))
    assert newest_good(run_dir)[0] == good


def test_a_file_without_its_digest_is_checked_by_the_sums_of_its_records(run_dir: Path) -> None:
    path = checkpoint_path(run_dir, 1)
    save_checkpoint(path, state(1))
    digest_path(path).unlink()
    assert find_damage(path) is None
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the middle of a tensor
    path.write_bytes(data)
    assert "data/" in find_damage(path)
    path.write_bytes(data[: len(data) // 2])
    assert "cannot be read" in find_damage(path)


def test_the_digest_is_that_of_sha256sum(run_dir: Path) -> None:
    save_checkpoint(checkpoint_path(run_dir, 1), state(1))
    done = subprocess.run(["sha256sum", "-c", "0000001.pt.sha256"], cwd=run_dir / "checkpoints", capture_output=True)
    assert done.returncode == 0


def test_the_newest_good_checkpoint_is_continued_and_the_damaged_one_named(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    newest = checkpoint_path(run, 20)
    flip_a_bit(newest, random.Random(1))
    train([*TINY, "--run-dir", str(run), "--max-steps", "20", "--log-every", "1"])
    out = capsys.readouterr().out
    assert f"warning: {newest} is damaged" in out
    assert f"continuing from step 10, {checkpoint_path(run, 10)}" in out
    assert newest.with_name("0000020.pt.damaged").exists()
    saved, expected = (torch.load(checkpoint_path(folder, 20), weights_only=True) for folder in (run, tiny_run))
    assert all(torch.equal(saved["model"][name], expected["model"][name]) for name in expected["model"])
    assert load_pretrained(run).step == 20


def test_a_damaged_ckpt_is_an_error_and_so_is_a_run_without_a_good_one(tiny_run: Path, tmp_path: Path, refuses) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    for path in checkpoints_of(run):
        flip_a_bit(path, random.Random(2))
    line = refuses(train, *TINY, "--ckpt", checkpoint_path(run, 20))
    assert f"cannot read checkpoint {checkpoint_path(run, 20)}" in line
    line = refuses(train, *TINY, "--run-dir", run)
    assert "no checkpoint of" in line
    assert "0000010.pt" in line
    assert "0000020.pt" in line
    assert len(checkpoints_of(run)) == 2  # nothing was taken away


def test_files_with_other_names_are_no_checkpoints(run_dir: Path) -> None:
    for name in ("0000001.pt", "12.pt", "copy.pt", "0000020-old.pt", ".0000030.17.pt", "0000040.pt.damaged"):
        (run_dir / "checkpoints" / name).write_bytes(b"")
    assert [path.name for path in checkpoints_of(run_dir)] == ["0000001.pt", "12.pt"]
    assert newest_checkpoint(run_dir).name == "12.pt"
    remove_leftovers(run_dir)
    assert not (run_dir / "checkpoints" / ".0000030.17.pt").exists()


# -- Writing in the background -----------------------------------------------------------------------------------


def test_what_is_written_is_the_moment_of_saving(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors may change after wait_copied, everything else right after save; the file is of before."""
    go = threading.Event()
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args: (go.wait(30), save_checkpoint(*args)))
    writer = CheckpointWriter(run_dir, tell=lambda line: None)
    for step in (1, 2):  # the second one reuses the buffers of the first
        go.clear()
        values = state(step)
        writer.save(step, values)
        values["opt"]["param_groups"][0]["lr"] = 7.0
        writer.wait_copied()
        for tensor in (values["model"]["a"], values["opt"]["state"][0]["step"]):
            tensor.fill_(9)
        assert not checkpoint_path(run_dir, step).exists()
        go.set()
        assert writer.wait() is None
    for step in (1, 2):
        saved = torch.load(checkpoint_path(run_dir, step), weights_only=True)
        assert saved["opt"]["param_groups"] == [{"lr": 0.1}]
        assert saved["opt"]["state"][0]["step"] == step
        assert saved["model"]["a"].eq(step).all()
        assert saved["step"] == step


def test_only_one_checkpoint_is_being_written(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most = [0], [0]

    def slow(path: Path, checkpoint: dict) -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        save_checkpoint(path, checkpoint)
        running[0] -= 1

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    writer = CheckpointWriter(run_dir, tell=lambda line: None)
    for step in range(5):
        writer.save(step, state(step))
    assert writer.wait() is None
    assert most == [1]
    assert len(checkpoints_of(run_dir)) == 5


def test_an_error_that_nobody_expected_reaches_the_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(checkpoints, "save_checkpoint", broken)
    writer = CheckpointWriter(run_dir)
    writer.save(1, state(1))
    with pytest.raises(KeyError):
        writer.wait()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(None, None, range(1, 11)), (3, None, (8, 9, 10)), (1, None, (10,)), (2, 4, (4, 8, 9, 10))],
)
def test_the_last_and_every_mth_are_kept(
    keep_last: int | None, keep_every: int | None, kept: tuple[int, ...], run_dir: Path
) -> None:
    writer = CheckpointWriter(run_dir, keep_last, keep_every, tell=lambda line: None)
    for step in range(1, 11):
        writer.save(step, state(step))
    writer.wait()
    assert [int(path.stem) for path in checkpoints_of(run_dir)] == list(kept)
    assert len(list((run_dir / "checkpoints").iterdir())) == 2 * len(kept)  # digests go with them


# -- A full disk -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 1 MB; False where the machine does not allow mounting one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses to make a file larger than 100 kB: what write() says at a full disk, everywhere."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(
    foreseen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foreseen, because the free space is looked at first; or not, and the write fails in the middle."""
    told: list[str] = []
    with small_disk(tmp_path / "disk") as mounted:
        if not mounted:
            pytest.skip("no tmpfs can be mounted here")
        run_dir = tmp_path / "disk" / "run"
        (run_dir / "checkpoints").mkdir(parents=True)
        monkeypatch.setattr(checkpoints, "CHUNK", 1 << 16)
        if not foreseen:
            usage = shutil.disk_usage(run_dir)
            monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
        writer = CheckpointWriter(run_dir, keep_last=1, tell=told.append)
        writer.save(1, state(1))  # takes 0.6 MB
        assert writer.wait() is None
        writer.save(2, state(2))
        failed = writer.wait()
        assert f"the last good checkpoint is {checkpoint_path(run_dir, 1)}" in failed
        assert ("the disk is full" if foreseen else os.strerror(errno.ENOSPC)) in failed
        assert told[-1] == f"warning: {failed}"
        assert newest_good(run_dir) == (checkpoint_path(run_dir, 1), {})
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert names == {"0000001.pt", "0000001.pt.sha256"}  # no half of a file
        checkpoint_path(run_dir, 1).unlink()
        writer.save(3, state(3))  # there is room again
        assert writer.wait() is None


def test_a_write_that_fails_keeps_the_old_checkpoint(run_dir: Path) -> None:
    writer = CheckpointWriter(run_dir, tell=lambda line: None)
    writer.save(1, state(1))
    writer.wait()
    with small_files():
        writer.save(2, state(2))
        failed = writer.wait()
    assert os.strerror(errno.EFBIG) in failed
    assert newest_good(run_dir) == (checkpoint_path(run_dir, 1), {})
    assert len(list((run_dir / "checkpoints").iterdir())) == 2


def test_a_run_goes_on_when_the_disk_is_full_and_fails_if_its_end_is_not_saved(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [*TINY, "--run-dir", str(run), "--max-steps", "20", "--ckpt-every", "5", "--log-every", "1"]

    def full_after_step_10(path: Path, checkpoint: dict) -> None:
        if checkpoint["step"] > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_checkpoint(path, checkpoint)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_checkpoint", full_after_step_10)
        with pytest.raises(UserError, match=r"0000020.pt was not written: .*No space left.*is .*0000010.pt; make room"):
            train(flags)
    assert "warning: checkpoint" in capsys.readouterr().out
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    train(flags)  # the user has made room
    saved, expected = (torch.load(checkpoint_path(folder, 20), weights_only=True) for folder in (run, tiny_run))
    assert all(torch.equal(saved["ema"][name], expected["ema"][name]) for name in expected["ema"])


# -- Starting or continuing --------------------------------------------------------------------------------------


def test_the_same_command_with_ckpt_continues_its_own_run(tiny_run: Path, tmp_path: Path, refuses, capsys) -> None:
    """A requeued job that began with --ckpt must not begin there again."""
    flags = [*TINY, "--run-dir", str(tmp_path / "run"), "--ckpt", str(checkpoint_path(tiny_run, 10))]
    train([*flags, "--max-steps", "12"])
    capsys.readouterr()
    train([*flags, "--max-steps", "14"])
    assert "continuing from step 12" in capsys.readouterr().out
    line = refuses(train, *TINY, "--run-dir", tmp_path / "run", "--ckpt", checkpoint_path(tiny_run, 20))
    assert "did not start from --ckpt" in line


def test_restarts_want_a_folder(refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert "--max-restarts needs --run-dir" in refuses(train, *TINY)
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS")
    assert "give --keep-last as well" in refuses(train, *TINY, "--keep-every", "5")


def test_torn_lines_of_metrics_do_not_stop_a_run(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    checkpoint_path(run, 20).unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    train([*TINY, "--run-dir", str(run), "--max-steps", "20", "--log-every", "1"])
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_each_sample_comes_once_per_epoch_when_the_number_of_processes_changes() -> None:
    """Two processes, then one, then four, at steps that are no ends of epochs."""
    stream = TrainingStream(Digits(), seed=3)
    seen: list[int] = []
    for start, stop, world_size in ((0, 41, 2), (41, 70, 1), (70, 200, 4)):
        ranks = [StepSampler(start, stop, 32, rank, world_size) for rank in range(world_size)]
        for parts in zip(*ranks, strict=True):
            seen += [position for part in parts for position in part]
    assert seen == list(range(200 * 32))
    for epoch in range(3):
        indices = [stream.index(position) for position in range(epoch * 1797, (epoch + 1) * 1797)]
        assert np.array_equal(np.sort(indices), np.arange(1797))


# -- Health ------------------------------------------------------------------------------------------------------


def poisoned(monkeypatch: pytest.MonkeyPatch, index: int, value: float) -> None:
    load = Digits.load

    def poison(self: Digits, i: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        image, label = load(self, i, generator)
        return (image + value if i == index else image), label

    monkeypatch.setattr(Digits, "load", poison)


def test_a_loss_that_is_not_finite_names_its_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = TrainingStream(Digits(), 0).index(3 * 32 + 5)
    poisoned(monkeypatch, index, float("nan"))
    named = rf"step 4 for 1 sample\(s\) of the dataset: {index} \(position 101, level [01]\);.*0000003.pt"
    with pytest.raises(UserError, match=named) as error:
        train([*TINY, "--run-dir", str(tmp_path), "--max-steps", "9", "--ckpt-every", "1"])
    assert "loss is not finite" in str(error.value)
    saved = torch.load(checkpoint_path(tmp_path, 3), weights_only=True)
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 3)


def test_a_gradient_that_is_not_finite_names_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from models import PyramidalPatchDiT

    forward, calls = PyramidalPatchDiT.forward, []

    def forward_once_bad(self: PyramidalPatchDiT, *args: object, **kwargs: object) -> list[torch.Tensor]:
        out = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 7:  # one level of the two
            out[0].register_hook(lambda grad: grad * float("inf"))
        return out

    monkeypatch.setattr(PyramidalPatchDiT, "forward", forward_once_bad)
    named = r"gradient is not finite at step \d+, though every loss is: in \d+ param.*level\(s\) \[[01]\].*at positions"
    with pytest.raises(UserError, match=named):
        train([*TINY, "--run-dir", str(tmp_path), "--max-steps", "20"])


# -- Signals -----------------------------------------------------------------------------------------------------


def ended_by(*lines: str) -> int:
    """The exit code of a small program that enters Preemption."""
    program = "\n".join(["import os, signal, time", "from runtime.preemption import Preemption", *lines])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, timeout=60).returncode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_first_signal_asks_and_the_second_exits_at_once(name: str) -> None:
    kill = f"os.kill(os.getpid(), signal.{name})"
    begin = "preemption = Preemption().__enter__()"
    assert ended_by(begin, kill, "time.sleep(20)") == EXIT_PREEMPTED  # nothing to save yet
    assert ended_by(begin, "preemption.working = True", kill, "raise SystemExit(7 * preemption.requested)") == 7
    assert ended_by(begin, "preemption.working = True", kill, kill, "time.sleep(20)") == 128 + getattr(signal, name)
    # Under torchrun the same order may come twice: from torchrun, and from who ordered torchrun.
    agent = "os.environ['TORCHELASTIC_RUN_ID'] = 'x'"
    assert ended_by(agent, begin, "preemption.working = True", kill, kill, "raise SystemExit(5)") == 5
    later = "preemption._time -= 10"
    assert ended_by(agent, begin, "preemption.working = True", kill, later, kill, "time.sleep(20)") > 128


def test_the_death_of_torchrun_counts_as_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    preemption = Preemption()
    assert not preemption.requested
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert preemption.requested


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """A run that was preempted leaves the signals ignored, as its process is about to end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.slow
@pytest.mark.usefixtures("signal_handlers")
@pytest.mark.parametrize("where", ["forward", "preview"])
def test_a_signal_saves_the_step_and_the_same_command_ends_alike(
    where: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train as script

    owner, name = {"forward": (script.rng, "draw_step"), "preview": (script.Pipeline, "images")}[where]
    flags = [*TINY, "--run-dir", str(tmp_path), "--max-steps", "20", "--log-every", "1", "--sample-every", "6"]
    original: Callable = getattr(owner, name)

    def signalled(*args: object, **kwargs: object) -> object:
        due = args[0] == 6 if where == "forward" else (tmp_path / "samples").exists()  # the seventh step, its preview
        if due and not (tmp_path / "signalled").exists():
            (tmp_path / "signalled").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, signalled)
        with pytest.raises(SystemExit) as stopped:
            train(flags)
    assert stopped.value.code == EXIT_PREEMPTED
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 7)
    assert (tmp_path / "samples" / "0000006.png").exists() == (where == "forward")  # a preview is left unfinished
    train(flags)
    saved, expected = (torch.load(checkpoint_path(folder, 20), weights_only=True) for folder in (tmp_path, tiny_run))
    for part in ("model", "ema"):
        assert all(torch.equal(saved[part][name], expected[part][name]) for name in expected[part])
