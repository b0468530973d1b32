"""weights/diffusers: the pipeline of diffusers, here and in folders that bring their own code."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils
from small_autoencoders import save_kl

import download
from data.autoencoder import PixelSpace, Scaling, load_autoencoder
from experts import ExpertPatchDiT
from models import create_model
from pipeline import Pipeline
from transport import ODE, Guidance, LevelErrors, create_transport
from weights.diffusers import PPFlowPipeline
from weights.diffusers.export import class_names, export, model_card, pipeline_of

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = [3, 0, 4]
SCALES = (1.0, 1.5, 2.0)
CODE = ("pipeline.py", "scheduler/pyramid_scheduler.py", "transformer/pyramid_transformer.py")
NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "cock", 4: "hen"}
LIBRARIES = {"torch", "numpy", "diffusers", "huggingface_hub", "tqdm", "scipy", "torchdiffeq"}


def random_weights(model: torch.nn.Module) -> torch.nn.Module:
    """The model with no weight at zero, for sampling."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def door(pipe: Pipeline, **options) -> PPFlowPipeline:
    """A Pipeline as diffusers has it, without a progress bar."""
    pipeline = pipeline_of(pipe.model, pipe.transport, pipe.autoencoder, level_errors=pipe.level_errors, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators(seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 * seed + number) for number in range(3)]


@pytest.fixture(scope="module")
def pixels() -> Pipeline:
    """Three levels with random weights on 8x8 pixels."""
    model = random_weights(create_model("PPF-T-3", depth=2, input_size=8, in_channels=1, num_classes=5))
    return Pipeline(model, create_transport(level_edges=(0.5, 0.75)), PixelSpace(), name="PPF-T-3")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Rotary positions, two levels that predict different things, a heavy tail and a scaling of each channel."""
    model = random_weights(create_model("PPFiT-T-2", depth=2, input_size=8, in_channels=4, num_classes=5))
    scaling = Scaling((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))
    autoencoder = load_autoencoder(str(save_kl(tmp_path_factory.mktemp("vae")))).with_scaling(scaling)
    transport = create_transport("GVP", prediction="data velocity", level_edges=(0.4,), aug_dim=64.0)
    return Pipeline(model, transport, autoencoder, name="PPFiT-T-2")


@pytest.fixture(scope="module")
def experts() -> Pipeline:
    """Two experts, the second with two patch sizes."""
    fields = {"depth": 1, "input_size": 8, "in_channels": 1, "num_classes": 5}
    parts = [create_model("SiT-T/2", **fields), create_model("PPF-T-2", **fields)]
    model = random_weights(ExpertPatchDiT(parts, (0.3,)))
    return Pipeline(model, create_transport(level_edges=(0.3, 0.7)), PixelSpace(), name="SiT-T/2+PPF-T-2")


@pytest.fixture(scope="module")
def elastic(pixels: Pipeline) -> Pipeline:
    """The three levels, as if they had been trained with elastic ones: coarse errors grow over time."""
    tenths = torch.arange(10.0) / 10
    sums = torch.stack([1 + 0.5 * tenths**2, 1 + 0.2 * tenths**3, torch.ones(10)])
    errors = LevelErrors(sums.tolist(), torch.ones(3, 10).tolist())
    transport = create_transport(level_edges=(0.5, 0.75), elastic=0.5)
    return Pipeline(pixels.model, transport, PixelSpace(), name="elastic", level_errors=errors)


@pytest.fixture(scope="module")
def elastic_experts(experts: Pipeline, elastic: Pipeline) -> Pipeline:
    """Two experts, of whose second the levels are elastic."""
    transport = create_transport(level_edges=(0.3, 0.7), elastic=0.5, expert_levels=(1, 2))
    return Pipeline(experts.model, transport, PixelSpace(), name="experts", level_errors=elastic.level_errors)


@pytest.fixture(scope="module")
def folders(pixels: Pipeline, latents: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both, exported."""
    place = tmp_path_factory.mktemp("folders")
    for pipe in (pixels, latents):
        export(door(pipe, id2label=NAMES), place / pipe.name, pipe.name, 20)
    return {"pixels": place / pixels.name, "latents": place / latents.name}


@pytest.fixture(scope="module")
def elastic_folder(elastic: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network with elastic levels, exported."""
    folder = tmp_path_factory.mktemp("folders") / "elastic"
    export(door(elastic), folder, elastic.name)
    return folder


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the test's own for the code that diffusers copies and imports."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "modules"
    for name in [name for name in sys.modules if name.split(".")[0] == "diffusers_modules"]:
        del sys.modules[name]


# -- Images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edges", "steps", "scales", "interval"),
    [(None, 9, SCALES, None), ((0.2, 0.9), (2, 3, 4), 3.0, None), (None, 9, SCALES, (0.6, 0.9))],
)
def test_samples_are_those_of_a_pipeline(pixels: Pipeline, edges, steps, scales, interval) -> None:
    other = Pipeline(pixels.model, create_transport(level_edges=edges or (0.5, 0.75)), PixelSpace())
    expected = other.images(LABELS, ODE(num_steps=steps), Guidance(scales, interval=interval), generators())
    call = {"level_edges": edges, "guidance_interval": interval, "generator": generators()}
    found = door(pixels)(LABELS, scales, steps, **call, output_type="pt").images
    assert torch.equal(found, (expected / 2 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("size", [None, (16, 8)])
def test_images_are_those_of_a_pipeline(latents: Pipeline, size) -> None:
    expected = latents.images(LABELS, ODE(num_steps=6), Guidance((1.0, 2.0)), generators(), size=size)
    height, width = size or (None, None)
    call = {"height": height, "width": width, "generator": generators()}
    pictures = door(latents)(LABELS, [1.0, 2.0], 6, **call).images
    found = door(latents)(LABELS, [1.0, 2.0], 6, **call | {"generator": generators()}, output_type="np").images
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert (found == expected).all()
    assert (pictures[0].mode, pictures[0].size) == ("RGB", expected.shape[2:0:-1])


def test_experts_are_one_network(experts: Pipeline) -> None:
    expected = experts.latents(LABELS, ODE(num_steps=6), Guidance(SCALES), generators())
    pipeline = door(experts)
    assert torch.equal(pipeline(LABELS, SCALES, 6, generator=generators(), output_type="latent").images, expected)
    with pytest.raises(ValueError, match=r"move 0\.3, at which another expert takes over"):
        pipeline(LABELS, level_edges=(0.4, 0.7))


def test_euler_is_that_of_diffusers_scheduler(pixels: Pipeline) -> None:
    pipeline = door(pixels)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, method="euler")
    x0, y = torch.randn(3, 1, 8, 8, generator=generators()[0]), torch.tensor(LABELS)
    found = pipeline(LABELS, 1.0, (2, 1, 2), latents=x0, output_type="latent").images
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25, 0.125])  # 1 - t at the starts of the steps
    x = x0
    for sigma, timestep, level in zip(theirs.sigmas, theirs.timesteps, (0, 0, 1, 2, 2), strict=False):
        velocity = pixels.model(x, (1 - sigma).expand(3), y, level=level)
        x = theirs.step(-velocity, timestep, x).prev_sample
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)


def test_half_precision_is_that_of_a_pipeline(pixels: Pipeline, folders: dict[str, Path]) -> None:
    pipeline = PPFlowPipeline.from_pretrained(folders["pixels"], torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    kept = {name for name, weight in pipeline.transformer.named_parameters() if weight.dtype == torch.float32}
    assert kept == {name for name in kept if ".blocks." not in name}
    pipe = Pipeline(create_model("PPF-T-3", **pixels.model.config), pixels.transport, PixelSpace())
    pipe.model.load_state_dict(pixels.model.state_dict())
    expected = pipe.to("cpu", "bf16").latents(LABELS, ODE(num_steps=5), Guidance(2.0), generators())
    found = pipeline(LABELS, 2.0, 5, generator=generators(), output_type="latent").images
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    all_half = door(pipe).to(torch.bfloat16)(LABELS, 2.0, 5, generator=generators(), output_type="latent").images
    assert (all_half - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("name", "budget", "scales"),
    [("elastic", 0.4, 2.0), ("elastic", 0.6, SCALES), ("elastic", 1, 1.0), ("elastic_experts", 0.7, SCALES)],
)
def test_budgets_are_those_of_a_pipeline(name: str, budget: float, scales, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)
    solver, guidance = ODE("heun2", num_steps=9), Guidance(scales, interval=(0.1, 0.8))
    expected = pipe.images(LABELS, solver, guidance, generators(), budget=budget)
    pipeline = door(pipe)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, method="heun2")
    call = {"guidance_interval": (0.1, 0.8), "generator": generators(), "budget": budget}
    found = pipeline(LABELS, scales, 9, **call, output_type="pt").images
    assert torch.equal(found, (expected / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(found, pipeline(LABELS, scales, 9, **call | {"budget": None}, output_type="pt").images)


# -- As diffusers' own pipelines do it -------------------------------------------------------------------------------


def test_callbacks_see_each_step_and_may_change_it(pixels: Pipeline) -> None:
    pipeline, seen = door(pixels), []

    def callback(pipe, step: int, t: float, tensors: dict) -> dict:
        seen.append((step, t, tensors["latents"].clone()))
        return {"latents": torch.zeros_like(tensors["latents"])} if t == 0.75 else {}

    call = {"num_inference_steps": (2, 1, 2), "guidance_scale": 2.0, "output_type": "latent"}
    changed = pipeline(LABELS, **call, generator=generators(), callback_on_step_end=callback).images
    assert [(step, t) for step, t, _ in seen] == [(0, 0.25), (1, 0.5), (2, 0.75), (3, 0.875), (4, 1.0)]
    guided = ODE(num_steps=(2, 1, 2)), Guidance(2.0)
    edge = pixels.latents(LABELS, *guided, generators(), levels=range(0, 1))
    assert torch.equal(seen[1][2], edge)
    assert torch.equal(changed, seen[-1][2])
    zero = torch.zeros_like(edge)
    assert torch.equal(changed, pixels.latents(LABELS, *guided, x0=zero, levels=range(2, 3)))


def test_a_callback_may_stop_the_walk(pixels: Pipeline) -> None:
    class Stop(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs) -> dict:
            pipeline._interrupt = timestep == 0.5
            return callback_kwargs

    pipeline = door(pixels)
    call = {"generator": generators(), "output_type": "latent", "callback_on_step_end": Stop(cutoff_step_ratio=1.0)}
    found = pipeline(LABELS, 2.0, 8, **call).images
    assert pipeline.interrupt
    assert torch.equal(found, pixels.latents(LABELS, ODE(num_steps=8), Guidance(2.0), generators(), levels=range(0, 1)))
    assert not torch.equal(pipeline(LABELS, 2.0, 8, generator=generators(), output_type="latent").images, found)


def test_the_progress_bar_counts_steps(pixels: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = pipeline_of(pixels.model, pixels.transport, pixels.autoencoder)
    (images,) = pipeline(0, num_inference_steps=(2, 3, 4), return_dict=False)
    assert (images[0].mode, images[0].size, pipeline.num_timesteps) == ("L", (8, 8), 9)
    assert "9/9" in capsys.readouterr().err


def test_models_are_offloaded(latents: Pipeline) -> None:
    expected = door(latents)(LABELS, 2.0, 4, generator=generators(), output_type="np").images
    pipeline = door(latents)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert (pipeline(LABELS, 2.0, 4, generator=generators(), output_type="np").images == expected).all()


@pytest.mark.parametrize("name", ["pixels", "latents", "experts"])
def test_weights_are_used_inside_their_modules_alone(name: str, request: pytest.FixtureRequest) -> None:
    """Hooks of sequential offloading bring a module's weights when it is called; elsewhere they are on no device."""
    pipe = request.getfixturevalue(name)
    transformer = door(pipe).transformer
    x, t, y = torch.randn(2, *pipe.model.sample_shape), torch.rand(2), torch.tensor([0, 5])
    expected = [transformer(x, t, y, level) for level in range(transformer.num_levels)]
    hooks = []
    for module in transformer.modules():
        own = dict(module.named_parameters(recurse=False))
        absent = {key: torch.nn.Parameter(weight.to("meta"), requires_grad=False) for key, weight in own.items()}
        module._parameters.update(absent)
        bring = module.register_forward_pre_hook(lambda module, _, own=own: module._parameters.update(own))
        take = module.register_forward_hook(lambda module, *_, absent=absent: module._parameters.update(absent))
        hooks.append((module, own, bring, take))
    found = [transformer(x, t, y, level) for level in range(transformer.num_levels)]
    for module, own, bring, take in hooks:
        module._parameters.update(own)
        bring.remove()
        take.remove()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_classes_have_names(pixels: Pipeline) -> None:
    pipeline = door(pixels, id2label=NAMES)
    assert pipeline.labels == {"tench, Tinca tinca": 0, "tench": 0, "Tinca tinca": 0, "cock": 3, "hen": 4}
    assert pipeline.label_ids("cock") == [3]
    assert pipeline.label_ids(["hen", 2]) == [4, 2]
    assert pipeline.label_ids(torch.tensor([1, 5])) == [1, 5]
    ids = [3, 0]
    by_name, by_id = (
        pipeline(labels, 2.0, 3, generator=generators()[:2], output_type="latent").images
        for labels in (["cock", "tench"], ids)
    )
    assert torch.equal(by_name, by_id)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"class_labels": 6}, "between 0 and 4, got 6"),
        ({"class_labels": [0, -1]}, "got -1"),
        ({"class_labels": 1.0}, "got 1.0"),
        ({"class_labels": True}, "got True"),
        ({"class_labels": "cat"}, "'cat' is the name of no class, or of more than one: pipe.labels has the names, as "),
        ({"class_labels": "crane"}, "or of more than one"),
        ({"guidance_scale": (1.0, 2.0)}, r"2 guidance scale\(s\) for 3 level"),
        ({"guidance_scale": "4"}, "by numbers, one or several, got '4'"),
        ({"guidance_scale": torch.ones(3)}, "by numbers"),
        ({"guidance_interval": (0.5, 0.5)}, "interval .* is empty"),
        ({"num_inference_steps": 2}, "cannot cover 3 interval"),
        ({"num_inference_steps": (3, 3)}, "2 numbers of steps for 3 level"),
        ({"num_inference_steps": 2.5}, "whole numbers"),
        ({"level_edges": (0.5,)}, "the model has 3 level"),
        ({"level_edges": (0.8, 0.5)}, "must ascend"),
        ({"budget": 0.5}, "errors, by which a budget is met, are not in this pipeline: give level_edges instead"),
        ({"budget": 0.5, "level_edges": (0.3, 0.5)}, "give budget or level_edges, not both"),
        ({"budget": "0.5"}, "a budget is a number, got '0.5'"),
        ({"height": 8}, "both height and width"),
        ({"height": 16, "width": 16}, "knows 8x8 alone, not 16x16"),
        ({"generator": generators()}, "3 generators for a batch of 1"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"\(1, 1, 8, 8\) is needed"),
        ({"latents": torch.zeros(1, 1, 8, 8), "generator": generators()}, "leave the generator out"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"found \['noise'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(pixels: Pipeline, call: dict, words: str) -> None:
    pipeline = door(pixels, id2label=NAMES)
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=words):
        pipeline(**{"class_labels": 0, **call})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"budget": 0.01}, "a budget is a share of the finest level's arithmetic, here from"),
        ({"budget": 1.5}, r"to 1, got 1\.5"),
        ({"budget": float("nan")}, "to 1, got nan"),
        ({"budget": 0.5, "num_inference_steps": (3, 3, 3)}, "one number for all levels"),
        ({"budget": 0.5, "level_edges": (0.3, 0.5)}, "give budget or level_edges, not both"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused_before_the_work(elastic: Pipeline, call: dict, words: str) -> None:
    pipeline = door(elastic)
    pipeline.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=words):
        pipeline(0, **{"num_inference_steps": 9, **call})


def test_latents_need_an_autoencoder_to_be_pictures(latents: Pipeline) -> None:
    pipeline = pipeline_of(latents.model, latents.transport, PixelSpace())
    with pytest.raises(ValueError, match="4 channels and no vae make no picture"):
        pipeline(0)
    with pytest.raises(ValueError, match="unknown method 'dopri5'; choose one of euler"):
        pipeline.scheduler.from_config(pipeline.scheduler.config, method="dopri5")


# -- Folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pixels", "latents"])
def test_a_folder_is_loaded_here_without_its_code(name: str, folders, request, tmp_path: Path) -> None:
    shutil.copytree(folders[name], tmp_path / "a")
    for code in CODE:
        (tmp_path / "a" / code).write_text("raise RuntimeError('the code of the folder')")
    again = PPFlowPipeline.from_pretrained(tmp_path / "a")
    again.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = door(request.getfixturevalue(name))(LABELS, **call, generator=generators()).images
    assert (again(LABELS, **call, generator=generators()).images == expected).all()
    assert (again.id2label, again.transformer.training) == (NAMES, False)


def test_a_folder_brings_its_code(latents: Pipeline, folders, tmp_path: Path, modules_cache: Path) -> None:
    folder = folders["latents"]
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    parts = (pipeline, pipeline.transformer, pipeline.scheduler)
    assert all(type(part).__module__.startswith("diffusers_modules.local.") for part in parts)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = door(latents)(4, **call, generator=generators()[:1]).images
    assert (pipeline("hen", **call, generator=generators()[:1]).images == expected).all()
    pipeline.save_pretrained(tmp_path / "b")
    for code in CODE:
        assert (tmp_path / "b" / code).read_bytes() == (folder / code).read_bytes()
    indices = [json.loads((place / "model_index.json").read_text()) for place in (folder, tmp_path / "b")]
    assert {**indices[1], "_name_or_path": ""} == {**indices[0], "_name_or_path": ""}
    weights = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in latents.autoencoder.model.state_dict().items())


def test_the_code_of_a_folder_needs_libraries_alone(folders: dict[str, Path]) -> None:
    for code in CODE:
        file = folders["pixels"] / code
        tree = ast.parse(file.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in imported} - sys.stdlib_module_names - LIBRARIES
        assert dynamic_modules_utils.check_imports(file) == []  # what diffusers would look for beside it


class Hub:
    """Hands out the files of a folder as the hub's client does: those that are asked for, and no others."""

    def __init__(self, folder: Path, snapshot: Path) -> None:
        self.folder, self.snapshot = folder, snapshot
        self.names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def model_info(self, repo_id: str, **_) -> SimpleNamespace:
        return SimpleNamespace(sha="0" * 40, siblings=[SimpleNamespace(rfilename=name) for name in self.names])

    def hf_hub_download(self, repo_id: str, filename: str, subfolder: str | None = None, **_) -> str:
        file = self.snapshot / (subfolder or "") / filename
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / (subfolder or "") / filename, file)
        return str(file)

    def snapshot_download(self, repo_id: str, allow_patterns: list[str], ignore_patterns: list[str], **_) -> str:
        for name in self.names:
            if any(fnmatch(name, each) for each in allow_patterns) and not any(
                fnmatch(name, e) for e in ignore_patterns
            ):
                self.hf_hub_download(repo_id, name)
        return str(self.snapshot)


@pytest.mark.parametrize("kind", [DiffusionPipeline, PPFlowPipeline])
def test_the_hub_gives_what_a_folder_needs(
    kind, latents: Pipeline, folders, tmp_path: Path, modules_cache: Path, monkeypatch
) -> None:
    hub = Hub(folders["latents"], tmp_path / "snapshot")
    for module in (pipeline_utils, dynamic_modules_utils):
        for name in ("model_info", "hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(module, name, getattr(hub, name), raising=False)
    trust = {"trust_remote_code": True} if kind is DiffusionPipeline else {}
    pipeline = kind.from_pretrained("someone/model", **trust)
    pipeline.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "output_type": "np"}
    expected = door(latents)(4, **call, generator=generators()[:1]).images
    assert (pipeline("hen", **call, generator=generators()[:1]).images == expected).all()


def test_a_folder_is_a_source_of_weights(pixels: Pipeline, latents: Pipeline, folders: dict[str, Path]) -> None:
    for pipe, name in ((pixels, "pixels"), (latents, "latents")):
        again = Pipeline.load(folders[name])
        assert again.transport.schedule == pipe.transport.schedule
        solver = ODE(num_steps=3)
        assert torch.equal(again.images(LABELS, solver, seed=1), pipe.images(LABELS, solver, seed=1))


def test_a_folder_keeps_its_budgets(elastic: Pipeline, elastic_folder: Path, modules_cache: Path) -> None:
    expected = elastic.images(LABELS, ODE(num_steps=9), Guidance(2.0), generators(), budget=0.5)
    pipeline = DiffusionPipeline.from_pretrained(elastic_folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(LABELS, 2.0, 9, budget=0.5, generator=generators(), output_type="pt").images
    assert torch.equal(found, (expected / 2 + 0.5).clamp(0, 1))
    again = Pipeline.load(elastic_folder)
    assert (again.level_errors, again.transport.schedule) == (elastic.level_errors, elastic.transport.schedule)
    assert torch.equal(again.images(LABELS, ODE(num_steps=9), Guidance(2.0), generators(), budget=0.5), expected)


def test_a_folder_from_before_there_were_budgets_is_loaded(
    elastic: Pipeline, elastic_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(elastic_folder, tmp_path / "a")
    file = folder / "scheduler" / "scheduler_config.json"
    newer = ("elastic", "expert_levels", "level_errors")
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key not in newer}))
    expected = elastic.latents(LABELS, ODE(num_steps=6), Guidance(2.0), generators())
    pipeline = PPFlowPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(pipeline(LABELS, 2.0, 6, generator=generators(), output_type="latent").images, expected)
    with pytest.raises(ValueError, match="not in this pipeline"):
        pipeline(LABELS, budget=0.5)
    again = Pipeline.load(folder)
    assert again.level_errors is None
    assert torch.equal(again.latents(LABELS, ODE(num_steps=6), Guidance(2.0), generators()), expected)


FRESH = """
import json, sys, torch
from pathlib import Path
from diffusers import DiffusionPipeline
for folder, out, budget in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(number) for number in range(3)]
    images = pipe([3, 0, 4], 2.0, 6, budget=budget, generator=generators, output_type="pt").images
    torch.save(images, Path(out) / "images.pt")
    pipe.save_pretrained(Path(out) / "again")
assert not {"models", "transport", "weights", "sklearn"} & sys.modules.keys()
"""


@pytest.mark.slow
def test_folders_are_loaded_in_a_fresh_process(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Exported while compiled, loaded without this program, saved there, and loaded once more."""
    first, second, expected = [], [], {}
    for name, budget in {"pixels": None, "latents": None, "experts": None, "elastic": 0.5}.items():
        pipe, here = request.getfixturevalue(name), tmp_path / name
        (here / "first").mkdir(parents=True)
        (here / "second").mkdir()
        pipeline = door(pipe)
        pipeline.transformer = torch.compile(pipeline.transformer)
        export(pipeline, here / "folder", pipe.name)
        images = pipe.images(LABELS, ODE(num_steps=6), Guidance(2.0), generators(), budget=budget)
        expected[here] = (images / 2 + 0.5).clamp(0, 1)
        first.append((str(here / "folder"), str(here / "first"), budget))
        second.append((str(here / "first" / "again"), str(here / "second"), budget))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for number, jobs in enumerate((first, second)):
        cache = {"HF_MODULES_CACHE": str(tmp_path / f"modules{number}"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", FRESH, json.dumps(jobs)]
        done = subprocess.run(command, cwd=tmp_path, env=environment | cache, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for (_, out, _), images in zip(jobs, expected.values(), strict=True):
            assert torch.equal(torch.load(Path(out) / "images.pt"), images)


def test_the_model_card(pixels: Pipeline, folders: dict[str, Path], experts: Pipeline) -> None:
    card = (folders["pixels"] / "README.md").read_text()
    cost = [pixels.model.macs(level) / 1e9 for level in range(3)]
    total = 25 * cost[0] + 13 * cost[1] + 12 * cost[2]
    for text in (
        "library_name: diffusers",
        "# PPF-T-3\n",
        "Step 20 of its training",
        f"| 0 | [0, 0.5] | 4x4 | 4 | {cost[0]:.3g} | 25 |\n| 1 | [0.5, 0.75] | 2x4 | 8 | {cost[1]:.3g} | 13 |\n",
        f"50 steps take {total:.4g} GMACs",
        f"would take {50 * cost[2]:.4g}, {50 * cost[2] / total:.2f} times as many",
        "5 is the null label",
    ):
        assert text in card
    assert "height" not in card
    card = (folders["latents"] / "README.md").read_text()
    assert all(
        text in card for text in ("`height` and `width`", "and scipy", "latents of 4x8x8, images of 16x16 pixels")
    )
    assert "| 2 | [0.7, 1] | 2x2 | 16 |" in str(model_card(door(experts), "experts"))


def test_the_card_has_a_table_of_budgets(elastic: Pipeline, elastic_folder: Path, folders: dict[str, Path]) -> None:
    cost = [elastic.model.macs(level) / 1e9 for level in range(3)]
    card = (elastic_folder / "README.md").read_text()
    (lines,) = [part.splitlines() for part in card.split("\n\n") if part.startswith("| budget |")]
    rows = {cells[1]: cells[2:4] for line in lines[2:] if (cells := [cell.strip() for cell in line.split("|")])}
    assert list(rows) == ["1", "0.8", "0.6", "0.4", "0.3"]
    assert rows["1"] == ["0, 0", f"{50 * cost[2]:.4g}"]
    for budget, (_, gmacs) in rows.items():
        assert float(gmacs) == pytest.approx(float(budget) * 50 * cost[2], abs=cost[2])
    at = elastic.at_budget(0.6)
    assert rows["0.6"][0] == ", ".join(f"{edge:g}" for edge in at.transport.schedule.level_edges)
    assert float(rows["0.6"][1]) == pytest.approx(at.check().gmacs(1), rel=1e-3)
    assert "budget" not in (folders["pixels"] / "README.md").read_text()
    finest = pipeline_of(elastic.model, elastic.transport.with_edges((0, 0)), elastic.autoencoder)
    assert f"| 1 | [0, 0] | 2x4 | 8 | {cost[1]:.3g} | 0 |" in str(model_card(finest, "finest"))


# -- The command ---------------------------------------------------------------------------------------------------


def test_the_command(tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refuses) -> None:
    (tmp_path / "names.txt").write_text("".join(f"digit {number}\n" for number in range(10)))
    flags = ["--format", "diffusers", "--labels", str(tmp_path / "names.txt")]
    download.main(["export", str(tiny_run), str(tmp_path / "a" / "b"), *flags])
    assert "PPF-T-2, step 20, as a pipeline of diffusers" in capsys.readouterr().out
    pipeline = PPFlowPipeline.from_pretrained(tmp_path / "a" / "b")
    pipeline.set_progress_bar_config(disable=True)
    expected = Pipeline.load(tiny_run).images([7], ODE(num_steps=4), Guidance(4.0), generators()[:1])
    found = pipeline("digit 7", num_inference_steps=4, generator=generators()[:1], output_type="pt").images
    assert torch.equal(found, (expected / 2 + 0.5).clamp(0, 1))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b"}

    new = tmp_path / "c"
    assert "is there already" in refuses(download.main, "export", tiny_run, tmp_path / "a", *flags)
    assert "1000 names for 10 classes" in refuses(download.main, "export", tiny_run, new, *flags[:3], "imagenet")
    assert "is neither a file" in refuses(download.main, "export", "nowhere", new, *flags)
    assert "--format" in refuses(download.main, "export", tiny_run, new)
    assert "nowhere.txt" in refuses(download.main, "export", tiny_run, new, *flags[:3], tmp_path / "nowhere.txt")
    assert not new.exists()


def test_names_of_imagenet() -> None:
    names = class_names("imagenet", 1000)
    assert (names[0], names[207], names[999]) == ("tench", "golden retriever", "toilet tissue")
    with pytest.raises(ValueError, match="imagenet has 1000 names for 10 classes"):
        class_names("imagenet", 10)
