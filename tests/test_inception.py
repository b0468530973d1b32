"""Inception as torch-fidelity computes it, TensorFlow's resize, the order of sFID's features, and refused files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from metrics.features import load_extractor
from metrics.inception import FILE, Inception, InceptionNetwork, load_inception, resize_bilinear


@pytest.fixture(scope="module")
def inception(inception_file: Path) -> Inception:
    return load_inception(inception_file, check_digest=False)


def images(number: int, height: int, width: int) -> torch.Tensor:
    """Smooth random images (n, 3, H, W) uint8, each another."""
    coarse = torch.rand(number, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


# -- The resize ----------------------------------------------------------------------------------------------------


def test_resize_of_a_ramp_is_that_of_tensorflow_1_by_hand() -> None:
    """Pixel i of 7 lies at 4 i / 7 of the values 0, 10, 20, 30; beyond the last value nothing rises."""
    ramp = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 3, 4, 4)
    row = torch.tensor([min(10 * 4 * i / 7, 30.0) for i in range(7)])
    torch.testing.assert_close(resize_bilinear(ramp, (7, 7)), row.expand(1, 3, 7, 7))
    torch.testing.assert_close(resize_bilinear(ramp.mT, (7, 7)), row[:, None].expand(1, 3, 7, 7))


@pytest.mark.parametrize("size", [(8, 8), (32, 48), (299, 299), (400, 310)])
def test_resize_is_bit_by_bit_that_of_torch_fidelity(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
    wanted = interpolate_bilinear_2d_like_tensorflow1x(x, (299, 299), align_corners=False)
    assert torch.equal(resize_bilinear(x, (299, 299)), wanted)


# -- Features ------------------------------------------------------------------------------------------------------


def test_features_and_logits_are_those_of_torch_fidelity(inception: Inception, inception_file: Path) -> None:
    other = FeatureExtractorInceptionV3("other", ["2048", "logits_unbiased"], str(inception_file))
    joined = {}
    other.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, output: joined.update(spatial=output))
    x = images(2, 40, 56)
    pool, logits = other(x)
    assert relative(pool[0], pool[1]) > 0.01  # the weights tell images apart
    found = inception(x)
    assert relative(found.pool, pool) < 1e-5
    assert relative(found.probabilities, logits.softmax(1)) < 1e-5
    # ADM's order by loops: rows, then columns, then seven channels.
    wanted = [[joined["spatial"][n, c, h, w] for h in range(17) for w in range(17) for c in range(7)] for n in (0, 1)]
    assert relative(found.spatial, torch.tensor(wanted)) < 1e-5
    assert found.pool.shape == (2, inception.dimensions)
    assert found.spatial.shape == (2, inception.spatial_dimensions)
    assert found.probabilities.shape == (2, inception.num_classes)
    # Neighbouring values are channels of one place; exchanging height and width would be seen.
    in_space = found.spatial.reshape(2, 17, 17, 7)
    assert torch.allclose(in_space[..., 3], joined["spatial"][:, 3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(in_space[..., 3], joined["spatial"][:, 3].mT, rtol=1e-2)


@pytest.mark.slow
def test_features_do_not_depend_on_the_batch(inception: Inception) -> None:
    x = images(5, 32, 32)
    together, alone = inception(x), [inception(image[None]) for image in x]
    for field in ("pool", "spatial", "probabilities"):
        assert relative(torch.cat([getattr(features, field) for features in alone]), getattr(together, field)) < 1e-5


def test_settings_of_tf32_are_off_inside_and_restored_after(
    inception: Inception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    inside = []

    def network(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inside.append(settings())
        return x.new_zeros(1, 2048), x.new_zeros(1, 2023), x.new_zeros(1, 1008)

    monkeypatch.setattr(inception, "network", network)
    before = settings()
    try:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        inception(images(1, 8, 8))
        assert inside == [("highest", False)]
        assert settings() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_the_network_is_in_evaluation_mode_and_its_weights_are_fixed(inception: Inception) -> None:
    assert not any(module.training for module in inception.network.modules())
    assert not any(parameter.requires_grad for parameter in inception.network.parameters())


# -- Files ---------------------------------------------------------------------------------------------------------


def test_digest_is_the_sha256_of_the_file(inception: Inception, inception_file: Path) -> None:
    assert inception.digest == hashlib.sha256(inception_file.read_bytes()).hexdigest()


def test_the_public_file_has_472_tensors(inception_file: Path) -> None:
    assert len(torch.load(inception_file, weights_only=True)) == 472


def test_a_missing_file_is_named_with_the_address_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPFLOW_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/{FILE} does not exist: download https://.*--inception"):
        load_inception()
    with pytest.raises(FileNotFoundError, match=r"elsewhere.pth does not exist"):
        load_extractor("inception", (8, 8), weights=tmp_path / "elsewhere.pth")


def test_another_file_than_the_public_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"its sha256 begins with \w{8}, not 6726825d"):
        load_inception(path)


def test_files_that_hold_code_or_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(ValueError, match="not only tensors and plain data"):
        load_inception(path, check_digest=False)
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, path)
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3.bn.bias is missing"):
        load_inception(path, check_digest=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_inception(path, check_digest=False)


def test_a_tensor_of_another_shape_is_named() -> None:
    state = InceptionNetwork().state_dict()
    state["fc.bias"] = torch.zeros(1000)
    with pytest.raises(ValueError, match=r"fc.bias is \(1000,\), not \(1008,\)"):
        Inception(state, "digest")


def test_counters_of_batch_norm_are_ignored(inception: Inception) -> None:
    """Files saved from a module have them; the public one does not."""
    again = Inception(inception.network.state_dict(), "digest")
    x = torch.from_numpy(np.zeros((1, 3, 8, 8), np.uint8))
    assert torch.equal(again(x).pool, inception(x).pool)
