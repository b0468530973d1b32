"""Datasets. A path's content decides: the bundled digits, a folder or zip archive of images, or latents of them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.autoencoder import Autoencoder, autoencoder_name, load_autoencoder
from data.images import ImageArchive, ImageFolderDataset
from data.latent_files import digest, shard_files
from data.latents import LatentShards
from data.sizes import SizeRule


class AnyDataset(Protocol):
    """A list of (x, label) with random access.

    A dataset may also have load_many(indices, generators), which gives (n, C, H, W) and labels (n,) at once; where
    there is a rule of sizes, a list of (C, H, W).
    """

    kind: str  # "digits", "images" (both with values in [-1, 1]) or "latents" (scaled for the network)
    num_classes: int
    image_shape: tuple[int, ...]  # of a loaded sample, (C, H, W); of a square one with a rule of sizes
    image_size: int | None  # side of the images; for latents, of the images behind them, if known
    sizes: SizeRule | None  # of images that keep their aspect ratio; None where all are squares
    value_step: float | None  # distance of neighbouring pixel values, for bits per dimension; None for latents

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """One x (C, H, W) float32 and its label; the generator augments it; None for no augmentation."""
        ...

    def take_sizes(self, sizes: SizeRule) -> None:
        """Let images keep their aspect ratio, at the sizes of a rule (ValueError where the data do not allow it)."""
        ...

    def identity(self) -> dict[str, Any]:
        """Identify the data by content, not place, in JSON values: equal for data that have not changed.

        "kind", "images" (their number), "num_classes", "names" (digest of the file names), "labels" (digest); for
        latents also "scaling". It reads labels only, no images.
        """
        ...


class Digits(Dataset):
    """The 1797 handwritten 8x8 digits that scikit-learn ships; 17 grey levels."""

    kind = "digits"
    num_classes = 10
    image_shape = (1, 8, 8)
    image_size = 8
    sizes = None
    value_step = 2 / 16

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        self.images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        self.labels = torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int, generator: torch.Generator | None = None) -> tuple[torch.Tensor, int]:
        """Image (1, 8, 8) and label; no augmentation, because a mirrored digit is no digit."""
        return self.images[index], int(self.labels[index])

    def take_sizes(self, sizes: SizeRule) -> None:
        """Refuse: all digits are squares."""
        raise ValueError("digits are 8x8, all of them: leave --max-tokens out")

    def identity(self) -> dict[str, Any]:
        """See AnyDataset; the images are so small that the digest is of their values."""
        names, labels = digest(self.images.numpy()), digest(self.labels.numpy())
        classes = self.num_classes
        return {"kind": self.kind, "images": len(self), "num_classes": classes, "names": names, "labels": labels}


LOOKED_FOR = (
    "the word 'digits', a folder of *.safetensors latent files, a zip archive of images, "
    "or a folder with one sub-folder per class"
)


def open_dataset(path: str, image_size: int | None = None, autoencoder: Autoencoder | None = None) -> AnyDataset:
    """The dataset that a path holds.

    Args:
        path:        --data-path
        image_size:  side of the images; None for the dataset's own (folders of images 256)
        autoencoder: that of --vae, if given: it scales LightningDiT's latent files

    Raises:
        FileNotFoundError: if the path does not exist or holds nothing to train on.
        ValueError: if it is damaged, or cannot give images of that size.
    """
    if path == "digits":
        if image_size not in (None, Digits.image_size):
            raise ValueError(f"digits are 8x8: leave --image-size {image_size} out")
        return Digits()
    if not Path(path).exists():
        raise FileNotFoundError(f"--data-path {path} does not exist: looked for {LOOKED_FOR}")
    if not Path(path).is_dir():
        if not zipfile.is_zipfile(path):
            raise ValueError(f"--data-path {path} is a file, but no zip archive: looked for {LOOKED_FOR}")
        return ImageArchive(path, image_size)
    if shard_files(path):
        return LatentShards(path, autoencoder, image_size)
    try:
        return ImageFolderDataset(path, 256 if image_size is None else image_size)
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"--data-path {path}: looked for {LOOKED_FOR} ({', '.join(IMG_EXTENSIONS)} files): {reason}"
        ) from error


def open_training_data(
    path: str, image_size: int | None, vae: str | None, shown: bool, device: torch.device
) -> tuple[AnyDataset, Autoencoder | None, str]:
    """The dataset that a network is trained on, and the autoencoder of its latents.

    Args:
        path, image_size: as for `open_dataset`
        vae:              --vae; None for the dataset's own, or Stable Diffusion's
        shown:            samples are decoded, for previews or evaluations
        device:           where the autoencoder computes

    Returns:
        the dataset; the autoencoder, None where nothing is encoded or shown; the autoencoder's name.

    Raises:
        ValueError, OSError: if either cannot be had, or they do not fit together.
    """
    autoencoder = load_autoencoder(vae, device) if vae else None
    dataset = open_dataset(path, image_size, autoencoder)
    if dataset.kind == "digits" and vae not in (None, "none"):
        raise ValueError(f"digits are trained on as pixels: leave --vae {vae} out")
    default = {"digits": "none", "images": "ema", "latents": getattr(dataset, "vae", None)}[dataset.kind]
    name = autoencoder_name(vae or default or "none")
    if name == "none" and dataset.kind == "latents" and shown:
        raise ValueError(
            f"{path} does not say which autoencoder decodes it: give --vae, or --sample-every 0 (and no --eval-every)"
        )
    if autoencoder is None and (dataset.kind == "images" or shown):
        autoencoder = load_autoencoder(name, device)
    if dataset.kind == "latents" and autoencoder is not None and autoencoder.name != "none":
        autoencoder = autoencoder.with_scaling(dataset.scaling)
    return dataset, autoencoder, name
