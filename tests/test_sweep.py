"""sweep.py: distances by hand, work that is shared and never repeated, commands that draw what was measured."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import start_script
from PIL import Image

import sample_ddp
import train_utils
from data.datasets import Digits
from metrics.search import Setting
from models import create_model
from pipeline import Pipeline
from runtime.rng import label_of
from sweep import main
from transport import ODE, Guidance

# Two scales at the coarse level and three at the fine one, on images of few pixels.
FLAGS = ["--features", "pixels", "--scales", 1, 2, "--scales", 1, 2, 3, "--intervals", "none", "--steps", 4]
FLAGS += ["--num-samples", 12, "--full-num-samples", 20, "--best", 1, "--per-proc-batch-size", 5]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the reference are kept elsewhere than the user's."""
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Samples that were walked over each level."""
    walked, latents = Counter(), Pipeline.latents

    def counted(self: Pipeline, labels: list[int], *values: object, levels: range | None = None, **more: object):
        if levels is not None:
            walked[levels.start] += len(labels)
        return latents(self, labels, *values, levels=levels, **more)

    monkeypatch.setattr(Pipeline, "latents", counted)
    return walked


def sweep(run: Path, out: Path, *more: object) -> None:
    main([str(flag) for flag in ("digits", "--ckpt", run, "--out", out, *FLAGS, *more)])


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """The squared Frechet distance of rows a and b, from the eigenvalues of the product of their covariances."""
    (mean_a, cov_a), (mean_b, cov_b) = ((rows.mean(0), np.cov(rows, rowvar=False)) for rows in (a, b))
    roots = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).astype(complex)).real.sum()
    return float(((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * roots)


def test_a_distance_is_that_of_samples_drawn_in_one_go(tiny_run: Path, tmp_path: Path) -> None:
    sweep(tiny_run, tmp_path, "--intervals", "0.7,0.9", "--num-samples", 20, "--best", 0)
    found = next(record for record in records(tmp_path) if record["setting"]["interval"])
    setting, pipe = found["setting"], Pipeline.load(tiny_run)
    labels = [label_of(index, 10, 0, "random") for index in range(20)]
    guidance = Guidance(tuple(setting["scales"]), interval=tuple(setting["interval"]))
    images = pipe.images(labels, ODE(setting["solver"], setting["steps"]), guidance, seed=0)
    pixels = [(x * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1 for x in (images, Digits().images)]
    rows = [x.expand(-1, 3, -1, -1).flatten(1).double().numpy() for x in pixels]
    assert found["distance"] == pytest.approx(by_hand(*rows), rel=1e-4)
    cost = pipe.check(ODE(setting["solver"], setting["steps"]), guidance)
    assert (found["nfe"], found["gmacs"]) == (cost.nfe(1), cost.gmacs(1))


def test_coarse_levels_are_walked_once_for_all_fine_settings(tiny_run: Path, tmp_path: Path, walks: Counter) -> None:
    sweep(tiny_run, tmp_path, "--best", 0)
    settings = [Setting.from_dict(record["setting"]) for record in records(tmp_path)]
    assert len(settings) >= 2 + 3 - 1
    assert walks[1] == 12 * len(settings)
    assert walks[0] == 12 * len({setting.scales[0] for setting in settings}) == 12 * 2


@pytest.mark.slow
def test_a_finished_sweep_draws_nothing_again(tiny_run: Path, tmp_path: Path, walks: Counter, capsys) -> None:
    sweep(tiny_run, tmp_path)
    assert [record["num"] for record in records(tmp_path)][-2:] == [12, 20]
    before, shown = (tmp_path / "results.jsonl").read_text(), capsys.readouterr().out
    walks.clear()
    sweep(tiny_run, tmp_path)
    assert not walks
    assert (tmp_path / "results.jsonl").read_text() == before
    last = shown.splitlines()[-1]
    assert last == capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "table.md").read_text() in shown
    assert Image.open(tmp_path / "pareto.png").width > 500
    assert not (tmp_path / "states").exists()
    sweep(tiny_run, tmp_path, "--label-sampling", "balanced", "--best", 0)  # other labels are another matter
    assert walks


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tiny_run: Path, tmp_path: Path, walks: Counter, monkeypatch) -> None:
    sweep(tiny_run, tmp_path / "whole")
    whole, latents = dict(walks), Pipeline.latents
    walks.clear()

    def killed(self: Pipeline, *values: object, **more: object) -> torch.Tensor:
        if walks[1] == 29:  # in the third setting
            raise KeyboardInterrupt
        return latents(self, *values, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "latents", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(tiny_run, tmp_path / "killed")
    assert len(records(tmp_path / "killed")) == 2
    sweep(tiny_run, tmp_path / "killed")
    assert walks[0] == whole[0]  # no state was solved for twice
    assert walks[1] == whole[1] + 5  # the first batch of the third setting
    found, expected = (
        [{**record, "seconds": 0} for record in records(tmp_path / name)] for name in ("killed", "whole")
    )
    assert found == expected


def test_a_setting_that_diverges_is_the_last(tiny_run: Path, tmp_path: Path, monkeypatch) -> None:
    latents = Pipeline.latents

    def diverging(self: Pipeline, labels: list[int], solver: ODE, guidance: Guidance, *values: object, **more: object):
        if guidance.scales[0] == 2 and more.get("levels") is not None:
            raise FloatingPointError("the samples are not finite")
        return latents(self, labels, solver, guidance, *values, **more)

    monkeypatch.setattr(Pipeline, "latents", diverging)
    sweep(tiny_run, tmp_path)
    distances = {tuple(record["setting"]["scales"]): record["distance"] for record in records(tmp_path)}
    assert {scales[0] for scales, distance in distances.items() if distance is None} == {2}
    assert "inf" in (tmp_path / "table.md").read_text().splitlines()[-1]


def test_the_command_draws_with_the_best_setting(tiny_run: Path, tmp_path: Path, capsys) -> None:
    more = ["--edges", 0.4, "--solvers", "euler", "--steps", "3,4", "--intervals", "0.2,0.9", "--cfg-channels", 1]
    sweep(tiny_run, tmp_path, *more, "--precision", "bf16", "--best", 2)
    line = capsys.readouterr().out.splitlines()[-1]
    records_ = [record for record in records(tmp_path) if record["num"] == 20]
    assert len(records_) == 2
    best = Setting.from_dict(min(records_, key=lambda record: record["distance"])["setting"])
    program, script, *flags = shlex.split(line)
    assert (program, script) == ("python", "sample_ddp.py")
    args = sample_ddp.build_parser().parse_args(flags)
    assert train_utils.solver_from(args) == ODE("euler", (3, 4))
    assert train_utils.guidance_from(args) == Guidance(best.scales, 1, best.interval)
    assert (args.level_edges, args.precision, args.num_fid_samples, args.global_seed) == ([0.4], "bf16", 20, 1)


def test_three_levels(tmp_path: Path, walks: Counter) -> None:
    torch.manual_seed(0)
    create_model("PPF-T-3", input_size=8, in_channels=1, num_classes=10).save_pretrained(tmp_path / "weights")
    sweep(tmp_path / "weights", tmp_path, "--scales", 1, 4, "--best", 0)
    settings = [Setting.from_dict(record["setting"]) for record in records(tmp_path)]
    assert settings[0].scales == (1.0, 3.0, 4.0)  # nearest to those of PPFlow's evaluation
    assert [walks[level] for level in range(3)] == [
        12 * len({setting.scales[: level + 1] for setting in settings}) for level in range(3)
    ]


@pytest.mark.slow
def test_two_processes_measure_the_same(tiny_run: Path, tmp_path: Path) -> None:
    sweep(tiny_run, tmp_path / "one")
    flags = ["digits", "--ckpt", tiny_run, "--out", tmp_path / "two", *FLAGS]
    done = start_script("sweep.py", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (records(tmp_path / name) for name in ("one", "two"))
    assert [record["setting"] for record in one] == [record["setting"] for record in two]
    assert [record["distance"] for record in one] == pytest.approx([record["distance"] for record in two], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--scales", 1, "--scales", 2, "--scales", 3], "--scales is given"),
        (["--scales", -1], "-1 is not at least 0"),
        (["--edges", "0.5,0.7"], "the model has 2 level(s) but the schedule 3"),
        (["--steps", 1], "1 step(s) cannot cover 2 interval(s)"),
        (["--intervals", "0.6"], "0.6 is neither LOW,HIGH nor none"),
        (["--solvers", "dopri5"], "invalid choice: 'dopri5'"),
        (["--features", "nothing"], "--features nothing is unknown"),
        (["--num-samples", 1], "1 is not at least 2"),
        (["--dino", "weights.pt"], "--dino has no effect with --features pixels"),
        (["--cfg-channels", 4], "guidance of 4 channels"),
        (["--level-edges", 0.4], "--level-edges"),
    ],
)
def test_bad_flags_are_refused_before_the_work(
    flags: list[object], words: str, tiny_run: Path, tmp_path: Path, refuses, walks: Counter
) -> None:
    assert words in refuses(main, "digits", "--ckpt", tiny_run, "--out", tmp_path / "none", *FLAGS[:2], *flags)
    assert not (tmp_path / "none").exists()
    assert not walks


def test_references_that_do_not_fit_are_refused(tiny_run: Path, tmp_path: Path, refuses) -> None:
    flags = ["--ckpt", tiny_run, "--out", tmp_path / "none", *FLAGS]
    assert "does not exist" in refuses(main, tmp_path / "no.npz", *flags)
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((3, 9, 10, 3), np.uint8))
    line = refuses(main, tmp_path / "large.npz", *flags)
    assert "large.npz holds images of 9x10, and the samples are 8x8" in line
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert "statistics" in refuses(main, tmp_path / "statistics.npz", *flags)
    assert not (tmp_path / "none").exists()
    assert "cannot be written" in refuses(main, "digits", "--ckpt", tiny_run, *FLAGS, "--out", "/dev/null/sweep")
