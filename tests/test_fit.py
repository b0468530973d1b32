"""Networks of any size: FiT's and FiTv2's published sizes, symmetries of rotary positions, groups of mixed sizes."""

import copy
import math

import numpy as np
import pytest
import torch
from test_groups import gradients
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blocks import Joined
from models import PyramidalPatchDiT, create_model
from positions import RopeScaling, rotate
from runtime.speed import compile_levels
from transport.paths import PATHS

pytestmark = pytest.mark.usefixtures("one_thread")

# Heads of 8 features; the second has every part of FiTv2, the first those of FiT.
V1 = {"position": "rope", "mlp": "swiglu", "hidden_size": 32, "num_heads": 4, "depth": 2, "num_classes": 5}
V1 |= {"input_size": 8, "in_channels": 3, "patch_sizes": ((2, 2),)}
V2 = {**V1, "qk_norm": True, "adaln_rank": 8, "mlp_ratio": 8 / 3, "learn_sigma": False}
PYRAMID = {**V2, "patch_sizes": ((4, 4), (2, 4), (2, 2))}
CONFIGS = pytest.mark.parametrize("config", [V1, V2, PYRAMID], ids=["v1", "v2", "pyramid"])


def random_model(config: dict, dtype: torch.dtype = torch.float64) -> PyramidalPatchDiT:
    """A model in which every parameter is random and matters, and whose attention is far from uniform."""
    model = PyramidalPatchDiT(**config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.normal_(std=width, generator=generator)
        for block in model.blocks:
            block.attn.qkv.weight.mul_(2)
    return model


def group(
    size: tuple[int, int], n: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed + 100 * size[0] + size[1])
    x = torch.randn(n, 3, *size, generator=generator, dtype=dtype)
    return x, torch.rand(n, generator=generator, dtype=dtype), torch.randint(6, (n,), generator=generator)


# -- Published sizes -------------------------------------------------------------------------------------------------

PUBLISHED = {  # parameters; GMACs of 256, 400 and 1024 tokens, not all of which are counted again
    "FiT-B/2": (158_664_224, (30.2, None, None)),
    "FiT-L/2": (558_602_272, (None, None, None)),
    "FiT-XL/2": (823_599_392, (None, None, None)),
    "FiTv2-B/2": (128_149_072, (None, 46.2, 132.9)),
    "FiTv2-XL/2": (671_045_776, (None, None, None)),
    "FiTv2-3B/2": (2_971_928_080, (None, None, None)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_gmacs_are_those_of_the_published_models(name):
    parameters, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        model = create_model(name)
    assert model.num_parameters == parameters
    if name in (tensors := {"FiT-XL/2": 347, "FiTv2-XL/2": 517, "FiTv2-3B/2": 573}):
        assert len(model.state_dict()) == tensors[name]
    for size, expected in zip(((32, 32), (40, 40), (64, 64)), gmacs, strict=True):
        if expected is not None:
            assert model.macs(0, size) / 1e9 == pytest.approx(expected, rel=2e-3)
    assert model.num_tokens(0, (20, 60)) == 300


def test_the_share_that_fitv2_trains_again_for_larger_images():
    """Embedding of patches, biases, modulations and the head: 14.15 % in the paper's table."""
    with torch.device("meta"):
        model = create_model("FiTv2-XL/2")
    again = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if any(part in name for part in ("x_embedder", "bias", "LN", "final_layer"))
    )
    assert again / model.num_parameters == pytest.approx(0.14151, abs=5e-6)


@pytest.mark.parametrize("name", ["PPFiT-T-2", "PPFiT-S-3", "PPFiT-B-2", "PPFiT-XL-3"])
def test_a_pyramid_has_fitv2s_block(name):
    with torch.device("meta"):
        model = create_model(name)
    size = {
        "PPFiT-T-2": (6, 128, 4),
        "PPFiT-S-3": (15, 384, 6),
        "PPFiT-B-2": (15, 768, 12),
        "PPFiT-XL-3": (36, 1152, 16),
    }
    assert (model.depth, model.hidden_size, model.num_heads) == size[name]
    assert model.patch_sizes == {"2": ((4, 4), (2, 2)), "3": ((4, 4), (2, 4), (2, 2))}[name[-1]]
    assert (model.position, model.mlp, model.qk_norm) == ("rope", "swiglu", True)
    assert model.adaln_rank == model.hidden_size // 4
    assert model.blocks[0].mlp.fc2.in_features == int(4 * model.hidden_size) * 2 // 3
    assert (model.learn_sigma, model.train_tokens) == (False, 256)


# -- Any size ----------------------------------------------------------------------------------------------------------


@CONFIGS
def test_the_output_has_the_size_of_the_input_and_is_zero_at_initialisation(config):
    model = PyramidalPatchDiT(**config)
    for size in ((8, 8), (4, 12), (20, 8)):
        for level in range(model.num_levels):
            out = model(*group(size, dtype=torch.float32), level=level)
            assert out.shape == (2, 3, *size)
            assert not out.any()


@CONFIGS
def test_only_differences_of_positions_matter(config, monkeypatch):
    """Adding a constant to all rows, and another to all columns, changes nothing."""
    model = random_model(config)
    x_t_y = group((8, 12))
    expected = [model(*x_t_y, level=level) for level in range(model.num_levels)]
    frequencies = torch.tensor([1.0, 0.01], dtype=torch.float64)
    shift = torch.cat([5.0 * frequencies, -3.5 * frequencies])  # of 4 pairs: two of the row, two of the column
    turn = torch.stack([shift.cos(), shift.sin()])[None, :, None]
    monkeypatch.setattr("blocks.rotate", lambda x, table: rotate(rotate(x, table), turn))
    for level, before in enumerate(expected):
        torch.testing.assert_close(model(*x_t_y, level=level), before, atol=1e-10, rtol=1e-10)


def transposed(model: PyramidalPatchDiT) -> PyramidalPatchDiT:
    """The network of transposed images: rows and columns change places in patches, heads and the halves of q and k."""
    other = PyramidalPatchDiT(**{**model.config, "patch_sizes": [(q, p) for p, q in model.patch_sizes]}).double()
    weights = copy.deepcopy(model.state_dict())

    def swap(rows: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
        return rows.unflatten(0, (*patch, -1)).transpose(0, 1).flatten(0, 2)

    for level, patch in enumerate(model.patch_sizes):
        weights[f"x_embedder.{level}.weight"] = swap(weights[f"x_embedder.{level}.weight"].T, patch).T
        for end in ("weight", "bias"):
            name = f"final_layer.linear.{level}.{end}"
            weights[name] = swap(weights[name], patch)
    for block in range(model.depth):
        for end in ("weight", "bias"):
            name = f"blocks.{block}.attn.qkv.{end}"
            q_k, v = weights[name].split([2 * model.hidden_size, model.hidden_size])
            halves = q_k.unflatten(0, (2 * model.num_heads, 2, -1)).flip(1).flatten(0, 2)
            weights[name] = torch.cat([halves, v])
    other.load_state_dict(weights)
    return other


@CONFIGS
@pytest.mark.parametrize("kind", ["normal", "ntk", "yarn"])
def test_the_network_of_transposed_images(config, kind):
    """Catches every mix-up of rows and columns, in positions, patches and scaling."""
    model = random_model(config)
    other = transposed(model)
    model.rope_scaling = other.rope_scaling = RopeScaling(kind)
    x, t, y = group((4, 20))
    for level in range(model.num_levels):
        expected = model(x, t, y, level=level)
        found = other(x.mT, t, y, level=level).mT
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
        assert (model(x.mT, t, y, level=level).mT - expected).abs().max() > 0.1 or model.patch_sizes[level] == (2, 4)


def test_scaling_matters_beyond_the_tokens_of_training_alone():
    model = random_model(V2)
    within, beyond = group((4, 16)), group((8, 12))
    by_default = [model(*x_t_y) for x_t_y in (within, beyond)]
    outputs = {}
    for kind in ("normal", "linear", "ntk", "auto"):
        model.rope_scaling = RopeScaling(kind)
        outputs[kind] = [model(*x_t_y) for x_t_y in (within, beyond)]
    model.rope_scaling = RopeScaling("ntk", attention_scale="log")
    assert torch.equal(outputs["auto"][1], model(*beyond))
    assert torch.equal(outputs["auto"][0], outputs["normal"][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs["auto"], by_default, strict=True))
    for kind in ("linear", "ntk", "auto"):
        assert (outputs[kind][1] - outputs["normal"][1]).abs().max() > 1e-3, kind


def test_the_tokens_of_training_are_those_of_the_first_size():
    model = PyramidalPatchDiT(**{**PYRAMID, "input_size": (8, 16)})
    assert model.train_tokens == 32
    larger = PyramidalPatchDiT(**{**model.config, "input_size": [32, 32]})
    assert (larger.input_size, larger.train_tokens) == ((32, 32), 32)
    assert PyramidalPatchDiT(**{**PYRAMID, "train_tokens": 100}).train_tokens == 100


def test_coarse_tokens_are_placed_on_the_fine_grid():
    model = PyramidalPatchDiT(**PYRAMID)
    x = torch.zeros(1, 3, 8, 8)
    coarse, fine = model.rotation(x, 0), model.rotation(x, 2)
    corners = fine.unflatten(2, (4, 4))[:, :, ::2, ::2].flatten(2, 3)
    assert torch.equal(coarse, corners)
    assert coarse[0, 0, 2, 0].item() == pytest.approx(math.cos(2), rel=1e-6)  # the second row is two fine tokens down


# -- Groups of mixed sizes -----------------------------------------------------------------------------------------

# 8x12 and 12x8 have the same number of tokens at levels of square patches: they share attention calls.
MIXES = [
    ([(8, 8), (8, 12), (12, 8)], [2, 2, 2]),
    ([(8, 12), (12, 8), (4, 24), (8, 12)], [2, 2, 2, 2]),
    ([(8, 8), (8, 8), (12, 8), (16, 16)], [0, 2, 0, 1]),
    ([(16, 8), (8, 16), (16, 16)], [0, 0, 0]),
]


@pytest.mark.parametrize(("sizes", "levels"), MIXES)
@pytest.mark.parametrize("kind", ["auto", "normal"])
def test_groups_of_mixed_sizes_are_each_alone_with_gradients(sizes, levels, kind):
    model = random_model(PYRAMID)
    model.rope_scaling = RopeScaling(kind)
    groups = [group(size, n=1 + index % 3, seed=index) for index, size in enumerate(sizes)]
    found = model(*zip(*groups, strict=True), level=levels)
    expected = [model(*each, level=level) for each, level in zip(groups, levels, strict=True)]
    for a, b, (x, _, _) in zip(found, expected, groups, strict=True):
        assert a.shape == x.shape
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for a, b in zip(gradients(model, found), gradients(model, expected), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_a_batch_of_mixed_sizes_is_each_sample_alone_in_any_order():
    model = random_model(PYRAMID)
    sizes, levels = [(8, 8), (12, 8), (8, 12), (8, 8)], [2, 1, 2, 0]
    groups = [group(size, seed=index) for index, size in enumerate(sizes)]
    found = model(*zip(*groups, strict=True), level=levels)
    back = [model(*zip(*groups[::-1], strict=True), level=levels[::-1])][0][::-1]
    for outputs in (found, back):
        for output, (x, t, y), level in zip(outputs, groups, levels, strict=True):
            for i in range(len(x)):
                alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], level=level)
                torch.testing.assert_close(output[i : i + 1], alone, atol=1e-10, rtol=1e-10)


def test_a_group_without_samples_shares_a_call_with_another():
    model = random_model(PYRAMID)
    (x, t, y), other = group((8, 12)), group((12, 8))
    for first, second in (
        ((x, t, y), tuple(each[:0] for each in other)),
        (tuple(each[:0] for each in (x, t, y)), other),
    ):
        found = model(*zip(first, second, strict=True), level=[2, 2])
        for output, (noisy, *rest) in zip(found, (first, second), strict=True):
            assert output.shape == noisy.shape
            if len(noisy):
                torch.testing.assert_close(output, model(noisy, *rest, level=2), atol=1e-10, rtol=1e-10)


def test_equal_numbers_of_tokens_share_an_attention_call_and_nothing_is_padded(monkeypatch):
    model = random_model(PYRAMID, torch.float32)
    sizes, levels, counts = [(8, 12), (12, 8), (8, 8), (4, 24)], [2, 2, 2, 1], [2, 1, 3, 2]
    groups = [group(size, n, dtype=torch.float32) for size, n in zip(sizes, counts, strict=True)]
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "blocks.F.scaled_dot_product_attention", lambda q, k, v: (calls.append(tuple(q.shape)), attend(q, k, v))[1]
    )
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*zip(*groups, strict=True), level=levels)
    assert calls == model.depth * [(3, 4, 24, 8), (3, 4, 16, 8), (2, 4, 12, 8)]
    macs = [n * model.macs(level, size) for size, level, n in zip(sizes, levels, counts, strict=True)]
    assert counter.get_total_flops() == 2 * sum(macs)


def test_joined_groups_are_split_again():
    joined = Joined([(0, 4), (1, 4), (0, 4), (0, 6)])
    groups = [torch.full((n, 2), float(n)) for n in (1, 2, 3, 4)]
    whole = joined.join(groups)
    assert [len(part) for part in whole] == [4, 2, 4]
    assert all(torch.equal(a, b) for a, b in zip(joined.split(whole, [1, 2, 3, 4]), groups, strict=True))


# -- Precision, checkpointing, compilation ---------------------------------------------------------------------------


def test_the_sum_over_blocks_stays_in_fp32_under_autocast():
    model = random_model(PYRAMID, torch.float32)
    inputs = group((8, 12), dtype=torch.float32)
    exact = model(*inputs, level=2)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs, level=2)
        assert model.tokens(inputs[0], 2).dtype == torch.float32
    assert (out.dtype, seen) == (torch.float32, [torch.float32])
    assert 1e-4 < (out - exact).norm() / exact.norm() < 0.1  # it was used, and does no harm


def test_blocks_that_are_stored_in_bf16_compute_what_autocast_makes_of_them():
    model = random_model(PYRAMID, torch.float32)
    groups, levels = [group((8, 12), dtype=torch.float32), group((12, 8), dtype=torch.float32)], [2, 2]
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*zip(*groups, strict=True), level=levels)
        model.blocks.bfloat16()
        found = model(*zip(*groups, strict=True), level=levels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_activation_checkpointing_changes_nothing():
    model = random_model(PYRAMID)
    groups, levels = [group((8, 12)), group((12, 8)), group((8, 8))], [2, 2, 0]
    expected = gradients(model, model(*zip(*groups, strict=True), level=levels))
    model.activation_checkpointing = True
    found = gradients(model, model(*zip(*groups, strict=True), level=levels))
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.slow
def test_a_compiled_block_serves_several_sizes():
    torch._dynamo.reset()
    model = random_model(PYRAMID)
    sets = [
        ([(8, 8)], [2], [3]),
        ([(8, 12)], [2], [1]),
        ([(8, 12), (12, 8), (8, 8)], [2, 2, 0], [2, 1, 0]),
        ([(8, 12), (12, 8), (8, 8)], [2, 2, 0], [1, 3, 2]),
        ([(8, 12), (12, 8)], [2, 2], [0, 0]),
    ]
    cases = [
        ([group(size, n) for size, n in zip(sizes, counts, strict=True)], levels) for sizes, levels, counts in sets
    ]
    expected = [model(*zip(*groups, strict=True), level=levels) for groups, levels in cases]
    compile_levels(model, backend="aot_eager")
    for (groups, levels), outputs in zip(cases, expected, strict=True):
        found = model(*zip(*groups, strict=True), level=levels)
        for a, b in zip(found, outputs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


# -- DDPM's index ----------------------------------------------------------------------------------------------------


def test_the_time_input_is_the_index_of_equal_noise():
    """DDPM's alpha-bar, computed step by step, against the VP path's alpha squared."""
    model = PyramidalPatchDiT(**{**V1, "time_input": "ddpm"}).double()
    seen = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    model.t_embedder(t)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    wanted = 2 * np.log(PATHS["VP"].coefficients(t).alpha.numpy())
    index = np.interp(-wanted, -np.log(alpha_bar), np.arange(1000))
    angle = index[:, None] * 10_000 ** (-np.arange(128) / 128)
    np.testing.assert_allclose(seen[0].numpy(), np.concatenate([np.cos(angle), np.sin(angle)], axis=1), atol=2e-3)
    assert 995 < index[0] < 999
    assert index[-1] == 0
    difference = np.abs(index - 1000 * (1 - t.numpy()))[:-1]
    assert 0.4 < difference.max() < 5  # it is not 1000 (1 - t)
    assert "ddpm" not in "".join(model.state_dict())


# -- Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position": "rotary"}, "unknown position 'rotary'; choose one of sincos, rope"),
        ({"mlp": "relu"}, "unknown mlp 'relu'; choose one of gelu, swiglu"),
        ({"time_input": "index"}, "unknown time_input 'index'; choose one of t, ddpm"),
        ({"adaln_rank": 0}, "adaln_rank must be at least 1, got 0"),
        ({"num_heads": 16}, "heads of a multiple of 4 features, not of 2"),
        ({"rope_theta": 1.0}, "rope_theta must be above 1"),
        ({"train_tokens": 0}, "train_tokens must be at least 1"),
        ({"train_tokens": 16, "position": "sincos"}, "train_tokens is about rotary positions"),
        ({"input_size": (8, 6)}, "4x4 patch of level 0 does not divide the 8x6 input"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PyramidalPatchDiT(**{**PYRAMID, **fields})


def test_inputs_that_do_not_fit_are_named():
    model = PyramidalPatchDiT(**PYRAMID)
    assert model(*group((6, 10), dtype=torch.float32), level=2).shape == (2, 3, 6, 10)  # a level's own patch is enough
    with pytest.raises(ValueError, match="the 4x4 patch of level 0 does not divide the 6x8 input"):
        model(*group((6, 8), dtype=torch.float32), level=0)
    with pytest.raises(ValueError, match="the model takes 3xHxW inputs, got 4x8x8"):
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long), level=0)


@pytest.mark.parametrize(
    ("size", "factor", "nearest"),
    [((11, 8), 1, "12x8"), ((300, 310), 8, "288x320"), ((1, 1000), 8, "32x992"), ((335, 320), 8, "320x320")],
)
def test_a_size_that_does_not_fit_is_answered_with_the_nearest(size, factor, nearest):
    model = PyramidalPatchDiT(**PYRAMID)
    with pytest.raises(ValueError, match=f"the nearest size that works is {nearest}"):
        model.input_size_of(size, factor)
    height, width = map(int, nearest.split("x"))
    assert model.input_size_of((height, width), factor) == (height // factor, width // factor)


def test_sine_cosine_positions_know_one_size_alone():
    model = PyramidalPatchDiT(input_size=8, patch_sizes=(2,), hidden_size=32, depth=1, num_heads=4)
    assert model.input_size_of((64, 64), 8) == (8, 8)
    with pytest.raises(ValueError, match="knows 64x64 alone, not 64x96: its positions are sine-cosine"):
        model.input_size_of((64, 96), 8)
