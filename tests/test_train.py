"""train.py and train_utils.py: runs, continuing them, several processes, and bad input."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, start_script
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

from models import PyramidalPatchDiT, create_model
from runtime.errors import UserError
from runtime.files import complete_file
from runtime.rng import draw_step
from runtime.speed import compile_levels, update_ema
from train import train
from transport import Transport, create_transport


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint(run_dir: Path, step: int) -> dict:
    return torch.load(run_dir / "checkpoints" / f"{step:07d}.pt", weights_only=True)


def assert_same_state(a: object, b: object) -> None:
    """Bit by bit."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_state(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert a == b


@pytest.fixture
def picture_folder(tmp_path: Path) -> Path:
    """Three classes of four small random pictures."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        for number in range(4):
            file = tmp_path / "pictures" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(file)
    return tmp_path / "pictures"


# -- What a run leaves -------------------------------------------------------------------------------------------


def test_run_folder_holds_everything(tiny_run: Path) -> None:
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["model"]["patch_sizes"] == [[4, 4], [2, 2]]
    assert config["transport"]["level_edges"] == [0.5]
    assert "20" in (tiny_run / "log.txt").read_text()
    assert Image.open(tiny_run / "loss.png").size[0] > 300
    grid = Image.open(tiny_run / "samples" / "0000020.png")
    assert grid.size == (8 * 66 + 2, 10 * 66 + 2)  # ten classes of eight samples, each pixel eight wide
    record = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 20
    assert {"loss", "loss_level_0", "loss_level_1", "images_per_second", "step_time", "grad_norm", "lr"} <= set(record)


def test_loss_falls(tiny_run: Path) -> None:
    values = losses(tiny_run)
    assert len(values) == 20
    assert np.mean(values[-5:]) < 0.8 * np.mean(values[:5])


def test_loss_is_the_mean_of_the_levels_weighted_by_their_samples(tiny_run: Path) -> None:
    for line in (tiny_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)  # 32 samples in strata, edge at 0.5: sixteen each
        assert record["loss"] == pytest.approx((record["loss_level_0"] + record["loss_level_1"]) / 2)


def test_checkpoint_is_plain_data_and_describes_itself(tiny_run: Path) -> None:
    saved = checkpoint(tiny_run, 20)
    assert saved["step"] == 20
    assert saved["config"]["model_name"] == "PPF-T-2"
    model = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10, learn_sigma=False)
    model.load_state_dict(saved["model"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(saved["opt"])
    assert any(not torch.equal(saved["ema"][name], saved["model"][name]) for name in saved["model"])


def test_new_runs_are_numbered(tmp_path: Path) -> None:
    for _ in range(2):
        train([*TINY, "--results-dir", str(tmp_path), "--max-steps", "1"])
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "000-PPF-T-2-Linear-velocity",
        "001-PPF-T-2-Linear-velocity",
    ]


# -- Continuing --------------------------------------------------------------------------------------------------


def test_continued_run_is_the_run_that_never_stopped(tiny_run: Path, tmp_path: Path) -> None:
    continued = tmp_path / "continued"
    shutil.copytree(tiny_run, continued)
    (continued / "checkpoints" / "0000020.pt").unlink()  # as if it had been killed after step 10
    train([*TINY, "--run-dir", str(continued), "--max-steps", "20", "--log-every", "1"])
    for part in ("model", "ema", "opt"):
        assert_same_state(checkpoint(continued, 20)[part], checkpoint(tiny_run, 20)[part])
    assert losses(continued) == losses(tiny_run)  # no step missing, none twice


def test_ckpt_continues_in_another_folder_with_its_own_settings(tiny_run: Path, tmp_path: Path) -> None:
    source = tiny_run / "checkpoints" / "0000010.pt"
    other = tmp_path / "other"  # only the model and the data are repeated: the rest is remembered
    train(
        [
            "--data-path",
            "digits",
            "--model",
            "PPFlow_T_2",
            "--ckpt",
            str(source),
            "--run-dir",
            str(other),
            "--max-steps",
            "20",
            "--log-every",
            "1",
        ]
    )
    assert_same_state(checkpoint(other, 20)["model"], checkpoint(tiny_run, 20)["model"])


def test_finished_run_is_left_alone(tiny_run: Path) -> None:
    before = (tiny_run / "checkpoints" / "0000020.pt").stat().st_mtime_ns
    train([*TINY, "--run-dir", str(tiny_run), "--max-steps", "20", "--ckpt-every", "10", "--log-every", "1"])
    assert (tiny_run / "checkpoints" / "0000020.pt").stat().st_mtime_ns == before
    assert len(losses(tiny_run)) == 20


# -- Processes, accumulation and random numbers ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [32, 2])  # with 2, a process has no sample of one of the levels
def test_two_processes_follow_the_loss_curve_of_one(batch_size: int, tmp_path: Path) -> None:
    flags = [*TINY, "--global-batch-size", batch_size, "--max-steps", 10, "--log-every", 1]
    train([*map(str, flags), "--run-dir", str(tmp_path / "one")])
    done = start_script("train.py", *flags, "--run-dir", tmp_path / "two", processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-4)
    assert (tmp_path / "two" / "samples" / "0000010.png").exists()


def test_accumulated_passes_are_one_step(tmp_path: Path) -> None:
    for passes in ("1", "4"):
        train(
            [
                *TINY,
                "--gradient-accumulation-steps",
                passes,
                "--max-steps",
                "5",
                "--log-every",
                "1",
                "--run-dir",
                str(tmp_path / passes),
            ]
        )
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), atol=1e-5)


@pytest.mark.slow
def test_faster_and_smaller_steps_have_the_same_losses(tmp_path: Path, monkeypatch) -> None:
    counter = CompileCounterWithBackend("aot_eager")  # inductor has a test of its own, and takes its time
    monkeypatch.setattr("runtime.speed.compile_levels", partial(compile_levels, backend=counter))
    torch._dynamo.reset()
    found = {}
    for flags in (
        "",
        "--activation-checkpointing",
        "--compile",
        "--precision bf16",
        "--compile --activation-checkpointing --precision bf16",
    ):
        run_dir = tmp_path / (flags or "plain")
        # An edge that cuts the batch into whole samples nowhere: the levels' shares change from step to step.
        train(
            [
                *TINY,
                "--level-edges",
                "0.47",
                "--max-steps",
                "5",
                "--log-every",
                "1",
                "--sample-every",
                "0",
                "--run-dir",
                str(run_dir),
                *flags.split(),
            ]
        )
        found[flags] = losses(run_dir)
        log = (run_dir / "log.txt").read_text()
        assert ("first step after" in log) == ("--compile" in flags)
        if flags == "--compile":
            assert counter.frame_count == 1
    assert counter.frame_count == 1 + 1  # a graph for both levels, and one in bf16
    for flags, values in found.items():
        np.testing.assert_allclose(values, found[""], rtol=5e-3 if "bf16" in flags else 1e-5, err_msg=flags)


def test_a_run_continues_with_other_flags_of_speed(tiny_run: Path, tmp_path: Path) -> None:
    continued = tmp_path / "continued"
    shutil.copytree(tiny_run, continued)
    (continued / "checkpoints" / "0000020.pt").unlink()
    train([*TINY, "--run-dir", str(continued), "--max-steps", "20", "--log-every", "1", "--activation-checkpointing"])
    np.testing.assert_allclose(losses(continued), losses(tiny_run), rtol=1e-4)


def test_random_numbers_of_a_step_do_not_depend_on_the_processes() -> None:
    transport = create_transport(level_edges=(0.5,))

    def draw(rank: int, world_size: int) -> tuple[torch.Tensor, ...]:
        n, first = 32 // world_size, 7 * 32
        positions = range(first + rank * n, first + (rank + 1) * n)
        return draw_step(7, positions, (1, 8, 8), transport, seed=0, batch_size=32, dropout=0.1)

    for whole, *parts in zip(draw(0, 1), *(draw(rank, 4) for rank in range(4)), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def test_labels_are_dropped_with_the_given_probability() -> None:
    transport, settings = create_transport(), {"seed": 0, "batch_size": 1000, "dropout": 0.3}
    drops = [
        draw_step(step, range(1000 * step, 1000 * (step + 1)), (1,), transport, **settings)[3] for step in range(10)
    ]
    rate = torch.cat(drops).float().mean().item()
    assert abs(rate - 0.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5


def test_ema_is_the_weighted_mean_of_all_weights() -> None:
    torch.manual_seed(0)
    model, ema = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    history = [ema.weight.clone()]
    for _ in range(5):
        torch.nn.init.normal_(model.weight)
        history.append(model.weight.detach().clone())
        update_ema(ema, model, decay=0.8)
    weights = [0.8**5, *(0.2 * 0.8 ** (4 - k) for k in range(5))]
    expected = sum(w * h for w, h in zip(weights, history, strict=True))
    torch.testing.assert_close(ema.weight, expected)


# -- Settings that must have an effect ---------------------------------------------------------------------------


def test_warm_up_raises_the_learning_rate_in_equal_steps(tmp_path: Path) -> None:
    train([*TINY, "--warmup-steps", "4", "--max-steps", "6", "--log-every", "1", "--run-dir", str(tmp_path)])
    rates = [json.loads(line)["lr"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_clipping_limits_the_step(tmp_path: Path) -> None:
    """AdamW divides by sqrt(v) + 1e-8: gradients clipped far below 1e-8 hardly move the weights."""
    moved = {}
    for limit in ("1e-14", "10"):
        train([*TINY, "--max-grad-norm", limit, "--max-steps", "1", "--run-dir", str(tmp_path / limit)])
        head = checkpoint(tmp_path / limit, 1)["model"]["final_layer.linear.0.weight"]  # starts at zero
        moved[limit] = head.abs().max().item()
    assert moved["1e-14"] < 1e-7 < 1e-4 < moved["10"]


def scale_losses(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Transport.training_losses

    def scaled(self, *args, **kwargs):
        terms = real(self, *args, **kwargs)
        return {**terms, "loss": terms["loss"] * factor}

    monkeypatch.setattr(Transport, "training_losses", scaled)


@pytest.mark.slow
def test_gradients_whose_square_is_no_float_are_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping takes a factor of the loss away, also one that makes fp32's sum of squares infinite."""
    flags = [*TINY, "--max-steps", "3", "--max-grad-norm", "1e-3"]
    train([*flags, "--run-dir", str(tmp_path / "plain")])
    scale_losses(1e22, monkeypatch)
    train([*flags, "--run-dir", str(tmp_path / "scaled")])
    for name, tensor in checkpoint(tmp_path / "plain", 3)["model"].items():
        torch.testing.assert_close(checkpoint(tmp_path / "scaled", 3)["model"][name], tensor, rtol=1e-3, atol=1e-5)
    record = json.loads((tmp_path / "scaled" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 1e19 < record["grad_norm"] < 1e30


def test_gradients_that_adamw_cannot_square_are_refused_unless_clipped(tmp_path: Path, monkeypatch, refuses) -> None:
    scale_losses(1e22, monkeypatch)
    line = refuses(train, *TINY, "--max-steps", 3, "--run-dir", tmp_path)
    assert re.search(r"gradient's norm is \S+e\+2\d at step 1, which AdamW cannot square", line)
    train([*TINY, "--max-steps", "3", "--run-dir", str(tmp_path), "--max-grad-norm", "1"])  # as it advises


def test_an_operation_without_a_deterministic_kernel_is_named(tmp_path: Path, monkeypatch, refuses) -> None:
    """Max-unpooling has none on any device; nothing of ours uses it."""
    real = PyramidalPatchDiT.forward

    def forward(self, *args, **kwargs):
        torch.nn.functional.max_unpool2d(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.long), 2)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PyramidalPatchDiT, "forward", forward)
    try:
        line = refuses(train, *TINY, "--max-steps", 1, "--deterministic", "--run-dir", tmp_path)
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
    assert "--deterministic: max_unpooling2d_forward_out has no deterministic kernel here" in line


@pytest.mark.gpu
def test_deterministic_runs_on_cuda_have_the_same_bits(tmp_path: Path) -> None:
    """Two runs of 50 steps each; without the flag the losses agree to rounding."""
    flags = [*TINY, "--max-steps", 50, "--log-every", 1, "--sample-every", 0]
    for name, extra in (("a", ["--deterministic"]), ("b", ["--deterministic"]), ("c", []), ("d", [])):
        done = start_script("train.py", *flags, *extra, "--run-dir", tmp_path / name, cuda=True)
        assert done.returncode == 0, done.stderr
    for part in ("model", "ema", "opt"):
        assert_same_state(checkpoint(tmp_path / "a", 50)[part], checkpoint(tmp_path / "b", 50)[part])
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    for other in ("c", "d"):
        np.testing.assert_allclose(losses(tmp_path / other), losses(tmp_path / "a"), rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("path_type", ["Linear", "GVP", "VP"])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score", "data"])
def test_every_path_and_prediction_trains_with_levels(path_type: str, prediction: str, tmp_path: Path) -> None:
    train(
        [
            *TINY,
            "--path-type",
            path_type,
            "--prediction",
            prediction,
            "--max-steps",
            "12",
            "--log-every",
            "4",
            "--level-edges",
            "0.3",
            "--run-dir",
            str(tmp_path),
        ]
    )
    values = losses(tmp_path)
    assert np.isfinite(values).all()
    assert values[-1] < values[0]


@pytest.mark.slow
def test_bf16_follows_fp32(tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        train(
            [
                *TINY,
                "--precision",
                precision,
                "--max-steps",
                "8",
                "--log-every",
                "8",
                "--run-dir",
                str(tmp_path / precision),
            ]
        )
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    np.testing.assert_allclose(losses(tmp_path / "bf16"), losses(tmp_path / "fp32"), rtol=0.02)


def test_image_folder_trains_in_pixel_space(picture_folder: Path, tmp_path: Path) -> None:
    train(
        [
            "--data-path",
            str(picture_folder),
            "--model",
            "PPF-T-3",
            "--image-size",
            "16",
            "--vae",
            "none",
            "--epochs",
            "3",
            "--global-batch-size",
            "4",
            "--num-workers",
            "2",
            "--log-every",
            "1",
            "--run-dir",
            str(tmp_path / "run"),
        ]
    )
    assert len(losses(tmp_path / "run")) == 9  # 3 epochs of 12 pictures in batches of 4
    assert checkpoint(tmp_path / "run", 9)["config"]["model"]["num_classes"] == 3
    assert Image.open(tmp_path / "run" / "samples" / "0000009.png").size == (8 * 66 + 2, 3 * 66 + 2)


def test_wandb_offline_leaves_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PROJECT", "ppflow-test")
    train([*TINY, "--wandb", "--max-steps", "2", "--log-every", "1", "--run-dir", str(tmp_path)])
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))


# -- Bad input ---------------------------------------------------------------------------------------------------


def test_unknown_flag_is_an_error_and_not_an_abbreviation(refuses) -> None:
    assert "--batch-size" in refuses(train, *TINY, "--batch-size", 3)
    assert "--glob" in refuses(train, *TINY, "--glob", 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-path", "no/such/folder"], "no/such/folder does not exist"),
        (["--image-size", "9"], "digits are 8x8"),
        (["--num-classes", "5"], "--num-classes 5 is too few"),
        (["--model", "PPF-M-2"], "unknown model 'PPF-M-2'"),
        (["--cfg-scales", "1", "2", "3"], "3 guidance scale(s) for 2 level(s)"),
        (["--level-edges", "0.2", "0.7"], "give 1 level edge(s)"),
        (["--level-edges", "1.5"], "between 0 and 1"),
        (["--train-eps", "0.7"], "train_eps must be in [0, 0.5)"),
        (["--gradient-accumulation-steps", "3"], "choose a multiple of 3"),
        (["--ckpt", "no/such.pt"], "no/such.pt does not exist"),
        (["--model", "SiT-T/2", "--level-edges", "0.5"], "give 0 level edge(s)"),
        (["--model", "SiT-S/8", "--max-steps", "0"], "at least 1"),
        (["--loss-weight", "min-snr-5"], "not one of None, velocity, likelihood, data"),
        (["--cfg-scales", "inf"], "inf is not a finite number"),
        (["--lr", "inf"], "inf"),
        (["--epochs", "3", "--max-steps", "5"], "give one of them"),
        (["--data-path", ""], "it is empty"),
    ],
)
def test_bad_flags_end_before_training(flags: list[str], words: str, tmp_path: Path, refuses) -> None:
    assert words in refuses(train, *TINY, "--run-dir", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_empty_folder_and_indivisible_size_are_named(picture_folder: Path, tmp_path: Path, refuses) -> None:
    (tmp_path / "empty").mkdir()
    assert "sub-folder per class" in refuses(train, *TINY, "--data-path", tmp_path / "empty", "--vae", "none")
    line = refuses(train, *TINY, "--data-path", picture_folder, "--image-size", 18, "--vae", "none")
    assert "the 4x4 patch of level 0 does not divide the 18x18 input" in line


def test_truncated_checkpoint_is_named(tiny_run: Path, tmp_path: Path, refuses) -> None:
    whole = (tiny_run / "checkpoints" / "0000020.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    broken.write_bytes(whole[: len(whole) // 2])
    assert f"cannot read checkpoint {broken}" in refuses(train, *TINY, "--ckpt", broken)
    torch.save({"weights": torch.zeros(3)}, broken)
    assert "is not a checkpoint of this train.py" in refuses(train, *TINY, "--ckpt", broken)


def test_tensor_of_another_shape_is_named_before_the_run(tiny_run: Path, tmp_path: Path, refuses) -> None:
    odd = checkpoint(tiny_run, 20)
    odd["ema"]["y_embedder.embedding_table.weight"] = torch.zeros(7, 128)
    torch.save(odd, tmp_path / "odd.pt")
    line = refuses(train, *TINY, "--ckpt", tmp_path / "odd.pt", "--run-dir", tmp_path / "run")
    assert "odd.pt: ema" in line
    assert "y_embedder.embedding_table.weight is (7, 128), not (11, 128)" in line


@pytest.mark.slow
def test_processes_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    done = start_script("train.py", *TINY, "--run-dir", tmp_path / "run", processes=3)
    assert done.returncode != 0
    assert "does not divide into 3 process(es)" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()


def test_error_is_one_line_without_traceback() -> None:
    done = start_script("train.py", "--data-path", "no/such/folder")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("train.py: error: --data-path no/such/folder does not exist")


def test_folder_of_other_things_is_not_made_a_run(tmp_path: Path, refuses) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "holds other files and no run" in refuses(train, *TINY, "--run-dir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_run_that_another_process_trains_is_refused(tiny_run: Path, monkeypatch, refuses) -> None:
    import subprocess
    import sys

    from runtime import run

    held = tiny_run.with_name("held")
    shutil.copytree(tiny_run, held)
    program = (
        f"import fcntl; f = open({str(held / '.lock')!r}, 'ab'); fcntl.flock(f, fcntl.LOCK_EX); print('held'); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline().strip() == b"held"
        monkeypatch.setattr(run, "LOCK_PATIENCE", 0.0)
        assert "another process trains in" in refuses(train, *TINY, "--run-dir", held, "--max-steps", 30)
        other.communicate(b"\n")


def test_finished_run_says_that_there_is_nothing_to_do(tiny_run: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    train([*TINY, "--run-dir", str(tmp_path / "run"), "--max-steps", "5"])
    assert "nothing to do" in capsys.readouterr().out


def test_torn_picture_is_named_with_a_way_out(picture_folder: Path, tmp_path: Path, refuses) -> None:
    torn = picture_folder / "ant" / "0.png"
    torn.write_bytes(torn.read_bytes()[:200])
    for workers in (0, 1):
        line = refuses(
            train,
            "--data-path",
            picture_folder,
            "--model",
            "PPF-T-2",
            "--image-size",
            16,
            "--vae",
            "none",
            "--global-batch-size",
            12,
            "--max-steps",
            1,
            "--num-workers",
            workers,
            "--run-dir",
            tmp_path / str(workers),
        )
        assert f"error: cannot read the image {torn}" in line
        assert "--skip-unreadable" in line


def test_diverged_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step \d") as stopped:
        train([*TINY, "--lr", "1e25", "--ckpt-every", "1", "--run-dir", str(run_dir)])
    kept = max((run_dir / "checkpoints").glob("*.pt"))
    assert str(kept) in str(stopped.value)
    saved = torch.load(kept, weights_only=True)
    assert all(torch.isfinite(tensor).all() for part in ("model", "ema") for tensor in saved[part].values())


def test_interrupted_writing_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("old")
    with pytest.raises(RuntimeError), complete_file(file) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
