"""Features of images: every distance and score is computed from them, in one pass over the images."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Features(NamedTuple):
    """Features of n images, on the extractor's device.

    pool:          (n, d) float32
    spatial:       (n, d_s) float32, those of sFID; None where the extractor has none
    probabilities: (n, K) float32 of K classes; None where the extractor is no classifier
    """

    pool: torch.Tensor
    spatial: torch.Tensor | None = None
    probabilities: torch.Tensor | None = None


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in fp32 without tf32, whose features depend on the batch (torch allows it in convolutions)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class Extractor(ABC):
    """A fixed network, in fp32 without tf32, so that features do not depend on the batch."""

    name: str  # as in --features
    digest: str  # sha256 of its weights; of its definition where it has none
    resize: str  # how images reach its input size, in words
    dimensions: int  # d of `Features.pool`
    spatial_dimensions: int | None = None  # d_s of `Features.spatial`
    num_classes: int | None = None  # K of `Features.probabilities`
    device: torch.device

    @abstractmethod
    def __call__(self, images: torch.Tensor) -> Features:
        """Features of images (n, 3, H, W) uint8 on any device."""


class Pixels(Extractor):
    """The pixels themselves, in [-1, 1]: for closed forms, and for images as small as digits."""

    name = "pixels"
    digest = "pixels"
    resize = "none"

    def __init__(self, image_size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.dimensions = 3 * image_size[0] * image_size[1]
        self.device = torch.device(device)

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(images.to(self.device).flatten(1).float() / 127.5 - 1)


class Function(Extractor):
    """A function of one's own, in a module that Python finds.

    Args:
        name:       "module:function"; it takes images (n, 3, H, W) uint8, and returns Features or a tensor (n, d)
        image_size: (H, W) of the images

    Raises:
        ValueError: if there is no such function, or it returns something else for two images.
    """

    resize = "that of the function"

    def __init__(self, name: str, image_size: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.name, self.device = name, torch.device(device)
        self._function, self.digest = _import_function(name)
        features = self(torch.zeros(2, 3, *image_size, dtype=torch.uint8))
        self.dimensions = features.pool.shape[1]
        self.spatial_dimensions = None if features.spatial is None else features.spatial.shape[1]
        self.num_classes = None if features.probabilities is None else features.probabilities.shape[1]

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        with exact_arithmetic():
            given = self._function(images.to(self.device))
        features = given if isinstance(given, Features) else Features(given)
        for values in features:
            if values is not None or features.pool is None:
                _check_features(values, len(images), self.name)
        return Features(*(None if values is None else values.float() for values in features))


def _check_features(values: Any, number: int, name: str) -> None:
    """Refuse what is not float values (number, d), of the function of this name (ValueError)."""
    found = type(values).__name__
    if isinstance(values, torch.Tensor):
        if values.is_floating_point() and values.ndim == 2 and len(values) == number:
            return
        found = f"{values.dtype} {tuple(values.shape)}"
    raise ValueError(f"--features {name} gives {found} of {number} images, not floats ({number}, d)")


def _import_function(name: str) -> tuple[Callable[[torch.Tensor], Any], str]:
    """The function "module:function", and the sha256 of its module's source (ValueError if there is none)."""
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
        source = inspect.getsource(module)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"--features {name}: {error}") from error
    if not callable(function):
        raise ValueError(f"--features {name}: it is a {type(function).__name__}, not a function")
    return function, hashlib.sha256(source.encode()).hexdigest()


EXTRACTORS = ("inception", "dinov2", "digits", "cifar", "pixels")


def load_extractor(
    name: str, image_size: tuple[int, int], device: torch.device | str = "cpu", weights: str | Path | None = None
) -> Extractor:
    """The extractor of --features.

    Args:
        name:       one of EXTRACTORS, or "module:function"
        image_size: (H, W) of the images
        device:     where it computes
        weights:    file of its weights; None for the one in the cache, where there is one

    Raises:
        FileNotFoundError: if the weights are not there; the message says where to get them.
        ValueError:        if there is no such extractor, it has no weights to give, or they are others.
        ConnectionError:   if weights cannot be fetched.
    """
    if name == "inception":  # imported where they are needed: they import this module
        from metrics.inception import load_inception

        return load_inception(weights, device)
    if name == "dinov2":
        from metrics.dino import load_dino

        return load_dino(weights, device)
    if name in ("digits", "cifar"):
        from metrics.classifiers import load_classifier

        return load_classifier(name, image_size, device, weights)
    if name != "pixels" and ":" not in name:
        raise ValueError(f"--features {name} is unknown: give {', '.join(EXTRACTORS)} or module:function")
    if weights is not None:
        raise ValueError(f"--features {name} has no weights: leave {weights} out")
    return Pixels(image_size, device) if name == "pixels" else Function(name, image_size, device)
