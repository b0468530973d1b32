"""The Inception network of 2015 that FID, sFID and the inception score are defined by (arXiv:1512.00567).

Weights are read under the names of torch-fidelity's public file, which were converted from the TensorFlow graph of
inception-2015-12-05. Where that graph differs from the paper the code says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from metrics.features import Extractor, Features, exact_arithmetic
from runtime.files import check_tensors
from weights.files import choose_weights, read_file
from weights.published import cache_folder, file_sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d"  # the first digits, as in the name

INPUT_SIZE = 299
SPATIAL_CHANNELS = 7  # of sFID

# A layer is (output channels, kernel). A branch is a chain of layers; a tuple of two layers at its end forks it.
Layer = tuple[int, int | tuple[int, int]]
Branch = list[Layer | tuple[Layer, Layer]]


# ---------------------------------------------------------------------------------------------------------------
# The network


class Convolution(nn.Module):
    """Convolution, batch normalisation, ReLU."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, whose outputs (N, C_i, H, W) are joined along the channels.

    Args:
        channels: of the input
        branches: by name; layer k of a branch of several layers is called NAME_k, the two of a fork NAME_ka and NAME_kb
        pool:     the last branch: "average" or "max" over 3x3, then a 1x1 convolution; "halve" for max over 3x3 with
                  stride 2 alone, and then the last layer of the other branches has stride 2 as well
        pooled:   output channels of that convolution
    """

    def __init__(self, channels: int, branches: dict[str, Branch], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[tuple[str, ...]]] = []
        self.out_channels = pooled or channels
        for name, branch in branches.items():
            width, chain = channels, []
            for k, layer in enumerate(branch, 1):
                last = k == len(branch)
                number = f"_{k}" if len(branch) > 1 else ""
                fork = dict(zip("ab", layer, strict=True)) if isinstance(layer[0], tuple) else {"": layer}
                for letter, (out_channels, kernel) in fork.items():
                    self._add(f"{name}{number}{letter}", width, out_channels, kernel, halve=last and pool == "halve")
                chain.append(tuple(f"{name}{number}{letter}" for letter in fork))
                width = sum(out_channels for out_channels, _ in fork.values())
            self.chains.append(chain)
            self.out_channels += width
        if pooled:
            self._add("branch_pool", channels, pooled, 1)

    def _add(
        self, name: str, channels: int, out_channels: int, kernel: int | tuple[int, int], halve: bool = False
    ) -> None:
        padding = (kernel // 2, kernel // 2) if isinstance(kernel, int) else (kernel[0] // 2, kernel[1] // 2)
        stride, padding = (2, 0) if halve else (1, padding)
        self.add_module(name, Convolution(channels, out_channels, kernel, stride, padding))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for chain in self.chains:
            y = x
            for names in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        if self.pool == "halve":
            return torch.cat([*outputs, F.max_pool2d(x, 3, stride=2)], 1)
        if self.pool == "average":  # of the pixels that exist: TensorFlow does not count the padding
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*outputs, self.branch_pool(x)], 1)


def mixed_35(channels: int, pooled: int) -> Mixed:
    """A block at 35x35: 5a to 5d."""
    double: Branch = [(64, 1), (96, 3), (96, 3)]
    branches = {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)], "branch3x3dbl": double}
    return Mixed(channels, branches, "average", pooled)


def mixed_17(channels: int, width: int) -> Mixed:
    """A block at 17x17, 6b to 6e: 7x7 convolutions as products of 1x7 and 7x1."""
    single: Branch = [(width, 1), (width, (1, 7)), (192, (7, 1))]
    double: Branch = [(width, 1), (width, (7, 1)), (width, (1, 7)), (width, (7, 1)), (192, (1, 7))]
    return Mixed(channels, {"branch1x1": [(192, 1)], "branch7x7": single, "branch7x7dbl": double}, "average", 192)


def mixed_8(channels: int, pool: str) -> Mixed:
    """A block at 8x8, 7b and 7c: branches that fork into 1x3 and 3x1."""
    fork = ((384, (1, 3)), (384, (3, 1)))
    branches: dict[str, Branch] = {
        "branch1x1": [(320, 1)],
        "branch3x3": [(384, 1), fork],
        "branch3x3dbl": [(448, 1), (384, 3), fork],
    }
    return Mixed(channels, branches, pool, 192)


class InceptionNetwork(nn.Module):
    """Images (N, 3, 299, 299), (x - 128) / 128 of bytes x, to features.

    Returns:
        pool (N, 2048), spatial (N, 2023) and logits (N, 1008).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = mixed_35(192, pooled=32)
        self.Mixed_5c = mixed_35(256, pooled=64)
        self.Mixed_5d = mixed_35(288, pooled=64)
        self.Mixed_6a = Mixed(288, {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "halve")
        self.Mixed_6b = mixed_17(768, width=128)
        self.Mixed_6c = mixed_17(768, width=160)
        self.Mixed_6d = mixed_17(768, width=160)
        self.Mixed_6e = mixed_17(768, width=192)
        reduced: Branch = [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)]
        self.Mixed_7a = Mixed(768, {"branch3x3": [(192, 1), (320, 3)], "branch7x7x3": reduced}, "halve")
        self.Mixed_7b = mixed_8(1280, "average")
        self.Mixed_7c = mixed_8(2048, "max")  # in that graph, where the other blocks average
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # ADM's mixed_6/conv: the output of branch1x1, which comes first, in TensorFlow's order (h, w, c).
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.fc.weight.T  # the graph has no bias, the file does


def resize_bilinear(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """TensorFlow 1's ResizeBilinear of (N, C, H, W) float32 to `size` (h, w), without antialiasing.

    Pixel i of h lies at i H / h of the image's H, with no shift by half a pixel, between its neighbours below and above
    that, the last one at most.
    """
    for axis in (3, 2):  # rows first, as there: so that they round alike
        length = images.shape[axis]
        position = torch.arange(size[axis - 2], dtype=torch.float32, device=images.device)
        position = position * torch.tensor(length / size[axis - 2], dtype=torch.float32)
        low = position.long()
        fraction = position - low
        below, above = (images.index_select(axis, index) for index in (low, (low + 1).clamp(max=length - 1)))
        images = below + (above - below) * (fraction if axis == 3 else fraction[:, None])
    return images


# ---------------------------------------------------------------------------------------------------------------
# The extractor


class Inception(Extractor):
    """Features of FID and sFID, and the class probabilities of the inception score.

    Args:
        weights: state dict of an InceptionNetwork
        digest:  sha256 of their file
        device:  where it computes
        source:  name for messages

    Raises:
        ValueError: if a tensor is missing or unknown, or has another shape.
    """

    name = "inception"
    resize = "bilinear to 299x299 as in TensorFlow 1, without half-pixel centres"
    dimensions = 2048
    spatial_dimensions = 17 * 17 * SPATIAL_CHANNELS
    num_classes = 1008

    def __init__(
        self, weights: dict[str, torch.Tensor], digest: str, device: torch.device | str = "cpu", source: str = FILE
    ) -> None:
        network = InceptionNetwork()
        counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
        wanted = {name: tensor for name, tensor in network.state_dict().items() if name not in counters}
        check_tensors({name: tensor for name, tensor in weights.items() if name not in counters}, wanted, source)
        network.load_state_dict(weights, strict=False)  # the counters do nothing
        self.device = torch.device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        self.digest = digest

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        with exact_arithmetic():
            x = resize_bilinear(images.to(self.device).float(), (INPUT_SIZE, INPUT_SIZE))
            pool, spatial, logits = self.network((x - 128) / 128)
            return Features(pool, spatial, logits.softmax(1))


def load_inception(
    path: str | Path | None = None, device: torch.device | str = "cpu", check_digest: bool = True
) -> Inception:
    """Read the network's weights, without unpickling code.

    Args:
        path:         torch-fidelity's file; None for the one of that name in the cache
        check_digest: refuse any other file: distances in the features of another network are no FID

    Raises:
        FileNotFoundError: if there is no such file; it is not downloaded.
        ValueError: if it is another file, or damaged.
    """
    path = cache_folder() / FILE if path is None else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: download {URL} (91 MB) there, or name it with --inception")
    digest = file_sha256(path)
    if check_digest and not digest.startswith(SHA256):
        raise ValueError(
            f"{path} is damaged, or not the Inception of 2015 that FID is defined by: its sha256 begins with "
            f"{digest[:8]}, not {SHA256}; download {URL}"
        )
    checkpoint: dict[str, Any] = read_file(path)
    return Inception(choose_weights(checkpoint, "ema", path), digest, device, str(path))
