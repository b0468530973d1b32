"""Runs that are killed at random, and end as if nothing had happened.

The kills are drawn from fixed seeds: CHAOS_KILLS of them (make chaos: 50). The device is the CPU, or with CHAOS_DEVICES
(make chaos CHAOS_DEVICES=0) that of CUDA_VISIBLE_DEVICES; two processes then need two of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT

from runtime.checkpoints import checkpoint_path, checkpoints_of, find_damage, newest_good
from runtime.preemption import EXIT_PREEMPTED

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("CHAOS_KILLS", 5))
KILLS_PER_RUN = 5
DEVICES = os.environ.get("CHAOS_DEVICES", "")
STEPS = 30
FLAGS = [
    *(
        f"--data-path digits --model PPF-T-2 --global-batch-size 32 --max-steps {STEPS} "
        "--lr 1e-3 --warmup-steps 4 --ema-decay 0.9 --ckpt-every 2 --keep-last 4 "
        "--log-every 1 --sample-every 0"
    ).split(),
    *(["--deterministic"] if DEVICES else []),
]
PATIENCE = 120  # seconds, for anything

two_processes = pytest.mark.skipif(DEVICES.count(",") == 0 and DEVICES != "", reason="two processes want two GPUs")


class Job:
    """A training script that was started, alone or under torchrun, in a process group of its own."""

    def __init__(
        self, run_dir: Path, *flags: object, processes: int | None = None, torchrun: tuple[str, ...] = ()
    ) -> None:
        launcher = [sys.executable]
        if processes is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
        self.run_dir = run_dir
        self.output = run_dir.with_name(f"{run_dir.name}.out")
        self.offset = len(self.text())
        environment = {**os.environ, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": DEVICES, "OMP_NUM_THREADS": "1"}
        command = [*launcher, str(ROOT / "train.py"), *map(str, FLAGS), "--run-dir", str(run_dir), *map(str, flags)]
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=ROOT, env=environment, start_new_session=True
            )

    def text(self) -> str:
        """Text that this folder's jobs have printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def ended(self) -> bool:
        return self.process.poll() is not None

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait; False if the job ended first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.ended():
                return False
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.0005)
        return True

    def trained(self, steps: int) -> bool:
        """Wait until this job has done so many steps."""
        return self.until(lambda: len(re.findall(r"^step \d+: ", self.text()[self.offset :], re.M)) >= steps)

    def descendants(self) -> list[int]:
        """The job's process and all below it; the last two of torchrun's are its ranks."""
        parents: dict[int, list[int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
        found = [self.process.pid]
        for pid in found:
            found += sorted(parents.get(pid, []))
        return found

    def ranks(self) -> list[int]:
        """The processes that torchrun started."""
        direct = []
        for pid in self.descendants()[1:]:
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and b"\0LOCAL_RANK=" in b"\0" + environ:
                    direct.append(pid)
        return direct

    def temporary(self) -> list[Path]:
        """Temporary files of unfinished checkpoints."""
        return list((self.run_dir / "checkpoints").glob(".[0-9]*"))

    def kill(self) -> None:
        """Kill every process of the job, without notice."""
        for pid in self.descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> int:
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(self.text())


def final(run_dir: Path) -> dict:
    return torch.load(checkpoint_path(run_dir, STEPS), weights_only=True)


def assert_same_bits(run_dir: Path, reference: Path) -> None:
    """Weights, average and the optimizer's state, and every step logged once."""
    assert newest_good(run_dir)[0] == checkpoint_path(run_dir, STEPS)

    def flat(value: object, name: str = "") -> dict[str, object]:
        if isinstance(value, (dict, list, tuple)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            return {key: leaf for part, item in items for key, leaf in flat(item, f"{name}/{part}").items()}
        return {name: value}

    for part in ("model", "ema", "opt"):
        a, b = flat(final(run_dir)[part]), flat(final(reference)[part])
        assert a.keys() == b.keys()
        for name in a:
            same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
            assert same, f"{part}{name}"
    assert losses(run_dir) == losses(reference)


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [record["loss"] for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Path]:
    """The uninterrupted run, by number of processes."""
    made: dict[int | None, Path] = {}

    def make(processes: int | None) -> Path:
        if processes not in made:
            run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
            job = Job(run_dir, "--num-workers", "0", processes=processes)
            assert job.end() == 0, job.text()
            made[processes] = run_dir
        return made[processes]

    return make


# -- SIGKILL -----------------------------------------------------------------------------------------------------


def kill_at_random(job: Job, rng: random.Random) -> str | None:
    """Kill a job in its start-up, in a step, while it writes, or near its end.

    Returns what was hit; None if the job ended before.
    """
    moment = rng.choice(["start-up", "step", "write", "write", "end"])
    left = set(job.temporary())  # by the one before
    if moment == "start-up":
        time.sleep(rng.uniform(0, 3))
    elif moment == "step":
        job.trained(rng.randint(1, 10))
        time.sleep(rng.uniform(0, 0.05))
    elif moment == "write":
        job.trained(rng.randint(1, 6))
        job.until(lambda: bool(set(job.temporary()) - left))
        time.sleep(rng.choice([0, rng.uniform(0, 0.06)]))
    else:
        job.until(checkpoint_path(job.run_dir, STEPS - 2 * rng.randint(0, 1)).exists)
        time.sleep(rng.uniform(0, 0.3))
    if job.ended():
        return None
    job.kill()
    return "a file half written" if set(job.temporary()) - left else moment


@pytest.mark.parametrize("chain", range(max(1, KILLS // KILLS_PER_RUN)))
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(
    chain: int, undisturbed: Callable[[int | None], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In long series every fifth chain has two processes. A run that ends before its kills is followed by another."""
    processes = 2 if chain % 5 == 4 and (DEVICES == "" or "," in DEVICES) else None
    hits: Counter[str] = Counter()
    number = folders = 0
    while sum(hits.values()) < KILLS_PER_RUN:
        run_dir = tmp_path / f"run-{folders}"
        folders += 1
        hit: str | None = ""
        while hit is not None:
            rng = random.Random(f"{chain} {number}")
            number += 1
            job = Job(run_dir, "--num-workers", rng.choice([0, 0, 2]), processes=processes)
            hit = kill_at_random(job, rng) if sum(hits.values()) < KILLS_PER_RUN else None
            if hit:
                hits[hit] += 1
                assert not any(find_damage(path) for path in checkpoints_of(run_dir))  # complete or absent
        assert job.end() == 0, job.text()
        assert "Traceback" not in job.text()
        assert_same_bits(run_dir, undisturbed(processes))
        assert not list((run_dir / "checkpoints").glob(".*"))
        assert len(checkpoints_of(run_dir)) <= 4  # --keep-last
    with capsys.disabled():
        counted = ", ".join(f"{count} in {moment}" for moment, count in hits.items())
        print(f"\nchain {chain}, {processes or 1} process(es), {folders} run(s), kills: {counted}", flush=True)


# -- Signals -----------------------------------------------------------------------------------------------------


def test_a_signal_to_all_processes_of_a_run_saves_and_exits_with_its_code(undisturbed, tmp_path: Path) -> None:
    """Slurm signals every process, the loader's workers as well."""
    run_dir = tmp_path / "run"
    job = Job(run_dir, "--num-workers", 2, "--ckpt-every", 1000)
    assert job.trained(6)
    os.killpg(job.process.pid, signal.SIGTERM)
    assert job.end() == EXIT_PREEMPTED, job.text()
    (stopped,) = checkpoints_of(run_dir)
    assert f"stopped by a signal after step {int(stopped.stem)}" in job.text()
    job = Job(run_dir)
    assert job.end() == 0
    assert "Traceback" not in job.text()
    assert_same_bits(run_dir, undisturbed(None))


@two_processes
def test_two_processes_then_one_then_two(undisturbed, tmp_path: Path) -> None:
    """Stopped by a signal to one rank of two, and to the only process."""
    run_dir = tmp_path / "run"
    job = Job(run_dir, "--ckpt-every", 1000, processes=2)
    assert job.trained(6)
    os.kill(job.ranks()[1], signal.SIGUSR1)
    assert job.end() == 1  # torchrun's code for everything
    assert f"exitcode  : {EXIT_PREEMPTED}" in job.text()
    assert len(checkpoints_of(run_dir)) == 1
    job = Job(run_dir, "--ckpt-every", 1000)
    assert job.trained(6)
    job.process.send_signal(signal.SIGUSR1)
    assert job.end() == EXIT_PREEMPTED
    assert len(checkpoints_of(run_dir)) == 2
    job = Job(run_dir, processes=2)
    assert job.end() == 0, job.text()
    np.testing.assert_allclose(losses(run_dir), losses(undisturbed(None)), atol=1e-4)


@two_processes
def test_torchrun_that_is_stopped_and_a_rank_that_dies(undisturbed, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = Job(run_dir, "--ckpt-every", 1000, processes=2)
    assert job.trained(6)
    job.process.terminate()
    assert job.end() == 1
    assert len(checkpoints_of(run_dir)) == 1

    job = Job(run_dir, processes=2, torchrun=("--max-restarts=1",))
    assert job.trained(6)
    killed = job.ranks()
    os.kill(killed[0], signal.SIGKILL)
    began = time.monotonic()
    assert job.until(lambda: not [pid for pid in killed if Path(f"/proc/{pid}").exists()])
    assert time.monotonic() - began < 60  # the limit; the other rank got SIGTERM
    assert job.end() == 0, job.text()
    assert re.search(r"failed \(exitcode: -9\) local_rank: 0", job.text())  # what torchrun says of the rank that died
    assert_same_bits(run_dir, undisturbed(2))
