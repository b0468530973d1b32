"""Rotary positions against the frequencies of FiT's code, against timm, and against what must not change."""

import math

import pytest
import torch
from timm.layers import RotaryEmbeddingCat, apply_rot_embed_cat

from positions import ROPE_KINDS, RopeScaling, attention_factor, rope_frequencies, rotary_table, rotate

# f_i at i = 1, 2, d/8 and d/4 - 1 as FiT's code computes them, with 16 tokens in training and 20 or 30 now.
FREQUENCIES = {
    (72, 20): {
        "normal": (0.599484, 0.359381, 0.01, 1.66810e-4),
        "linear": (0.479587, 0.287505, 0.008, 1.33448e-4),
        "ntk": (0.591667, 0.350070, 0.00888576, 1.33448e-4),
        "ntk-parts": (0.591667, 0.318787, 0.008, 1.33448e-4),
        "yarn": (0.539536, 0.287505, 0.008, 1.33448e-4),
    },
    (72, 30): {
        "normal": (0.599484, 0.359381, 0.01, 1.66810e-4),
        "linear": (0.319725, 0.191670, 0.00533333, 8.89654e-5),
        "ntk": (0.577722, 0.333763, 0.00716919, 8.89654e-5),
        "ntk-parts": (0.577722, 0.262716, 0.00533333, 8.89654e-5),
        "yarn": (0.459605, 0.191670, 0.00533333, 8.89654e-5),
    },
    (64, 20): {
        "normal": (0.562341, 0.316228, 0.01, 1.77828e-4),
        "linear": (0.449873, 0.252982, 0.008, 1.42262e-4),
        "ntk": (0.554038, 0.306958, 0.00887799, 1.42262e-4),
        "ntk-parts": (0.554038, 0.279970, 0.008, 1.42262e-4),
        "yarn": (0.506107, 0.252982, 0.008, 1.42262e-4),
    },
    (64, 30): {
        "normal": (0.562341, 0.316228, 0.01, 1.77828e-4),
        "linear": (0.299915, 0.168655, 0.00533333, 9.48416e-5),
        "ntk": (0.539262, 0.290804, 0.00715154, 9.48416e-5),
        "ntk-parts": (0.539262, 0.229729, 0.00533333, 9.48416e-5),
        "yarn": (0.431128, 0.168655, 0.00533333, 9.48416e-5),
    },
}

# The factor of cos and sin at 20x20, 10x30, 16x16, 10x20 and 32x32 tokens.
FACTORS = {
    ("ntk", "fit1"): (1.153465, 1.215205, None, None, None),
    ("ntk", "fit2"): (1.097944, 1.074059, 1.060660, 1.039462, 1.172604),
    ("yarn", None): (1.022314, 1.062861, 1.0, None, None),
    ("normal", None): (1.0, 1.0, 1.0, 1.0, 1.0),
    ("ntk", "log"): (1.0805**0.5, math.sqrt(math.log(300) / math.log(256)), 1.0, 1.0, 1.25**0.5),
}
GRIDS = ((20, 20), (10, 30), (16, 16), (10, 20), (32, 32))


NORMAL = RopeScaling("normal")


def table(tokens: tuple[int, int], scaling: RopeScaling = NORMAL, head_dim: int = 72, **how) -> torch.Tensor:
    """The table of a single level of 2x2 patches, trained on 256 tokens: (2, H, W, d/2)."""
    size, patch = (2 * tokens[0], 2 * tokens[1]), (2, 2)
    fixed = {"dtype": torch.float64, "device": torch.device("cpu"), "train_tokens": 256, "theta": 1e4, **how}
    return rotary_table(head_dim, size, patch, patch, scaling=scaling, **fixed)[0].unflatten(1, tokens)


# -- Frequencies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head_dim", "length"), FREQUENCIES)
def test_frequencies_are_those_of_fits_code(head_dim, length):
    for kind, expected in FREQUENCIES[head_dim, length].items():
        found = rope_frequencies(head_dim, length, 16, kind, 10_000.0)
        assert found.shape == (head_dim // 4,)
        assert found[0] == pytest.approx({"linear": 16 / length}.get(kind, 1.0), rel=1e-12)
        assert found[[1, 2, head_dim // 8, -1]].tolist() == pytest.approx(expected, rel=1e-5), kind


@pytest.mark.parametrize("kind", ROPE_KINDS[1:])
@pytest.mark.parametrize("head_dim", [4, 8, 64, 72, 96])
def test_nothing_changes_up_to_the_length_of_training(kind, head_dim):
    normal = [10_000 ** (-2 * i / (head_dim / 2)) for i in range(head_dim // 4)]
    for length in (1, 10, 16):
        assert rope_frequencies(head_dim, length, 16, kind, 10_000.0).tolist() == pytest.approx(normal, rel=1e-12)


def test_the_lowest_frequency_of_ntk_is_that_of_linear():
    for head_dim, length in ((8, 17), (64, 32), (72, 50.5), (96, 100)):
        ntk, linear = (rope_frequencies(head_dim, length, 16, kind, 500.0) for kind in ("ntk", "linear"))
        assert ntk[-1].item() == pytest.approx(linear[-1].item(), rel=1e-12)
        assert ntk[0] == 1


def test_yarn_keeps_what_fits_code_keeps():
    """With 16 tokens in training yarn keeps nearly no pair, so it is nearly linear."""
    for head_dim, kept in ((72, (1, 1 / 2, 0)), (64, (1, 1 / 2, 0)), (96, (1, 2 / 3, 1 / 3, 0))):
        normal, yarn = (rope_frequencies(head_dim, 32, 16, kind, 10_000.0)[: len(kept)] for kind in ("normal", "yarn"))
        expected = [share + (1 - share) / 2 for share in kept]
        assert (yarn / normal).tolist() == pytest.approx(expected, rel=1e-12)


# -- The attention's factor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scale"), FACTORS)
def test_factors_are_those_of_fits_code(kind, scale):
    for tokens, expected in zip(GRIDS, FACTORS[kind, scale], strict=True):
        if expected is not None:
            found = attention_factor(RopeScaling(kind, attention_scale=scale), tokens, 256, max(tokens) / 16)
            assert math.sqrt(found) == pytest.approx(expected, rel=2e-6 if scale != "log" else 1e-4)
            squares = table(tokens, RopeScaling(kind, attention_scale=scale)).square().sum(0)
            torch.testing.assert_close(squares, torch.full_like(squares, found))  # cos^2 + sin^2


@pytest.mark.parametrize("patch", [(4, 4), (2, 4), (2, 2)])
def test_a_level_has_the_factor_of_its_own_tokens(patch):
    how = {"train_tokens": 256, "theta": 1e4, "dtype": torch.float64, "device": torch.device("cpu")}
    found = rotary_table(64, (48, 64), patch, (2, 2), scaling=RopeScaling("ntk", attention_scale="log"), **how)
    tokens, trained = 48 * 64 // (patch[0] * patch[1]), 1024 // (patch[0] * patch[1])
    squares = found[0].square().sum(0)
    torch.testing.assert_close(squares, torch.full_like(squares, math.log(tokens) / math.log(trained)))


def test_auto_is_normal_up_to_the_tokens_of_training_and_ntk_beyond():
    for tokens in ((16, 16), (10, 20), (8, 32), (2, 100)):
        assert torch.equal(table(tokens, RopeScaling()), table(tokens))
    beyond = RopeScaling("ntk", attention_scale="log")
    assert torch.equal(table((20, 20), RopeScaling()), table((20, 20), beyond))
    assert not torch.equal(table((20, 20), RopeScaling()), table((20, 20)))
    given = RopeScaling("auto", decouple=False, attention_scale="fit2")
    assert torch.equal(table((10, 30), given), table((10, 30), RopeScaling("ntk", False, "fit2")))


# -- Tables and rotations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [(16, 16), (10, 20), (7, 3), (1, 5)])
@pytest.mark.parametrize("head_dim", [8, 64, 72, 96])
def test_the_rotation_is_timms(tokens, head_dim):
    embedding = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=tokens, temperature=10_000)
    x = torch.randn(2, 3, tokens[0] * tokens[1], head_dim, generator=torch.Generator().manual_seed(0))
    mine = table(tokens, head_dim=head_dim, dtype=torch.float32).flatten(1, 2).unsqueeze(0)
    torch.testing.assert_close(rotate(x, mine), apply_rot_embed_cat(x, embedding.get_embed()), atol=1e-5, rtol=0)


def test_a_pair_turns_by_its_own_angle():
    x = torch.randn(1, 1, 15, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotate(x, table((3, 5), head_dim=8).flatten(1, 2).unsqueeze(0))[0, 0]
    for token in range(15):
        for pair, angle in enumerate((token // 5, token // 5 * 0.01, token % 5, token % 5 * 0.01)):
            before, after = (torch.view_as_complex(v.reshape(4, 2))[pair] for v in (x[0, 0, token], found[token]))
            turned = before * complex(math.cos(angle), math.sin(angle))
            assert abs(after - turned).item() < 1e-12


@pytest.mark.parametrize("kind", ROPE_KINDS[1:])
def test_axes_scale_alone_or_by_the_longer_one(kind):
    for tokens in ((20, 20), (12, 12)):
        assert torch.equal(table(tokens, RopeScaling(kind, True)), table(tokens, RopeScaling(kind, False)))
    alone, together = (table((10, 30), RopeScaling(kind, decouple)) for decouple in (True, False))
    factor = math.sqrt(attention_factor(RopeScaling(kind), (10, 30), 256, 30 / 16))
    assert torch.equal(alone[..., 18:], together[..., 18:])  # the longer axis
    torch.testing.assert_close(alone[..., :18], factor * table((10, 30))[..., :18])
    assert torch.equal(alone[..., :18], together[..., :18]) == (kind == "normal")


def test_coarse_tokens_sit_on_the_fine_grid():
    how = {"train_tokens": 16, "theta": 1e4, "dtype": torch.float64, "device": torch.device("cpu")}
    for scaling in (RopeScaling("normal"), RopeScaling("ntk"), RopeScaling("linear", False)):
        coarse, fine = (rotary_table(8, (16, 24), patch, (2, 2), scaling=scaling, **how) for patch in ((4, 8), (2, 2)))
        corners = fine.unflatten(2, (8, 12))[:, :, ::2, ::4].flatten(2, 3)
        assert torch.equal(coarse, corners)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"kind": "pi"},
            "unknown kind of rotary positions 'pi'; choose one of auto, normal, linear, ntk, ntk-parts, yarn",
        ),
        ({"attention_scale": "fit3"}, "unknown attention scale 'fit3'; choose one of None, log, fit1, fit2"),
        ({"kind": "yarn", "attention_scale": "log"}, "yarn scales the attention itself"),
    ],
)
def test_unknown_settings_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
