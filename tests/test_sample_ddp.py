"""sample_ddp.py: many samples, the same on any number of processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, start_script
from PIL import Image

from sample_ddp import build_parser, label_of, main
from sample_store import PngStore, ShardStore, write_npz


def npz(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*.npz")
    with np.load(file) as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"]


@pytest.fixture
def samples(tiny_run: Path, tmp_path: Path) -> Path:
    """Eleven samples made by one process."""
    main(["ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "11", "--num-sampling-steps", "4",
          "--sample-dir", str(tmp_path / "alone")])  # fmt: skip
    return tmp_path / "alone"


def test_npz_is_what_adm_reads_in_sample_order(samples: Path) -> None:
    array = npz(samples)
    assert array.shape == (11, 8, 8, 3)
    assert array.dtype == np.uint8
    files = sorted(samples.rglob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(11)]
    assert all(np.array_equal(np.asarray(Image.open(file)), row) for file, row in zip(files, array, strict=True))


@pytest.mark.parametrize(("processes", "batch_size", "flags"), [(2, 3, []), (3, 4, ["--no-png"])])
def test_processes_and_batch_size_do_not_change_the_samples(
    processes: int, batch_size: int, flags: list[str], samples: Path, tiny_run: Path, tmp_path: Path
) -> None:
    done = start_script("sample_ddp.py", "ODE", "--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4,
                        "--per-proc-batch-size", batch_size, "--sample-dir", tmp_path / "more", *flags,
                        processes=processes)  # fmt: skip
    assert done.returncode == 0, done.stderr
    difference = npz(tmp_path / "more").astype(int) - npz(samples)
    assert abs(difference).max() <= 1
    assert len(list((tmp_path / "more").rglob("*.png"))) == (0 if flags else 11)


def test_adaptive_samples_are_the_same_after_an_interruption(tiny_run: Path, tmp_path: Path) -> None:
    """The steps of dopri5 follow the whole batch: what is missing of a block is made with the rest of it."""
    flags = ["ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "8", "--per-proc-batch-size", "3",
             "--sampling-method", "dopri5", "--sample-dir", str(tmp_path)]  # fmt: skip
    main(flags)
    before = npz(tmp_path)
    store = store_of(tmp_path)
    for index in (1, 7):
        store.path(index).unlink()
    main(flags)
    assert np.array_equal(npz(tmp_path), before)


def test_adaptive_samples_of_another_batch_size_do_not_mix(tiny_run: Path, tmp_path: Path, refuses) -> None:
    flags = ["ODE", "--ckpt", tiny_run, "--num-fid-samples", 2, "--sampling-method", "bosh3", "--sample-dir", tmp_path]
    main([*map(str, flags), "--per-proc-batch-size", "2"])
    assert "per_proc_batch_size 2, not 1" in refuses(main, *flags, "--per-proc-batch-size", 1)


def test_sde_samples_do_not_depend_on_the_batch(tiny_run: Path, tmp_path: Path) -> None:
    for size in ("5", "2"):
        main(["SDE", "--ckpt", str(tiny_run), "--num-fid-samples", "5", "--num-sampling-steps", "6",
              "--cfg-scales", "2", "--per-proc-batch-size", size, "--sample-dir", str(tmp_path / size)])  # fmt: skip
    assert abs(npz(tmp_path / "5").astype(int) - npz(tmp_path / "2")).max() <= 1


def store_of(sample_dir: Path) -> PngStore:
    (folder,) = (path for path in sample_dir.iterdir() if path.is_dir())
    return PngStore(folder)


def test_only_what_is_missing_or_torn_is_made(samples: Path, tiny_run: Path, capsys) -> None:
    before, store = npz(samples), store_of(samples)
    store.path(3).unlink()
    for index, length in ((7, 60), (8, 0)):
        store.path(index).write_bytes(store.path(index).read_bytes()[:length])
    kept = store.path(5).stat().st_mtime_ns
    main(["ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "11", "--num-sampling-steps", "4",
          "--sample-dir", str(samples)])  # fmt: skip
    assert "3 of 11 samples to make" in capsys.readouterr().out
    assert store.path(5).stat().st_mtime_ns == kept
    assert np.array_equal(npz(samples), before)


def test_killed_at_any_moment_it_completes_what_is_missing(samples: Path, tiny_run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sample_ddp.py"), "ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "11",
               "--num-sampling-steps", "4", "--per-proc-batch-size", "1",
               "--sample-dir", str(tmp_path / "killed")]  # fmt: skip
    for wanted in (1, 5):  # files there when it is killed
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list((tmp_path / "killed").rglob("0*.png"))) < wanted:
                time.sleep(0.005)
            process.kill()
        assert not list((tmp_path / "killed").glob("*.npz"))
    main(command[2:])
    assert abs(npz(tmp_path / "killed").astype(int) - npz(samples)).max() <= 1


def test_damaged_picture_is_named(samples: Path, tiny_run: Path, refuses) -> None:
    path = store_of(samples).path(4)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    line = refuses(main, "ODE", "--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4,
                   "--sample-dir", samples)  # fmt: skip
    assert f"{path} is damaged" in line


def test_shards_are_continued_with_another_batch_size(samples: Path, tiny_run: Path, tmp_path: Path, capsys) -> None:
    flags = ["ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "11", "--num-sampling-steps", "4", "--no-png",
             "--sample-dir", str(tmp_path / "shards")]  # fmt: skip
    main([*flags, "--per-proc-batch-size", "4"])
    first, second, _ = sorted((tmp_path / "shards").rglob("shards/*.npz"))
    first.unlink()
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    capsys.readouterr()
    main([*flags, "--per-proc-batch-size", "5"])
    assert "8 of 11 samples to make" in capsys.readouterr().out
    assert abs(npz(tmp_path / "shards").astype(int) - npz(samples)).max() <= 1


def test_other_weights_do_not_share_a_folder(samples: Path, tiny_run: Path, refuses) -> None:
    line = refuses(main, "ODE", "--ckpt", tiny_run, "--weights", "model", "--num-fid-samples", 11,
                   "--num-sampling-steps", 4, "--sample-dir", samples)  # fmt: skip
    assert "holds samples with weights" in line


def test_other_settings_do_not_share_a_folder(samples: Path, tiny_run: Path, refuses) -> None:
    line = refuses(main, "ODE", "--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4,
                   "--sample-dir", samples, "--label-sampling", "balanced")  # fmt: skip
    assert "label_sampling random, not balanced" in line


def test_labels() -> None:
    balanced = build_parser().parse_args(["ODE", "--ckpt", "x", "--label-sampling", "balanced"])
    assert set(Counter(label_of(i, 10, balanced) for i in range(50)).values()) == {5}
    random = build_parser().parse_args(["ODE", "--ckpt", "x"])
    counts = Counter(label_of(i, 10, random) for i in range(2000))
    chi_square = sum((counts[label] - 200) ** 2 / 200 for label in range(10))
    assert chi_square < 27.9  # 0.1 % point of chi-square with nine degrees of freedom


@pytest.mark.parametrize("kind", [PngStore, ShardStore])
def test_npz_is_written_in_little_memory(kind: type, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    store = kind(tmp_path)
    for start in range(0, 60, 6):
        store.write(range(start, start + 6), images[start : start + 6], None)
    assert store.present(60) == set(range(60))
    tracemalloc.start()
    write_npz(tmp_path / "all.npz", store, 60, (64, 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 2
    assert np.array_equal(np.load(tmp_path / "all.npz")["arr_0"], images)


def test_files_are_a_thousand_to_a_folder(tmp_path: Path) -> None:
    path = PngStore(tmp_path).path
    assert path(999).parent != path(1000).parent
    assert path(49_999).parent == path(49_000).parent


def test_settings_are_stored(samples: Path) -> None:
    (file,) = samples.rglob("settings.json")
    settings = json.loads(file.read_text())
    assert settings["checkpoint"] == "PPF-T-2, step 20"
    assert settings["num_sampling_steps"] == [4]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tf32", "--precision", "bf16"], "--tf32 and --precision say the same"),
        (["--num-fid-samples", "0"], "at least 1"),
        (["--cfg-scales", "1", "1", "1"], "3 guidance scale(s)"),
        (["--num-fid-sample", "5"], "--num-fid-sample"),
        (["--num-sampling-steps", "1"], "1 step(s)"),
    ],
)
def test_bad_flags_are_named(flags: list[str], words: str, tiny_run: Path, tmp_path: Path, refuses) -> None:
    assert words in refuses(main, "ODE", "--ckpt", tiny_run, "--sample-dir", tmp_path / "none", *flags)
    assert not (tmp_path / "none").exists()
