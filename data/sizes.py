"""Images of many sizes: the size that an image is resized to, and how (FiT, arXiv:2402.12376, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

LONGEST = 64  # times the short side: only the middle of a longer image is resized


@dataclass(frozen=True)
class SizeRule:
    """Sizes of images of any aspect ratio: each keeps most of its pixels in at most so many tokens.

    Unlike FiT, which rounds both sides down and so stretches images a little, an image covers its size and is cropped:
    rounding to 32 pixels would waste a twelfth of the tokens.

    Args:
        max_tokens: tokens of an image at most, N
        multiple:   divides the sides, in pixels; every level's patch must divide it too
        token:      side of a token in pixels: the autoencoder's factor times the patch size
        crop_probability: of the square version in training, which images have that are larger than it on both sides
            (FiTv2, arXiv:2410.13925: 0.5; FiT: 0)

    Raises:
        ValueError: if a number is below 1, or so few tokens make no image.
    """

    max_tokens: int
    multiple: int = 32
    token: int = 16
    crop_probability: float = 0.5

    def __post_init__(self) -> None:
        if min(self.max_tokens, self.multiple, self.token) < 1:
            raise ValueError(f"tokens and sizes are at least 1: {self}")
        if not 0 <= self.crop_probability <= 1:
            raise ValueError(f"the crop probability must be in [0, 1], got {self.crop_probability}")
        if self.multiple**2 > self.max_area:
            least = math.ceil((self.multiple / self.token) ** 2)
            raise ValueError(
                f"{self.max_tokens} tokens of {self.token}x{self.token} pixels make no image whose sides are multiples "
                f"of {self.multiple}: give at least {least} tokens"
            )

    @property
    def max_area(self) -> int:
        """Pixels of an image at most."""
        return self.max_tokens * self.token**2

    @property
    def square(self) -> int:
        """Side S in pixels of the largest square."""
        return math.isqrt(self.max_area) // self.multiple * self.multiple

    def size_of(self, width: int, height: int) -> tuple[int, int]:
        """Size (H, W) in pixels for an image: the one with the largest product of its area and the image's share in it.

        Images are not enlarged, but for those that are smaller than the multiple on a side.
        """
        return _best_size(width, height, self.max_area, self.multiple)

    def has_square(self, width: int, height: int) -> bool:
        """Tell if an image also has a square version: FiTv2 crops those that are larger than S on both sides.

        An image that is a square anyway has but one.
        """
        return min(width, height) > self.square and self.size_of(width, height) != (self.square, self.square)


@lru_cache(maxsize=4096)
def _best_size(width: int, height: int, max_area: int, multiple: int) -> tuple[int, int]:
    aspect, best, best_score = width / height, (multiple, multiple), -1.0
    most = max_area // multiple**2
    for rows in range(1, min(most, max(1, height // multiple)) + 1):
        for columns in range(1, min(most // rows, max(1, width // multiple)) + 1):
            ratio = columns / rows / aspect
            score = rows * columns * min(ratio, 1 / ratio)
            if score > best_score:
                best, best_score = (rows * multiple, columns * multiple), score
    return best


def cover_and_crop(image: Image.Image, height: int, width: int) -> np.ndarray:
    """The middle of an image, resized to cover a size: halved with a box filter while twice too large, then bicubic.

    Args:
        image:         RGB image of any size
        height, width: size of the result in pixels

    Returns:
        (height, width, 3) uint8. Squares are ADM's centre crop (guided-diffusion, arXiv:2105.05233).
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    across, down = round(image.width * scale), round(image.height * scale)
    left, top = (across - width) // 2, (down - height) // 2
    if max(across / width, down / height) > LONGEST:  # 1 x 10000 pixels would become 256 x 2560000
        x, y = image.width / across, image.height / down
        box = (left * x, top * y, (left + width) * x, (top + height) * y)
        return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
    image = image.resize((across, down), Image.Resampling.BICUBIC)
    return np.asarray(image)[top : top + height, left : left + width]


def draw_version(generator: torch.Generator, sizes: SizeRule | None = None) -> tuple[bool, bool]:
    """Draw the version of a sample, for images and latents alike: if it is mirrored, and if it is the square one.

    Both come from the first number of its generator, so that what is drawn later does not depend on the rule.
    """
    number = 2 * torch.rand((), generator=generator).item()
    return number < 1, sizes is not None and number % 1 < sizes.crop_probability
