"""FiT's and FiTv2's files against their networks written a second time; pyramids that start from them."""

import pickle
import re

import pytest
import torch
from published import DEFAULTS, same_weights, saved
from published_fit import CLASSES, DEPTH, HEADS, INTERPOLATIONS, TOKENS, WIDTH, fit_forward, fit_weights
from safetensors.torch import load_file, save_file
from test_download import Server

from models import PyramidalPatchDiT, create_model
from pipeline import Pipeline
from positions import RopeScaling
from train_utils import INTERPOLATIONS as FLAGS
from transport import ODE, create_transport
from transport.paths import PATHS
from weights.layouts import export_state_dict, fields_from_shapes, initialize_levels, layout_of
from weights.pretrained import convert, load_pretrained
from weights.published import PUBLISHED, published_name

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(tokens: tuple[int, int] = (16, 16), n: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 2 * tokens[0], 2 * tokens[1], generator=generator)
    return x, torch.rand(n, generator=generator), torch.arange(n) * 5  # the null label too


def network_time(version: int, t: torch.Tensor) -> torch.Tensor:
    """t, or the index at which DDPM's product of 1 - beta, step by step, is the VP path's alpha squared."""
    if version == 2:
        return t
    noise, found = -torch.cumsum(torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)), 0), []
    for wanted in -2 * PATHS["VP"].coefficients(t.double()).alpha.log():
        below = int((noise < wanted).sum()) - 1
        found.append(below + (wanted - noise[below]) / (noise[below + 1] - noise[below]))
    return torch.stack(found).float()


def check(model: PyramidalPatchDiT, version: int, tokens: tuple[int, int], interpolation: str, decouple: bool) -> None:
    """Ours and the published network agree to 1e-5."""
    x, t, y = inputs(tokens)
    kind, attention_scale = FLAGS[interpolation]
    model.rope_scaling = RopeScaling(kind, decouple, attention_scale)
    expected = fit_forward(fit_weights(version), x, network_time(version, t), y, interpolation, decouple)
    assert expected.std() > 0.3
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y, level=model.num_levels - 1), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module", params=[1, 2])
def version(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def model(version, tmp_path_factory) -> PyramidalPatchDiT:
    path = saved(fit_weights(version), tmp_path_factory.mktemp("fit") / "model_ema.bin")
    return load_pretrained(path, num_heads=HEADS).model


# -- Reading, against the published networks ---------------------------------------------------------------------------


@pytest.mark.parametrize("decouple", [True, False])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_published_weights_compute_the_published_outputs(tokens, interpolation, decouple, model, version):
    check(model, version, tokens, interpolation, decouple)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_files_tell_the_network_and_its_process(suffix, version, tmp_path):
    weights, path = fit_weights(version), tmp_path / f"model_ema{suffix}"
    torch.save(weights, path) if suffix == ".bin" else save_file(weights, path)
    found = load_pretrained(path, num_heads=HEADS)
    assert found.model.config == {
        **DEFAULTS,
        "input_size": [32, 32],
        "patch_sizes": [[2, 2]],
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 4.0 if version == 1 else 8 / 3,
        "num_classes": CLASSES,
        "learn_sigma": version == 1,
        "position": "rope",
        "mlp": "swiglu",
        "qk_norm": version == 2,
        "adaln_rank": None if version == 1 else WIDTH // 4,
        "train_tokens": 256,
        "time_input": "ddpm" if version == 1 else "t",
    }
    transport = create_transport(**found.transport)
    process = ("VP", "noise") if version == 1 else ("Linear", "velocity")
    assert (transport.path.name, transport.prediction, found.vae) == (*process, "stabilityai/sd-vae-ft-ema")
    recommended = RopeScaling("ntk") if version == 1 else RopeScaling("auto", attention_scale="fit2")
    assert found.model.rope_scaling == recommended


def test_a_pickle_of_tensors_with_attributes_is_read_without_running_code(tmp_path):
    """As of the published model_ema.bin: torch pickles such a tensor by a function that weights_only allows."""
    weights = fit_weights(2)
    for tensor in weights.values():
        tensor.saved_by = "accelerate"
    path = saved(weights, tmp_path / "model_ema.bin")
    assert b"_rebuild_from_type_v2" in path.read_bytes()
    check(load_pretrained(path, num_heads=HEADS).model, 2, (10, 20), "no", True)
    path.write_bytes(pickle.dumps({"blocks.0.mlp.fc1_g.weight": print}, protocol=2))
    with pytest.raises(ValueError, match=r"model_ema\.bin"):
        load_pretrained(path)


def test_heads_are_those_of_the_published_width():
    for name, heads in {"FiT-XL/2": 16, "FiTv2-XL/2": 16, "FiTv2-3B/2": 24, "FiTv2-B/2": 12, "FiT-L/2": 16}.items():
        with torch.device("meta"):
            fields = fields_from_shapes(export_state_dict(create_model(name), "fit"), name)
        assert fields["num_heads"] == heads
    with pytest.raises(ValueError, match="is 144 wide, which does not tell the number of heads: give num_heads"):
        fields_from_shapes(fit_weights(1), "a.bin")


@pytest.mark.parametrize(
    ("width", "inner"), [(128, 341), (136, 362), (280, 746), (1000, 2666), (1160, 3093), (96, 257), (688, 1834)]
)
def test_any_width_of_the_mlp_is_read(width, inner):
    """The quotient of two whole numbers, times the second, may be just below the first."""
    weights = {name: tensor for name, tensor in fit_weights(2).items() if ".mlp." not in name}
    weights |= {f"blocks.{block}.mlp.fc1_g.bias": torch.zeros(inner) for block in range(DEPTH)}
    weights |= {name: torch.zeros(width) for name in ("blocks.0.attn.proj.bias", "blocks.1.attn.proj.bias")}
    weights |= {f"t_embedder.mlp.{layer}.bias": torch.zeros(width) for layer in (0, 2)}
    fields = fields_from_shapes(weights, "a.bin", num_heads=1)
    assert int(fields["hidden_size"] * fields["mlp_ratio"]) == inner


def test_samples_come_from_the_files_own_process(version, tmp_path):
    """FiT's follows the VP path and predicts noise; its first step is known in closed form."""
    pipe = Pipeline.load(saved(fit_weights(version), tmp_path / "a.bin"), num_heads=HEADS)
    x0, _, y = inputs((4, 6))
    found = pipe.latents(y, ODE("euler", 1), x0=x0)
    start, stop = pipe.transport.sample_interval
    c = pipe.transport.path.coefficients(torch.tensor([start, stop], dtype=torch.float64))
    (alpha, end), (sigma, _), (d_alpha, _), (d_sigma, _) = (values.tolist() for values in c)
    x, t = sigma * x0, torch.full((2,), start)
    out = fit_forward(fit_weights(version), x, network_time(version, t), y)
    velocity = out if version == 2 else d_alpha * (x - sigma * out) / alpha + d_sigma * out
    torch.testing.assert_close(found, (x + (stop - start) * velocity) / end, atol=1e-3, rtol=1e-3)


# -- Files that are wrong --------------------------------------------------------------------------------------------


def test_a_missing_or_wrong_tensor_is_named(version, tmp_path):
    weights = fit_weights(version)
    assert layout_of(weights, "a") == "fit"
    names = ["x_embedder.proj.weight", "blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1_g.weight", "blocks.1.mlp.fc2.weight"]
    names += ["blocks.1.adaLN_modulation.1.weight", "final_layer.linear.weight", "y_embedder.embedding_table.weight"]
    names += ["global_adaLN_modulation.1.weight", "blocks.0.adaLN_modulation.2.bias"] if version == 2 else []
    for name in names:
        tensor = weights[name]
        path = saved({key: value for key, value in weights.items() if key != name}, tmp_path / "a.bin")
        with pytest.raises(ValueError, match=rf"a\.bin is incomplete.*{re.escape(name)}"):
            load_pretrained(path, num_heads=HEADS)
        if name != "y_embedder.embedding_table.weight":  # a row less is a class less
            path = saved({**weights, name: tensor[:-1].clone()}, tmp_path / "a.bin")
            with pytest.raises(ValueError, match=rf"a\.bin is damaged.* {re.escape(name)} is"):
                load_pretrained(path, num_heads=HEADS)
    path = saved({**weights, "blocks.0.attn.q_norm.weight": torch.zeros(72)}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"it has blocks\.0\.attn\.q_norm\.weight, which is unknown"):
        load_pretrained(path, num_heads=HEADS)


# -- There and back ----------------------------------------------------------------------------------------------------


def test_there_and_back_is_exact(version, tmp_path):
    weights = fit_weights(version)
    given = saved(weights, tmp_path / "model_ema.bin")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    convert(given, ours, "ours", num_heads=HEADS)
    convert(ours, back, "fit")
    assert same_weights(load_file(back), weights)
    first, again = load_pretrained(given, num_heads=HEADS), load_pretrained(ours)
    assert again.model.config == first.model.config
    assert again.model.rope_scaling == first.model.rope_scaling
    assert again.transport == first.transport
    for layout in ("sit", "ppflow"):
        with pytest.raises(ValueError, match=f"the {layout} layout has no model with"):
            export_state_dict(first.model, layout)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_sizes": ((4, 4), (2, 2))}, "has no model with 4x4, 2x2 patches, rope positions and a swiglu MLP"),
        ({"position": "sincos", "train_tokens": None}, "has no model with 2x2 patches, sincos positions"),
        ({"qk_norm": False}, "no mixture"),
        ({"time_input": "ddpm"}, "no mixture"),
        ({"rope_theta": 100.0}, "no place for another rope_theta than 10000"),
        ({"bottleneck": 8}, "or for a bottleneck"),
    ],
)
def test_a_model_that_fit_does_not_have_is_not_exported_to_its_layout(fields, message):
    with torch.device("meta"):
        model = create_model("FiTv2-B/2", depth=1, **fields)
    with pytest.raises(ValueError, match=message):
        export_state_dict(model, "fit")


# -- Pyramids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3])
def test_the_finest_level_of_a_pyramid_computes_what_fitv2_did(levels, tmp_path):
    path = saved(fit_weights(2), tmp_path / "model_ema.bin")
    source = load_pretrained(path, num_heads=HEADS).model
    fields = {
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "depth": DEPTH,
        "adaln_rank": WIDTH // 4,
        "num_classes": CLASSES,
    }
    pyramid = create_model(f"PPFiT-S-{levels}", **fields).eval()
    assert initialize_levels(pyramid, source) == []
    for tokens in ((16, 16), (10, 30)):
        x_t_y = inputs(tokens)
        source.rope_scaling = pyramid.rope_scaling = RopeScaling("ntk", attention_scale="fit2")
        with torch.no_grad():
            assert torch.equal(pyramid(*x_t_y, level=levels - 1), source(*x_t_y))
        check(pyramid, 2, tokens, "ntkpro2", True)
    x, t, y = inputs((10, 20))
    with torch.no_grad():  # a coarse level sees the mean of its pixels, and answers to all of them alike
        blocks = torch.nn.functional.avg_pool2d(x, 2)
        blocks = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)
        out = pyramid(x, t, y, level=0)
        torch.testing.assert_close(out, pyramid(blocks, t, y, level=0), atol=1e-4, rtol=1e-4)
        assert torch.equal(out[..., ::2, ::2], out[..., 1::2, 1::2])


def test_a_start_at_a_size_that_the_weights_scale_is_told():
    """As of FiTv2's weights for larger images, which were trained with positions scaled from 256 tokens."""
    size = {"hidden_size": 32, "num_heads": 4, "depth": 1, "adaln_rank": 8, "num_classes": CLASSES}
    source = create_model("FiTv2-B/2", **size)
    source.rope_scaling = RopeScaling("ntk")
    assert initialize_levels(create_model("PPFiT-S-2", **size), source) == []
    (line,) = initialize_levels(create_model("PPFiT-S-2", **size, input_size=(32, 64)), source)
    assert "inputs of 32x64 are beyond the 256 tokens" in line


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "sincos", "train_tokens": None}, "position is rope there, sincos here"),
        ({"qk_norm": False}, "qk_norm is True there, False here"),
        ({"adaln_rank": 8}, "adaln_rank is 36 there, 8 here"),
        ({"mlp": "gelu"}, "mlp is swiglu there, gelu here"),
        ({"time_input": "ddpm"}, "time_input is t there, ddpm here"),
        ({"rope_theta": 100.0}, "rope_theta is 10000.0 there, 100.0 here"),
    ],
)
def test_a_start_from_another_kind_of_network_is_refused(fields, message):
    size = {"hidden_size": WIDTH, "num_heads": HEADS, "depth": DEPTH, "adaln_rank": WIDTH // 4, "num_classes": CLASSES}
    with torch.device("meta"):
        source, other = (create_model("FiTv2-B/2", **{**size, **changed}) for changed in ({}, fields))
    with pytest.raises(ValueError, match=message):
        initialize_levels(other, source)


# -- Published weights -------------------------------------------------------------------------------------------------


def test_published_names_have_the_addresses_of_the_readme():
    hub = "https://huggingface.co/InfImagine/"
    assert {name: published.url.removeprefix(hub) for name, published in PUBLISHED.items() if "FiT" in name} == {
        "FiT-XL/2": "FiT/resolve/main/FiTv1_xl/model_ema.bin",
        "FiTv2-XL/2": "FiTv2/resolve/main/FiTv2_XL/model_ema.safetensors",
        "FiTv2-3B/2": "FiTv2/resolve/main/FiTv2_3B/model_ema.bin",
        "FiTv2-HR-XL/2": "FiTv2/resolve/main/FiTv2_XL_HRFT/model_ema.safetensors",
        "FiTv2-HR-3B/2": "FiTv2/resolve/main/FiTv2_3B_HRFT/model_ema.safetensors",
    }
    assert len({published.file for published in PUBLISHED.values()}) == len(PUBLISHED)
    for spelling, name in {
        "FiTv1-XL/2": "FiT-XL/2",
        "fitv2_hr_xl_2": "FiTv2-HR-XL/2",
        "FiTv2-3B-2": "FiTv2-3B/2",
    }.items():
        assert published_name(spelling) == name


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_name_is_downloaded_and_checked(suffix, tmp_path, monkeypatch):
    """The larger images' weights are of the same network: their name tells size and scaling."""
    model = create_model("FiTv2-B/2", depth=1, hidden_size=64, num_heads=4, adaln_rank=16, num_classes=3)
    weights, path = {n: t.contiguous() for n, t in export_state_dict(model, "fit").items()}, tmp_path / f"file{suffix}"
    torch.save(weights, path) if suffix == ".bin" else save_file(weights, path)
    server = Server(path.read_bytes())
    published = PUBLISHED["FiTv2-HR-XL/2"]._replace(file=f"other{suffix}", url=server.url)
    monkeypatch.setitem(PUBLISHED, "FiTv2-HR-XL/2", published)
    monkeypatch.setattr("weights.published.create_model", lambda name: PyramidalPatchDiT(**model.config))
    try:
        found = load_pretrained("FiTv2-HR-XL-2", cache_dir=tmp_path / "cache", num_heads=4)
    finally:
        server.stop()
    assert same_weights(found.model.state_dict(), model.state_dict())
    assert (found.model.input_size, found.model.train_tokens) == ((64, 64), 256)
    assert found.model.rope_scaling == RopeScaling("ntk")
    assert "path_type" in found.stated
    convert(tmp_path / "cache" / f"other{suffix}", tmp_path / "o.pt", "ours")  # a path tells neither
    assert Pipeline.load(tmp_path / "o.pt").model.rope_scaling == RopeScaling("auto", attention_scale="fit2")
