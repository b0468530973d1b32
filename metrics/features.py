"""Features of images: every distance and score is computed from them, in one pass over the images."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

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
