"""experts.py: networks that share time, trained together or alone, are levels like any others."""

from __future__ import annotations

import copy
import json
import re
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from closed_form import DATA, Network
from conftest import TINY, start_script
from published import TINY as SMALL
from published import inputs, same_weights, tiny
from test_train import assert_same_state, checkpoint, losses

import sample
import sample_ddp
import sweep
from experts import ExpertPatchDiT, OneExpertAtATime, create_expert
from models import PyramidalPatchDiT
from pipeline import Pipeline
from runtime import parallel
from runtime.rng import sample_generators
from train import build_network, train
from transport import (
    NOISE_TO_DATA_METHODS,
    ODE,
    ODE_METHODS,
    SDE,
    SDE_METHODS,
    Guidance,
    Sampler,
    create_transport,
    expert_parts,
)
from weights.pretrained import convert, initialize_from, load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

EDGE = 0.3333
RUN = [
    *TINY,
    "--model",
    "SiT-T/2",
    "--expert-edges",
    str(EDGE),
    "--sample-every",
    "0",
    "--log-every",
    "1",
    "--global-batch-size",
    "8",
]


def random_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No weight stays zero, no gate closed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval()


def two_experts(**fields: object) -> ExpertPatchDiT:
    """An expert with one patch size, and one with two."""
    configs = [{**SMALL, "patch_sizes": sizes, **fields} for sizes in ([4], [4, 2])]
    return random_weights(ExpertPatchDiT(configs, [EDGE]))


# -- Levels --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_levels_are_those_of_the_experts_one_after_the_other() -> None:
    model = two_experts()
    assert (model.num_levels, model.fixed_edges) == (3, {1: EDGE})
    assert [model.num_tokens(level) for level in range(3)] == [16, 16, 64]
    assert model.num_parameters == sum(expert.num_parameters for expert in model.experts)
    x, t, y = inputs()
    alone = [model.experts[0](x, t, y, 0), model.experts[1](x, t, y, 0), model.experts[1](x, t, y, 1)]
    for level, expected in enumerate(alone):
        assert torch.equal(model(x, t, y, level), expected)
    order = [2, 0, 1]  # and one of them is empty
    groups = [[value[:0] if level == 0 else value for level in order] for value in (x, t, y)]
    for level, out in zip(order, model(*groups, order), strict=True):
        torch.testing.assert_close(out, alone[level][: len(out)] if level else x[:0], atol=1e-5, rtol=1e-5)
    for level in (-1, 3):
        with pytest.raises(ValueError, match="out of range: the model has 3"):
            model(x, t, y, level)
    with pytest.raises(ValueError, match="3 levels, but 2"):
        model([x, x], [t, t], [y, y], [0, 1, 2])


def test_costs_and_parameters_of_a_level_are_its_experts() -> None:
    model = two_experts()
    first, second = model.experts
    assert [model.macs(level) for level in range(3)] == [first.macs(0), second.macs(0), second.macs(1)]
    own = [{id(parameter) for parameter in model.level_parameters(level)} for level in range(3)]
    assert own[0] == {id(parameter) for parameter in first.parameters()}  # no other level uses them
    assert own[1] == {id(parameter) for parameter in second.level_parameters(0)}
    model.activation_checkpointing = True
    assert model.activation_checkpointing
    assert all(expert.activation_checkpointing for expert in model.experts)


@pytest.mark.parametrize(
    ("edges", "fields", "message"),
    [
        ([], [{}], "0 expert edge"),
        ([0.5], [{}], "1 expert edge"),
        ([0.5, 0.5], [{}, {}, {}], "ascend"),
        ([1.5], [{}, {}], "ascend"),
        ([0.5], [{}, {"in_channels": 3}], "in_channels"),
        ([0.5], [{}, {"num_classes": 3}], "num_classes"),
        ([0.5], [{}, {"input_size": 8}], "input_size"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(edges: list, fields: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPatchDiT([{**SMALL, **each} for each in fields], edges)


# -- Equal experts are one network ---------------------------------------------------------------------------------


def test_equal_experts_are_one_network_bit_for_bit() -> None:
    network = tiny(1, input_size=8)
    experts = ExpertPatchDiT([copy.deepcopy(network) for _ in range(3)], [0.3, 0.7])
    one = SameAtAllLevels(network, 3)
    process = create_transport(level_edges=(0.3, 0.7))
    x1 = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    labels = [0, 1, 2, 3, 4, 0]
    terms = [
        process.training_losses(each, x1, torch.tensor(labels), torch.Generator().manual_seed(1))
        for each in (experts, one)
    ]
    assert torch.equal(terms[0]["loss"], terms[1]["loss"])
    pipes = [Pipeline(experts, process), Pipeline(one, process)]
    for solver, guidance in product(
        (ODE("ab2", 6), ODE("dpmpp_2m", (2, 1, 2)), ODE("dopri5", atol=1e-2, rtol=1e-2), SDE(num_steps=6)),
        (Guidance(1.0), Guidance((1.0, 2.0, 1.5), interval=(0.2, 0.9))),
    ):
        counted = [pipe.counted() for pipe in pipes]
        found = [pipe.latents(labels, solver, guidance, seed=3) for pipe in counted]
        assert torch.equal(*found)
        assert counted[0].model.rows == counted[1].model.rows
    assert torch.equal(*(pipe.log_prob(x1, labels, ODE("heun2", 6)) for pipe in pipes))
    assert torch.equal(*(pipe.noise(x1, labels, ODE("ab2", 6)) for pipe in pipes))
    steps = ODE("euler", 10)  # which meet the edges: then no levels are needed
    whole = Pipeline(network, create_transport()).latents(labels, steps, seed=3)
    torch.testing.assert_close(pipes[0].latents(labels, steps, seed=3), whole, atol=1e-5, rtol=1e-5)


class SameAtAllLevels(torch.nn.Module):
    """A network of one level that serves several."""

    def __init__(self, network: PyramidalPatchDiT, num_levels: int) -> None:
        super().__init__()
        self.network, self.num_levels = network, num_levels
        self.num_classes, self.in_channels, self.input_size = network.num_classes, 4, network.input_size

    def forward(self, x, t, y, level=0):
        return self.network(x, t, y)


def test_experts_of_a_pyramid_start_as_the_pyramid(tmp_path: Path) -> None:
    """An expert has other levels than the pyramid, but its tokens sit where they did."""
    pyramid = tiny(3)
    convert_saved(pyramid, tmp_path / "pyramid.pt")
    parts = [create_expert("PPF-T-3", patches, **{**SMALL, "mlp_ratio": 4}) for patches in (range(2), range(1, 3))]
    model = ExpertPatchDiT(parts, [0.6]).eval()
    assert initialize_from(model, tmp_path / "pyramid.pt") == []
    x, t, y = inputs()
    with torch.no_grad():
        for level, origin in enumerate((0, 1, 1, 2)):
            torch.testing.assert_close(model(x, t, y, level), pyramid(x, t, y, origin), atol=1e-5, rtol=1e-5)
    single = create_expert("PPF-T-3", range(1), **SMALL)  # its level's row is in the class table now
    initialize_from(single, tmp_path / "pyramid.pt")
    with torch.no_grad():
        torch.testing.assert_close(single(x, t, y, 0), pyramid(x, t, y, 0), atol=1e-5, rtol=1e-5)


def convert_saved(model: torch.nn.Module, path: Path, **transport: object) -> Path:
    """A file of weights with their config."""
    config = {"model_name": "x", "model": model.config, "transport": transport, "vae": "none"}
    torch.save({"ema": model.state_dict(), "config": config, "step": 3}, path)
    return path


def test_experts_are_divided_further_from_the_one_that_served_the_time(tmp_path: Path) -> None:
    source = random_weights(ExpertPatchDiT([{**SMALL, "patch_sizes": [2]}] * 2, [0.5]))
    file = convert_saved(source, tmp_path / "two.pt", level_edges=[0.5])
    model = ExpertPatchDiT([{**SMALL, "patch_sizes": [2]}] * 4, [0.25, 0.5, 0.75])
    initialize_from(model, file)
    for expert, origin in zip(model.experts, (0, 0, 1, 1), strict=True):
        assert same_weights(expert.state_dict(), source.experts[origin].state_dict())
    alone = PyramidalPatchDiT(**{**SMALL, "patch_sizes": [2]})
    initialize_from(alone, file, interval=(0.75, 1.0))
    assert same_weights(alone.state_dict(), source.experts[1].state_dict())
    with pytest.raises(ValueError, match="2 experts, which do not become one network"):
        initialize_from(alone, file)


# -- Each within its interval --------------------------------------------------------------------------------------


class Blind(Network):
    """The exact networks for Gaussian data: experts that see nothing outside of their closed interval."""

    def __init__(self, path: str, prediction: str, edges: tuple[float, ...]) -> None:
        super().__init__(DATA, path, prediction, len(edges) + 1)
        self.edges = (0.0, *edges, 1.0)

    def __call__(self, x, t, y=None, level=0):
        bounds = torch.tensor(self.edges[level : level + 2], dtype=torch.float64).to(t.dtype)
        outside = (t < bounds[0]) | (t > bounds[1])
        return super().__call__(x, t, y, level).masked_fill(outside[:, None], float("nan"))


EDGES = (0.1, 1 / 3, 0.7)
PROCESSES = [("Linear", "velocity"), ("GVP", "noise"), ("VP", "data")]


def poisoned(path: str, prediction: str) -> tuple[Sampler, Blind, torch.Tensor]:
    noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    return Sampler(create_transport(path, prediction, level_edges=EDGES)), Blind(path, prediction, EDGES), noise


@pytest.mark.parametrize(("path", "prediction"), PROCESSES)
@pytest.mark.parametrize("method", ODE_METHODS)
def test_no_solver_asks_an_expert_outside_its_interval(method: str, path: str, prediction: str) -> None:
    sampler, network, x0 = poisoned(path, prediction)
    found = [sampler.sample_ode(network, x0, method, num_steps=9)]
    if method not in NOISE_TO_DATA_METHODS:
        found.append(sampler.sample_ode(network, x0, method, num_steps=9, reverse=True))
    assert all(x.isfinite().all() for x in found)
    assert {level for _, _, level, _ in network.calls} == {0, 1, 2, 3}


@pytest.mark.parametrize(("path", "prediction"), PROCESSES)
@pytest.mark.parametrize("last_step", [None, "Mean", "Tweedie", "Euler"])
@pytest.mark.parametrize("method", SDE_METHODS)
def test_no_sde_asks_an_expert_outside_its_interval(method: str, last_step: str, path: str, prediction: str) -> None:
    sampler, network, x0 = poisoned(path, prediction)
    generator = torch.Generator().manual_seed(1)
    x1 = sampler.sample_sde(network, x0, method, num_steps=12, last_step=last_step, generator=generator)
    assert x1.isfinite().all()


@pytest.mark.parametrize(("path", "prediction"), PROCESSES)
def test_neither_likelihood_nor_training_asks_an_expert_outside_its_interval(path: str, prediction: str) -> None:
    sampler, network, x = poisoned(path, prediction)
    for method in ("heun2", "dopri5"):
        log_prob, x0 = sampler.log_likelihood(network, x, method=method, num_steps=9)
        assert log_prob.isfinite().all()
        assert x0.isfinite().all()
    process, generator = sampler.transport, torch.Generator().manual_seed(2)
    for n in (1, 5, 64):
        data = torch.randn(n, 5, generator=generator)
        assert process.training_losses(network, data, generator=generator)["loss"].isfinite().all()
    on_edges = torch.tensor([edge for edge in EDGES for _ in range(2)])
    assert process.training_losses(network, data[:6], t=on_edges)["loss"].isfinite().all()


# -- Training together and alone -----------------------------------------------------------------------------------


def test_an_expert_alone_has_the_gradient_that_it_has_beside_others() -> None:
    model = two_experts(input_size=8)
    together = create_transport(level_edges=(EDGE, 0.5))
    alone = [
        create_transport(interval=(0.0, EDGE)),
        create_transport(level_edges=(0.5,), interval=(EDGE, 1.0)),
    ]
    x1, y = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
    for number, (expert, process) in enumerate(zip(model.experts, alone, strict=True)):
        t = process.sample_times(8, torch.Generator().manual_seed(number))
        low, high = process.interval
        assert ((t > low) & (t <= torch.tensor(high))).all()
        gradients = []
        for network, transport in ((model, together), (expert, process)):
            model.zero_grad()
            loss = parallel.LossModule(network, transport)(x1, y, t, x1.flip(0))["loss"].mean()
            loss.backward()
            gradients.append([parameter.grad for parameter in expert.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_loss_of_all_is_that_of_each_by_its_share_of_the_times() -> None:
    shape = {"time_sampling": "logit-normal", "time_params": (0.3, 1.0)}
    together = create_transport(level_edges=EDGES, **shape)
    shares = together.level_probabilities()
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def mean_loss(**settings: object) -> float:
        """Of a loss t^2, by as many times as there are strata."""
        process = create_transport(**shape, **settings)
        return process.sample_times(len(u), torch.Generator().manual_seed(0)).double().square().mean().item()

    parts = [mean_loss(interval=interval) for interval in pairwise((0.0, *EDGES, 1.0))]
    assert sum(share * part for share, part in zip(shares, parts, strict=True)) == pytest.approx(mean_loss(), rel=1e-5)


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts trained together, with a checkpoint after 3 of 6 steps."""
    run_dir = tmp_path_factory.mktemp("experts") / "joint"
    train([*RUN, "--max-steps", "6", "--ckpt-every", "3", "--run-dir", str(run_dir)])
    return run_dir


@pytest.fixture(scope="module")
def alone_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same two, trained alone."""
    folder = tmp_path_factory.mktemp("experts")
    for expert in ("0", "1"):
        train([*RUN, "--max-steps", "3", "--expert", expert, "--run-dir", str(folder / expert)])
    return [folder / "0", folder / "1"]


def test_files_of_experts_keep_their_predictions(tmp_path: Path) -> None:
    files = []
    for number, (sizes, prediction, interval) in enumerate(
        (([2], "data", [0.0, EDGE]), ([4, 2], "data velocity", [EDGE, 1.0]))
    ):
        model = random_weights(PyramidalPatchDiT(**{**SMALL, "patch_sizes": sizes}))
        process = {"level_edges": [0.6] * number, "interval": interval, "prediction": prediction}
        files.append(convert_saved(model, tmp_path / f"{number}.pt", **process))
    pipe = Pipeline.load(files)
    assert pipe.transport.predictions == ("data", "data", "velocity")
    assert pipe.transport.sample_interval == (0.0, 1.0)  # neither is singular at its own end
    assert samples(pipe).isfinite().all()


def test_a_run_of_experts_is_continued_bit_by_bit(joint_run: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", str(joint_run / "checkpoints" / "0000003.pt"), "--max-steps", "6", "--log-every", "1"]
    train([*flags, "--run-dir", str(tmp_path)])
    for part in ("model", "ema", "opt"):
        assert_same_state(checkpoint(tmp_path, 6)[part], checkpoint(joint_run, 6)[part])
    assert losses(tmp_path) == losses(joint_run)[3:]
    config = checkpoint(joint_run, 6)["config"]
    assert config["transport"]["level_edges"] == config["model"]["expert_edges"] == [EDGE]
    record = json.loads((joint_run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"loss_level_0", "loss_level_1"} <= set(record)


def test_an_expert_starts_with_the_same_weights_alone_and_beside_others() -> None:
    fields = {"input_size": (8, 8), "in_channels": 1, "num_classes": 10}
    parts = expert_parts((0.5,), (EDGE,))
    model = build_network("PPF-T-2", parts, 3, **fields)
    for part, expert in zip(parts, model.experts, strict=True):
        assert same_weights(build_network("PPF-T-2", [part], 3, **fields).state_dict(), expert.state_dict())


def test_experts_of_a_pyramid_train_and_show_samples(tmp_path: Path) -> None:
    flags = [*TINY, "--global-batch-size", "8", "--expert-snr", "0.25", "--max-steps", "1", "--log-every", "1"]
    for name, way in {"plain": "", "bf16": "--precision bf16 --sample-every 0"}.items():
        train([*flags, *way.split(), "--run-dir", str(tmp_path / name)])
    config = checkpoint(tmp_path / "plain", 1)["config"]
    assert [expert["patch_sizes"] for expert in config["model"]["experts"]] == [[[4, 4]], [[4, 4], [2, 2]]]
    assert config["model"]["experts"][0]["unit_patch"] == [2, 2]
    assert config["transport"]["level_edges"] == [pytest.approx(1 / 3), 0.5]
    assert (tmp_path / "plain" / "samples" / "0000001.png").exists()
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_blocks_that_are_computed_again_have_the_same_gradients() -> None:
    model, process = two_experts(input_size=8), create_transport(level_edges=(EDGE, 0.5))
    x1, y, t = torch.randn(4, 4, 8, 8), torch.arange(4), torch.tensor([0.1, 0.4, 0.6, 0.2])
    gradients = []
    for again in (False, True):
        model.zero_grad()
        model.activation_checkpointing = again
        parallel.LossModule(model, process)(x1, y, t, x1.flip(0))["loss"].mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_processes_with_whole_and_with_divided_weights_follow_one(joint_run: Path, tmp_path: Path) -> None:
    """A batch of 4 in two processes: some have no sample of one of the experts."""
    flags = [*RUN, "--global-batch-size", "4", "--max-steps", "6"]
    train([*flags, "--run-dir", str(tmp_path / "one")])
    for name, more in {"two": [], "divided": ["--shard"]}.items():
        done = start_script("train.py", *flags, *more, "--run-dir", tmp_path / name, processes=2)
        if "--shard on CPUs takes a newer torch" in done.stderr:
            pytest.skip(f"FSDP2 does not work on the CPU in torch {torch.__version__}")
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
        for part in ("model", "ema"):
            found, expected = (checkpoint(tmp_path / run, 6)[part] for run in (name, "one"))
            for tensor, value in found.items():
                torch.testing.assert_close(value, expected[tensor], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_experts_have_the_same_losses(joint_run: Path, tmp_path: Path) -> None:
    train([*RUN, "--max-steps", "3", "--compile", "--run-dir", str(tmp_path)])
    assert losses(tmp_path) == pytest.approx(losses(joint_run)[:3], rel=1e-5)


# -- One file, several files, one expert at a time ------------------------------------------------------------------


def samples(pipe: Pipeline, **how: object) -> torch.Tensor:
    generators = sample_generators(0, range(3), 1)
    return pipe.latents([1, 2, 3], ODE(num_steps=6), Guidance(1.5), generators=generators, **how)


def test_files_of_experts_are_the_file_of_all_bit_for_bit(joint_run: Path, tmp_path: Path) -> None:
    joint = Pipeline.load(joint_run)
    config = checkpoint(joint_run, 6)["config"]
    files = []
    for number, (expert, interval) in enumerate(zip(joint.model.experts, ((0, EDGE), (EDGE, 1)), strict=True)):
        process = {**config["transport"], "level_edges": [], "interval": list(interval)}
        files.append(convert_saved(expert, tmp_path / f"{number}.pt", **process))
    parts = Pipeline.load(list(reversed(files)))  # in any order
    assert (joint.name, parts.name) == ("SiT-T/2", "x")  # --model of the run, and what the files call it
    assert parts.model.config == joint.model.config
    assert same_weights(parts.model.state_dict(), joint.model.state_dict())
    assert parts.transport.schedule == joint.transport.schedule
    assert torch.equal(samples(parts), samples(joint))
    for suffix in (".pt", ".safetensors"):
        file = tmp_path / f"all{suffix}"
        convert(files, file, "ours")
        again = Pipeline.load(file)
        assert same_weights(again.model.state_dict(), joint.model.state_dict())
        assert torch.equal(samples(again), samples(joint))


def test_the_step_of_every_expert_is_told(joint_run: Path, tmp_path: Path) -> None:
    joint = Pipeline.load(joint_run)
    config = checkpoint(joint_run, 6)["config"]
    assert (joint.trained, joint.file_name) == ("step 6", "SiT-T-2-0000006")

    def joined(*steps: int) -> Pipeline:
        files = []
        for number, interval in enumerate(((0, EDGE), (EDGE, 1))):
            process = {**config["transport"], "level_edges": [], "interval": list(interval)}
            files.append(convert_saved(joint.model.experts[number], tmp_path / f"{number}.pt", **process))
            torch.save({**torch.load(files[-1]), "step": steps[number]}, files[-1])
        return Pipeline.load(files)

    same, others = joined(40, 40), joined(50, 40)
    assert (same.step, same.trained, same.file_name) == (40, "step 40", "x-0000040")
    assert (others.step, others.trained, others.file_name) == (40, "steps 50 + 40", "x-0000050+0000040")


def test_the_commands_sample_from_several_files(alone_runs: list[Path], tmp_path: Path, capsys) -> None:
    files = [str(path) for path in alone_runs]
    flags = ["ODE", "--ckpt", *files, "--num-sampling-steps", "4"]
    sample.main([*flags, "--class-labels", "1", "--out", str(tmp_path / "a.png")])
    assert "\n2 experts, 2 level(s) " in capsys.readouterr().out
    sample.main([*flags, "--class-labels", "1", "--offload-experts", "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    sample_ddp.main([*flags, "--num-fid-samples", "2", "--offload-experts", "--sample-dir", str(tmp_path)])
    assert "cfg-1-seed" in next(tmp_path.glob("*.npz")).name  # nothing is known about guiding experts
    capsys.readouterr()
    sample_ddp.main([*flags, "--num-fid-samples", "2", "--sample-dir", str(tmp_path)])  # the same samples
    assert "0 of 2 samples to make" in capsys.readouterr().out


def test_one_expert_at_a_time_makes_the_same_samples_with_few_moves(joint_run: Path) -> None:
    plain, offloaded = Pipeline.load(joint_run).to("cpu"), Pipeline.load(joint_run).to("cpu", offload_experts=True)
    expected = samples(plain)
    assert torch.equal(samples(offloaded), expected)
    assert offloaded.offloaded.moves == 1  # of two experts, the first one was there
    assert torch.equal(samples(offloaded), expected)
    assert offloaded.offloaded.moves == 3
    assert torch.equal(
        offloaded.log_prob(expected, [1, 2, 3], ODE("heun2", 4)), plain.log_prob(expected, [1, 2, 3], ODE("heun2", 4))
    )
    assert offloaded.offloaded.moves == 4  # from the data's end
    with pytest.raises(ValueError, match="offloaded already"):
        offloaded.to("cpu")


def test_an_expert_that_does_not_compute_has_no_copy_on_the_device() -> None:
    model = two_experts().requires_grad_(False)

    def places(expert: PyramidalPatchDiT) -> list[int]:
        return [tensor.data_ptr() for tensor in (*expert.parameters(), *expert.buffers())]

    host, before = [places(expert) for expert in model.experts], copy.deepcopy(model.state_dict())
    kept = OneExpertAtATime(model, torch.device("cpu"))
    for turn in (1, 0, 1):
        kept.bring(model.experts[turn])
        for number, expert in enumerate(model.experts):
            copied = [now != then for now, then in zip(places(expert), host[number], strict=True)]
            assert copied == [number == turn] * len(copied)
    assert same_weights(model.state_dict(), before)


@pytest.mark.gpu
def test_one_expert_at_a_time_halves_the_memory_of_a_gpu() -> None:
    model = random_weights(ExpertPatchDiT([{**SMALL, "depth": 8, "hidden_size": 512, "patch_sizes": [2]}] * 2, [EDGE]))
    process, expected, held = create_transport(level_edges=[EDGE]), None, []
    for offload in (False, True):
        pipe = Pipeline(copy.deepcopy(model), process).to("cuda", "fp32", offload_experts=offload)
        x1 = samples(pipe)
        held.append(torch.cuda.memory_allocated())
        torch.testing.assert_close(x1, x1 if expected is None else expected)
        expected = x1
        del pipe
    assert held[1] < 0.6 * held[0]


def test_experts_in_bf16_are_close(joint_run: Path) -> None:
    half = Pipeline.load(joint_run).to("cpu", "bf16")
    assert {block.mlp.fc1.weight.dtype for block in half.model.blocks} == {torch.bfloat16}
    torch.testing.assert_close(samples(half), samples(Pipeline.load(joint_run)), atol=0.1, rtol=0.1)


# -- Hub -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_folder_restores_the_experts(tmp_path: Path) -> None:
    model = two_experts()
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == model.config
    again = ExpertPatchDiT.from_pretrained(tmp_path / "a")
    assert (again.config, same_weights(again.state_dict(), model.state_dict())) == (model.config, True)
    transport = {"level_edges": [EDGE, 0.5]}
    model.save_pretrained(tmp_path / "b", config={**model.config, "transport": transport, "vae": "none"})
    pipe = Pipeline.load(tmp_path / "b")
    assert same_weights(pipe.model.state_dict(), model.state_dict())
    assert pipe.transport.schedule.level_edges == (EDGE, 0.5)


@torch.no_grad()
def test_the_card_of_experts_has_code_that_runs(tmp_path: Path) -> None:
    model = ExpertPatchDiT([{**SMALL, "patch_sizes": [4]}] * 2, [EDGE])
    model.save_pretrained(tmp_path / "a", model_card_kwargs={"repo_id": "someone/model"})
    card = (tmp_path / "a" / "README.md").read_text()
    for text in ("license: mit", "- arxiv:2207.04316", "# someone/model", "2 experts, t in [0, 0.3333]"):
        assert text in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names = {}
    exec(snippet.replace("someone/model", str(tmp_path / "a")).replace("num_steps=50", "num_steps=2"), names)
    assert names["x1"].shape == (1, 4, 16, 16)


# -- Bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--expert-edges 0.5 0.4", "expert edges must ascend"),
        ("--expert-edges 1.5", "expert edges must ascend"),
        ("--expert-edges 0.5001", "nothing is left to train"),
        ("--expert-edges 0.3 --expert-snr 0.25", "give one of them"),
        ("--expert-edges 0.3 --expert 2", "there is no --expert 2: 1 edge(s) make experts 0 to 1"),
        ("--expert 0", "give --expert-edges or --expert-snr"),
        ("--expert-edges 0.3 --expert 0 --sample-every 5", "takes all experts: leave it out"),
        ("--expert-edges 0.3 --expert 0 --eval-every 5 --eval-ref digits", "takes all experts: leave it out"),
        ("--expert-edges 0.001 --expert 0 --prediction noise", "leaves nothing of the expert's interval"),
        ("--path-type VP --expert-snr 1e-9", "expert edges must ascend"),
        ("--expert-snr 0.25 0.1", "--expert-snr 0.25 0.1 is t = 0.333333 0.240253 on the Linear path"),
        ("--expert-snr 1e-30", "has next to nothing to learn"),
        (
            "--expert-edges 0.3 --expert 0 --time-sampling logit-normal --time-params 4 0.1",
            "logit-normal times fall into [0, 0.3] with probability",
        ),
    ],
)
def test_training_refuses_experts_that_cannot_be(flags: str, message: str, tmp_path: Path, refuses) -> None:
    line = refuses(train, "--data-path", "digits", "--model", "PPF-T-2", *flags.split(), "--run-dir", tmp_path / "run")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_continued_run_keeps_its_experts(joint_run: Path, alone_runs: list[Path], refuses) -> None:
    assert "--expert-edges is [0.3333]" in refuses(train, "--run-dir", joint_run, "--expert-edges", "0.4")
    assert "--expert is None" in refuses(train, "--run-dir", joint_run, "--expert", "1")
    assert "takes all experts" in refuses(train, "--run-dir", alone_runs[0], "--sample-every", "2")


def test_sampling_refuses_what_experts_do_not_serve(
    joint_run: Path, alone_runs: list[Path], tiny_run: Path, tmp_path: Path, refuses
) -> None:
    first, second = alone_runs
    out = ["--out", tmp_path / "a.png"]
    for files, flags, message in (
        ([second], [], "an expert for t in [0.3333, 1] alone"),
        ([second, second], [], "nothing serves t in [0.0, 0.3333]"),
        ([first, first, second], [], "two experts serve t in [0.0, 0.3333]"),
        ([first, first], [], "two experts serve"),
        ([first, joint_run], [], "no expert that was trained alone"),
        ([joint_run], ["--compare-finest"], "no level of"),
        ([joint_run], ["--level-edges", "0.4"], "move 0.3333, at which another expert takes over"),
        ([joint_run], ["--level-edges", "0.3333", "0.5"], "give 1 level edge(s)"),
        ([tiny_run], ["--offload-experts"], "no experts that could be offloaded"),
    ):
        assert message in refuses(sample.main, "ODE", "--ckpt", *files, *flags, *out)
    line = refuses(
        sweep.main, "digits", "--ckpt", joint_run, "--features", "digits", "--edges", "0.4", "--out", tmp_path
    )
    assert "another expert takes over" in line
    assert list(tmp_path.iterdir()) == []


def test_the_layouts_of_others_take_no_experts(joint_run: Path, alone_runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the sit layout has no experts"):
        convert(joint_run, tmp_path / "a.pt", "sit")
    with pytest.raises(ValueError, match="an expert for a part of time"):
        convert(alone_runs[0], tmp_path / "a.pt", "sit")
    convert(alone_runs[0], tmp_path / "a.pt", "ours")
    assert load_pretrained(tmp_path / "a.pt").transport["interval"] == [0.0, EDGE]


@pytest.mark.parametrize(
    ("network", "process", "more", "message"),
    [
        ({}, {"path_type": "GVP"}, {}, "path_type is Linear in"),
        ({}, {"sample_eps": 0.01}, {}, "sample_eps is None in"),
        ({}, {"aug_dim": 32.0}, {}, "aug_dim is None in"),
        ({"num_classes": 7}, {}, {}, "num_classes is 5 in"),
        ({"in_channels": 3}, {}, {}, "in_channels is 4 in"),
        ({"input_size": 8}, {}, {}, r"input_size is \(16, 16\) in"),
        ({}, {}, {"vae": "a/vae"}, "autoencoder is none in"),
        ({}, {}, {"scaling": {"shift": [0.0], "scale": [2.0]}}, "scaling of the latents is None in"),
    ],
)
def test_experts_of_different_processes_are_no_pair(
    network: dict, process: dict, more: dict, message: str, tmp_path: Path
) -> None:
    files = []
    for number, interval in enumerate(([0.0, EDGE], [EDGE, 1.0])):
        other = (
            {"network": network, "process": process, "more": more}
            if number
            else {"network": {}, "process": {}, "more": {}}
        )
        model = PyramidalPatchDiT(**{**SMALL, "depth": 1, "patch_sizes": [2], **other["network"]})
        transport = {
            "level_edges": [],
            "interval": interval,
            "loss_weight": ["velocity", None][number],
            **other["process"],
        }
        config = {"model": model.config, "transport": transport, "vae": "none", **other["more"]}
        files.append(tmp_path / f"{number}.pt")
        torch.save({"ema": model.state_dict(), "config": config, "step": 1}, files[-1])
    with pytest.raises(ValueError, match=message):
        load_pretrained(files)
