"""The network against its published sizes, closed forms, other libraries, and a DiT written a second time."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import MODELS, PyramidalPatchDiT, canonical_name, create_model, patchify, unpatchify
from positions import sincos_position_embedding

TINY = {"hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "in_channels": 3}
SQUARE = {**TINY, "input_size": 8, "patch_sizes": ((4, 4), (2, 4), (2, 2))}
OBLONG = {**TINY, "input_size": (4, 12), "patch_sizes": ((4, 3), (2, 3), (1, 2)), "mlp_ratio": 1.5}
SINGLE = {**TINY, "input_size": 6, "patch_sizes": (2,), "learn_sigma": False}
CONFIGS = pytest.mark.parametrize("config", [SQUARE, OBLONG, SINGLE], ids=["square", "oblong", "single"])


def on_meta(name: str, **overrides) -> PyramidalPatchDiT:
    with torch.device("meta"):
        return create_model(name, **overrides)


def random_model(config: dict, dtype: torch.dtype = torch.float64) -> PyramidalPatchDiT:
    """A model in which every parameter is random and matters: nothing is zero, no bias, no gate."""
    model = PyramidalPatchDiT(**config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            width = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.normal_(std=width, generator=generator)
    return model


def random_inputs(model: PyramidalPatchDiT, n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, model.in_channels, *model.input_size, generator=generator, dtype=dtype)
    t = torch.rand(n, generator=generator, dtype=dtype)
    y = torch.arange(n) * 2 % (model.num_classes + 1)
    y[-1] = model.num_classes  # the null label
    return x, t, y


# -- Sizes, against the published table ----------------------------------------------------------------------------

SIZES = {  # depth, hidden size and heads; parameters of SiT/2, PPF-2 and PPF-3; GMACs with 4x4, 2x4 and 2x2 patches
    "S": ((12, 384, 6), (32_865_056, 32_940_064, 32_977_760), ("1.41", "2.88", "6.06")),
    "B": ((12, 768, 12), (130_315_808, 130_465_696, 130_541_024), ("5.57", "11.23", "23.01")),
    "L": ((24, 1024, 16), (457_840_672, 458_040_480, 458_140_896), ("19.7", "39.63", "80.7")),
    "XL": ((28, 1152, 16), (674_834_720, 675_059_488, 675_172_448), ("29.04", "58.37", "118.62")),
}


@pytest.mark.parametrize("size", SIZES)
def test_shapes_parameters_and_gmacs_are_those_of_the_published_models(size):
    shape, parameters, (coarse, middle, fine) = SIZES[size]
    gmacs = {f"SiT-{size}/2": [fine], f"PPF-{size}-2": [coarse, fine], f"PPF-{size}-3": [coarse, middle, fine]}
    for (name, expected), count in zip(gmacs.items(), parameters, strict=True):
        model = on_meta(name)
        assert (len(model.blocks), model.blocks[0].attn.proj.out_features, model.num_heads) == shape
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count, name
        digits = [len(value.partition(".")[2]) for value in expected]
        measured = [f"{model.macs(level) / 1e9:.{n}f}" for level, n in enumerate(digits)]
        assert measured == expected, name


@CONFIGS
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_are_half_the_flops_that_pytorch_counts(config, device):
    with torch.device(device):
        model = PyramidalPatchDiT(**config)
        inputs = torch.zeros(1, model.in_channels, *model.input_size), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    for level in range(model.num_levels):
        # Attention as two matrix products: older counters do not know all of its fused kernels.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs, level=level)
        assert 2 * model.macs(level) == counter.get_total_flops()


# -- Patches -------------------------------------------------------------------------------------------------------

CUTS = [((8, 8), (4, 4)), ((8, 8), (2, 4)), ((8, 8), (2, 2)), ((6, 12), (3, 4)), ((4, 10), (1, 5)), ((4, 6), (4, 6))]


@pytest.mark.parametrize(("size", "patch"), CUTS)
def test_unpatchify_inverts_patchify(size, patch):
    x = torch.arange(2 * 3 * size[0] * size[1]).reshape(2, 3, *size)
    assert torch.equal(unpatchify(patchify(x, patch), patch, size), x)


@pytest.mark.parametrize(("size", "patch"), CUTS)
def test_a_token_lists_its_pixels_by_row_column_channel(size, patch):
    (h, w), (p, q), channels = size, patch, 3
    x = torch.arange(2 * channels * h * w).reshape(2, channels, h, w)
    tokens = patchify(x, patch)
    assert tokens.shape == (2, (h // p) * (w // q), p * q * channels)
    for n, i, j, c in itertools.product(range(2), range(h), range(w), range(channels)):
        token = (i // p) * (w // q) + j // q
        feature = ((i % p) * q + j % q) * channels + c
        assert tokens[n, token, feature] == x[n, c, i, j]


@CONFIGS
def test_an_embedding_is_a_strided_convolution(config):
    model = random_model(config)
    x, _, _ = random_inputs(model)
    for linear, (p, q) in zip(model.x_embedder, model.patch_sizes, strict=True):
        kernel = torch.stack([linear.weight[:, c :: model.in_channels].reshape(-1, p, q) for c in range(x.shape[1])], 1)
        expected = F.conv2d(x, kernel, linear.bias, stride=(p, q)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(linear(patchify(x, (p, q))), expected, atol=1e-12, rtol=0)


# -- Positions -----------------------------------------------------------------------------------------------------


def mae_1d(dim: int, position: np.ndarray) -> np.ndarray:
    omega = 1 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = np.einsum("m,d->md", position.reshape(-1), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def mae_2d(dim: int, height: int, width: int) -> np.ndarray:
    """MAE's table; its np.meshgrid(columns, rows) puts the column coordinate first."""
    grid = np.stack(np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64)), axis=0)
    return np.concatenate([mae_1d(dim // 2, grid[0]), mae_1d(dim // 2, grid[1])], axis=1)


@pytest.mark.parametrize(("dim", "height", "width"), [(32, 16, 16), (8, 3, 5), (1152, 16, 16)])
def test_positions_are_the_table_of_mae(dim, height, width):
    table = sincos_position_embedding(dim, torch.arange(height), torch.arange(width))
    np.testing.assert_allclose(table.numpy(), mae_2d(dim, height, width), atol=1e-7)


def test_the_finest_level_has_the_positions_of_its_own_grid():
    model = PyramidalPatchDiT(**OBLONG)
    np.testing.assert_allclose(model.pos_embed_2.numpy(), mae_2d(32, 4, 6), atol=1e-7)


@pytest.mark.parametrize("patch_sizes", [((4, 4), (2, 4), (2, 2)), ((8, 2), (4, 4), (2, 2)), ((6, 4), (1, 2))])
def test_a_coarse_token_has_the_position_of_its_top_left_fine_token(patch_sizes):
    model = PyramidalPatchDiT(**{**TINY, "input_size": (24, 16), "patch_sizes": patch_sizes})
    finest = len(patch_sizes) - 1
    fine_p, fine_q = patch_sizes[finest]
    fine = getattr(model, f"pos_embed_{finest}").reshape(24 // fine_p, 16 // fine_q, -1)
    for level, (p, q) in enumerate(patch_sizes[:-1]):
        corners = fine[:: p // fine_p, :: q // fine_q].flatten(0, 1)
        torch.testing.assert_close(getattr(model, f"pos_embed_{level}"), corners, atol=0, rtol=0)


def test_positions_are_not_part_of_the_weights():
    model = PyramidalPatchDiT(**SQUARE)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


# -- A second implementation ---------------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.mlp = Mlp(width, 4 * width, act_layer=lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))


class PlainDiT(nn.Module):
    """DiT with SiT's conventions, from timm's modules, with the parameter names of SiT's files."""

    def __init__(self, size, patch, channels, width, depth, heads, classes) -> None:
        super().__init__()
        self.x_embedder = PatchEmbed(size, patch, channels, width)
        time_mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.t_embedder = nn.ModuleDict({"mlp": time_mlp})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        head = nn.Linear(width, 2 * channels * patch[0] * patch[1])
        self.final_layer = nn.ModuleDict({"adaLN_modulation": modulation, "linear": head})

    def forward(self, x, t, y, positions):
        angle = torch.stack([t * 10000 ** (-i / 128) for i in range(128)], dim=1)
        c = self.t_embedder.mlp(torch.cat([torch.cos(angle), torch.sin(angle)], dim=1))
        c = c + self.y_embedder.embedding_table(y)
        h = self.x_embedder(x) + positions
        norm = nn.LayerNorm(h.shape[-1], elementwise_affine=False, eps=1e-6)
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            h = h + gate1 * block.attn(norm(h) * (1 + scale1) + shift1)
            h = h + gate2 * block.mlp(norm(h) * (1 + scale2) + shift2)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        out = self.final_layer.linear(norm(h) * (1 + scale) + shift)
        out = out.reshape(len(x), *self.x_embedder.grid_size, *self.x_embedder.patch_size, -1)
        mean, _ = torch.einsum("nhwpqc->nchpwq", out).reshape(len(x), -1, *x.shape[2:]).chunk(2, dim=1)
        return mean


@pytest.mark.parametrize("levels", [((2, 2),), ((4, 4),), SQUARE["patch_sizes"], OBLONG["patch_sizes"]])
def test_every_level_is_a_plain_dit(levels):
    """The level's embedding, head and positions, and the shared blocks; its own embedding joins the class's."""
    config = {**TINY, "input_size": OBLONG["input_size"], "patch_sizes": levels, "depth": 3}
    model = random_model(config)
    inputs = random_inputs(model, n=4)
    for level, patch in enumerate(levels):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if len(levels) > 1:
            level_embedding = weights.pop("level_embedder.embedding_table.weight")[level]
            weights["y_embedder.embedding_table.weight"] += level_embedding
        embeddings, heads = (
            [{kind: weights.pop(f"{name}.{k}.{kind}") for kind in ("weight", "bias")} for k in range(len(levels))][
                level
            ]
            for name in ("x_embedder", "final_layer.linear")
        )
        kernel = embeddings["weight"].reshape(32, *patch, 3).permute(0, 3, 1, 2)
        weights |= {"x_embedder.proj.weight": kernel, "x_embedder.proj.bias": embeddings["bias"]}
        weights |= {f"final_layer.linear.{kind}": tensor for kind, tensor in heads.items()}
        plain = PlainDiT(config["input_size"], patch, channels=3, width=32, depth=3, heads=4, classes=5).double()
        plain.load_state_dict(weights)
        out = model(*inputs, level=level)
        assert out.abs().mean() > 0.1
        expected = plain(*inputs, getattr(model, f"pos_embed_{level}"))
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


# -- What the network computes -------------------------------------------------------------------------------------


@CONFIGS
def test_the_output_is_zero_at_initialisation(config):
    model = PyramidalPatchDiT(**config)
    inputs = random_inputs(model, dtype=torch.float32)
    for level in range(model.num_levels):
        out = model(*inputs, level=level)
        assert out.shape == inputs[0].shape
        assert not out.any()


def test_initial_weights_have_the_published_scales():
    torch.manual_seed(0)
    model = PyramidalPatchDiT(input_size=8, patch_sizes=(4, 2), hidden_size=256, depth=1, num_heads=4)
    block = model.blocks[0]
    xavier = {
        linear: (2 / sum(linear.weight.shape)) ** 0.5
        for linear in (*model.x_embedder, block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    }
    normal = dict.fromkeys((model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]), 0.02)
    for module, std in {**xavier, **normal}.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.05)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "adaLN_modulation" in name or "final_layer" in name:
            assert not parameter.any(), name


@CONFIGS
def test_the_network_is_a_pure_function(config):
    model = random_model(config)
    inputs = random_inputs(model)
    kept = [tensor.clone() for tensor in inputs]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    for level in range(model.num_levels):
        model.train()
        first = model(*inputs, level=level)
        model.eval()
        assert torch.equal(model(*inputs, level=level), first)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@CONFIGS
def test_samples_of_a_batch_do_not_see_each_other(config):
    model = random_model(config)
    inputs = random_inputs(model, n=4)
    for level in range(model.num_levels):
        alone = torch.cat([model(*(tensor[i : i + 1] for tensor in inputs), level=level) for i in range(4)])
        torch.testing.assert_close(model(*inputs, level=level), alone, atol=1e-11, rtol=0)


def test_the_second_half_of_the_channels_of_learn_sigma_has_no_influence():
    model = random_model(SQUARE)
    inputs = random_inputs(model)
    for level, (p, q) in enumerate(model.patch_sizes):
        head = model.final_layer.linear[level]
        assert head.out_features == p * q * 2 * 3
        sigma = (torch.arange(head.out_features) % 6 >= 3).nonzero().squeeze(1)  # rows are (p, q, channel)
        before = model(*inputs, level=level)
        with torch.no_grad():
            head.weight[sigma], head.bias[sigma] = 7.0, -3.0
        assert torch.equal(model(*inputs, level=level), before)
        with torch.no_grad():
            head.bias[(sigma + 3) % head.out_features] += 1.0
        torch.testing.assert_close(model(*inputs, level=level), before + 1)


# -- Levels --------------------------------------------------------------------------------------------------------


@CONFIGS
def test_levels_share_everything_but_embedding_and_head(config):
    model = random_model(config)
    inputs = random_inputs(model)
    reached = []
    for level in range(model.num_levels):
        model.zero_grad(set_to_none=True)
        model(*inputs, level=level).square().sum().backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert set.union(*reached) == set(names.values())
    assert {name for name in names.values() if name.startswith("blocks.")} <= set.intersection(*reached)
    for level in range(model.num_levels):
        others = set().union(*(reached[k] for k in range(model.num_levels) if k != level))
        own = {names[parameter] for parameter in model.level_parameters(level)}
        if model.num_levels > 1:
            assert own == reached[level] - others
        assert {name.split(".")[0] for name in own} == {"x_embedder", "final_layer"}


def test_a_level_uses_its_own_row_of_the_level_table():
    model = random_model(SQUARE)
    inputs = random_inputs(model)
    table = model.level_embedder.embedding_table.weight
    for level in range(3):
        (gradient,) = torch.autograd.grad(model(*inputs, level=level).sum(), table)
        assert gradient.abs().sum(dim=1).nonzero().squeeze(1).tolist() == [level]


# -- Precision, export and compilation -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_has_the_precision_of_the_model(dtype):
    exact = random_model(SQUARE)
    inputs = random_inputs(exact)
    model = random_model(SQUARE).to(dtype)
    for level in range(3):
        out = model(*(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs), level=level)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact(*inputs, level=level), atol=1e-4, rtol=1e-4)


def test_bfloat16_autocast_gives_the_result_to_its_precision():
    model = random_model(SQUARE, torch.float32)
    inputs = random_inputs(model, dtype=torch.float32)
    for level in range(3):
        exact = model(*inputs, level=level)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs, level=level)
        error = (out.float() - exact).norm() / exact.norm()
        assert 1e-4 < error < 0.05  # bfloat16 was used, and did no harm


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_level_exports_with_any_batch_size(level):
    model = random_model(SQUARE)
    batch = {0: torch.export.Dim.DYNAMIC}
    shapes = {"x": batch, "t": batch, "y": batch, "level": None}
    program = torch.export.export(model, random_inputs(model, n=3), {"level": level}, dynamic_shapes=shapes)
    inputs = random_inputs(model, n=5)
    out = program.module()(*inputs, level=level)
    assert out.abs().mean() > 0.1
    torch.testing.assert_close(out, model(*inputs, level=level), atol=1e-10, rtol=1e-10)


def check_compiled(backend: str, levels: range) -> None:
    torch._dynamo.reset()
    model = random_model(SQUARE)
    inputs = random_inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for level in levels:
        out = compiled(*inputs, level=level)
        assert out.abs().mean() > 0.1
        torch.testing.assert_close(out, model(*inputs, level=level), atol=1e-10, rtol=1e-10)
        if out.requires_grad:
            weight = model.blocks[0].attn.qkv.weight
            gradients = [
                torch.autograd.grad(f(*inputs, level=level).square().sum(), weight)[0] for f in (compiled, model)
            ]
            torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_each_level_compiles_to_one_graph_with_gradients():
    check_compiled("aot_eager", range(3))


@pytest.mark.slow
@torch.no_grad()
def test_a_level_compiles_with_inductor():
    check_compiled("inductor", range(1))


# -- The patch embedding's bottleneck --


@torch.no_grad()
def test_a_bottleneck_factors_the_patch_embedding():
    model = random_model({**SQUARE, "bottleneck": 7})
    plain = random_model(SQUARE)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("x_embedder.")}
    for level, (down, up) in enumerate(model.x_embedder):
        assert (down.out_features, down.bias, up.in_features) == (7, None, 7)
        state |= {f"x_embedder.{level}.weight": up.weight @ down.weight, f"x_embedder.{level}.bias": up.bias}
        own = {id(parameter) for parameter in model.level_parameters(level)}
        assert {id(parameter) for parameter in (down.weight, up.weight, up.bias)} < own
    plain.load_state_dict(state)
    for level in range(3):
        inputs = random_inputs(model)
        torch.testing.assert_close(model(*inputs, level=level), plain(*inputs, level=level))
    assert PyramidalPatchDiT(**model.config).state_dict().keys() == model.state_dict().keys()
    for start in PyramidalPatchDiT(**{**SQUARE, "bottleneck": 7}).x_embedder[0]:  # Xavier's, as without
        bound = (6 / sum(start.weight.shape)) ** 0.5
        assert 0.8 * bound < start.weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("bottleneck", "message"),
    [
        (0, "a bottleneck of 0 is none between the 48 values of a 4x4 patch and the width 32: give 1 to 31"),
        (32, "a bottleneck of 32 is none"),
        (12, "between the 12 values of a 2x2 patch and the width 32: give 1 to 11"),
    ],
)
def test_a_bottleneck_that_is_none_is_refused(bottleneck, message):
    with pytest.raises(ValueError, match=message):
        PyramidalPatchDiT(**SQUARE, bottleneck=bottleneck)


# -- Names and configurations --------------------------------------------------------------------------------------


def test_every_registered_name_builds():
    expected = {f"PPF-{size}-{levels}": levels for size in ("T", "S", "B", "L", "XL") for levels in (2, 3)}
    expected |= {f"SiT-{size}/{patch}": 1 for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} | {"SiT-T/2": 1}
    expected |= {f"SiT-{size}/{patch}": 1 for size in ("B", "L") for patch in (16, 32)}
    expected |= {f"PPF-{size}-{n}/{patch}": n for size in ("B", "L") for n in (2, 3) for patch in (16, 32)}
    expected |= {f"FiT-{size}/2": 1 for size in ("B", "L", "XL")} | {f"FiTv2-{size}/2": 1 for size in ("B", "XL", "3B")}
    expected |= {f"PPFiT-{size}-{levels}": levels for size in ("T", "S", "B", "XL") for levels in (2, 3)}
    assert set(MODELS) == set(expected)
    pyramids = {1: None, 2: ((4, 4), (2, 2)), 3: ((4, 4), (2, 4), (2, 2))}
    for name, levels in expected.items():
        model = on_meta(name)
        assert model.num_levels == levels
        finest = int(name.split("/")[1]) if "/" in name else 2
        patch_sizes = pyramids[levels] or ((2, 2),)
        assert model.patch_sizes == tuple((p * finest // 2, q * finest // 2) for p, q in patch_sizes)
        if finest > 8:  # for pixels: no half of the head is dropped
            assert model.sample_shape == (3, 16 * finest, 16 * finest)
            assert (model.num_tokens(levels - 1), model.learn_sigma) == (256, False)


SPELLINGS = [
    ("PPFlow_XL_2", "PPF-XL-2"),
    ("ppflow-xl-2", "PPF-XL-2"),
    ("PPFXL2", "PPF-XL-2"),
    ("ppf_b-3", "PPF-B-3"),
    ("PPFlow/S/3", "PPF-S-3"),
    ("PPFlowT2", "PPF-T-2"),
    ("sit-xl-2", "SiT-XL/2"),
    ("SiT_L_8", "SiT-L/8"),
    ("SIT-T/2", "SiT-T/2"),
    ("sitb4", "SiT-B/4"),
    ("ppf-b-2-16", "PPF-B-2/16"),
    ("FiTv1-XL/2", "FiT-XL/2"),
    ("fitv2_3b_2", "FiTv2-3B/2"),
    ("ppfit-xl-3", "PPFiT-XL-3"),
]


@pytest.mark.parametrize(("name", "canonical"), SPELLINGS)
def test_the_spelling_of_a_name_does_not_matter(name, canonical):
    assert canonical_name(name) == canonical
    assert on_meta(name).config == on_meta(canonical).config


def test_canonical_names_are_their_own():
    assert [canonical_name(name) for name in MODELS] == list(MODELS)


@pytest.mark.parametrize("name", ["PPF-XXL-2", "PPF-XL-4", "SiT-XL", "", "XL/2", "SiT-T/4"])
def test_an_unknown_name_is_answered_with_the_choices(name):
    with pytest.raises(ValueError, match="unknown model") as error:
        create_model(name)
    assert repr(name) in str(error.value)
    assert all(choice in str(error.value) for choice in MODELS)


def test_any_field_of_a_registered_model_can_be_overridden():
    overrides = {
        "input_size": (8, 16),
        "patch_sizes": ((4, 8), (2, 2)),
        "in_channels": 1,
        "hidden_size": 48,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "num_classes": 7,
        "learn_sigma": False,
    }
    model = create_model("PPF-T-2", **overrides)
    out = model(torch.zeros(2, 1, 8, 16), torch.zeros(2), torch.tensor([0, 7]), level=1)
    assert out.shape == (2, 1, 8, 16)
    assert len(model.blocks) == 3
    assert model.blocks[0].mlp.fc1.weight.shape == (96, 48)
    assert model.y_embedder.embedding_table.weight.shape == (8, 48)
    assert model.final_layer.linear[0].out_features == 32
    with pytest.raises(TypeError, match="bogus"):
        create_model("PPF-T-2", bogus=1)


@CONFIGS
def test_a_model_can_be_rebuilt_from_its_config_as_json(config):
    model = random_model(config)
    rebuilt = PyramidalPatchDiT(**json.loads(json.dumps(model.config))).double()
    assert rebuilt.config == model.config
    rebuilt.load_state_dict(model.state_dict())
    inputs = random_inputs(model)
    for level in range(model.num_levels):
        assert torch.equal(rebuilt(*inputs, level=level), model(*inputs, level=level))


# -- Errors --------------------------------------------------------------------------------------------------------

WRONG = [
    ({"patch_sizes": ((4, 4), (2, 3))}, "2x3 patch of level 1 does not divide the 8x8 input"),
    ({"patch_sizes": ((4, 4), (2, 2)), "input_size": (6, 8)}, "4x4 patch of level 0 does not divide the 6x8 input"),
    ({"patch_sizes": (0,)}, "0x0 patch of level 0 does not divide"),
    ({"patch_sizes": (-2,)}, "-2x-2 patch of level 0 does not divide"),
    ({"patch_sizes": (16,)}, "16x16 patch of level 0 does not divide the 8x8 input"),
    ({"patch_sizes": ()}, "patch_sizes is empty"),
    ({"patch_sizes": ((2, 2, 2),)}, r"\(2, 2, 2\)"),
    ({"input_size": 0}, "input_size must be at least 1"),
    ({"input_size": (8, -8)}, "input_size must be at least 1"),
    ({"hidden_size": 30, "num_heads": 4}, "hidden_size 30 must be divisible by num_heads 4"),
    ({"hidden_size": 30, "num_heads": 5}, "hidden_size 30 must be divisible by num_heads 5 and by 4"),
    ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
    ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
    ({"num_heads": -4}, "num_heads must be at least 1, got -4"),
    ({"depth": 0}, "depth must be at least 1, got 0"),
    ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ({"mlp_ratio": -1.0}, "mlp_ratio"),
    ({"mlp_ratio": float("nan")}, "mlp_ratio"),
    ({"mlp_ratio": float("inf")}, "mlp_ratio"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_fields_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PyramidalPatchDiT(**{**SQUARE, **fields})


def test_a_fraction_is_no_patch_size():
    with pytest.raises(TypeError, match="float"):
        PyramidalPatchDiT(**{**SQUARE, "patch_sizes": ((2.5, 2),)})


@pytest.mark.parametrize("level", [-1, 3])
def test_a_level_out_of_range_is_an_error(level):
    model = PyramidalPatchDiT(**SQUARE)
    with pytest.raises(ValueError, match=rf"level {level} is out of range: the model has 3 level"):
        model(*random_inputs(model, dtype=torch.float32), level=level)


@pytest.mark.parametrize("shape", [(3, 8, 4), (4, 8, 8), (3, 4, 4), (3, 16, 16), (8, 8)])
def test_an_input_of_another_size_is_an_error(shape):
    model = PyramidalPatchDiT(**SQUARE)
    with pytest.raises(ValueError, match=f"takes 3x8x8 inputs, got {'x'.join(map(str, shape))}$"):
        model(torch.zeros(2, *shape), torch.zeros(2), torch.zeros(2, dtype=torch.long))
