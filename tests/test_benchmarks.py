"""The parts that all benchmarks share: clocks, rates, and how tables are printed and read back."""

import re

import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Printed tables by the first column's title, as rows by column; lines of other lengths are left out."""
    found = {}
    for block in text.strip().split("\n\n")[1:]:
        columns, *rows = (re.split(r"\s{2,}", line) for line in block.splitlines())
        found[columns[0]] = [dict(zip(columns, row, strict=True)) for row in rows if len(row) == len(columns)]
    return found


def test_calls_take_turns_and_the_median_counts(monkeypatch):
    """A fake clock: the first call of each compiles, and the second of three repeats is slow for all."""
    called, durations = [], iter([9.0, 8.0, 1.0, 1.0, 1.0, 2.0, 40.0, 30.0, 1.5, 2.5])

    def seconds_of(call, device):
        call()
        return next(durations)

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = timing.time_in_turns(calls, repeats=3, device=CPU)
    assert "".join(called) == "abbaabbaab"
    assert seconds == {"a": (9.0, 1.5), "b": (8.0, 2.5)}


def test_the_baseline_is_the_sit_of_the_same_size():
    assert [timing.baseline(name) for name in ("PPF-B-2", "PPF-XL-3", "SiT-S/8")] == ["SiT-B/2", "SiT-XL/2", "SiT-S/2"]
    assert [timing.baseline(name) for name in ("PPF-B-3/16", "SiT-L/32")] == ["SiT-B/16", "SiT-L/32"]


def test_the_peak_is_the_data_sheets_or_measured(monkeypatch):
    monkeypatch.setattr(timing, "PEAK_REPEATS", 2)
    for card, peak in {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12}.items():
        monkeypatch.setattr(timing, "device_name", lambda device, card=card: card)
        assert timing.peak_flops("bf16", CPU) == (peak, "dense bf16, data sheet")
    products, seconds = [], iter([0.75, 0.5])

    def seconds_of(call, device):
        products.append(call().shape)
        return next(seconds)

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    peak, source = timing.peak_flops("fp32", CPU)
    rows, columns = products[0]
    assert peak == 2 * rows * columns * rows / 0.5
    assert f"{rows}x{columns} matrices in fp32" in source


def test_rates_by_hand():
    """Ten samples of a billion multiply-accumulates in half a second, on a device of 0.1 TFLOP/s."""
    bench = timing.Bench((), 10, 1, False, CPU, "fp32", peak=1e11)
    assert bench.rates(10e9, 10, 0.5) == ("20.00", "0.040", "40.0%")


def test_a_profile_is_printed_on_request_only():
    parser = timing.build_parser("x", "", ["speed", "profile"])
    assert parser.parse_args([]).sections == ["speed"]
    assert parser.parse_args(["--sections", "profile"]).sections == ["profile"]


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--model", "PPF-T-9"], "unknown model 'PPF-T-9'"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--repeats", "0"], "0 is not at least 1"),
        (["--precision", "fp7"], "fp7"),
        (["--sections", "all"], "--sections"),
        (["--repeat", "3"], "unrecognized arguments: --repeat"),
    ],
)
def test_bad_flags_are_answered_in_one_line(refuses, flags, what):
    parser = timing.build_parser("x", "", ["speed"])
    assert what in refuses(lambda argv: timing.open_bench(parser.parse_args(argv)), *flags)
