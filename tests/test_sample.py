"""sample.py: pictures, their cost, likelihood, there and back, and bad input."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_script
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import sample_ddp
from models import PyramidalPatchDiT
from runtime.speed import compile_levels, precision_note
from sample import main
from train import train
from weights.pretrained import convert


def cost(text: str, name: str) -> tuple[float, float]:
    """NFE and GMACs per image that a row of the report states."""
    (row,) = [line for line in text.splitlines() if line.startswith(name)]
    nfe, gmacs, _ = row[22:].split()
    return float(nfe), float(gmacs)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def noise_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another path and prediction, and a single level."""
    run_dir = tmp_path_factory.mktemp("runs") / "vp"
    train(
        (
            "--data-path digits --model SiT-T/2 --path-type VP --prediction noise --max-steps 2 "
            f"--global-batch-size 16 --num-workers 0 --run-dir {run_dir}"
        ).split()
    )
    return run_dir


# -- Pictures and their cost -------------------------------------------------------------------------------------


def test_grid_has_a_row_for_each_class_and_a_report(tiny_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "grid.png"
    main(
        (
            f"ODE --ckpt {tiny_run} --class-labels 3 1 4 --samples-per-class 5 "
            f"--num-sampling-steps 10 --cfg-scales 2 --out {out}"
        ).split()
    )
    assert Image.open(out).size == (5 * 66 + 2, 3 * 66 + 2)
    nfe, _ = cost(capsys.readouterr().out, "pyramid")
    assert nfe == 20  # ten steps, each on the label and on the null label


def test_cost_counts_evaluations_and_macs_of_each_level(tiny_run: Path, tmp_path: Path, capsys) -> None:
    from models import create_model

    with torch.device("meta"):
        model = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10)
    main(
        (
            f"ODE --ckpt {tiny_run} --num-sampling-steps 3 5 --sampling-method euler "
            f"--cfg-scales 1 2 --compare-finest --out {tmp_path / 'a.png'}"
        ).split()
    )
    text = capsys.readouterr().out
    nfe, gmacs = cost(text, "pyramid")
    assert nfe == 3 * 1 + 5 * 2  # guidance at scale 1 is free
    assert gmacs == pytest.approx((3 * model.macs(0) + 10 * model.macs(1)) / 1e9, abs=6e-4)
    nfe, gmacs = cost(text, "finest")
    assert nfe == 16
    assert gmacs == pytest.approx(16 * model.macs(1) / 1e9, abs=6e-4)


def test_a_sample_does_not_depend_on_its_batch(tiny_run: Path, tmp_path: Path) -> None:
    for mode, flags in (("ODE", []), ("SDE", ["--sampling-method", "Heun", "--diffusion-form", "linear"])):
        grids = []
        for batch_size in ("10", "3"):
            out = tmp_path / f"{batch_size}.png"
            main(
                [
                    *f"{mode} --ckpt {tiny_run} --num-sampling-steps 6 --batch-size {batch_size}".split(),
                    *flags,
                    "--out",
                    str(out),
                ]
            )
            grids.append(pixels(out))
        assert abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_settings_change_the_picture(tiny_run: Path, tmp_path: Path) -> None:
    variants = [
        [],
        ["--seed", "1"],
        ["--cfg-scales", "1"],
        ["--weights", "model"],
        ["--level-edges", "0.25"],
        ["--cfg-interval", "0.2", "0.6"],
        ["--sampling-method", "dopri5"],
        ["--num-sampling-steps", "5"],
    ]
    pictures = []
    for number, flags in enumerate(variants):
        main(["ODE", "--ckpt", str(tiny_run), *flags, "--out", str(tmp_path / f"{number}.png")])
        pictures.append(pixels(tmp_path / f"{number}.png"))
    for number, picture in enumerate(pictures[1:], start=1):
        assert (picture != pictures[0]).any(), variants[number]


@pytest.mark.parametrize("last_step", ["None", "Mean", "Tweedie", "Euler"])
def test_every_last_step_samples_another_path_and_prediction(noise_run: Path, last_step: str, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    main(["SDE", "--ckpt", str(noise_run), "--num-sampling-steps", "8", "--last-step", last_step, "--out", str(out)])
    assert pixels(out).std() > 10


@pytest.mark.slow
def test_script_runs_as_a_user_starts_it(tiny_run: Path, tmp_path: Path) -> None:
    done = start_script("sample.py", "ODE", "--ckpt", tiny_run, "--num-sampling-steps", 2, "--out", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert "NFE" in done.stdout
    assert (tmp_path / "a.png").exists()


# -- Likelihood, and there and back ------------------------------------------------------------------------------


def test_likelihood_states_bits_of_seventeen_grey_levels(tiny_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "bits.json"
    main(f"ODE --ckpt {tiny_run} --likelihood --data-path digits --num-images 6 --num-probes 2 --out {out}".split())
    records = json.loads(out.read_text())
    assert len(records) == 6
    for record in records:
        # A step between grey levels is 1/8, so a density p has mass p / 8 per dimension.
        assert record["bits_per_dim"] == pytest.approx(-record["nats"] / (64 * math.log(2)) + 3)
    stated = float(re.search(r"([\d.]+) \+- [\d.]+ bits per dimension", capsys.readouterr().out).group(1))
    assert stated == pytest.approx(np.mean([record["bits_per_dim"] for record in records]), abs=1e-3)


def test_likelihood_of_an_untrained_network_is_that_of_its_noise(tmp_path: Path) -> None:
    """At the start the network is zero: nothing moves, and the density of an image is that of the Gaussian."""
    from sklearn.datasets import load_digits

    run_dir = tmp_path / "run"
    train(
        (
            "--data-path digits --model PPF-T-2 --max-steps 1 --global-batch-size 2 --lr 1e-30 "
            f"--num-workers 0 --run-dir {run_dir}"
        ).split()
    )
    out = tmp_path / "bits.json"
    main(f"ODE --ckpt {run_dir} --likelihood --data-path digits --num-images 20 --out {out}".split())
    for record in json.loads(out.read_text()):
        image = load_digits().images[record["image"]].reshape(-1) / 8 - 1
        # Dequantisation adds u in [-1/16, 1/16] to each pixel: its mean effect is the variance, 1/768.
        expected = -0.5 * (image**2 + 1 / 768).sum() - 32 * math.log(2 * math.pi)
        assert record["nats"] == pytest.approx(expected, abs=5 * math.sqrt((image**2).sum() / 768 + 0.01))


def test_likelihood_does_not_depend_on_the_batch(tiny_run: Path, tmp_path: Path) -> None:
    nats = []
    for size in ("7", "2"):
        main(
            (
                f"ODE --ckpt {tiny_run} --likelihood --data-path digits --num-images 7 "
                f"--sampling-method rk4 --num-sampling-steps 6 --batch-size {size} --out {tmp_path / size}"
            ).split()
        )
        nats.append([record["nats"] for record in json.loads((tmp_path / size).read_text())])
    np.testing.assert_allclose(*nats, rtol=1e-4)


def test_reverse_turns_images_into_noise_and_back(tiny_run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "reverse.png"
    main(["ODE", "--ckpt", str(tiny_run), "--reverse", "--data-path", "digits", "--num-images", "4", "--out", str(out)])
    error = float(re.search(r"RMS error ([\d.e+-]+)", capsys.readouterr().out).group(1))
    assert error < 5e-3
    grid = pixels(out)
    original, back = grid[:66], grid[-68:-2]
    assert abs(original - back).max() <= 3
    assert abs(original - grid[66:132]).max() > 50


# -- Faster, and the same pictures -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", [[], ["--sampling-method", "dpmpp_2m"]])
def test_one_evaluation_a_step(method: list[str], tiny_run: Path, tmp_path: Path, capsys) -> None:
    grids = []
    for steps, flags in (("40", method), ("60", ["--sampling-method", "rk4"])):
        out = tmp_path / f"{steps}.png"
        main([*f"ODE --ckpt {tiny_run} --cfg-scales 1 --num-sampling-steps {steps} --out {out}".split(), *flags])
        grids.append(pixels(out))
        assert cost(capsys.readouterr().out, "pyramid")[0] == (40 if steps == "40" else 240)
    assert abs(grids[0] - grids[1]).max() <= 3  # of 255


@pytest.mark.slow
def test_compiled_and_in_bf16_it_draws_the_same(tiny_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    counter = CompileCounterWithBackend("aot_eager")  # inductor has a test of its own, and takes its time
    monkeypatch.setattr("pipeline.compile_levels", partial(compile_levels, backend=counter))
    torch._dynamo.reset()
    grids = {}
    for name, flags in {
        "plain": [],
        "compiled": ["--compile"],
        "bf16": ["--precision", "bf16"],
        "both": ["--compile", "--precision", "bf16"],
    }.items():
        before, out = counter.frame_count, tmp_path / f"{name}.png"
        main(
            [
                *(
                    f"ODE --ckpt {tiny_run} --num-sampling-steps 8 --class-labels 1 2 3 --batch-size 2 "
                    f"--cfg-scales 1 2 --compare-finest --out {out}"
                ).split(),
                *flags,
            ]
        )
        grids[name] = pixels(out)
        # One graph per level, for batches of 2 and 1, guided or not, also at the finest level alone
        assert counter.frame_count - before == (2 if "--compile" in flags else 0)
        assert capsys.readouterr().out.count("compiled a block for") == (2 if "--compile" in flags else 0)
    assert abs(grids["compiled"] - grids["plain"]).max() <= 1
    assert 0 < abs(grids["bf16"] - grids["plain"]).max() <= 8
    assert abs(grids["both"] - grids["plain"]).max() <= 8


@pytest.mark.slow
def test_likelihood_of_a_compiled_network(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.compile_levels", partial(compile_levels, backend="aot_eager"))
    nats = []
    for flags in ([], ["--compile"]):
        out = tmp_path / "l.json"
        main(
            [
                *(
                    f"ODE --ckpt {tiny_run} --likelihood --data-path digits --num-images 3 "
                    f"--num-probes 2 --num-sampling-steps 4 --out {out}"
                ).split(),
                *flags,
            ]
        )
        nats.append([record["nats"] for record in json.loads(out.read_text())])
    assert nats[0] == pytest.approx(nats[1], rel=1e-4)


# -- Solvers that fail ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diverged(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a weight that is not a number."""
    checkpoint = torch.load(tiny_run / "checkpoints" / "0000020.pt", weights_only=True)
    checkpoint["ema"]["blocks.0.mlp.fc1.bias"][0] = math.nan
    torch.save(checkpoint, path := tmp_path_factory.mktemp("diverged") / "nan.pt")
    return path


GIVEN = ["--data-path", "digits", "--num-images", "2"]


def test_too_little_memory_is_one_line(tiny_run: Path, tmp_path: Path, monkeypatch, refuses) -> None:
    forward = PyramidalPatchDiT.forward

    def full(model: PyramidalPatchDiT, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if x.is_meta:  # where multiply-accumulates are counted
            return forward(model, x, *args, **kwargs)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PyramidalPatchDiT, "forward", full)
    line = refuses(main, "ODE", "--ckpt", tiny_run, "--out", tmp_path / "a.png")
    assert "memory is too small for the samples of a batch: lower --batch-size" in line
    flags = ["--ckpt", tiny_run, "--num-fid-samples", 2, "--sample-dir", tmp_path]
    assert "lower --per-proc-batch-size" in refuses(sample_ddp.main, "SDE", *flags)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "scipy_solver", "euler"])
@pytest.mark.parametrize("question", [[], ["--likelihood", *GIVEN], ["--reverse", *GIVEN]])
def test_a_network_that_diverged_is_one_line(
    method: str, question: list[str], diverged: Path, tmp_path: Path, refuses
) -> None:
    out = tmp_path / "a.png"
    line = refuses(main, "ODE", "--ckpt", diverged, "--sampling-method", method, *question, "--out", out)
    assert "the weights of PPF-T-2 at step 20 are not finite" in line
    if method in ("dopri5", "bosh3"):
        assert f"{method} failed between t = " in line
    assert len(line) < 300
    assert not out.exists()
    assert "are not finite" in refuses(main, "SDE", "--ckpt", diverged, "--num-sampling-steps", 3, "--out", out)


def test_a_field_too_steep_for_an_adaptive_method_is_one_line(tiny_run: Path, tmp_path: Path, refuses) -> None:
    steep = ["--sampling-method", "dopri5", "--cfg-scales", "1e30"]
    line = refuses(main, "ODE", "--ckpt", tiny_run, *steep, "--out", tmp_path / "a.png")
    assert "dopri5 failed between t = 0 and 0.5: " in line
    assert "lower --cfg-scales, or give another --sampling-method, as ab2" in line


# -- The process ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def old_run(noise_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as an earlier `train.py --path-type Linear --prediction noise --sample-eps 0` wrote it."""
    checkpoint = torch.load(noise_run / "checkpoints" / "0000002.pt", weights_only=True)
    process = {"path_type": "Linear", "loss_weight": "velocity", "train_eps": 0.0, "sample_eps": 0.0}
    checkpoint["config"]["transport"] |= process
    torch.save(checkpoint, path := tmp_path_factory.mktemp("old") / "old.pt")
    return path


@pytest.mark.parametrize("mode", ["ODE", "SDE"])
def test_a_checkpoint_that_no_solver_could_start_from_is_sampled(
    mode: str, old_run: Path, tmp_path: Path, refuses, capsys
) -> None:
    pictures = []
    for number, flags in enumerate(([], ["--sample-eps", "0.001"], ["--sample-eps", "0.05"])):
        out = tmp_path / f"{number}.png"
        main([mode, "--ckpt", str(old_run), "--num-sampling-steps", "8", "--out", str(out), *flags])
        noted = "has sample_eps 0, from which no solver can start: 0.001 is used" in capsys.readouterr().out
        assert noted == (not flags)
        pictures.append(pixels(out))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    line = refuses(main, mode, "--ckpt", old_run, "--sample-eps", "0", "--out", tmp_path / "a.png")
    assert "sample_eps 0 is too small for the Linear path with noise prediction" in line


def test_an_end_that_a_method_comes_to_is_told_before_the_work(tiny_run: Path, tmp_path: Path, refuses) -> None:
    """A data prediction gives no velocity at t = 1, where some methods and every likelihood evaluate it."""
    convert(tiny_run, bare := tmp_path / "bare.pt", "ppflow", num_heads=2)
    command = ["ODE", "--ckpt", str(bare), "--prediction", "data", "--sample-eps", "0", "--out", f"{tmp_path}/a.png"]
    main(command)
    given = ["--likelihood", "--data-path", "digits"]
    for flags in (["--sampling-method", "rk4"], given, ["--reverse", *given[1:]]):
        line = refuses(main, *command, *flags)
        assert "comes to an end of the Linear path with data prediction that is infinite: give --sample-eps" in line


def test_bare_weights_are_told_their_process(noise_run: Path, tmp_path: Path) -> None:
    """Files in SiT's layout do not store it: SiT's sample.py takes train.py's flags."""
    convert(noise_run, bare := tmp_path / "bare.pt", "sit", num_heads=2)
    told = ["--path-type", "VP", "--prediction", "noise", "--loss-weight", "velocity", "--train-eps", "1e-5"]
    pictures = []
    for ckpt, flags in ((noise_run, []), (bare, told), (bare, [])):
        out = tmp_path / f"{len(pictures)}.png"
        main(["ODE", "--ckpt", str(ckpt), "--num-sampling-steps", "8", "--out", str(out), *flags])
        pictures.append(pixels(out))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


# -- Processors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx2 avx512f\n", True),
        ("processor : 0\nflags\t\t: fpu sse2 avx512_bf16 avx512f\n", False),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", False),
        ("Features\t: fp asimd\n", True),
        ("model name : of which nothing is known\n", False),
        (None, False),
    ],
)
def test_a_processor_without_bf16_is_told(flags: str | None, slow: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("runtime.speed.CPU_INFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags)
    line = precision_note("bf16", torch.device("cpu"))
    assert (line is not None) == slow
    assert not slow or ("bf16" in line and "--precision fp32" in line and "\n" not in line)
    assert precision_note("fp32", torch.device("cpu")) is None
    assert precision_note("bf16", torch.device("cuda")) is None


def test_the_note_comes_once(tiny_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "cpuinfo").write_text("flags : sse2\n")
    monkeypatch.setattr("runtime.speed.CPU_INFO", tmp_path / "cpuinfo")
    flags = ["ODE", "--ckpt", str(tiny_run), "--num-sampling-steps", "2", "--precision"]
    for precision in ("bf16", "fp32"):
        main([*flags, precision, "--out", str(tmp_path / "a.png")])
        assert capsys.readouterr().out.count("no instructions for bf16") == (precision == "bf16")
        sample_ddp.main([*flags, precision, "--num-fid-samples", "1", "--sample-dir", str(tmp_path / precision)])
        assert capsys.readouterr().out.count("no instructions for bf16") == (precision == "bf16")


# -- Bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "flags", "words"),
    [
        ("ODE", ["--class-labels", "10"], "class label 10 is out of range: the model knows 0 to 9"),
        ("ODE", ["--class-labels", "-1"], "-1"),
        ("ODE", ["--cfg-scales", "1", "2", "3"], "3 guidance scale(s) for 2 level(s)"),
        ("ODE", ["--cfg-interval", "0.5", "0.2"], "is empty"),
        ("ODE", ["--model", "SiT-T/2"], "was trained with PPF-T-2"),
        ("ODE", ["--image-size", "16"], "was trained with 8"),
        ("ODE", ["--num-classes", "1000"], "was trained with 10"),
        ("ODE", ["--num-steps", "10"], "--num-steps"),
        ("ODE", ["--num-sampling-steps", "1"], "1 step(s)"),
        ("ODE", ["--num-sampling-steps", "1", "2", "3"], "3 numbers of steps for 2 level(s)"),
        (
            "ODE",
            ["--atol", "1e-5"],
            "has no effect with ab2, which takes --num-sampling-steps: leave it out, or give --sampling-method dopri5",
        ),
        ("ODE", ["--path-type", "GVP"], "was trained with Linear: leave --path-type out"),
        ("ODE", ["--prediction", "noise"], "was trained with velocity: leave --prediction out"),
        ("SDE", ["--loss-weight", "likelihood"], "was trained with None: leave --loss-weight out"),
        ("SDE", ["--train-eps", "0.01"], "was trained with 0.0: leave --train-eps out"),
        ("ODE", ["--sample-eps", "0.5"], "sample_eps must be in [0, 0.5)"),
        ("SDE", ["--last-step-size", "1e-9"], "give a larger --last-step-size"),
        ("ODE", ["--likelihood"], "need --data-path"),
        ("ODE", ["--num-probes", "2"], "--num-probes has no effect without --likelihood"),
        ("ODE", ["--likelihood", "--data-path", "digits", "--class-labels", "1"], "--class-labels has no effect"),
        ("ODE", ["--likelihood", "--data-path", "nowhere"], "nowhere does not exist"),
        ("ODE", ["--level-edges", "0.5", "0.7"], "give 1 level edge(s)"),
        ("ODE", ["--diffusion-form", "sigma"], "--diffusion-form"),
        ("SDE", ["--likelihood"], "--likelihood"),
        ("ODE", ["--likelihood", "--data-path", "digits", "--sampling-method", "dpmpp_2m"], "choose ab2"),
        ("ODE", ["--reverse", "--data-path", "digits", "--sampling-method", "dpmpp_2m"], "choose ab2"),
        ("SDE", ["--last-step", "None", "--last-step-size", "0.1"], "has no effect with --last-step None"),
        ("SDE", ["--level-edges", "0.98"], "would cross the level edge at 0.98"),
        ("SDE", ["--diffusion-form", "increasing-decresing"], "invalid choice"),
        ("DDE", [], "invalid choice: 'DDE'"),
        ("ODE", ["--cfg-scales", "1.5x"], "invalid float value: '1.5x'"),
        ("ODE", ["--cfg-scales", "nan"], "nan is not a finite number"),
        ("ODE", ["--cfg-channels", "9"], "the model has 1 channel(s)"),
        ("ODE", ["--cfg-scales", "1e38"], "the samples are not finite"),
        ("ODE", ["--ckpt", ""], "it is empty"),
        ("ODE", ["--out", "picture.xyz"], "no suffix of a picture"),
        ("ODE", ["--out", "/proc/none/a.png"], "/proc/none"),
    ],
)
def test_bad_flags_are_named(mode: str, flags: list[str], words: str, tiny_run: Path, tmp_path: Path, refuses) -> None:
    out = tmp_path / "a.png"
    assert words in refuses(main, mode, "--ckpt", tiny_run, "--out", out, *flags)
    assert not out.exists()


def test_the_mode_comes_first(tiny_run: Path, tmp_path: Path, refuses) -> None:
    line = refuses(main, "--ckpt", "a b.pt", "SDE", "--seed", 1)
    assert "ODE or SDE comes first: sample.py SDE --ckpt 'a b.pt' --seed 1" in line
    assert "ODE or SDE comes first: sample_ddp.py ODE --ckpt a.pt" in refuses(sample_ddp.main, "--ckpt", "a.pt")


def test_the_folder_of_a_runs_checkpoints_will_do(tiny_run: Path, tmp_path: Path) -> None:
    main(
        ["ODE", "--ckpt", str(tiny_run / "checkpoints"), "--num-sampling-steps", "2", "--out", str(tmp_path / "a.png")]
    )


def test_checkpoint_trouble_is_named(tiny_run: Path, tmp_path: Path, refuses) -> None:
    assert "is neither a file" in refuses(main, "ODE", "--ckpt", tmp_path / "none.pt")
    assert "model.safetensors" in refuses(main, "ODE", "--ckpt", tmp_path)
    whole = (tiny_run / "checkpoints" / "0000020.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    assert "half.pt" in refuses(main, "ODE", "--ckpt", tmp_path / "half.pt")
    assert "or no file of weights?" in refuses(main, "ODE", "--ckpt", tiny_run / "config.json")


def test_tensors_of_another_shape_are_named(tiny_run: Path, tmp_path: Path, refuses) -> None:
    checkpoint = torch.load(tiny_run / "checkpoints" / "0000020.pt", weights_only=True)
    checkpoint["ema"]["y_embedder.embedding_table.weight"] = torch.zeros(7, 128)
    torch.save(checkpoint, tmp_path / "odd.pt")
    line = refuses(main, "ODE", "--ckpt", tmp_path / "odd.pt")
    assert "y_embedder.embedding_table.weight is (7, 128), not (11, 128)" in line
    del checkpoint["ema"]["y_embedder.embedding_table.weight"]
    torch.save(checkpoint, tmp_path / "odd.pt")
    assert "y_embedder.embedding_table.weight" in refuses(main, "ODE", "--ckpt", tmp_path / "odd.pt")


def test_unwritable_answer_is_refused_before_the_work(tiny_run: Path, tmp_path: Path, refuses) -> None:
    (tmp_path / "folder.png").mkdir()
    assert "is a folder" in refuses(main, "ODE", "--ckpt", "none.pt", "--out", tmp_path / "folder.png")


def test_ctrl_c_ends_without_a_traceback(capsys) -> None:
    from runtime.errors import run_script

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run_script(interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip().endswith("interrupted")
