"""sample_ddp.py: many samples, the same on any number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, start_script
from PIL import Image

from models import create_model
from pipeline import Pipeline
from runtime.rng import label_of
from runtime.sample_store import PngStore, ShardStore, write_npz
from sample_ddp import main
from weights.layouts import fingerprint
from weights.pretrained import load_pretrained


def npz(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*.npz")
    with np.load(file) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        return archive["arr_0"]


@pytest.fixture
def samples(tiny_run: Path, tmp_path: Path) -> Path:
    """Eleven samples made by one process."""
    main(f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 --sample-dir {tmp_path / 'alone'}".split())
    return tmp_path / "alone"


def test_npz_is_what_adm_reads_in_sample_order(samples: Path) -> None:
    array = npz(samples)
    assert array.shape == (11, 8, 8, 3)
    assert array.dtype == np.uint8
    files = sorted(samples.rglob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(11)]
    assert all(np.array_equal(np.asarray(Image.open(file)), row) for file, row in zip(files, array, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "batch_size", "flags"), [(2, 3, []), (3, 4, ["--no-png"])])
def test_processes_and_batch_size_do_not_change_the_samples(
    processes: int, batch_size: int, flags: list[str], samples: Path, tiny_run: Path, tmp_path: Path
) -> None:
    done = start_script(
        "sample_ddp.py",
        *(
            f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 "
            f"--per-proc-batch-size {batch_size} --sample-dir {tmp_path / 'more'}"
        ).split(),
        *flags,
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    difference = npz(tmp_path / "more").astype(int) - npz(samples)
    assert abs(difference).max() <= 1
    assert len(list((tmp_path / "more").rglob("*.png"))) == (0 if flags else 11)


def test_adaptive_samples_are_the_same_after_an_interruption(tiny_run: Path, tmp_path: Path) -> None:
    """dopri5 chooses its steps from the whole batch, so an incomplete block is made again as a whole."""
    flags = (
        f"ODE --ckpt {tiny_run} --num-fid-samples 8 --per-proc-batch-size 3 "
        f"--sampling-method dopri5 --sample-dir {tmp_path}"
    ).split()
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
        main(
            (
                f"SDE --ckpt {tiny_run} --num-fid-samples 5 --num-sampling-steps 6 --cfg-scales 2 "
                f"--per-proc-batch-size {size} --sample-dir {tmp_path / size}"
            ).split()
        )
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
    main(f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 --sample-dir {samples}".split())
    assert "3 of 11 samples to make" in capsys.readouterr().out
    assert store.path(5).stat().st_mtime_ns == kept
    assert np.array_equal(npz(samples), before)


@pytest.mark.slow
def test_killed_at_any_moment_it_completes_what_is_missing(samples: Path, tiny_run: Path, tmp_path: Path) -> None:
    flags = (
        f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 "
        f"--per-proc-batch-size 1 --sample-dir {tmp_path / 'killed'}"
    ).split()
    command = [sys.executable, str(ROOT / "sample_ddp.py"), *flags]
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
    line = refuses(
        main, *f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 --sample-dir {samples}".split()
    )
    assert f"{path} is damaged" in line


def test_shards_are_continued_with_another_batch_size(samples: Path, tiny_run: Path, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "shards"
    flags = f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 --no-png --sample-dir {folder}".split()
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
    flags = f"--weights model --num-fid-samples 11 --num-sampling-steps 4 --sample-dir {samples}".split()
    line = refuses(main, "ODE", "--ckpt", tiny_run, *flags)
    assert "holds samples with weights" in line


def test_other_settings_do_not_share_a_folder(samples: Path, tiny_run: Path, refuses) -> None:
    line = refuses(
        main,
        *(
            f"ODE --ckpt {tiny_run} --num-fid-samples 11 --num-sampling-steps 4 "
            f"--sample-dir {samples} --label-sampling balanced"
        ).split(),
    )
    assert "label_sampling random, not balanced" in line


def settings_of(sample_dir: Path) -> dict[str, object]:
    (file,) = sample_dir.rglob("settings.json")
    return json.loads(file.read_text())


def change_settings(sample_dir: Path, **values: object) -> None:
    (file,) = sample_dir.rglob("settings.json")
    file.write_text(json.dumps(settings_of(sample_dir) | values))


@pytest.fixture
def large_weights(tmp_path: Path) -> Path:
    """Matrices large enough that several threads add up parts of them."""
    torch.manual_seed(0)
    model = create_model("PPF-T-2", input_size=8, in_channels=3, num_classes=30_000)
    torch.nn.init.normal_(model.y_embedder.embedding_table.weight)
    model.save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.mark.slow
def test_another_number_of_threads_goes_on(large_weights: Path, tmp_path: Path, capsys) -> None:
    before = torch.get_num_threads()
    try:
        for threads, samples in ((2, 1), (1, 2), (3, 3)):
            torch.set_num_threads(threads)
            flags = ["--ckpt", str(large_weights), "--num-fid-samples", str(samples), "--num-sampling-steps", "2"]
            main(["ODE", *flags, "--sample-dir", str(tmp_path / "samples")])
            assert f"1 of {samples} samples to make" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_the_fingerprint_is_of_names_and_bytes(tiny_run: Path) -> None:
    model = load_pretrained(tiny_run).model
    expected = hashlib.sha256()
    for name in sorted(model.state_dict()):
        expected.update(name.encode() + model.state_dict()[name].numpy().tobytes())
    assert fingerprint(model) == expected.hexdigest()
    with torch.no_grad():
        model.blocks[0].mlp.fc1.bias[0] += 1e-7
    assert fingerprint(model) != expected.hexdigest()


def test_it_is_of_the_weights_as_they_were_read(tiny_run: Path, samples: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", str(tiny_run), "--num-fid-samples", "1", "--num-sampling-steps", "4", "--precision", "bf16"]
    main(["ODE", *flags, "--sample-dir", str(tmp_path / "bf16")])
    assert settings_of(tmp_path / "bf16")["weights"] == settings_of(samples)["weights"]


def test_a_folder_with_an_earlier_fingerprint_goes_on(samples: Path, tiny_run: Path, refuses, capsys) -> None:
    """Earlier versions hashed the weights' sums."""
    sums = [parameter.double().sum().item() for parameter in load_pretrained(tiny_run).model.parameters()]
    before, flags = settings_of(samples), ["ODE", "--ckpt", tiny_run, "--num-fid-samples", 11]
    flags += ["--num-sampling-steps", 4, "--sample-dir", samples]
    change_settings(samples, weights=hashlib.sha256(repr(sums).encode()).hexdigest()[:16])
    store_of(samples).path(3).unlink()
    main([*map(str, flags)])
    assert "1 of 11 samples to make" in capsys.readouterr().out
    assert settings_of(samples) == before
    change_settings(samples, weights="0123456789abcdef")
    assert "holds samples with weights 0123456789abcdef" in refuses(main, *flags)


def test_damaged_settings_are_named(samples: Path, tiny_run: Path, refuses) -> None:
    (file,) = samples.rglob("settings.json")
    flags = ["ODE", "--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4, "--sample-dir", samples]
    for content in ("{", "3"):
        file.write_text(content)
        assert f"{file} is damaged" in refuses(main, *flags)


def test_steps_that_an_adaptive_method_does_not_take_make_no_other_folder(
    tiny_run: Path, tmp_path: Path, capsys
) -> None:
    flags = ["ODE", "--ckpt", str(tiny_run), "--num-fid-samples", "2", "--sample-dir", str(tmp_path)]
    flags += ["--sampling-method", "bosh3"]
    main(flags)
    assert "note:" not in capsys.readouterr().out
    for steps in (["250"], ["1"], ["1", "2", "3"]):  # too few and too many for a method that took them
        main([*flags, "--num-sampling-steps", *steps])
        text = capsys.readouterr().out
        assert text.count("note: bosh3 chooses its own steps: --num-sampling-steps has no effect") == 1
        assert "0 of 2 samples to make" in text


def test_a_sample_of_another_size_is_named(samples: Path, tiny_run: Path, refuses) -> None:
    Image.new("RGB", (9, 8)).save(store_of(samples).path(4))
    flags = ["--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4, "--sample-dir", samples]
    line = refuses(main, "ODE", *flags)
    assert "sample 4 is (8, 9, 3) uint8, and the first (8, 8, 3) uint8: remove that folder" in line


# -- Errors of one process ---------------------------------------------------------------------------------------


def ends_without_traceback(*flags: object, limit: int | None = None) -> str:
    """Run it with bad input on two processes, or on one under a limit of so many kB per file; returns its messages."""
    flags = ("ODE", "--num-sampling-steps", 4, "--per-proc-batch-size", 1, *flags)
    if limit is None:
        done = start_script("sample_ddp.py", *flags, processes=2)
        assert done.returncode == 1  # torchrun's
    else:
        command = shlex.join([sys.executable, str(ROOT / "sample_ddp.py"), *map(str, flags)])
        command = ["bash", "-c", f"ulimit -f {limit}; {command}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 2
    assert 'sample_ddp.py", line' not in done.stderr  # torchrun has a traceback of its own
    return done.stderr


@pytest.mark.slow
def test_other_settings_end_every_process(samples: Path, tiny_run: Path) -> None:
    flags = ["--ckpt", tiny_run, "--num-fid-samples", 11, "--sample-dir", samples]
    text = ends_without_traceback(*flags, "--label-sampling", "balanced")
    assert "label_sampling random, not balanced" in text


def test_a_folder_that_cannot_be_made_is_one_line(tiny_run: Path, refuses) -> None:
    line = refuses(main, "ODE", "--ckpt", tiny_run, "--num-fid-samples", 2, "--sample-dir", "/dev/null/samples")
    assert "cannot be written: [Errno 20] Not a directory: '/dev/null/samples" in line
    assert "choose another --sample-dir" in line


@pytest.mark.slow
def test_a_picture_that_cannot_be_written_ends_every_process(samples: Path, tiny_run: Path, refuses) -> None:
    for index in (1, 3):
        store_of(samples).path(index).unlink()
        store_of(samples).path(index).mkdir()  # which two processes share: the second makes sample 3
    flags = ("--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4, "--sample-dir", samples)
    assert "cannot be written" in refuses(main, "ODE", *flags)
    store_of(samples).path(1).rmdir()
    ends_without_traceback(*flags)


@pytest.mark.slow
def test_a_disk_that_takes_no_npz_is_one_line(tiny_run: Path, tmp_path: Path) -> None:
    flags = ("--ckpt", tiny_run, "--num-fid-samples", 40, "--sample-dir", tmp_path)
    text = ends_without_traceback(*flags, limit=2)  # 40 samples of 192 bytes
    assert "npz cannot be written: [Errno 27] File too large" in text
    assert "the same command makes what is missing" in text
    assert not list(tmp_path.glob("*.npz"))
    main(["ODE", "--num-sampling-steps", "4", "--per-proc-batch-size", "1", *map(str, flags)])
    assert npz(tmp_path).shape == (40, 8, 8, 3)


@pytest.mark.slow
def test_names_of_any_letters_in_any_locale(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "größe_图"
    flags = ["ODE", "--num-fid-samples", "2", "--num-sampling-steps", "2", "--sample-dir", str(folder), "--ckpt"]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, str(ROOT / "sample_ddp.py"), *flags]
    done = subprocess.run([*command, str(tiny_run)], capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert npz(folder).shape == (2, 8, 8, 3)
    shutil.copy(tiny_run / "checkpoints" / "0000020.pt", tmp_path / "größe.pt")  # torch opens no such name here
    command += [str(tmp_path / "größe.pt")]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 2
    assert b"this locale has no such letters, set PYTHONUTF8=1" in done.stderr


@pytest.mark.parametrize(
    ("model", "flags", "scales"),
    [
        ("SiT-T/2", [], [1.0]),
        ("PPF-T-2", [], [1.0, 3.0]),
        ("PPF-T-3", [], [1.0, 3.5, 3.75]),
        ("PPF-T-2", ["--cfg-scales", "1.0"], [1.0]),
        ("PPF-T-2", ["--likelihood"], [1.0]),
    ],
)
def test_guidance_is_that_of_ppflows_evaluation(model: str, flags: list[str], scales: list[float], tmp_path: Path):
    create_model(model, input_size=8, in_channels=3, num_classes=2).save_pretrained(tmp_path / "weights")
    flags = [*flags, "--sampling-method", "euler", "--num-sampling-steps", "4", "--num-fid-samples", "1"]
    main(["ODE", "--ckpt", str(tmp_path / "weights"), *flags, "--sample-dir", str(tmp_path / "samples")])
    assert settings_of(tmp_path / "samples")["cfg_scales"] == scales
    assert f"-cfg-{'-'.join(f'{scale:g}' for scale in scales)}-seed" in store_of(tmp_path / "samples").folder.name


def test_labels() -> None:
    assert set(Counter(label_of(i, 10, seed=0, sampling="balanced") for i in range(50)).values()) == {5}
    counts = Counter(label_of(i, 10, seed=0, sampling="random") for i in range(2000))
    chi_square = sum((counts[label] - 200) ** 2 / 200 for label in range(10))
    assert chi_square < 27.9  # 0.1 % point of chi-square with nine degrees of freedom


def test_labels_are_those_of_earlier_versions() -> None:
    assert [label_of(i, 10, 3, "random") for i in range(12)] == [2, 1, 6, 9, 5, 4, 8, 5, 6, 8, 2, 2]
    assert [label_of(i, 1000, 3, "random") for i in (0, 7, 49_999)] == [772, 585, 556]


def test_the_npz_holds_the_classes_as_adm_writes_them(samples: Path) -> None:
    (file,) = samples.glob("*.npz")
    with np.load(file) as archive:
        labels = archive["arr_1"]
    assert labels.dtype == np.int64
    assert labels.tolist() == [label_of(i, 10, 0, "random") for i in range(11)]


@pytest.mark.parametrize("kind", [PngStore, ShardStore])
def test_npz_is_written_in_little_memory(kind: type, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (60, 64, 64, 3), dtype=np.uint8)
    store = kind(tmp_path)
    for start in range(0, 60, 6):
        store.write(range(start, start + 6), images[start : start + 6], None)
    assert store.present(60) == set(range(60))
    tracemalloc.start()
    write_npz(tmp_path / "all.npz", store, range(60))
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
    assert settings["num_classes"] == 10


def test_settings_tell_the_cost(samples: Path, tiny_run: Path, tmp_path: Path) -> None:
    macs = [Pipeline.load(tiny_run).model.macs(level) for level in (0, 1)]
    assert settings_of(samples)["nfe_per_image"] == 2 + 2 * 2  # the fine level is guided
    assert settings_of(samples)["gmacs_per_image"] == pytest.approx((2 * macs[0] + 2 * 2 * macs[1]) / 1e9)
    flags = ["--ckpt", str(tiny_run), "--num-fid-samples", "1", "--sample-dir", str(tmp_path / "more")]
    main(["ODE", *flags, "--cfg-scales", "2", "1", "--num-sampling-steps", "4", "3"])
    cost = settings_of(tmp_path / "more")
    assert cost["nfe_per_image"] == 2 * 4 + 3
    assert cost["gmacs_per_image"] == pytest.approx((2 * 4 * macs[0] + 3 * macs[1]) / 1e9)
    main(["ODE", *flags[:-1], str(tmp_path / "adaptive"), "--sampling-method", "bosh3"])
    cost = settings_of(tmp_path / "adaptive")
    assert cost["nfe_per_image"] is cost["gmacs_per_image"] is None


def test_a_folder_that_does_not_tell_classes_and_cost_goes_on(samples: Path, tiny_run: Path, refuses, capsys) -> None:
    """Those of earlier versions do not."""
    before, (file,) = settings_of(samples), samples.rglob("settings.json")
    added = ("num_classes", "nfe_per_image", "gmacs_per_image")
    flags = ["ODE", "--ckpt", tiny_run, "--num-fid-samples", 11, "--num-sampling-steps", 4, "--sample-dir", samples]
    file.write_text(json.dumps({name: value for name, value in before.items() if name not in added}))
    store_of(samples).path(3).unlink()
    main([*map(str, flags)])
    assert "1 of 11 samples to make" in capsys.readouterr().out
    assert settings_of(samples) == before
    file.write_text(json.dumps({name: value for name, value in before.items() if name != "label_sampling"}))
    assert "holds samples with label_sampling None, not random" in refuses(main, *flags)


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
