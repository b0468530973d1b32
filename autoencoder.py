"""Between images and what the network sees: pixels themselves, or the latents of a diffusers autoencoder.

Latents are x = (z - shift) * scale with the autoencoder's own scaling and shift (0.18215 and 0 for Stable Diffusion's),
so that the network sees numbers of about unit variance.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from transport.noise import Generator, randn

# What SiT and DiT call --vae ema and --vae mse.
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

DECODE_BATCH = 16


def autoencoder_name(vae: str) -> str:
    """The full name of --vae: "none", a hub id, or the absolute path of a local folder."""
    if vae == "none":
        return vae
    if Path(vae).is_dir():
        return str(Path(vae).resolve())
    return SHORT_NAMES.get(vae, vae)


class PixelSpace:
    """No autoencoder: the network sees images."""

    name = "none"

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(image_shape)

    def encode(self, images: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class LatentSpace:
    """The latents of an AutoencoderKL or AutoencoderTiny; built by `load_autoencoder`.

    Args:
        name:  the autoencoder's full name
        model: the diffusers model, on its device
    """

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        config = model.config
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
        if config.get("latents_mean") is not None:  # one number per channel, besides the common factor
            shift, deviation = (torch.tensor(config[name]).reshape(-1, 1, 1) for name in ("latents_mean", "latents_std"))
            scale = scale / deviation
        self.shift, self.scale = shift, scale

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, h, w) of the latents of images (3, H, W).

        Raises:
            ValueError: if the autoencoder's factor does not divide the image.
        """
        _, height, width = image_shape
        if height % self.factor or width % self.factor:
            raise ValueError(f"{self.name} shrinks images by {self.factor}, which does not divide {height}x{width}")
        return self.channels, height // self.factor, width // self.factor

    def _on(self, value: float | torch.Tensor, x: torch.Tensor) -> float | torch.Tensor:
        return value.to(x) if isinstance(value, torch.Tensor) else value

    @torch.no_grad()
    def moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (N, C, h, w) of the scaled latents of images in [-1, 1] (N, 3, H, W)."""
        encoded = self.model.encode(images)
        if hasattr(encoded, "latent_dist"):
            mean, deviation = encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
        else:  # AutoencoderTiny is deterministic
            mean = encoded.latents.float()
            deviation = torch.zeros_like(mean)
        scale = self._on(self.scale, mean)
        return (mean - self._on(self.shift, mean)) * scale, deviation * scale

    def encode(self, images: torch.Tensor, generator: Generator = None) -> torch.Tensor:
        """Scaled latents (N, C, h, w), drawn from the posterior of images in [-1, 1] (N, 3, H, W)."""
        mean, deviation = self.moments(images)
        return mean + deviation * randn(mean.shape, generator, mean.device, mean.dtype)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in about [-1, 1] of scaled latents (N, C, h, w), in batches that fit the memory."""
        z = latents / self._on(self.scale, latents) + self._on(self.shift, latents)
        images, batch_size = [], DECODE_BATCH
        while sum(map(len, images)) < len(z):
            first = sum(map(len, images))
            try:
                images.append(self.model.decode(z[first : first + batch_size]).sample.float())
            except torch.cuda.OutOfMemoryError:
                if batch_size == 1:
                    raise
                batch_size //= 2
                torch.cuda.empty_cache()
        return torch.cat(images) if images else z.new_zeros(0, 3, *(side * self.factor for side in z.shape[-2:]))


Autoencoder = PixelSpace | LatentSpace


def load_autoencoder(vae: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of --vae.

    Args:
        vae:    "none", "ema", "mse", a hub id, or a local folder that diffusers saved

    Raises:
        ValueError: if it cannot be found or fetched, or is of another kind.
    """
    name = autoencoder_name(vae)
    if name == "none":
        return PixelSpace()
    from diffusers import AutoencoderKL, AutoencoderTiny  # slow to import
    from diffusers.utils import logging

    logging.set_verbosity_error()
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    try:
        kind = AutoencoderKL.load_config(name)["_class_name"]
        if kind not in kinds:
            raise ValueError(f"the autoencoder {name} is a {kind}: give an {' or '.join(kinds)}")
        return LatentSpace(name, kinds[kind].from_pretrained(name).to(device))
    except (OSError, KeyError) as error:
        if Path(name).exists():
            reason = f"it is not a folder that diffusers saved ({str(error).splitlines()[0]})"
        else:
            reason = "there is no such folder, and it could not be fetched from the hub"
            reason += " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"cannot load the autoencoder {name}: {reason}; give --vae a local folder with config.json and weights"
        ) from error
