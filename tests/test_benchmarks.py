"""Levels at equal tokens, and what all benchmarks share."""

import pytest
import torch

from benchmarks import levels, timing
from models import create_model


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The printed rows of each model, by column."""
    found = {}
    for block in text.strip().split("\n\n")[1:]:
        name, header, *lines = block.splitlines()
        found[name] = [dict(zip(header.split(), line.split(), strict=True)) for line in lines]
    return found


@pytest.mark.parametrize(("flags", "factor"), [((), 1), (("--backward",), 3)])
def test_the_table_has_a_row_for_each_level(capsys, flags, factor):
    levels.main(["--model", "ppflow_t_2", "PPF-T-3", "--tokens", "256", "--repeats", "1", "--device", "cpu", *flags])
    printed = capsys.readouterr().out
    assert "256 tokens per call" in printed.splitlines()[0]
    assert ("backward" in printed.splitlines()[0]) == (factor == 3)
    found = tables(printed)
    expected = {"PPF-T-2": [("4x4", 64), ("2x2", 256)], "PPF-T-3": [("4x4", 64), ("2x4", 128), ("2x2", 256)]}
    assert set(found) == set(expected)
    for name, rows in found.items():
        model = create_model(name)
        assert [row["level"] for row in rows] == [str(level) for level in range(model.num_levels)]
        assert [(row["patch"], int(row["tokens"])) for row in rows] == expected[name]
        for level, row in enumerate(rows):
            assert int(row["batch"]) * int(row["tokens"]) == 256
            # GMACs are of what was run; the other columns follow from them and the time.
            macs = factor * model.macs(level) / 1e9
            assert float(row["GMACs/sample"]) == pytest.approx(macs, abs=6e-4)
            seconds = float(row["ms/call"]) / 1e3
            assert float(row["GMACs/s"]) == pytest.approx(int(row["batch"]) * macs / seconds, rel=0.05)
            finest = float(rows[-1]["GMACs/s"])
            assert float(row["ratio"]) == pytest.approx(float(row["GMACs/s"]) / finest, rel=0.05)


def test_levels_take_turns_and_the_median_counts(monkeypatch):
    """A fake clock: the second of three repeats is slow, for all levels."""
    evaluated, durations = [], iter([1.0, 2.0, 30.0, 40.0, 1.5, 2.5])

    def evaluation(model, level, batch, precision, backward):
        return lambda: evaluated.append(level)

    def seconds_of(call, device):
        call()
        return next(durations)

    monkeypatch.setattr(levels, "evaluation", evaluation)
    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    model = create_model("PPF-T-2")
    rows = levels.measure(model, 512, repeats=3, device=None, precision="fp32", backward=False)
    assert evaluated[: 2 * timing.WARMUP] == [0, 1] * timing.WARMUP
    assert evaluated[2 * timing.WARMUP :] == [0, 1, 1, 0, 0, 1]
    assert [row.seconds for row in rows] == [1.5, 2.5]
    assert [row.macs for row in rows] == [8 * model.macs(0), 2 * model.macs(1)]


REFUSED = [
    (["--model", "PPF-T-3", "--tokens", "320"], "--tokens 320", "multiple of 256"),
    (["--model", "PPF-T-9"], "unknown model 'PPF-T-9'", "PPF-T-3"),
    (["--device", "abacus"], "--device abacus", "cannot be used"),
    (["--tokens", "0"], "--tokens", "0 is not at least 1"),
    (["--precision", "fp7"], "--precision", "fp7"),
    (["--repeat", "3"], "unrecognized", "--repeat"),
]


@pytest.mark.parametrize(("flags", "what", "advice"), REFUSED)
def test_bad_flags_are_answered_in_one_line(refuses, flags, what, advice):
    line = refuses(levels.main, *flags)
    assert what in line
    assert advice in line


# -- Shared --------------------------------------------------------------------------------------------------------


def test_the_baseline_is_the_sit_of_the_same_size():
    assert [timing.baseline(name) for name in ("PPF-B-2", "PPF-XL-3", "SiT-S/8")] == ["SiT-B/2", "SiT-XL/2", "SiT-S/2"]


def test_the_peak_is_given_or_the_data_sheets_or_measured(monkeypatch):
    cpu = torch.device("cpu")
    assert timing.peak_flops(5.0, "fp32", cpu)[0] == 5e12
    monkeypatch.setattr(timing, "PEAK_REPEATS", 2)
    monkeypatch.setattr(timing, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert timing.peak_flops(None, "bf16", cpu) == (989e12, "dense bf16, data sheet")
    products, seconds = [], iter([0.75, 0.5] * timing.PEAK_REPEATS)

    def seconds_of(call, device):
        products.append(call().shape)
        return next(seconds)

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    peak, source = timing.peak_flops(None, "fp32", cpu)
    rows, columns = products[0]
    assert peak == 2 * rows * columns * rows / 0.5
    assert f"{rows}x{columns} matrices in fp32" in source
