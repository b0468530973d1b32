"""A zip archive of digits, as the studies of quality read them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from PIL import Image

from data.datasets import Digits


def write_digits_archive(path: Path, number: int = 120) -> Path:
    """Write the first digits as RGB images with their classes."""
    digits, labels = Digits(), []
    with zipfile.ZipFile(path, "w") as file:
        for index in range(number):
            pixels = ((digits.images[index, 0] + 1) * 127.5).round().byte().numpy()
            stream = io.BytesIO()
            Image.fromarray(pixels).convert("RGB").save(stream, format="PNG")
            file.writestr(f"{index:03d}.png", stream.getvalue())
            labels.append([f"{index:03d}.png", int(digits.labels[index])])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path
