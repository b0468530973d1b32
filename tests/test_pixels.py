"""Pixels by the commands: other patches, a bottleneck, a prediction for each level, and the weights of the loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import download
import sample
import sample_ddp
from models import PyramidalPatchDiT
from pipeline import Pipeline
from train import train
from transport import ODE, SDE, Guidance
from weights.pretrained import load_pretrained

QUICK = "--data-path digits --model PPF-T-2 --global-batch-size 16 --num-workers 0 --sample-every 0 --log-every 1"
OWN = "--patch-sizes 4x8 4 --bottleneck 9 --prediction data velocity --loss-weight min_snr --loss-weight-value 2"
JIT = "--time-sampling logit-normal --time-params -0.8 0.8 --cfg-interval 0.1 1"
COMMAND = [*QUICK.split(), *OWN.split(), *JIT.split()]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with everything of its own."""
    run_dir = tmp_path_factory.mktemp("pixels") / "run"
    train([*COMMAND, "--max-steps", "2", "--run-dir", str(run_dir)])
    return run_dir


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_settings(run: Path) -> None:
    pretrained = load_pretrained(run)
    model = pretrained.model
    assert (model.patch_sizes, model.bottleneck, model.learn_sigma) == (((4, 8), (4, 4)), 9, False)
    assert pretrained.transport["prediction"] == "data velocity"
    assert pretrained.name == "PyramidalPatchDiT 4x8+4x4, 6 blocks, 128 wide"
    transport = Pipeline.load(run).transport
    assert (transport.prediction, transport.loss_weight, transport.loss_weight_value) == ("data velocity", "min-snr", 2)
    assert transport.sample_interval == (0.0, 1.0)
    assert Pipeline.load(run, process={"prediction": ("data", "velocity")}).changed == {}
    with pytest.raises(ValueError, match=r"--prediction is noise velocity, but .* was trained with data velocity"):
        Pipeline.load(run, process={"prediction": ["noise", "velocity"]})


def test_the_velocity_error_of_each_level_is_logged(run: Path) -> None:
    for number, record in enumerate(records(run)):
        errors = [record["velocity_error_level_0"], record["velocity_error_level_1"]]
        assert all(0.5 < error < 10 for error in errors)  # of a network that predicts nothing yet
        assert errors[0] != record["loss_level_0"]  # which is weighted
        shown = " / ".join(f"{error:.4f}" for error in errors)
        assert (
            f"step {number + 1}: loss {record['loss']:.4f}, velocity error {shown}, " in (run / "log.txt").read_text()
        )


def test_without_a_weight_the_error_of_velocities_is_the_loss(tiny_run: Path) -> None:
    for record in records(tiny_run):
        for level in range(2):
            assert record[f"velocity_error_level_{level}"] == pytest.approx(record[f"loss_level_{level}"], rel=1e-6)


def test_a_level_without_samples_has_no_error(tmp_path: Path) -> None:
    train([*QUICK.split(), "--level-edges", "0.999", "--max-steps", "1", "--run-dir", str(tmp_path)])
    (record,) = records(tmp_path)
    assert record["velocity_error_level_1"] is None
    shown = f"velocity error {record['velocity_error_level_0']:.4f} / -, "
    assert shown in (tmp_path / "log.txt").read_text()


def test_a_run_continues_by_the_same_command_and_by_no_other(run: Path, tmp_path: Path, refuses) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    train([*COMMAND, "--max-steps", "3", "--run-dir", str(other)])
    assert [record["step"] for record in records(other)] == [1, 2, 3]
    for flags, words in (
        ("--prediction velocity", "--prediction is data velocity in"),
        ("--prediction velocity data", "not velocity data"),
        ("--patch-sizes 4 2", "--patch-sizes is [(4, 8), (4, 4)] in"),
        ("--bottleneck 8", "--bottleneck is 9 in"),
        ("--loss-weight edm", "--loss-weight is min-snr in"),
        ("--loss-weight-value 5", "--loss-weight-value is 2.0 in"),
    ):
        assert words in refuses(train, "--run-dir", other, *flags.split())


def test_a_run_of_a_doubled_head_keeps_it(run: Path, tmp_path: Path) -> None:
    """As one has that an earlier version began on pixels."""
    other = Path(shutil.copytree(run, tmp_path / "run"))
    path = other / "checkpoints" / "0000002.pt"
    checkpoint = torch.load(path, weights_only=True)
    fields = checkpoint["config"]["model"]
    fields["learn_sigma"] = True
    earlier = PyramidalPatchDiT(**fields)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in earlier.named_parameters()}
    state = {number: {"step": torch.tensor(2.0)} for number, _ in enumerate(zeros)}
    for number, tensor in enumerate(zeros.values()):
        state[number] |= {"exp_avg": tensor, "exp_avg_sq": tensor}
    checkpoint |= {"model": earlier.state_dict(), "ema": earlier.state_dict()}
    checkpoint["opt"]["state"] = state
    torch.save(checkpoint, path)
    path.with_name(f"{path.name}.sha256").unlink()
    train(["--run-dir", str(other), "--max-steps", "3"])
    assert load_pretrained(other).model.learn_sigma


def test_it_is_sampled_from(run: Path, tmp_path: Path, refuses) -> None:
    out = tmp_path / "a.png"
    flags = [
        "--ckpt",
        str(run),
        "--num-sampling-steps",
        "4",
        "--cfg-scales",
        "1.5",
        "2.9",
        "--cfg-interval",
        "0.1",
        "1",
    ]
    claims = ["--prediction", "data", "velocity", "--loss-weight", "min_snr"]
    sample.main(["ODE", *flags, *claims, "--sampling-method", "heun2", "--out", str(out)])
    assert Image.open(out).size[0] > 100
    sample.main(["SDE", *flags[:2], "--num-sampling-steps", "4", "--out", str(out)])
    sample.main(["ODE", *flags[:4], "--class-labels", "1", "--compare-finest", "--out", str(out)])
    line = refuses(sample.main, "ODE", *flags, "--prediction", "velocity", "--out", tmp_path / "b.png")
    assert "--prediction is velocity, but" in line
    assert "was trained with data velocity: leave --prediction out" in line
    likelihood = ["--likelihood", "--data-path", "digits", "--num-images", "2", "--sampling-method", "heun2"]
    sample.main(["ODE", *flags[:4], *likelihood, "--out", str(tmp_path / "nats.json")])
    assert np.isfinite([record["nats"] for record in json.loads((tmp_path / "nats.json").read_text())]).all()
    many = ["--num-fid-samples", "3", "--sample-dir", str(tmp_path)]
    sample_ddp.main(["ODE", *flags[:4], *many])
    (folder,) = tmp_path.glob("*.npz")
    assert np.load(folder)["arr_0"].shape == (3, 8, 8, 3)


def test_its_weights_make_the_same_samples_wherever_they_are_saved(run: Path, tmp_path: Path, refuses) -> None:
    pipe = Pipeline.load(run)
    process = load_pretrained(run).transport
    config = {**pipe.model.config, "transport": process, "vae": "none"}
    pipe.model.save_pretrained(tmp_path / "hub", config=config)
    download.main(["convert", str(run), str(tmp_path / "light.safetensors"), "--layout", "ours"])
    for solver in (ODE(num_steps=6), SDE(num_steps=6)):
        first, *others = (
            Pipeline.load(source).images([1, 2], solver, Guidance((2.0, 1.5)))
            for source in (run, tmp_path / "hub", tmp_path / "light.safetensors")
        )
        assert all(torch.equal(first, other) for other in others)
    line = refuses(download.main, "convert", run, tmp_path / "other.pt", "--layout", "ppflow")
    assert "our own" in line
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss-weight min_sn", "not one of None, velocity, likelihood"),
        ("--loss-weight-value 3", "loss_weight_value 3 has no effect without a loss weight"),
        ("--loss-weight velocity --loss-weight-value 3", "has no effect with loss weight velocity"),
        ("--loss-weight min-snr --loss-weight-value 0", "must be a number above 0, got 0"),
        ("--loss-weight min-snr --loss-weight-value five", "invalid float value"),
        ("--loss-weight min-snr --loss-weight-value", "expected one argument"),
        ("--loss-weight edm --loss-weight-value 1e-30", "loss_weight_value 1e-30 makes loss weight edm infinite"),
        ("--patch-sizes 3 2", "the 3x3 patch of level 0 does not divide the 8x8 input"),
        ("--patch-sizes 4x 2", "invalid patch value: '4x'"),
        ("--patch-sizes 4x2x1 2", "4x2x1 is no patch: give its side, or HxW as 4x8"),
        ("--patch-sizes 0 2", "0 is no patch"),
        ("--patch-sizes 4 2 1", "3 level(s)"),
        ("--patch-sizes 2 4", "give the largest first"),
        ("--bottleneck 4", "a bottleneck of 4 is none between the 4 values of a 2x2 patch"),
        ("--prediction data velocity noise", "3 predictions for 2 level(s)"),
        ("--prediction data speed", "invalid choice: 'speed'"),
    ],
)
def test_what_does_not_fit_is_one_line_before_the_work(flags: str, words: str, tmp_path: Path, refuses) -> None:
    edges = ["--level-edges", "0.5"]
    run_dir = tmp_path / "run"
    assert words in refuses(train, *QUICK.split(), *edges, *flags.split(), "--max-steps", "1", "--run-dir", run_dir)
    assert not run_dir.exists()
