"""Conversion between images and the network's inputs: pixels, or the latents of a diffusers autoencoder.

Latents are x = (z - shift) * scale with the autoencoder's own scaling and shift (0.18215 and 0 for Stable Diffusion's),
so that the network sees numbers of about unit variance.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.scaling import Scaling
from transport.noise import Generator, randn
from transport.samples import Samples, by_shape

# SiT's and DiT's --vae ema and --vae mse.
SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

# Pixels to encode or decode at once, about 3 GB of activations in fp32; halved when even that is too much.
BATCH_PIXELS = 16 * 256 * 256


def autoencoder_name(vae: str) -> str:
    """The full name of --vae: "none", a hub id, or the absolute path of a local folder."""
    if vae == "none":
        return vae
    if Path(vae).is_dir():
        return str(Path(vae).resolve())
    return SHORT_NAMES.get(vae, vae)


class PixelSpace:
    """No autoencoder: the network sees images."""

    name, channels, factor = "none", None, 1  # any number of channels

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(image_shape)

    def encode(self, images: Samples, generator: Generator = None) -> Samples:
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class LatentSpace:
    """The latents of an AutoencoderKL or AutoencoderTiny; built by `load_autoencoder`.

    It computes in fp32, or in tf32 where `use_precision` allows that, and never under autocast: it was not trained so.

    Args:
        name:  the autoencoder's full name
        model: the diffusers model, on its device
    """

    def __init__(self, name: str, model: torch.nn.Module) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.channels = model.config.latent_channels
        self.factor = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling = Scaling.from_config(model.config)
        self.deterministic = type(model).__name__ == "AutoencoderTiny"

    def with_scaling(self, scaling: Scaling) -> LatentSpace:
        """The same autoencoder with another scaling of its latents: that of a data set's latents_stats.pt."""
        other = copy.copy(self)
        other.scaling = scaling
        return other

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape (C, h, w) of the latents of images (3, H, W).

        Raises:
            ValueError: if the images have other channels, or the autoencoder's factor does not divide them.
        """
        channels, height, width = image_shape
        if channels != self.model.config.in_channels:
            raise ValueError(
                f"{self.name} encodes {self.model.config.in_channels} channels, the images have {channels}"
            )
        if height % self.factor or width % self.factor:
            raise ValueError(f"{self.name} shrinks images by {self.factor}, which does not divide {height}x{width}")
        return self.channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def raw_moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean and standard deviation (N, C, h, w) of the unscaled latents of images in [-1, 1] (N, 3, H, W).

        The deviation of a deterministic autoencoder is None.
        """

        def moments(part: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with _full_precision(part):
                encoded = self.model.encode(part.float())
            if self.deterministic:
                return (encoded.latents.float(),)
            return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()

        if not len(images):
            nothing = images.new_zeros(0, *self.latent_shape(images.shape[1:]))
            return nothing, None if self.deterministic else nothing
        parts = _in_batches(moments, images, pixels=images[0, 0].numel())
        mean, *deviation = (torch.cat(part) for part in zip(*parts, strict=True))
        return mean, deviation[0] if deviation else None

    def encode(self, images: Samples, generator: Generator = None) -> Samples:
        """Scaled latents (N, C, h, w), drawn from the posterior of images in [-1, 1] (N, 3, H, W).

        Of a list of images (3, H, W) of many sizes, with one generator each, a list of latents (C, h, w).
        """
        if not isinstance(images, torch.Tensor):
            latents: list[torch.Tensor] = [None] * len(images)
            for group in by_shape(images):
                generators = [generator[i] for i in group]
                for i, x in zip(group, self.encode(torch.stack([images[i] for i in group]), generators), strict=True):
                    latents[i] = x
            return latents
        mean, deviation = self.raw_moments(images)
        if deviation is not None:
            mean = mean + deviation * randn(mean.shape, generator, mean.device, mean.dtype)
        return self.scaling.apply(mean)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in about [-1, 1] of scaled latents (N, C, h, w)."""
        height, width = (side * self.factor for side in latents.shape[-2:])
        if not len(latents):
            return latents.new_zeros(0, 3, height, width)

        def images(part: torch.Tensor) -> torch.Tensor:
            with _full_precision(part):
                return self.model.decode(part).sample.float()

        z = self.scaling.invert(latents.float())
        return torch.cat(_in_batches(images, z, pixels=height * width))


def _full_precision(like: torch.Tensor) -> torch.autocast:
    """The context without autocast on a tensor's device."""
    return torch.autocast(like.device.type, enabled=False)


@dataclass(frozen=True)
class RawLatents:
    """A stand-in for an autoencoder that keeps samples as latents, unscaled, as their autoencoder decodes them.

    Args:
        name:     the autoencoder's full name, or "none" where it is unknown
        scaling:  between its latents and the network's inputs
        channels: its latents' channels; None where they are unknown
    """

    name: str
    scaling: Scaling
    channels: int | None = None
    factor = 1

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents (N, C, h, w) in fp32."""
        return self.scaling.invert(latents.float())


def _in_batches(function: Callable[[torch.Tensor], Any], x: torch.Tensor, pixels: int) -> list[Any]:
    """Results of the function for parts of x (N, ...) that fit the memory; `pixels` is the size of one image."""
    # Not accelerate's find_executable_batch_size: it starts over, frees too early to help, and hides the memory error.
    results, first, size = [], 0, min(len(x), max(1, BATCH_PIXELS // pixels))
    while first < len(x):
        try:
            results.append(function(x[first : first + size]))
            first += size
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # After the except block: the exception no longer holds the memory that the failed call allocated.
        size //= 2
        torch.cuda.empty_cache()
    return results


Autoencoder = PixelSpace | LatentSpace


def load_autoencoder(vae: str, device: torch.device | str = "cpu") -> Autoencoder:
    """The autoencoder of --vae.

    Args:
        vae:    "none", "ema", "mse", a hub id, or a local folder that diffusers saved

    Raises:
        ValueError: if it cannot be found or fetched, or is of another kind.
    """
    name = autoencoder_name(vae)
    return PixelSpace() if name == "none" else LatentSpace(name, _find(name).to(device))


def load_raw_latents(vae: str) -> RawLatents:
    """The latents of --vae, which is not "none", without a decoder: reads the config only, no weights.

    Raises:
        ValueError: as `load_autoencoder`.
    """
    name = autoencoder_name(vae)
    config = _find(name, weights=False).config
    return RawLatents(name, Scaling.from_config(config), config.latent_channels)


def _find(name: str, weights: bool = True) -> torch.nn.Module:
    """The diffusers model of a local folder or a hub id, from the hub's cache where that has it."""
    if not Path(name).is_dir():
        with contextlib.suppress(ValueError):
            return _read_model(name, weights, local_files_only=True)
    return _read_model(name, weights)


def _read_model(name: str, weights: bool, **options: Any) -> torch.nn.Module:
    """The diffusers model of a local folder or a hub id (ValueError, in one line, if that fails).

    Without weights its tensors are on the meta device.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny  # slow to import
    from diffusers.utils import logging
    from huggingface_hub.utils import logging as hub_logging

    logging.set_verbosity(logging.CRITICAL)  # errors are reported below, in one line
    hub_logging.set_verbosity(hub_logging.CRITICAL)  # retries are a dozen lines
    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    advice = f"give --vae a local folder with config.json and the weights of an {' or '.join(kinds)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # diffusers and its hub disagree about arguments
            config = AutoencoderKL.load_config(name, **options)
            kind = config.get("_class_name")
            if kind in kinds and not weights:
                with torch.device("meta"):
                    return kinds[kind].from_config(config)
            if kind in kinds:
                options |= {"torch_dtype": torch.float32, "output_loading_info": True}
                model, info = kinds[kind].from_pretrained(name, **options)
                if info["missing_keys"]:
                    raise ValueError(f"{sorted(info['missing_keys'])[0]} is missing from its weights")
                return model
    except Exception as error:  # diffusers, the hub and safetensors raise a dozen kinds
        if Path(name).exists():
            reason = f"it is not a folder that diffusers saved ({' '.join(str(error).split())})"
        else:
            reason = "there is no such folder, and it could not be fetched from the hub"
            reason += " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
            if unwritable := _file_error(error):
                reason = f"the hub's files cannot be kept ({unwritable}): set HF_HOME to another folder"
        raise ValueError(f"cannot load the autoencoder {name}: {reason}; {advice}") from error
    raise ValueError(f"the autoencoder {name} is of the kind {kind}; {advice}")


def _file_error(error: BaseException | None) -> OSError | None:
    """Cause of an error, if that is a file or folder of this machine."""
    while error is not None:
        if isinstance(error, OSError) and error.filename is not None:
            return error
        error = error.__cause__ or error.__context__
    return None
