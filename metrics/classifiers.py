"""Small classifiers as feature extractors: for images that Inception and DINOv2 were not made for, as digits.

    python evaluate.py classifier cifar-16.zip cifar-16.pt      # then --features cifar --classifier cifar-16.pt

Their last hidden layer gives the features, their probabilities the class accuracy. That of the digits is trained in
seconds when it is first asked for. Distances in the features of different classifiers do not compare.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data.datasets import Digits
from metrics.features import Extractor, Features, exact_arithmetic
from runtime.errors import note
from runtime.files import complete_file
from runtime.logs import to_uint8
from weights.files import read_file
from weights.published import cache_folder

HELD_OUT = 0.1  # share of the images, the last ones, on which the accuracy is measured
WIDTHS = (48, 96, 128)  # channels before and after each halving of the resolution; the last is the features'


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a way around them, (N, C, H, W) -> (N, C', H', W')."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.around = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.around(x))


class ClassifierNetwork(nn.Module):
    """A residual network (He et al., arXiv:1512.03385) for images (N, 3, H, W) in [-1, 1].

    Returns:
        features (N, d), the mean of the last layer over the image, and logits (N, K).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.blocks = nn.Sequential(
            *(
                ResidualBlock(*pair, stride)
                for *pair, stride in zip(WIDTHS[:1] + WIDTHS, WIDTHS, (1, 2, 2), strict=False)
            )
        )
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.blocks(self.stem(x)).mean((2, 3))
        return features, self.head(features)


class Classifier(Extractor):
    """A trained ClassifierNetwork for images of one size.

    Args:
        name:       "digits" or "cifar"
        network:    the network
        image_size: (H, W) of the images that it was trained on
        accuracy:   on images that were held out from its training
    """

    resize = "none"
    dimensions = WIDTHS[-1]

    def __init__(
        self,
        name: str,
        network: ClassifierNetwork,
        image_size: tuple[int, int],
        accuracy: float,
        device: torch.device | str = "cpu",
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.num_classes = network.head.out_features
        self.image_size = image_size
        self.accuracy = accuracy
        content = hashlib.sha256()
        for tensor in network.state_dict().values():
            content.update(tensor.cpu().contiguous().numpy().tobytes())
        self.digest = content.hexdigest()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        with exact_arithmetic():
            features, logits = self.network(images.to(self.device).float() / 127.5 - 1)
        return Features(features, probabilities=logits.softmax(1))

    def save(self, path: str | Path) -> None:
        """Write the weights, to be read by `load_classifier`."""
        described = {"name": self.name, "image_size": list(self.image_size), "accuracy": self.accuracy}
        with complete_file(path) as temporary:
            torch.save({"classifier": self.network.state_dict(), **described}, temporary)


# ---------------------------------------------------------------------------------------------------------------
# Training


def train_classifier(
    name: str,
    read: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    epochs: int,
    batch_size: int = 128,
    mirror: bool = True,
    seed: int = 0,
) -> Classifier:
    """Train a classifier on all but the last tenth of some images, on the CPU.

    Args:
        read:   gives the images of some numbers, (n, H, W, 3) uint8
        labels: (N,) class ids from 0
        mirror: show each image mirrored half of the time

    Raises:
        ValueError: if a class has no image to train on.
    """
    num_classes, seen = int(labels.max()) + 1, len(labels) - max(1, int(HELD_OUT * len(labels)))
    batch_size = min(batch_size, seen)
    if len(np.unique(labels[:seen])) < num_classes:
        raise ValueError(
            f"there are {num_classes} classes, some of them without an image: a classifier cannot learn them"
        )
    images = torch.from_numpy(np.ascontiguousarray(read(np.arange(len(labels))))).permute(0, 3, 1, 2)
    images, targets = images.contiguous(), torch.from_numpy(labels.astype(np.int64))
    height, width = images.shape[2:]
    shift = max(height, width) // 8  # of the crops
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(num_classes).to(memory_format=torch.channels_last)
        steps = epochs * (seen // batch_size)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=max(2, steps))
        progress = tqdm(total=steps, desc=f"classifier of {name}", unit="step")
        for _ in range(epochs):
            for picked in torch.randperm(seen)[: seen // batch_size * batch_size].split(batch_size):
                x = F.pad(images[picked].float() / 127.5 - 1, [shift] * 4, mode="replicate")
                top, left = torch.randint(2 * shift + 1, (2,)).tolist()
                x = x[:, :, top : top + height, left : left + width]
                if mirror and torch.rand(()) < 0.5:
                    x = x.flip(3)
                logits = network(x.contiguous(memory_format=torch.channels_last))[1]
                F.cross_entropy(logits, targets[picked], label_smoothing=0.1).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                progress.update()
        progress.close()
    classifier = Classifier(name, network, (height, width), 0.0)
    held_out = range(seen, len(labels), batch_size)
    found = [classifier(images[start : start + batch_size]).probabilities.argmax(1) for start in held_out]
    classifier.accuracy = (torch.cat(found) == targets[seen:]).double().mean().item()
    return classifier


# ---------------------------------------------------------------------------------------------------------------
# Files


def load_classifier(
    name: str, image_size: tuple[int, int], device: torch.device | str = "cpu", path: str | Path | None = None
) -> Classifier:
    """Read a classifier; that of the digits is trained when it is first needed, and kept in the cache.

    Args:
        name:       "digits" or "cifar"
        image_size: (H, W) of the images to classify
        path:       the weights; None for those in the cache ("digits" only)

    Raises:
        ValueError: if the file is damaged, or made for images of another size.
        FileNotFoundError: if there is no file.
    """
    if path is None and name == "cifar":
        raise FileNotFoundError("--features cifar needs --classifier FILE: evaluate.py classifier IMAGES FILE makes it")
    path = cache_folder() / "classifiers" / "digits.pt" if path is None else Path(path)
    if not path.is_file():
        if name != "digits":
            raise FileNotFoundError(f"{path} does not exist: evaluate.py classifier IMAGES {path} makes it")
        _digits_classifier().save(path)
        note(f"the classifier of the digits is kept in {path}")
    file = read_file(path)
    wanted = {"classifier", "name", "image_size", "accuracy"}
    if not wanted <= file.keys():
        raise ValueError(
            f"{path} is no classifier of evaluate.py: {', '.join(sorted(wanted - file.keys()))} is missing"
        )
    if tuple(file["image_size"]) != tuple(image_size):
        sizes = ["x".join(map(str, size)) for size in (file["image_size"], image_size)]
        raise ValueError(f"{path} was trained on images of {sizes[0]}, and these are {sizes[1]}")
    return Classifier(file["name"], _network(file["classifier"], path), tuple(image_size), file["accuracy"], device)


def _network(weights: dict[str, Any], path: Path) -> ClassifierNetwork:
    try:
        network = ClassifierNetwork(len(weights["head.bias"]))
        network.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another network: {str(error).splitlines()[0]}") from error
    return network


def _digits_classifier() -> Classifier:
    digits = Digits()
    pixels = to_uint8(digits.images).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return train_classifier("digits", pixels.__getitem__, digits.labels.numpy(), epochs=20, batch_size=64, mirror=False)
