"""Samples of any size: Pipeline, sample.py and sample_ddp.py with a network of rotary positions."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_autoencoders import open_kl
from test_fit import V2

import sample
import sample_ddp
import train
import train_utils as cli
from experts import ExpertPatchDiT, create_expert
from models import PyramidalPatchDiT, create_model
from pipeline import Pipeline
from positions import RopeScaling
from runtime.logs import to_uint8
from runtime.rng import Stream, label_of, sample_generators
from transport import ODE, ClassifierFreeGuidance, Guidance, Sampler, create_transport
from weights.pretrained import default_transport, load_pretrained

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = {"depth": 2, "input_size": 8, "in_channels": 1, "num_classes": 10}
SIZES = ((8, 8), (12, 8), (4, 20))


def random_weights(model: PyramidalPatchDiT) -> PyramidalPatchDiT:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        parameter.normal_(std=0.05, generator=generator)
    return model


def save_run(model: PyramidalPatchDiT, path: Path, **config) -> Path:
    content = {"model_name": "", "model": model.config, "transport": default_transport(model), "vae": "none", **config}
    torch.save({"ema": model.state_dict(), "config": content, "step": 7}, path)
    return path


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    """A small pyramid of FiTv2's block for grey pixels."""
    model = random_weights(create_model("PPFiT-T-2", **SIZE))
    return save_run(model, tmp_path_factory.mktemp("any_size") / "a.pt")


@pytest.fixture
def pipe(ckpt: Path) -> Pipeline:
    return Pipeline.load(ckpt)


def by_hand(pipe: Pipeline, size: tuple[int, int], labels: list[int], seed: int = 3, steps: int = 4) -> torch.Tensor:
    """Guided samples of a size, each from its own generator's noise, by the sampler itself."""
    generators = sample_generators(seed, range(len(labels)), Stream.SAMPLES)
    x0 = torch.stack([torch.randn(1, *size, generator=generator) for generator in generators])
    guided = ClassifierFreeGuidance(pipe.model, (1.5, 2.0), null_class=10)
    return Sampler(pipe.transport).sample_ode(guided, x0, num_steps=steps, y=torch.tensor(labels))


# -- Pipeline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_images_of_a_size_are_those_of_the_sampler(size, pipe: Pipeline) -> None:
    expected = by_hand(pipe, size, [1, 2])
    how = {"solver": ODE(num_steps=4), "guidance": Guidance((1.5, 2.0)), "seed": 3}
    assert expected.shape == (2, 1, *size)
    assert torch.equal(pipe.images([1, 2], **how, size=size), expected)
    assert torch.equal(pipe.latents([1, 2], **how, size=size), expected)
    assert pipe.images([1], ODE(num_steps=2)).shape == (1, 1, 8, 8)  # of a call alone
    pipe.use_size(size)
    assert torch.equal(pipe.images([1, 2], **how), expected)
    assert (pipe.image_size, pipe.image_shape) == (size, (1, *size))
    x0 = pipe.noise(expected, [1, 2], ODE("heun2", 4))
    nats = pipe.log_prob(expected, [1, 2], ODE("heun2", 4))
    assert x0.shape == expected.shape
    assert nats.isfinite().all()


def test_the_cost_is_that_of_the_size(pipe: Pipeline) -> None:
    size = (4, 20)
    counted = pipe.counted()
    counted.images([1, 2, 3], ODE("euler", (3, 5)), Guidance((1.0, 2.0)), size=size)
    assert counted.model.nfe(3) == 3 + 2 * 5
    expected = (3 * pipe.model.macs(0, size) + 10 * pipe.model.macs(1, size)) / 1e9
    assert counted.model.gmacs(3) == pytest.approx(expected, rel=1e-12)
    assert pipe.check(ODE("euler", (3, 5)), Guidance((1.0, 2.0)), size=size).gmacs(1) == pytest.approx(expected)
    with pytest.raises(ValueError, match="the nearest size"):
        pipe.check(size=(3, 20))
    finest = pipe.finest_only().counted()
    finest.images([1], ODE("euler", 8), size=size)
    assert finest.model.gmacs(1) == pytest.approx(8 * pipe.model.macs(1, size) / 1e9, rel=1e-12)


def test_sizes_are_those_of_images_where_there_is_an_autoencoder(tmp_path: Path) -> None:
    model = random_weights(PyramidalPatchDiT(**{**V2, "in_channels": 4, "patch_sizes": ((4, 4), (2, 2))}))
    pipe = Pipeline(model, create_transport(level_edges=(0.5,)), open_kl(tmp_path / "vae"))
    images = pipe.images([0], ODE(num_steps=2), size=(16, 24))  # pixels, twice as many as the network's
    assert images.shape == (1, 3, 16, 24)
    assert torch.equal(images, pipe.autoencoder.decode(pipe.latents([0], ODE(num_steps=2), size=(8, 12))))
    with pytest.raises(ValueError, match="height must be a multiple of 8, the width of 8; the nearest size"):
        pipe.images([0], size=(16, 22))
    with pytest.raises(ValueError, match="the nearest size that works is 16x24"):
        pipe.use_size((16, 22))
    assert pipe.image_size == (16, 16)


def test_experts_take_any_size_as_one_network_does() -> None:
    """Two experts that are one pyramid's levels: same samples, same cost."""
    whole = random_weights(create_model("PPFiT-T-2", **SIZE))
    experts = ExpertPatchDiT(
        [
            create_expert("PPFiT-T-2", range(level, level + 1), **SIZE, train_tokens=16).requires_grad_(False)
            for level in (0, 1)
        ],
        (0.5,),
    )
    given, table = whole.state_dict(), "y_embedder.embedding_table.weight"
    for level, expert in enumerate(experts.experts):
        weights = {name: tensor for name, tensor in given.items() if name in expert.state_dict()}
        for part, end in product(("x_embedder", "final_layer.linear"), ("weight", "bias")):
            weights[f"{part}.0.{end}"] = given[f"{part}.{level}.{end}"]
        weights[table] = given[table] + whole.level_embedder.embedding_table.weight[level]
        expert.load_state_dict(weights)
    transport, how = create_transport(level_edges=(0.5,)), {"solver": ODE(num_steps=4), "size": (12, 8)}
    pipes = [Pipeline(network, transport) for network in (whole, experts)]
    for pipe in pipes:
        pipe.model.rope_scaling = RopeScaling("linear")
    counted = [pipe.counted() for pipe in pipes]
    expected, found = (pipe.images([1, 2], **how) for pipe in counted)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert counted[0].model.gmacs(2) == counted[1].model.gmacs(2)
    pipes[1].use_size((12, 8))
    assert [expert.input_size for expert in experts.experts] == [(12, 8)] * 2
    with pytest.raises(ValueError, match="10x8 does not fit"):
        pipes[1].use_size((10, 8))


def test_the_scaling_is_the_weights_own_unless_another_is_given(ckpt: Path, tmp_path: Path) -> None:
    model = Pipeline.load(ckpt).model
    assert model.rope_scaling == RopeScaling()
    own = save_run(model, tmp_path / "own.pt", rope_scaling={"kind": "ntk", "decouple": False, "attention_scale": None})
    assert load_pretrained(own).model.rope_scaling == RopeScaling("ntk", decouple=False)
    drawn = {}
    for kind in ("normal", "linear"):
        pipe = Pipeline.load(own, rope=RopeScaling(kind))
        assert pipe.model.rope_scaling == RopeScaling(kind)
        drawn[kind] = [pipe.images([1], ODE(num_steps=3), size=size) for size in ((8, 8), (12, 12))]
    assert torch.equal(drawn["normal"][0], drawn["linear"][0])
    assert not torch.equal(drawn["normal"][1], drawn["linear"][1])


def test_sine_cosine_networks_take_neither_size_nor_scaling(tiny_run: Path) -> None:
    pipe = Pipeline.load(tiny_run)
    assert pipe.images([1], ODE(num_steps=2), size=(8, 8)).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="knows 8x8 alone, not 8x12"):
        pipe.images([1], size=(8, 12))
    with pytest.raises(ValueError, match="has sine-cosine positions: a scaling is for rotary ones"):
        Pipeline.load(tiny_run, rope=RopeScaling("ntk"))


# -- Commands ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "size"), [(["12", "8"], (12, 8)), (["12"], (12, 12))])
def test_a_grid_of_any_size(flag, size, ckpt: Path, pipe: Pipeline, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a.png"
    command = f"ODE --ckpt {ckpt} --num-sampling-steps 4 --class-labels 1 2 --cfg-scales 1.5 2 --seed 3 --out {out}"
    sample.main([*command.split(), "--image-size", *flag])
    columns, scale = 2, 64 // max(size)
    cell = [side * scale + 2 for side in size]
    assert Image.open(out).size == (columns * cell[1] + 2, cell[0] + 2)
    (row,) = re.findall(r"pyramid, 2 level\(s\)\s+([\d.]+)\s+([\d.]+)", capsys.readouterr().out)
    gmacs = sum(4 * pipe.model.macs(level, size) for level in (0, 1)) / 1e9
    assert [float(number) for number in row] == [8, pytest.approx(gmacs, abs=6e-4)]


def test_many_samples_of_any_size(ckpt: Path, pipe: Pipeline, tmp_path: Path, refuses) -> None:
    common = f"ODE --ckpt {ckpt} --num-sampling-steps 4 --cfg-scales 1.5 2 --global-seed 3 --sample-dir {tmp_path}"
    scaling = ["--rope", "ntk", "--no-decouple", "--attention-scale", "fit2"]
    flags = [*common.split(), *scaling, "--image-size", "12", "8", "--num-fid-samples"]
    sample_ddp.main([*flags, "3", "--per-proc-batch-size", "2"])
    sample_ddp.main([*flags, "5", "--per-proc-batch-size", "4"])  # the same set, completed
    (npz,) = tmp_path.glob("*.npz")
    with np.load(npz) as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert labels.tolist() == [label_of(index, 10, 3, "random") for index in range(5)]
    pipe.model.rope_scaling = RopeScaling("ntk", False, "fit2")
    expected = to_uint8(by_hand(pipe, (12, 8), labels.tolist())).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    assert np.abs(pixels.astype(int) - expected).max() <= 1
    settings = json.loads(next(tmp_path.glob("*/settings.json")).read_text())
    assert (settings["size"], settings["train_tokens"]) == ([12, 8], 16)
    assert settings["rope_scaling"] == {"kind": "ntk", "decouple": False, "attention_scale": "fit2"}
    macs = sum(4 * pipe.model.macs(level, (12, 8)) for level in (0, 1))
    assert settings["gmacs_per_image"] == pytest.approx(macs / 1e9)
    line = refuses(sample_ddp.main, *flags, 5, "--ori-max-pe-len", 5)
    assert "holds samples with train_tokens 16, not 25" in line
    assert npz.stem.endswith("-12x8-ntk-fit2-ODE-ab2-4-cfg-1.5-2-seed-3")


def test_a_pyramid_of_any_size_is_trained_from_a_single_level(tmp_path: Path, capsys) -> None:
    source = random_weights(create_model("PPFiT-T-2", **{**SIZE, "depth": 6}, patch_sizes=((2, 2),)))
    save_run(source, tmp_path / "fit.pt")
    flags = f"--data-path digits --model PPFiT-T-3 --global-batch-size 4 --num-workers 0 --run-dir {tmp_path / 'run'}"
    flags += f" --initialize_from {tmp_path / 'fit.pt'} --max-steps 1 --lr 1e-30 --ema-decay 0 --sample-every 0"
    train.train(flags.split())
    trained = load_pretrained(tmp_path / "run").model
    assert (trained.num_levels, trained.train_tokens, trained.position) == (3, 16, "rope")
    x, t, y = torch.randn(2, 1, 12, 8), torch.rand(2), torch.tensor([0, 10])
    with torch.no_grad():
        torch.testing.assert_close(trained(x, t, y, level=2), source.eval()(x, t, y), atol=1e-5, rtol=1e-5)
    out = tmp_path / "a.png"
    sample.main(f"SDE --ckpt {tmp_path / 'run'} --num-sampling-steps 5 --image-size 12 8 --out {out}".split())
    assert out.exists()


# -- Flags -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", None),
        ("--rope ntk", RopeScaling("ntk")),
        ("--rope yarn --no-decouple", RopeScaling("yarn", decouple=False)),
        ("--no-decouple", RopeScaling("auto", decouple=False)),
        ("--attention-scale fit1", RopeScaling("auto", attention_scale="fit1")),
        ("--rope normal --attention-scale log", RopeScaling("normal", attention_scale="log")),
        ("--interpolation no", RopeScaling("normal", decouple=False)),
        ("--interpolation linear --decouple", RopeScaling("linear")),
        ("--interpolation dynntk --decouple", RopeScaling("ntk")),
        ("--interpolation dynntk", RopeScaling("ntk", decouple=False)),
        ("--interpolation partntk --decouple", RopeScaling("ntk-parts")),
        ("--interpolation yarn", RopeScaling("yarn", decouple=False)),
        ("--interpolation ntkpro1 --decouple", RopeScaling("ntk", attention_scale="fit1")),
        ("--interpolation ntkpro2 --decouple", RopeScaling("ntk", attention_scale="fit2")),
    ],
)
def test_flags_of_positions_in_our_words_and_in_fits(flags: str, expected: RopeScaling | None) -> None:
    for parser in (sample.build_parser(), sample_ddp.build_parser()):
        assert cli.rope_from(parser.parse_args(["ODE", *flags.split()])) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", "10", "8"], "10x8 does not fit: the height must be a multiple of 4"),
        (["--image-size", "13"], "the nearest size that works is 12x12"),
        (["--image-size", "8", "8", "8"], "--image-size takes a side, or height and width, not 3 numbers"),
        (["--image-size", "0", "8"], "0 is not at least 1"),
        (["--rope", "yarn", "--attention-scale", "log"], "yarn scales the attention itself"),
        (["--rope", "ntk", "--interpolation", "no"], "--interpolation and --rope say the same"),
        (["--attention-scale", "log", "--interpolation", "no"], "--interpolation and --attention-scale say the same"),
        (["--rope", "pi"], "invalid choice: 'pi'"),
    ],
)
def test_bad_flags_are_named(flags, words, ckpt: Path, tmp_path: Path, refuses) -> None:
    assert words in refuses(sample.main, "ODE", "--ckpt", ckpt, "--out", tmp_path / "a.png", *flags)
    assert words in refuses(sample_ddp.main, "SDE", "--ckpt", ckpt, "--sample-dir", tmp_path / "s", *flags)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image-size", "8", "12"], "--image-size is 8x12, but {} was trained with 8x8: leave --image-size out"),
        (["--image-size", "16"], "--image-size is 16, but {} was trained with 8"),
        (["--rope", "ntk"], "--rope is about rotary positions, and those of {} are sine-cosine: leave it out"),
        (["--no-decouple"], "--decouple is about rotary positions"),
        (["--attention-scale", "log"], "--attention-scale is about rotary positions"),
        (["--interpolation", "no"], "--interpolation is about rotary positions"),
        (["--ori-max-pe-len", "16"], "--ori-max-pe-len is about rotary positions"),
    ],
)
def test_a_sine_cosine_network_refuses_them(flags, words, tiny_run: Path, tmp_path: Path, refuses) -> None:
    for main in (sample.main, sample_ddp.main):
        assert words.format(tiny_run) in refuses(main, "ODE", "--ckpt", tiny_run, *flags)


def test_a_size_of_its_own_may_be_named(tiny_run: Path, tmp_path: Path) -> None:
    for size in (["8"], ["8", "8"]):
        flags = ["--num-sampling-steps", "2", "--class-labels", "1", "--out", str(tmp_path / "a.png")]
        sample.main(["ODE", "--ckpt", str(tiny_run), *flags, "--image-size", *size])
