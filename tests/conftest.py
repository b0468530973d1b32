"""Fixtures of the tests of the commands: a small trained run, and commands started as users start them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Two threads that spin while waiting for each other stall for seconds on a busy machine. Set before torch is loaded.
# And nothing is fetched: a test that tried would take minutes to learn that it may not.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
DEVICES = os.environ.get("CUDA_VISIBLE_DEVICES")  # of the tests marked gpu; the others do not see them
os.environ.update(ENVIRONMENT)
if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: a second thread in each would wait for its turn
    os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

import train  # noqa: E402

TINY = [
    "--data-path",
    "digits",
    "--model",
    "PPF-T-2",
    "--global-batch-size",
    "32",
    "--lr",
    "1e-3",
    "--num-workers",
    "0",
    "--cfg-scales",
    "1.5",
    "--ema-decay",
    "0.9",
    "--sample-every",
    "1000",
]


def pytest_configure() -> None:
    train.EVALUATION_STEPS = 4
    train.PREVIEW_STEPS = 4  # every run ends with a preview; the demo's test makes them at full length


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is none."""
    if shutil.which("nvidia-smi") is None or subprocess.run(["nvidia-smi"], capture_output=True).returncode:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def start_script(
    script: str, *flags: object, processes: int | None = None, cuda: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository, under torchrun where a number of processes is given; `cuda` shows it the GPUs."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, **ENVIRONMENT, **({"OMP_NUM_THREADS": "1"} if processes else {})}
    if cuda:
        environment.pop("CUDA_VISIBLE_DEVICES")
        environment.update({} if DEVICES is None else {"CUDA_VISIBLE_DEVICES": DEVICES})
    command = [*launcher, str(ROOT / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: with small tensors on a busy machine a second one costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of PPF-T-2 after 20 steps on the digits, with a checkpoint every 10."""
    run_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train.train([*TINY, "--run-dir", str(run_dir), "--max-steps", "20", "--ckpt-every", "10", "--log-every", "1"])
    return run_dir


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights of Inception, 96 MB."""
    from random_inception import write_random_inception

    return write_random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call a script's main with bad input: it must end with one line on stderr and exit code 2, which is returned."""
    from runtime.errors import run_script

    def check(main: Callable[[list[str]], None], *flags: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: main([str(flag) for flag in flags]))
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    return check
