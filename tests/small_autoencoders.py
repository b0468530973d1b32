"""Autoencoders of a few thousand weights, saved as diffusers saves them, to be loaded as users load theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from data.autoencoder import LatentSpace, load_autoencoder

FACTOR = 2  # images are so many times larger than latents


def save_kl(
    folder: Path, channels: int = 4, blocks: int = 2, deviation: float = 0.3, offset: float = 0.0, **config: Any
) -> Path:
    """An AutoencoderKL with random weights, whose posteriors have about this standard deviation and mean."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16)[:blocks],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=8,
        layers_per_block=1,
        latent_channels=channels,
        **config,
    )
    with torch.no_grad():
        model.quant_conv.weight *= 3  # latents that differ between images
        model.quant_conv.bias[:channels] += offset
        model.quant_conv.bias[channels:] = 2 * torch.tensor(deviation).log()
    model.save_pretrained(folder)
    return folder


def save_tiny(folder: Path, **config: Any) -> Path:
    """An AutoencoderTiny with random weights."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8), "num": (1, 1)}
    AutoencoderTiny(
        encoder_block_out_channels=blocks["block_out_channels"],
        decoder_block_out_channels=blocks["block_out_channels"],
        num_encoder_blocks=blocks["num"],
        num_decoder_blocks=blocks["num"],
        **config,
    ).save_pretrained(folder)
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Overwrite values in config.json, as other autoencoders have them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def open_kl(folder: Path, **config: Any) -> LatentSpace:
    """Save and load one."""
    return load_autoencoder(str(save_kl(folder, **config)))
