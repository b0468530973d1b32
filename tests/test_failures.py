"""A process that fails, alone among others: it says why and with its rank, and the whole job ends soon after.

Rank 1 is given what a node of its own may have: other files, a full disk, another command (tests/failing_rank.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY
from PIL import Image
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

LIMIT = 60  # seconds from the start to the end of the job; a healthy start takes up to a third of it


class Outcome(NamedTuple):
    """Exit code and output of a job of two processes."""

    code: int  # torchrun's
    errors: list[str]  # lines of the script about errors
    text: str  # all of stdout and stderr

    @property
    def tracebacks(self) -> int:
        """Tracebacks of the script; torchrun ends with one of its own."""
        return self.text.count("Traceback (most recent") - self.text.count("ChildFailedError: \n")


def job(fault: str, script: str, *flags: object, folder: Path) -> Outcome:
    """Run a script on two processes in a folder, with a fault on rank 1; it must end in time, and wholly."""
    marker = f"FAILING_RANK_TEST={os.getpid()}-{time.monotonic_ns()}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "tests" / "failing_rank.py"), fault, script, *map(str, flags)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **dict([marker.split("=")])}
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    assert time.monotonic() - start < LIMIT, done.stdout
    assert not left_behind(marker), done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith(f"{script}: ")]
    return Outcome(done.returncode, errors, done.stdout)


def left_behind(marker: str) -> list[str]:
    """Processes of a job that are alive five seconds after it has ended."""
    for _ in range(50):
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker.encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text())
            except OSError:  # it has ended, or is not ours
                continue
        if not found:
            return []
        time.sleep(0.1)
    return found


def assert_one_line(outcome: Outcome, *words: str, rank: str = "rank 1: ") -> None:
    """One error line in all, no traceback, exit code 2 of the process that failed."""
    assert outcome.code == 1, outcome.text
    lines = [line for line in outcome.errors if "error: " in line]
    assert len(lines) == 1, outcome.text[:6000]
    assert f"error: {rank}" in lines[0], outcome.text
    for word in words:
        assert word in lines[0], outcome.text
    assert outcome.tracebacks == 0, outcome.text
    assert re.search(r"exitcode\s*: 2", outcome.text), outcome.text


def write_pictures(folder: Path, keep: float = 1.0) -> None:
    """Two classes of eight random pictures, of which a part of the bytes is kept."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for number in range(8):
            file = folder / "pictures" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
            file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])


def write_latents(folder: Path, value: float) -> None:
    """Eight latents of this value."""
    latents = torch.full((8, 4, 8, 8), value)
    (folder / "latents").mkdir(parents=True)
    save_file(
        {"latents": latents, "latents_flip": latents.clone(), "labels": torch.arange(8) % 2},
        folder / "latents" / "latents_rank00_shard000.safetensors",
    )
    torch.save({"mean": torch.zeros(1, 4, 1, 1), "std": torch.ones(1, 4, 1, 1)}, folder / "latents/latents_stats.pt")


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[Path, Path]:
    """The working folders of rank 0 and rank 1."""
    for name in ("zero", "one"):
        (tmp_path / name).mkdir()
    return tmp_path / "zero", tmp_path / "one"


PICTURES = [
    "--model",
    "PPF-T-2",
    "--image-size",
    16,
    "--vae",
    "none",
    "--global-batch-size",
    4,
    "--num-workers",
    1,
    "--sample-every",
    0,
    "--max-steps",
    50,
    "--data-path",
    "pictures",
]


# -- train.py ----------------------------------------------------------------------------------------------------


def test_data_that_one_node_lacks(nodes: tuple[Path, Path], tmp_path: Path) -> None:
    zero, one = nodes
    write_pictures(zero)
    outcome = job(
        f"in={one}", "train.py", *PICTURES, "--data-path", "pictures", "--run-dir", tmp_path / "run", folder=zero
    )
    assert_one_line(outcome, "--data-path pictures does not exist")
    assert not (tmp_path / "run").exists()


def test_a_picture_that_one_rank_cannot_read(nodes: tuple[Path, Path], tmp_path: Path) -> None:
    zero, one = nodes
    write_pictures(zero)
    write_pictures(one, keep=0.5)
    outcome = job(
        f"in={one}", "train.py", *PICTURES, "--data-path", "pictures", "--run-dir", tmp_path / "run", folder=zero
    )
    assert_one_line(outcome, "cannot read the image", "pictures/")


def test_a_loss_that_is_not_finite_on_one_rank(nodes: tuple[Path, Path], tmp_path: Path) -> None:
    zero, one = nodes
    write_latents(zero, 1.0)
    write_latents(one, float("nan"))
    outcome = job(
        f"in={one}",
        "train.py",
        "--model",
        "PPF-T-2",
        "--data-path",
        "latents",
        "--global-batch-size",
        4,
        "--num-workers",
        0,
        "--sample-every",
        0,
        "--max-steps",
        5,
        "--run-dir",
        tmp_path / "run",
        folder=zero,
    )
    assert_one_line(outcome, "the loss is not finite at step 1 for 2 sample(s)", rank="")


def test_a_checkpoint_that_one_node_lacks(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    zero, one = nodes
    shutil.copytree(tiny_run, zero / "begun")
    outcome = job(f"in={one}", "train.py", *TINY, "--ckpt", "begun", "--run-dir", tmp_path / "run", folder=zero)
    assert_one_line(outcome, "begun/checkpoints/0000020.pt")


def test_a_rank_that_was_started_with_other_flags(nodes: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = job("flags=--lr 0.5", "train.py", *TINY, "--run-dir", tmp_path / "run", folder=nodes[0])
    assert_one_line(outcome, "--lr 0.5", "0.001", "same command", rank="")
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_code_ends_all_ranks_with_its_traceback(nodes: tuple[Path, Path], tmp_path: Path) -> None:
    outcome = job("crash", "train.py", *TINY, "--run-dir", tmp_path / "run", folder=nodes[0])
    assert outcome.code == 1
    assert "AttributeError: a mistake in the code" in outcome.text
    assert outcome.tracebacks == 1, outcome.text
    assert re.search(r"exitcode\s*: 1", outcome.text)


# -- sample_ddp.py -----------------------------------------------------------------------------------------------

SAMPLING = ["ODE", "--num-fid-samples", 8, "--per-proc-batch-size", 2, "--num-sampling-steps", 2]


def test_weights_that_one_node_lacks(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    zero, one = nodes
    shutil.copytree(tiny_run, zero / "begun")
    outcome = job(f"in={one}", "sample_ddp.py", *SAMPLING, "--ckpt", "begun", "--sample-dir", tmp_path, folder=zero)
    assert_one_line(outcome, "begun is neither a file nor the name of published weights")
    assert not list(tmp_path.glob("PPF*"))


def test_samples_that_are_not_finite_on_one_rank(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    zero, one = nodes
    saved = torch.load(tiny_run / "checkpoints" / "0000020.pt", weights_only=True)
    torch.save(saved, zero / "weights.pt")
    saved["ema"]["blocks.0.mlp.fc1.bias"][0] = float("nan")
    torch.save(saved, one / "weights.pt")
    outcome = job(
        f"in={one}", "sample_ddp.py", *SAMPLING, "--ckpt", "weights.pt", "--sample-dir", tmp_path / "s", folder=zero
    )
    assert_one_line(outcome, "not finite")


def test_a_disk_that_is_full_on_one_node(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    outcome = job(
        "full-disk", "sample_ddp.py", *SAMPLING, "--ckpt", tiny_run, "--sample-dir", tmp_path / "s", folder=nodes[0]
    )
    assert_one_line(outcome, "cannot be written")


def test_samples_with_other_settings_end_all_ranks(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    """Rank 0 alone looks into the folder."""
    flags = [*SAMPLING, "--ckpt", tiny_run, "--sample-dir", tmp_path / "s"]
    assert job("none", "sample_ddp.py", *flags, folder=nodes[0]).code == 0
    outcome = job("none", "sample_ddp.py", *flags, "--cfg-interval", 0, 0.5, folder=nodes[0])
    assert_one_line(outcome, "holds samples with cfg_interval None", rank="")


def test_a_sampler_that_was_started_with_other_flags(nodes: tuple[Path, Path], tiny_run: Path, tmp_path: Path) -> None:
    flags = [*SAMPLING, "--ckpt", tiny_run, "--sample-dir", tmp_path / "s"]
    outcome = job("flags=--cfg-scales 3", "sample_ddp.py", *flags, folder=nodes[0])
    assert_one_line(outcome, "rank 1 was started with --cfg-scales [3.0], rank 0 with None", rank="")


# -- extract_latents.py ------------------------------------------------------------------------------------------


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    """A small autoencoder."""
    from small_autoencoders import save_kl

    return save_kl(tmp_path / "vae")


def extraction(vae: Path, out: Path) -> list[object]:
    return ["--data-path", "pictures", "--vae", vae, "--image-size", 16, "--out", out, "--num-workers", 0]


def test_images_that_one_node_lacks(nodes: tuple[Path, Path], vae: Path, tmp_path: Path) -> None:
    zero, one = nodes
    write_pictures(zero)
    outcome = job(f"in={one}", "extract_latents.py", *extraction(vae, tmp_path / "out"), folder=zero)
    assert_one_line(outcome, "--data-path pictures does not exist")
    assert not (tmp_path / "out").exists()


def test_an_image_that_one_rank_cannot_encode(nodes: tuple[Path, Path], vae: Path, tmp_path: Path) -> None:
    zero, one = nodes
    write_pictures(zero)
    write_pictures(one, keep=0.5)
    outcome = job(f"in={one}", "extract_latents.py", *extraction(vae, tmp_path / "out"), folder=zero)
    assert_one_line(outcome, "cannot read the image", "--skip-unreadable leaves such images out")


def test_latents_that_one_disk_does_not_take(nodes: tuple[Path, Path], vae: Path, tmp_path: Path) -> None:
    write_pictures(nodes[0])
    outcome = job("full-disk", "extract_latents.py", *extraction(vae, tmp_path / "out"), folder=nodes[0])
    assert_one_line(outcome, "cannot write", "latents_")


def test_an_autoencoder_that_one_node_lacks(nodes: tuple[Path, Path], vae: Path, tmp_path: Path) -> None:
    zero, one = nodes
    write_pictures(zero)
    write_pictures(one)
    shutil.copytree(vae, zero / "vae")
    flags = [flag if flag != vae else "./vae" for flag in extraction(vae, tmp_path / "out")]
    outcome = job(f"in={one}", "extract_latents.py", *flags, folder=zero)
    assert_one_line(outcome, "cannot load the autoencoder ./vae")


def test_latents_begun_with_other_settings_end_all_ranks(nodes: tuple[Path, Path], vae: Path, tmp_path: Path) -> None:
    write_pictures(nodes[0])
    flags = extraction(vae, tmp_path / "out")
    assert job("none", "extract_latents.py", *flags, folder=nodes[0]).code == 0
    outcome = job("none", "extract_latents.py", *flags, "--dtype", "fp32", folder=nodes[0])
    assert_one_line(outcome, "--dtype was fp16", rank="")
