"""Training steps that are timed are train.py's, packed rows compute the same losses, and tables belong to the model."""

import gc

import pytest
import torch
from test_benchmarks import tables

from benchmarks import steps, timing, training
from benchmarks.memory import in_fresh_process, kept_for_backward, resident
from benchmarks.packing import DenseMaskPacking
from benchmarks.padding import PaddedRows
from benchmarks.steps import Step
from benchmarks.timing import Bench, random_model
from models import MODELS, create_model
from transport import PatchSchedule, create_transport

CPU = torch.device("cpu")
TINY = {"num_classes": 5}
BENCH = Bench((), batch=4, repeats=1, compiled=False, device=CPU, precision="fp32", peak=1e10)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """The tiny models with 2 blocks."""
    for name in ("SiT-T/2", "PPF-T-2", "PPF-T-3", "PPFiT-T-2", "PPFiT-T-3"):
        monkeypatch.setitem(MODELS[name], "depth", 2)


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """Kept tensors are looked for among Python's objects: those of all modules loaded so far would take a second."""
    gc.freeze()
    yield
    gc.unfreeze()


# -- Packed rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SiT-T/2", "PPF-T-2", "PPF-T-3"])
@pytest.mark.parametrize("samples", [8, 5])
def test_packed_rows_compute_the_same_losses_and_gradients(name, samples):
    """With 5 samples the rows of coarse levels are not full."""
    model = random_model(name, CPU, **TINY).double()
    transport = create_transport(level_edges=PatchSchedule.default(model.num_levels).level_edges)
    x1, x0 = torch.randn(2, samples, 4, 32, 32, dtype=torch.float64)
    batch = {
        "y": torch.arange(samples) % 6,
        "t": (torch.arange(samples, dtype=torch.float64) + 0.5) / samples,
        "x0": x0,
    }
    ours = transport.training_losses(model, x1, **batch)["loss"]
    packed = transport.training_losses(DenseMaskPacking(model), x1, **batch, joint=True)["loss"]
    torch.testing.assert_close(packed, ours, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(ours.sum(), parameters, materialize_grads=True)
    found = torch.autograd.grad(packed.sum(), parameters, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_packed_rows_are_of_equal_length_and_masked():
    """Four samples of 64 tokens in a row, each of which sees itself alone; a fine sample is a row."""
    packing = DenseMaskPacking(create_model("PPF-T-2", **TINY))
    place, counts = packing._layout([torch.zeros(5, 64, 1), torch.zeros(2, 256, 1)])
    assert counts == [2, 2]
    assert place[:, ::64].tolist() == [[0, 1, 2, 3], [4, -1, -1, -1], [5, 5, 5, 5], [6, 6, 6, 6]]


# -- Padded rows ---------------------------------------------------------------------------------------------------


def mixed_batch(step: Step, dtype: torch.dtype) -> dict:
    _, x1, x0, y, t = step.draw([(8, 8), (4, 12), (12, 4), (8, 4), (8, 8), (4, 4)])
    return {"x1": [x.to(dtype) for x in x1], "x0": [x.to(dtype) for x in x0], "y": y % 6, "t": t.to(dtype)}


@pytest.mark.parametrize("name", ["PPFiT-T-2", "PPFiT-T-3"])
def test_padded_rows_compute_the_same_losses_and_gradients(name):
    """Every group of sizes and levels by itself, against rows of one length and a mask."""
    step = Step(name, BENCH)
    batch = mixed_batch(step, torch.float64)
    model = random_model(name, CPU, **TINY).double()
    ours = step.transport.training_losses(model, **batch)["loss"]
    padded = step.transport.training_losses(PaddedRows(model), **batch, joint=True)["loss"]
    torch.testing.assert_close(padded, ours, rtol=1e-12, atol=0)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(ours.sum(), parameters, materialize_grads=True)
    found = torch.autograd.grad(padded.sum(), parameters, materialize_grads=True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_padded_rows_predict_what_the_model_predicts_in_single_precision():
    model = random_model("PPFiT-T-3", CPU, **TINY)
    sizes, levels = [(8, 8), (4, 12), (12, 4), (8, 8)], [0, 1, 2, 2]
    x = [torch.randn(2, 4, *size) for size in sizes]
    t, y = torch.rand(4, 2).unbind(), [torch.tensor([0, 5])] * 4
    with torch.no_grad():
        expected, found = model(x, t, y, levels), PaddedRows(model)(x, t, y, levels)
    for ours, padded, noisy in zip(expected, found, x, strict=True):
        assert padded.shape == noisy.shape
        torch.testing.assert_close(padded, ours, rtol=1e-5, atol=1e-5)


def test_images_have_the_sizes_of_training():
    """Most of 256 tokens of 16x16 pixels in 4:3, 3:2 and squares; the order is mixed, and comes again."""
    found = training.image_sizes(32)
    assert set(found) == {(28, 36), (24, 40), (36, 28), (40, 24), (32, 32)}
    assert found[:16] == found[16:]
    assert all(height * width <= 4 * 256 for height, width in found)


# -- Memory --------------------------------------------------------------------------------------------------------


def test_kept_storages_count_once_and_parameters_not():
    weight = torch.nn.Parameter(torch.randn(100, 100))
    x = torch.randn(10, 100, requires_grad=True)

    def call():
        hidden = x @ weight  # keeps x, the caller's, and the weight
        return hidden * hidden.exp(), hidden[:5].sin()  # keeps hidden once, of three uses, and its exponential

    _, kept = kept_for_backward(call, [weight])
    results = (10 * 100 + 5 * 100) * 4  # which this test holds
    assert kept - results == 2 * 10 * 100 * 4


@pytest.mark.slow
def test_a_fresh_process_does_not_know_this_ones_memory():
    ballast = torch.ones(200 * 2**20 // 4)
    here = resident("VmHWM")
    assert here > ballast.nbytes
    assert in_fresh_process(resident, "VmHWM") < here - ballast.nbytes // 2


# -- A step --------------------------------------------------------------------------------------------------------


def test_a_step_is_an_optimizer_step_of_the_loss():
    step = Step("PPF-T-2", BENCH, "separate")
    before = [parameter.detach().clone() for parameter in step.model.parameters()]
    average = [parameter.clone() for parameter in step.ema.parameters()]
    reference = random_model("PPF-T-2", CPU)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-4)
    _, x1, x0, y, t = step.batch
    terms = step.transport.training_losses(reference, x1, y=y, t=t, x0=x0)
    terms["loss"].mean().backward()
    optimizer.step()
    step()
    for parameter, ema, expected, old, old_ema in zip(
        step.model.parameters(), step.ema.parameters(), reference.parameters(), before, average, strict=True
    ):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ema, 0.9999 * old_ema + 1e-4 * parameter)
        assert torch.equal(old, old_ema)
    assert step.samples == [2, 2]
    assert step.macs == 3 * 2 * (reference.macs(0) + reference.macs(1))


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_batch_of_one_level(level):
    step = Step("PPF-T-3", BENCH)
    assert step.change(level=level).samples == [4 * (other == level) for other in range(3)]
    assert step.change().samples == [2, 1, 1]


# -- Tables --------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_second(monkeypatch):
    """Every call runs once and takes a second, on a device of 0.01 TFLOP/s."""

    def seconds_of(call, device):
        call()
        return 1.0

    monkeypatch.setattr(timing, "WARMUP", 0)
    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    monkeypatch.setattr(timing, "peak_flops", lambda precision, device: (1e10, "as the test says"))
    monkeypatch.setattr(steps, "in_fresh_process", lambda call, *arguments: call(*arguments))


TRAINING = ["--batch-size", "4", "--repeats", "1", "--device", "cpu"]


@pytest.mark.slow
def test_the_tables_of_a_step(capsys, one_second):
    training.main(["--model", "PPF-T-2", "ppf-t-3", *TRAINING, "--sections", "ratio", "levels", "passes"])
    printed = capsys.readouterr().out
    found = tables(printed)
    models = {name: create_model(name) for name in ("SiT-T/2", "PPF-T-2", "PPF-T-3")}
    shares = {"SiT-T/2": [1], "PPF-T-2": [0.5, 0.5], "PPF-T-3": [0.5, 0.25, 0.25]}
    macs = {
        name: sum(share * model.macs(level) for level, share in enumerate(shares[name]))
        for name, model in models.items()
    }
    ratio = found["step of a mixed batch"]
    assert [row["step of a mixed batch"] for row in ratio] == list(models)
    for row, name in zip(ratio, models, strict=True):
        assert float(row["GMACs"]) == pytest.approx(macs[name] / 1e9, abs=6e-3)
        assert (row["ms/step"], row["images/s"], row["time/SiT"]) == ("1000.0", "4.00", "1.000")
        assert float(row["TFLOP/s"]) == pytest.approx(2 * 3 * 4 * macs[name] / 1e12, abs=6e-4)
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * 24 * macs[name] / 1e10, abs=0.06)
        assert float(row["GMACs/SiT"]) == pytest.approx(macs[name] / macs["SiT-T/2"], abs=6e-4)
        assert float(row["time/GMACs"]) == pytest.approx(macs["SiT-T/2"] / macs[name], abs=6e-4)
    assert "\nMORE THAN 1.05 times the GMACs' ratio: at most " in printed
    for name in ("PPF-T-2", "PPF-T-3"):
        for level, row in enumerate(found[f"{name}, level"]):
            assert int(row["tokens"]) == models[name].num_tokens(level)
            assert float(row["GMACs"]) == pytest.approx(models[name].macs(level) / 1e9, abs=6e-3)
        assert level == models[name].num_levels - 1
    separate, joint, packed = (int(row["activations MB"]) for row in found["PPF-T-3, 2+1+1 samples"])
    assert separate <= joint < packed


@pytest.mark.slow
def test_the_table_of_many_sizes(capsys, one_second):
    flags = ["--batch-size", "6", "--repeats", "1", "--device", "cpu", "--sections", "sizes"]
    training.main(["--model", "PPFiT-T-2", *flags])
    printed = capsys.readouterr().out
    finest, squares, mixed, padded = tables(printed)["PPFiT-T-2, a step of"]
    model, transport = create_model("PPFiT-T-2"), create_transport(level_edges=(0.5,))
    levels = transport.schedule.level_at(transport.sample_times(6, torch.Generator().manual_seed(0))).tolist()
    pairs = list(zip(levels, training.image_sizes(6), strict=True))
    tokens, macs = (sum(count(*pair) for pair in pairs) for count in (model.num_tokens, model.macs))
    number = round(tokens / 256)
    assert (int(finest["samples"]), int(finest["tokens"])) == (number, 256 * number)
    assert (int(squares["groups"]), int(mixed["groups"])) == (2, len(set(pairs)))
    assert int(mixed["tokens"]) == int(padded["tokens"]) == tokens
    assert float(mixed["GMACs"]) == pytest.approx(3 * macs / 1e9, abs=0.06)
    ratio = number * model.macs(1) / macs  # all take a second
    assert float(mixed["time/GMACs"]) == pytest.approx(ratio, abs=1e-3)
    assert f"times what the GMACs cost in squares: {ratio:.3f}; padded rows take 1.00 times as long" in printed


def test_sections_refuse_models_of_another_kind(refuses, one_second):
    flags = ["--device", "cpu", "--batch-size", "1", "--sections"]
    assert "PPF-T-2 knows one alone" in refuses(training.main, "--model", "PPF-T-2", *flags, "sizes")
    assert "no model of a single level to compare PPFiT-T-2" in refuses(
        training.main, "--model", "PPFiT-T-2", *flags, "ratio"
    )


def test_the_parts_of_a_step(capsys, one_second):
    training.main(["--model", "PPF-T-2", *TRAINING, "--sections", "parts"])
    printed = capsys.readouterr().out
    rows = {row["PPF-T-2, part of a step"]: row for row in tables(printed)["PPF-T-2, part of a step"]}
    first, *_ = rows
    assert first == "forward and backward"
    assert len(rows) == 8
    # Seven parts of a second each, of which the log counts a hundredth.
    assert float(rows["all"]["ms"]) == pytest.approx(6010)
    assert f"besides forward and backward: {5.01 / 6.01:.2%}, MORE THAN 0.05" in printed


def test_the_memory_of_models_and_variants(capsys, one_second, monkeypatch):
    compiled = []
    monkeypatch.setattr(steps, "compile_levels", compiled.append)
    training.main(["--model", "PPF-T-2", *TRAINING, "--sections", "memory", "variants", "--compile"])
    found = tables(capsys.readouterr().out)
    memory = {(row["memory of a step"], row["way"]): int(row["activations MB"]) for row in found["memory of a step"]}
    assert list(memory) == [("SiT-T/2", "separate"), *(("PPF-T-2", way) for way in ("separate", "joint", "packed"))]
    assert memory["PPF-T-2", "separate"] <= memory["PPF-T-2", "joint"] < memory["SiT-T/2", "separate"]
    assert memory["SiT-T/2", "separate"] <= memory["PPF-T-2", "packed"]
    kinds = {row["PPF-T-2, variant"]: int(row["activations MB"]) for row in found["PPF-T-2, variant"]}
    assert list(kinds) == ["eager", "eager, checkpointing", "compiled", "compiled, checkpointing"]
    assert kinds["eager"] == memory["PPF-T-2", "joint"] > 5 * kinds["eager, checkpointing"]
    assert len(compiled) == 3  # the step, and the memory of each compiled variant


def test_a_profile_names_operators(capsys, one_second):
    training.main(["--model", "PPF-T-2", *TRAINING, "--sections", "profile"])
    printed = capsys.readouterr().out
    assert "PPF-T-2, training step: 2 calls" in printed
    assert "aten::addmm" in printed
