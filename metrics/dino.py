"""Features of DINOv2 (arXiv:2304.07193), for the Fréchet distance FD-DINOv2 (arXiv:2306.04675)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metrics.features import Extractor, Features, exact_arithmetic
from weights.files import read_file

MODEL = "vit_large_patch14_dinov2.lvd142m"  # timm's name
URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"

INPUT_SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by channel


class DinoV2(Extractor):
    """The class token after the last norm, of a timm vision transformer.

    Args:
        network: images (N, 3, 224, 224), normalised, to features (N, d)
        device:  where it computes
    """

    name = "dinov2"
    resize = "Pillow's bicubic to 224x224, of bytes"

    def __init__(self, network: torch.nn.Module, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.network = network.to(self.device, torch.float32).eval().requires_grad_(False)
        self.dimensions = network.num_features
        content = hashlib.sha256()
        for name, tensor in sorted(network.state_dict().items()):
            content.update(name.encode())
            content.update(tensor.cpu().contiguous().numpy())
        self.digest = content.hexdigest()
        self._mean, self._deviation = (
            torch.tensor(values, device=self.device).reshape(3, 1, 1) for values in (MEAN, DEVIATION)
        )

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        with exact_arithmetic():
            x = resize_bicubic(images, INPUT_SIZE).to(self.device).float() / 255
            return Features(self.network((x - self._mean) / self._deviation))


def resize_bicubic(images: torch.Tensor, size: int) -> torch.Tensor:
    """Pillow's bicubic resize of images (N, 3, H, W) uint8 to (N, 3, size, size) uint8, on the CPU."""
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in pixels]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)


def load_dino(path: str | Path | None = None, device: torch.device | str = "cpu", model: str = MODEL) -> DinoV2:
    """Read the network's weights, without unpickling code.

    Args:
        path:  timm's file or DINOv2's own (.pth or .safetensors); None for what timm keeps, or else downloads
        model: timm's name of the network

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError:        if it is damaged, or of another network.
        ConnectionError:   if the weights cannot be fetched.
    """
    import timm  # slow to import

    overlay = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist: download {URL} (1.2 GB), and name it with --dino")
        overlay = {"pretrained_cfg_overlay": {"state_dict": read_file(Path(path))}}
    try:
        # For 224x224 timm resamples the position embeddings of 518x518.
        network = timm.create_model(model, pretrained=True, img_size=INPUT_SIZE, num_classes=0, **overlay)
    except Exception as error:  # of torch, timm, or half a dozen kinds of huggingface_hub
        reason = " ".join(str(error).split())
        if path is not None:
            raise ValueError(f"{path} is damaged, or not of {model}: {reason[:200]}") from error
        raise ConnectionError(
            f"the weights of {model} are neither kept nor to be fetched: download {URL} (1.2 GB) elsewhere, and name "
            f"it with --dino ({reason})"
        ) from error
    return DinoV2(network, device)
