"""Extractors by name: pixels, DINOv2, functions of one's own; and names, files and functions that are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from metrics.dino import load_dino
from metrics.features import Pixels, load_extractor

SMALL = "vit_tiny_patch16_224"  # of the class of DINOv2's networks


def images(number: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, 3, side, side), dtype=np.uint8))


# -- Names ---------------------------------------------------------------------------------------------------------


def test_pixels_are_the_images_in_minus_one_to_one() -> None:
    extractor = load_extractor("pixels", (1, 2))
    assert isinstance(extractor, Pixels)
    features = extractor(torch.tensor([[[[0, 255]], [[0, 0]], [[255, 51]]]], dtype=torch.uint8))
    torch.testing.assert_close(features.pool, torch.tensor([[-1, 1, -1, -1, 1, -0.6]]))
    assert extractor.dimensions == 6


def test_classifiers_are_loaded_by_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent.pt does not exist"):
        load_extractor("cifar", (32, 32), weights=tmp_path / "absent.pt")


def test_unknown_names_and_weights_of_what_has_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"--features vgg is unknown: give inception, dinov2"):
        load_extractor("vgg", (8, 8))
    with pytest.raises(ValueError, match=r"--features pixels has no weights: leave some.pt out"):
        load_extractor("pixels", (8, 8), weights="some.pt")


# -- Functions of one's own ----------------------------------------------------------------------------------------

SOURCE = """
import torch
from metrics.features import Features

number = 3

def brightness(images):
    assert images.dtype == torch.uint8
    return images.double().mean((2, 3))

def everything(images):
    n = len(images)
    return Features(torch.ones(n, 4), torch.ones(n, 5), torch.ones(n, 2) / 2)

def pictures(images):
    return images.float()

def counts(images):
    return images.flatten(1)

def nothing(images):
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of functions that Python finds."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_features", raising=False)
    (tmp_path / "own_features.py").write_text(SOURCE)
    return tmp_path / "own_features.py"


def test_a_function_of_ones_own_gives_a_tensor_or_features(own: Path) -> None:
    brightness, everything = (load_extractor(f"own_features:{name}", (8, 8)) for name in ("brightness", "everything"))
    x = images(3, 8)
    features = brightness(x)
    np.testing.assert_allclose(features.pool.numpy(), x.numpy().mean((2, 3)), rtol=1e-6)
    assert features.pool.dtype == torch.float32
    assert (brightness.dimensions, brightness.spatial_dimensions, brightness.num_classes) == (3, None, None)
    assert (everything.dimensions, everything.spatial_dimensions, everything.num_classes) == (4, 5, 2)
    assert brightness.digest == hashlib.sha256(own.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_features:absent", "has no attribute 'absent'"),
        ("own_features:number", "it is a int, not a function"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (":f", "Empty module name"),
        ("math:sqrt", "built-in|source code"),
        ("own_features:pictures", r"gives torch.float32 \(2, 3, 8, 8\) of 2 images, not floats \(2, d\)"),
        ("own_features:counts", r"gives torch.uint8 \(2, 192\)"),
        ("own_features:nothing", "gives NoneType"),
    ],
)
def test_what_is_no_function_of_features_is_refused(own: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_extractor(name, (8, 8))
    assert str(error.value).startswith(f"--features {name}")


# -- DINOv2 --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small vision transformer, as timm saves them."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dino") / "small.pth"
    torch.save(timm.create_model(SMALL, num_classes=0).state_dict(), path)
    return path


def test_dino_features_are_the_class_token_of_bicubic_normalised_images(small_file: Path) -> None:
    extractor = load_dino(small_file, model=SMALL)
    x = images(2, 20)
    resized = [Image.fromarray(image).resize((224, 224), Image.BICUBIC) for image in x.permute(0, 2, 3, 1).numpy()]
    pixels = np.stack([np.asarray(image) for image in resized]) / 255
    pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    reference = timm.create_model(SMALL, num_classes=0).eval()
    reference.load_state_dict(torch.load(small_file, weights_only=True))
    with torch.no_grad():
        wanted = reference.forward_features(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())[:, 0]
    features = extractor(x)
    torch.testing.assert_close(features.pool, wanted, rtol=1e-4, atol=1e-5)
    assert features.pool.shape == (2, extractor.dimensions)
    assert load_dino(small_file, model=SMALL).digest == extractor.digest


@pytest.mark.slow
def test_dino_takes_the_files_of_its_authors_and_of_timm(tmp_path: Path) -> None:
    """Theirs has a mask token as well; both have positions of 518x518 pixels."""
    name = "vit_small_patch14_dinov2.lvd142m"
    state = timm.create_model(name, num_classes=0).state_dict()
    torch.save(state, tmp_path / "timm.pth")
    torch.save(state | {"mask_token": torch.zeros(1, 384)}, tmp_path / "own.pth")
    x = images(1, 30)
    features = [load_dino(tmp_path / file, model=name)(x).pool for file in ("timm.pth", "own.pth")]
    assert torch.equal(*features)
    assert features[0].shape == (1, 384)


def test_dino_without_weights_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_file: Path
) -> None:
    def unreachable(*arguments: object, **settings: object) -> None:
        raise RuntimeError("no network\nat all")

    with pytest.raises(FileNotFoundError, match=r"absent.pth does not exist: download https://.*--dino"):
        load_extractor("dinov2", (8, 8), weights=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"small.pth is damaged, or not of vit_small"):
        load_dino(small_file, model="vit_small_patch14_dinov2.lvd142m")
    (tmp_path / "none.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="no file of weights"):
        load_extractor("dinov2", (8, 8), weights=tmp_path / "none.pth")
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        ConnectionError, match=r"neither kept nor to be fetched: download https://.*\(no network at all\)"
    ):
        load_extractor("dinov2", (8, 8))
