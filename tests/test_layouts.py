"""Layouts against the published networks written a second time; levels that start from others."""

import argparse
import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from published import (
    CLASSES,
    DEFAULTS,
    DEPTH,
    HEADS,
    PATCHES,
    WIDTH,
    check_levels,
    inputs,
    mae_positions,
    published_weights,
    same_weights,
    saved,
    tiny,
)
from safetensors.torch import load_file, save_file

from models import MODELS, PyramidalPatchDiT, create_model, patchify, unpatchify
from transport import PatchSchedule, create_transport
from weights.layouts import export_state_dict, fields_from_shapes, initialize_levels, registry_name
from weights.pretrained import convert, load_pretrained
from weights.published import PUBLISHED

# -- Reading, against the published networks ------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(("channels", "out"), [(4, 8), (3, 3)], ids=["learn_sigma", "plain"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_published_files_compute_the_published_outputs(levels, channels, out, suffix, tmp_path):
    weights = published_weights(levels, channels, out)
    path = tmp_path / f"model{suffix}"
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    pretrained = load_pretrained(path, num_heads=HEADS)
    assert pretrained.model.config == {
        **DEFAULTS,
        "input_size": [16, 16],
        "patch_sizes": [list(size) for size in PATCHES[levels]],
        "in_channels": channels,
        "hidden_size": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 4.0,
        "num_classes": CLASSES,
        "learn_sigma": out == 2 * channels,
        "bottleneck": None,
    }
    assert not pretrained.model.training
    assert PatchSchedule(pretrained.transport["level_edges"]) == PatchSchedule.default(levels)
    assert (pretrained.vae, pretrained.step) == ("stabilityai/sd-vae-ft-ema" if channels == 4 else "none", 0)
    assert create_transport(**pretrained.transport).path.name == "Linear"
    check_levels(pretrained.model, weights, learn_sigma=out == 2 * channels)


@pytest.mark.parametrize(("levels", "layout"), [(1, "sit"), (2, "ppflow"), (3, "ppflow")])
def test_exported_weights_compute_our_outputs(levels, layout):
    model = tiny(levels)
    weights = export_state_dict(model, layout)
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        name: tensor.shape for name, tensor in published_weights(levels).items()
    }
    check_levels(model, weights)


# What files of earlier versions and other layouts mean without saying it: Gaussian noise, uniform times, not elastic.
UNTOLD = {
    "aug_dim": None,
    "loss_weight_value": None,
    "time_sampling": "uniform",
    "time_params": None,
    "interval": None,
    "elastic": 0.0,
    "expert_levels": [],
}


def test_a_training_checkpoint_of_ppflow(tmp_path):
    """{"model", "ema", "opt", "args"} with args an argparse.Namespace."""
    last, ema = published_weights(2), published_weights(2)
    last["t_embedder.mlp.0.bias"] = last["t_embedder.mlp.0.bias"] + 1
    args = argparse.Namespace(
        model="PPFlow_XL_2",
        vae="mse",
        path_type="GVP",
        prediction="noise",
        loss_weight=None,
        train_eps=None,
        sample_eps=1e-3,
        data_path="/data",
        cfg_scales=[4.0],
    )
    optimizer = {"state": {0: {"step": torch.tensor(70.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    path = saved({"model": last, "ema": ema, "opt": optimizer, "args": args}, tmp_path / "0000070.pt")
    pretrained = load_pretrained(path, num_heads=HEADS)
    check_levels(pretrained.model, ema)
    check_levels(load_pretrained(path, weights="model", num_heads=HEADS).model, last)
    assert pretrained.transport == {
        "path_type": "GVP",
        "prediction": "noise",
        "loss_weight": None,
        "train_eps": None,
        "sample_eps": 1e-3,
        "level_edges": [0.5],
        **UNTOLD,
    }
    assert (pretrained.vae, pretrained.step) == ("stabilityai/sd-vae-ft-mse", 70)
    assert load_pretrained(saved({"ema": ema, "opt": None}, tmp_path / "lean.pt"), num_heads=HEADS).step == 0
    with pytest.raises(ValueError, match="no weights 'model', only 'ema'"):
        load_pretrained(saved(ema, tmp_path / "bare.pt"), weights="model", num_heads=HEADS)


def test_positions_are_the_files_own(tmp_path):
    """PPFlow averages pos_embed with the weights: rounding moves it by up to 2e-4, and its outputs with it."""
    weights = published_weights(2)
    generator = torch.Generator().manual_seed(0)
    for name in ("pos_embed.0", "pos_embed.1"):
        weights[name] += 2e-4 * torch.randn(weights[name].shape, generator=generator)
    drifted = saved(weights, tmp_path / "drifted.pt")
    check_levels(load_pretrained(drifted, num_heads=HEADS).model, weights)
    for suffix in (".pt", ".safetensors"):  # nor are they lost on the way through our own layout
        convert(drifted, tmp_path / f"ours{suffix}", "ours", num_heads=HEADS)
        check_levels(load_pretrained(tmp_path / f"ours{suffix}").model, weights)
        convert(tmp_path / f"ours{suffix}", tmp_path / "back.pt", "ppflow")
        assert same_weights(torch.load(tmp_path / "back.pt"), weights)


def test_positions_of_another_convention_are_refused(tmp_path):
    weights = published_weights(1)
    weights["pos_embed"] = weights["pos_embed"].roll(WIDTH // 2, dims=2)  # rows first
    with pytest.raises(ValueError, match="pos_embed is not the sine-cosine table of 64 tokens"):
        load_pretrained(saved(weights, tmp_path / "a.pt"), num_heads=HEADS)


def test_the_input_size_can_be_overridden(tmp_path):
    weights = published_weights(2)
    path = saved(weights, tmp_path / "a.pt")
    check_levels(load_pretrained(path, num_heads=HEADS, input_size=16).model, weights)
    for size, tokens in (((8, 32), (4, 16)), ((24, 8), (12, 4))):  # as many tokens as the file has, and fewer
        rows, columns = map(np.arange, tokens)
        positions = {
            "pos_embed.0": mae_positions(WIDTH, rows[::2], columns[::2]),
            "pos_embed.1": mae_positions(WIDTH, rows, columns),
        }
        model = load_pretrained(path, num_heads=HEADS, input_size=size).model
        assert model.input_size == size
        check_levels(model, {**weights, **positions})
        oblong = saved({**weights, **positions}, tmp_path / "oblong.pt")
        check_levels(load_pretrained(oblong, num_heads=HEADS, input_size=size).model, {**weights, **positions})
    with pytest.raises(ValueError, match=r"pos_embed.1 has 48 tokens, which make no square: give input_size=\(H, W\)"):
        load_pretrained(oblong, num_heads=HEADS)


def test_half_precision_weights_become_a_single_precision_model(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in published_weights(2).items()}
    model = load_pretrained(saved(weights, tmp_path / "a.pt"), num_heads=HEADS).model
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32}
    check_levels(model, {name: tensor.float() for name, tensor in weights.items()})


def test_the_number_of_heads_is_the_registrys_or_a_64th_of_the_width(tmp_path):
    for width, heads in ((1152, 16), (1024, 16), (384, 6), (128, 4), (64, 1), (192, 3)):
        with torch.device("meta"):
            model = PyramidalPatchDiT(hidden_size=width, depth=2, num_heads=1)
            assert fields_from_shapes(export_state_dict(model, "ppflow"), "a.pt")["num_heads"] == heads
    with torch.device("meta"):
        model = PyramidalPatchDiT(hidden_size=96, depth=2, num_heads=1)
    with pytest.raises(ValueError, match="is 96 wide, which does not tell the number of heads: give num_heads"):
        fields_from_shapes(export_state_dict(model, "ppflow"), "a.pt")


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("PPF-") or name.endswith("/2")])
def test_every_registered_size_is_recognised(name):
    with torch.device("meta"):
        model = create_model(name)
        layout = {"SiT": "sit", "PPF": "ppflow", "FiT": "fit"}[name[:3]]
        weights = export_state_dict(model, layout)
        again = PyramidalPatchDiT(**fields_from_shapes(weights, name))
    assert again.config == model.config
    assert registry_name(again) == registry_name(model) == name


def test_models_that_are_not_registered_are_described(tmp_path):
    name = load_pretrained(saved(published_weights(2), tmp_path / "a.pt")).name
    assert name == "PyramidalPatchDiT 4x4+2x2, 2 blocks, 64 wide"


def test_the_published_models_are_those_of_the_registry():
    """Names and shapes that a download of PPF-XL-2 must have, without the 2.7 GB."""
    parameters = {"PPF-XL-2": 675_059_488, "PPF-XL-3": 675_172_448, "SiT-XL/2": 674_834_720}
    assert {name for name in PUBLISHED if not name.startswith("FiT")} == set(parameters)
    for name, count in parameters.items():
        with torch.device("meta"):
            weights = export_state_dict(create_model(name), "sit" if name.startswith("SiT") else "ppflow")
        positions = {key: tuple(tensor.shape) for key, tensor in weights.items() if key.startswith("pos_embed")}
        tokens = {"PPF-XL-2": (64, 256), "PPF-XL-3": (64, 128, 256), "SiT-XL/2": (256,)}[name]
        assert list(positions.values()) == [(1, number, 1152) for number in tokens]
        assert sum(tensor.numel() for key, tensor in weights.items() if key not in positions) == count
        assert weights["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
        if name != "SiT-XL/2":
            assert weights["x_embedder.proj1.weight"].shape == (1152, 16, 2, 2)
            assert weights["final_layer.linear1.weight"].shape == (128, 1152)
        published = PUBLISHED[name]
        assert f"/{published.file}?rlkey=" in published.url
        assert published.url.endswith("&dl=1")


# -- Files that are wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_wrong_tensor_is_named(levels, tmp_path):
    weights = published_weights(levels)
    for name, tensor in weights.items():
        if name == "y_embedder.embedding_table.weight":
            continue  # a row less is a class less
        changed = tensor[:, :-1] if name.startswith("pos_embed") else tensor[:-1]
        if name == "pos_embed":
            changed = tensor[..., :-1]  # tokens are what the input size is read from
        path = saved({**weights, name: changed.clone()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"a\.pt is damaged.* {re.escape(name)} is"):
            load_pretrained(path, num_heads=HEADS)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_missing_tensor_is_named(levels, tmp_path):
    weights = published_weights(levels)
    for name in weights:
        path = saved({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"a\.pt is incomplete.*{re.escape(name)}"):
            load_pretrained(path, num_heads=HEADS)


def test_a_tensor_too_many_is_named(tmp_path):
    weights = {**published_weights(2), "projectors.0.weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"a\.pt is of another model: it has projectors\.0\.weight, which is unknown"):
        load_pretrained(saved(weights, tmp_path / "a.pt"), num_heads=HEADS)


def test_channels_that_contradict_each_other_are_named(tmp_path):
    weights = published_weights(1, channels=4, out=8)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"][:, :3].clone()
    with pytest.raises(ValueError, match=r"x_embedder.proj.weight is for 3 channels, final_layer.linear.weight for 8"):
        load_pretrained(saved(weights, tmp_path / "a.pt"), num_heads=HEADS)


def test_levels_that_ppflow_has_not_are_refused(tmp_path):
    weights = published_weights(2)
    only = {name: tensor for name, tensor in weights.items() if not re.match("(x_emb|final_layer.lin).*1", name)}
    only["level_embedder.embedding_table.weight"] = torch.zeros(4, WIDTH)
    for name in ("x_embedder.proj.weight", "x_embedder.proj.bias", "final_layer.linear.weight"):
        del only[name]
    del only["final_layer.linear.bias"]
    with pytest.raises(ValueError, match="PPFlow has 2 or 3 levels, not 0"):
        load_pretrained(saved(only, tmp_path / "a.pt"), num_heads=HEADS)


# -- There and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_there_and_back_is_exact(levels, suffix, tmp_path):
    """Ours to the other layout to ours, through files; and ours keeps the parts that the other layout lacks."""
    model = tiny(levels, learn_sigma=levels != 2)
    transport = {
        "path_type": "VP",
        "prediction": "noise",
        "loss_weight": "velocity",
        "train_eps": 1e-4,
        "sample_eps": 1e-3,
        "level_edges": [0.3, 0.6][: levels - 1],
        **UNTOLD,
    }
    config = {"model_name": "x", "model": model.config, "transport": transport, "vae": "some/vae"}
    ours = saved({"ema": model.state_dict(), "model": {}, "opt": {}, "config": config, "step": 7}, tmp_path / "7.pt")
    light, other, back = (tmp_path / f"{name}{suffix}" for name in ("light", "other", "back"))
    layout = "sit" if levels == 1 else "ppflow"
    for source, out, form in ((ours, light, "ours"), (light, other, layout), (other, back, "ours")):
        convert(source, out, form, num_heads=HEADS)
    read = {path: load_pretrained(path) for path in (light, back)}
    assert all(same_weights(found.model.state_dict(), model.state_dict()) for found in read.values())
    assert all(found.model.config == model.config for found in read.values())
    assert (read[light].transport, read[light].vae, read[light].step) == (transport, "some/vae", 7)
    flat = load_file(other) if suffix == ".safetensors" else torch.load(other, weights_only=True)
    assert same_weights(flat, export_state_dict(model, layout))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["7.pt", light.name, other.name, back.name])


@pytest.mark.parametrize(
    ("fields", "layout"),
    [
        ({"patch_sizes": (4, 2)}, "sit"),
        ({"patch_sizes": (2,)}, "ppflow"),
        ({"patch_sizes": ((8, 8), (2, 2))}, "ppflow"),
        ({"patch_sizes": ((4, 4), (4, 2), (2, 2))}, "ppflow"),
        ({"patch_sizes": (8, 4, 2, 1)}, "ppflow"),
    ],
)
def test_a_model_that_a_repository_does_not_have_is_not_exported_to_it(fields, layout):
    with pytest.raises(ValueError, match=f"the {layout} layout has no model with"):
        export_state_dict(tiny(2, **fields), layout)
    with pytest.raises(ValueError, match="unknown layout 'dit'"):
        export_state_dict(tiny(2), "dit")


@pytest.mark.parametrize("layout", ["sit", "ppflow"])
def test_a_bottleneck_is_not_exported(layout):
    with pytest.raises(ValueError, match=f"the {layout} layout has no patch embedding with a bottleneck: take our own"):
        export_state_dict(tiny(1 if layout == "sit" else 2, bottleneck=9), layout)


def test_levels_of_other_predictions_are_not_exported(tmp_path):
    model, transport = tiny(2), {"prediction": "data velocity", "level_edges": [0.5]}
    config = {"model_name": "x", "model": model.config, "transport": transport, "vae": "some/vae"}
    ours = saved({"ema": model.state_dict(), "config": config, "step": 7}, tmp_path / "7.pt")
    convert(ours, tmp_path / "same.safetensors", "ours")
    assert load_pretrained(tmp_path / "same.safetensors").transport["prediction"] == "data velocity"
    with pytest.raises(ValueError, match="has levels that predict data velocity, where programs of the ppflow layout"):
        convert(ours, tmp_path / "other.pt", "ppflow")
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("patch_sizes", [((1, 1),), ((4, 2),), ((8, 8), (4, 4)), ((2, 6), (1, 6), (1, 3))])
def test_patches_of_any_size_fit_the_layouts(patch_sizes, tmp_path):
    model = tiny(1, patch_sizes=patch_sizes, input_size=(16, 12) if 6 in patch_sizes[0] else 16)
    weights = export_state_dict(model, "sit" if len(patch_sizes) == 1 else "ppflow")
    path = saved(weights, tmp_path / "a.pt")
    again = load_pretrained(path, num_heads=HEADS, input_size=model.input_size).model
    assert again.config == model.config
    assert same_weights(again.state_dict(), model.state_dict())


# -- Starting from other levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3])
@torch.no_grad()
def test_the_finest_level_computes_what_sit_did(levels):
    sit, model = tiny(1), tiny(levels)
    before = copy.deepcopy(sit.state_dict())
    initialize_levels(model, sit)
    x, t, y = inputs()
    expected = sit(x, t, y)
    assert expected.std() > 0.3
    assert torch.equal(model(x, t, y, level=levels - 1), expected)
    assert not model.level_embedder.embedding_table.weight.any()
    assert same_weights(sit.state_dict(), before)
    with torch.no_grad():  # nothing is shared
        model.blocks[0].attn.qkv.weight.zero_()
    assert same_weights(sit.state_dict(), before)


@pytest.mark.parametrize("bottleneck", [None, 9])
@pytest.mark.parametrize("patch", [(4, 4), (2, 4), (4, 2), (8, 8), (6, 4), (2, 2)])
@torch.no_grad()
def test_a_coarse_level_is_sit_on_the_mean_pixels(patch, bottleneck):
    """The mean of the sub-pixels goes in, and the output of the fine pixel goes to each of them."""
    size = (24, 24)
    factor = (patch[0] // 2, patch[1] // 2)
    model = tiny(1, patch_sizes=(patch, (2, 2)), input_size=size, bottleneck=bottleneck)
    initialize_levels(model, tiny(1, input_size=size, bottleneck=bottleneck))
    small = tiny(1, input_size=(24 // factor[0], 24 // factor[1]), bottleneck=bottleneck)
    small.pos_embed_0 = model.pos_embed_0  # a coarse token sits where its top-left fine token does
    x, t, y = inputs(size=size)
    mean = F.avg_pool2d(x, factor)
    embedded = model.x_embedder[0](patchify(x, patch))
    torch.testing.assert_close(embedded, small.x_embedder[0](patchify(mean, (2, 2))), atol=1e-5, rtol=1e-5)
    tokens = torch.randn(3, model.num_tokens(0), WIDTH, generator=torch.Generator().manual_seed(2))
    fine = unpatchify(small.final_layer.linear[0](tokens), (2, 2), small.input_size)
    coarse = unpatchify(model.final_layer.linear[0](tokens), patch, size)
    torch.testing.assert_close(coarse, F.interpolate(fine, size, mode="nearest"), atol=1e-5, rtol=1e-5)
    expected = F.interpolate(small(mean, t, y), size, mode="nearest")
    torch.testing.assert_close(model(x, t, y, level=0), expected, atol=1e-4, rtol=1e-4)
    blocky = F.interpolate(mean, size, mode="nearest")  # constant over sub-pixels: as good as the subsampled image
    torch.testing.assert_close(model(blocky, t, y, level=0), expected, atol=1e-4, rtol=1e-4)


def test_levels_start_as_in_ppflows_layout():
    """PPFlow (arXiv:2506.23543) starts from a DiT by repeating tensors: sub-pixels are consecutive channels."""
    model, sit = tiny(3), tiny(1)
    initialize_levels(model, sit)
    found, given = export_state_dict(model, "ppflow"), export_state_dict(sit, "sit")
    for suffix, count in (("1", 4), ("2", 2), ("", 1)):
        kernel, head = given["x_embedder.proj.weight"], given["final_layer.linear.weight"]
        assert torch.equal(found[f"x_embedder.proj{suffix}.weight"], kernel.repeat_interleave(count, dim=1) / count)
        assert torch.equal(found[f"x_embedder.proj{suffix}.bias"], given["x_embedder.proj.bias"])
        assert torch.equal(found[f"final_layer.linear{suffix}.weight"], head.repeat_interleave(count, dim=0))
        bias = given["final_layer.linear.bias"].repeat_interleave(count)
        assert torch.equal(found[f"final_layer.linear{suffix}.bias"], bias)


@torch.no_grad()
def test_two_levels_become_three():
    two, three, x_t_y = tiny(2), tiny(3), inputs()
    initialize_levels(three, two)
    for level, origin in ((0, 0), (2, 1)):
        assert torch.equal(three(*x_t_y, level=level), two(*x_t_y, level=origin))
    table, given = three.level_embedder.embedding_table.weight, two.level_embedder.embedding_table.weight
    assert torch.equal(table, torch.stack([given[0], torch.zeros(WIDTH), given[1]]))
    middle = two.x_embedder[1].weight.reshape(WIDTH, 2, 2, 4).repeat_interleave(2, dim=2) / 2
    assert torch.equal(three.x_embedder[1].weight, middle.reshape(WIDTH, -1))


@torch.no_grad()
def test_a_new_patch_starts_from_the_finest_that_divides_it():
    two, model = tiny(2), tiny(1, patch_sizes=(8, (6, 4), 2), input_size=24)
    initialize_levels(model, two)
    for level, (fy, fx) in ((0, (4, 4)), (1, (3, 2))):
        fine = two.x_embedder[1].weight.reshape(WIDTH, 2, 2, 4)
        kernel = fine.repeat_interleave(fy, dim=1).repeat_interleave(fx, dim=2) / (fy * fx)
        assert torch.equal(model.x_embedder[level].weight, kernel.reshape(WIDTH, -1))
    assert not model.level_embedder.embedding_table.weight[:2].any()


@torch.no_grad()
def test_the_finest_level_becomes_a_sit():
    two, sit = tiny(2), tiny(1)
    initialize_levels(sit, two)
    torch.testing.assert_close(sit(*inputs()), two(*inputs(), level=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("there", [True, False])
@torch.no_grad()
def test_sigma_is_dropped_or_added(there):
    source, model, x_t_y = tiny(1, learn_sigma=there), tiny(2, learn_sigma=not there), inputs()
    initialize_levels(model, source)
    torch.testing.assert_close(model(*x_t_y, level=1), source(*x_t_y), atol=1e-6, rtol=1e-6)
    if model.learn_sigma:
        for head, (p, q) in zip(model.final_layer.linear, model.patch_sizes, strict=True):
            assert not head.weight.reshape(p, q, 2, 4, WIDTH)[:, :, 1].any()
            assert not head.bias.reshape(p, q, 2, 4)[:, :, 1].any()


@pytest.mark.parametrize("classes", [2, 9])
@pytest.mark.parametrize("levels", [1, 2, 3])
@torch.no_grad()
def test_another_number_of_classes_renews_the_label_table_alone(levels, classes):
    source, model, same = tiny(1), tiny(levels, num_classes=classes), tiny(levels)
    own = model.y_embedder.embedding_table.weight.clone()
    (line,) = initialize_levels(model, source)
    assert f"of {CLASSES} classes, and the model has {classes}" in line
    assert initialize_levels(same, source) == []
    found, expected = model.state_dict(), same.state_dict()
    table = "y_embedder.embedding_table.weight"
    null = source.y_embedder.embedding_table.weight[-1:]
    assert torch.equal(found.pop(table), torch.cat([own[:-1], null]))
    assert torch.equal(expected.pop(table), source.y_embedder.embedding_table.weight)
    assert same_weights(found, expected)
    x, t, _ = inputs()
    nobody = source(x, t, torch.full((3,), CLASSES))  # without a label, the network is the one that it started from
    assert torch.equal(model(x, t, torch.full((3,), classes), level=levels - 1), nobody)


@torch.no_grad()
def test_new_labels_meet_the_finest_level_of_a_pyramid():
    """In a model with a single level, the finest level's embedding joins every row of the label table, new or not."""
    two, sit = tiny(2), tiny(1, num_classes=2)
    own, level = sit.y_embedder.embedding_table.weight[:2].clone(), two.level_embedder.embedding_table.weight[1]
    initialize_levels(sit, two)
    null = two.y_embedder.embedding_table.weight[-1:]
    assert torch.equal(sit.y_embedder.embedding_table.weight, torch.cat([own, null]) + level)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 128}, "hidden_size is 128 there, 64 here"),
        ({"depth": 3}, "depth is 3 there, 2 here"),
        ({"in_channels": 3}, "in_channels is 3 there, 4 here"),
        ({"num_heads": 2}, "num_heads is 2 there, 4 here"),
        ({"mlp_ratio": 2.0}, "width of the MLP is 128 there, 256 here"),
        ({"bottleneck": 9}, "bottleneck is 9 there, None here"),
        ({"patch_sizes": (8, 4)}, r"none of their patches \(8x8, 4x4\) divides 2x4"),
    ],
)
def test_a_start_from_another_model_is_refused(fields, message):
    model = tiny(3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        initialize_levels(model, tiny(2, **fields))
    assert same_weights(model.state_dict(), before)
