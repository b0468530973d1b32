"""The tables of benchmarks/sampling.py belong to the models and to the evaluations that are made."""

import pytest
import torch
from test_benchmarks import tables

import pipeline
from benchmarks import sampling, timing
from benchmarks.timing import random_model
from models import MODELS, PyramidalPatchDiT, create_model

SAMPLING = ["--batch-size", "2", "--repeats", "1", "--device", "cpu", "--steps", "4"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """The tiny models with 2 blocks."""
    for name in ("SiT-T/2", "PPF-T-2", "PPF-T-3"):
        monkeypatch.setitem(MODELS[name], "depth", 2)


@pytest.fixture
def a_second_for_each_evaluation(monkeypatch):
    """A clock that counts evaluations of the network instead of seconds."""
    evaluations = [0]
    forward = PyramidalPatchDiT.forward

    def counted(self, x, t, y, level=0):
        evaluations[0] += 1
        return forward(self, x, t, y, level)

    def seconds_of(call, device):
        before = evaluations[0]
        call()
        return float(evaluations[0] - before)

    monkeypatch.setattr(PyramidalPatchDiT, "forward", counted)
    monkeypatch.setattr(timing, "WARMUP", 0)
    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    monkeypatch.setattr(timing, "peak_flops", lambda precision, device: (1e10, "as the test says"))


def test_evaluations_are_those_of_the_guided_solver():
    """Four Heun steps are eight evaluations of twice the batch; a network that watches them confirms it."""
    bench = sampling.SamplingBench(("PPF-T-3",), 2, 1, False, CPU, "fp32", 1e10, steps=4, trained=None)
    model = random_model("PPF-T-3", CPU, num_classes=5)
    run = sampling.Sampling(sampling.pipeline_of(model, bench, "fp32", compiled=False), bench)
    seen = []
    model.register_forward_pre_hook(
        lambda module, inputs, named: seen.append((named["level"], len(inputs[0]))), with_kwargs=True
    )
    assert run().shape == (2, 4, 32, 32)
    assert run.evaluations == [seen.count((level, 4)) for level in range(3)] == [4, 2, 2]
    assert run.macs == 4 * (4 * model.macs(0) + 2 * model.macs(1) + 2 * model.macs(2))
    seen.clear()
    run.evaluation(1)()
    assert seen == [(1, 4)]


@pytest.mark.slow
def test_the_tables_of_speed(capsys, a_second_for_each_evaluation):
    sampling.main(["--model", "ppf-t-2", "PPF-T-3", *SAMPLING, "--sections", "speed"])
    printed = capsys.readouterr().out
    found = tables(printed)
    models = {name: create_model(name) for name in ("SiT-T/2", "PPF-T-2", "PPF-T-3")}
    counts = {"SiT-T/2": [8], "PPF-T-2": [4, 4], "PPF-T-3": [4, 2, 2]}
    macs = {
        name: sum(count * model.macs(level) for level, count in enumerate(counts[name]))
        for name, model in models.items()
    }
    rows = {row["4 steps of heun2"]: row for row in found["4 steps of heun2"]}
    assert list(rows) == list(models)
    for name, row in rows.items():
        assert row["evaluations"] == "+".join(map(str, counts[name]))
        # Eight evaluations are eight seconds, together and one by one.
        assert (row["s/batch"], row["images/s"], row["SiT/time"]) == ("8.000", "0.25", "1.000")
        assert (row["sum s"], row["time/sum"]) == ("8.000", "1.000")
        assert float(row["SiT/GMACs"]) == pytest.approx(macs["SiT-T/2"] / macs[name], abs=6e-4)
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * 2 * 4 * macs[name] / 8 / 1e10, abs=0.06)
    assert "SiT-T/2: 1.000 times its evaluations (within 1.05)\n" in printed
    assert "PPF-T-2: 1.000 times its evaluations (within 1.05); 1.00x SiT (LESS THAN 1.6x)\n" in printed
    assert "PPF-T-3: 1.000 times its evaluations (within 1.05); 1.00x SiT (LESS THAN 2x)\n" in printed
    for row in found["level"]:
        name, level = row["level"].split()
        gmacs = models[name].macs(int(level)) / 1e9
        assert float(row["GMACs"]) == pytest.approx(gmacs, abs=6e-3)
        assert (row["ms/evaluation"], row["images/s"]) == ("1000.0", "2.00")
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * 2 * 4 * gmacs / 10, abs=0.06)
    assert len(found["level"]) == 6


def test_the_table_of_precisions(capsys, a_second_for_each_evaluation, monkeypatch, tmp_path):
    """Given weights: bf16 samples are near those in fp32, but not the same. tf32 is CUDA's alone."""
    compiled = []
    monkeypatch.setattr(pipeline, "compile_levels", lambda model, tell: compiled.append(model))
    random_model("PPF-T-2", CPU, num_classes=5).save_pretrained(tmp_path)
    sampling.main([*SAMPLING, "--sections", "precision", "--ckpt", str(tmp_path), "--compile"])
    ((title, (fp32, bf16)),) = tables(capsys.readouterr().out).items()
    assert title == "--ckpt, 4 steps of heun2"
    assert (fp32[title], fp32["RMS difference"], bf16[title], bf16["faster"]) == ("fp32", "0.00e+00", "bf16", "1.000")
    assert [model.num_classes for model in compiled] == [5, 5]
    assert 0 < float(bf16["of RMS"].rstrip("%")) < 5


def test_the_table_of_compilation_and_the_profile(capsys, a_second_for_each_evaluation, monkeypatch):
    compiled = []
    monkeypatch.setattr(pipeline, "compile_levels", lambda model, tell: compiled.append(model))
    sampling.main(["--model", "PPF-T-2", *SAMPLING, "--sections", "compile", "profile"])
    printed = capsys.readouterr().out
    rows = tables(printed)["PPF-T-2, level"]
    expected = [("0", "eager"), ("1", "eager"), ("0", "compiled"), ("1", "compiled")]
    assert [(row["PPF-T-2, level"], row["way"]) for row in rows] == expected
    assert len(compiled) == 1
    assert "PPF-T-2, sampling: 2 calls" in printed
    assert "aten::addmm" in printed


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--ckpt", "nowhere.pt"], "nowhere.pt"),
        (["--steps", "0"], "0 is not at least 1"),
        (["--model", "PPF-T-2", "--steps", "1", "--sections", "precision"], "1 step(s)"),
    ],
)
def test_bad_flags_are_answered_in_one_line(refuses, a_second_for_each_evaluation, flags, what):
    assert what in refuses(sampling.main, "--device", "cpu", "--batch-size", "1", *flags)
