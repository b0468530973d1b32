"""One network for digits of several sizes: trained on 8x8, 8x6 and 6x8, and asked for 10x8 and 8x10 as well.

    python -m benchmarks.digit_sizes

Trains a small network with rotary positions on digits that are cropped to three sizes, and draws five sizes with its
averaged weights. A support vector machine for each training size, fitted to real digits cropped to it, tells how many
samples have the class that was asked for; at the other sizes it is that of the squares, to which samples are resized.
The network is kept in --out, and the same command makes what is missing. The table goes to OUT/digit-sizes.md, ten
digits of each class to OUT/samples-HxW.png, one class at all sizes to OUT/one-class.png.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.svm import SVC
from tqdm import tqdm

import train_utils as cli
from data.datasets import Digits
from models import PyramidalPatchDiT, create_model
from pipeline import Pipeline
from runtime.errors import run_script
from runtime.files import complete_file
from runtime.logs import save_grid, to_uint8
from runtime.rng import Stream, sample_generators
from runtime.speed import ema_decay_at, update_ema
from transport import ODE, Guidance, create_transport

Size = tuple[int, int]  # (H, W)
TRAINED: tuple[Size, ...] = ((8, 8), (8, 6), (6, 8))
UNSEEN: tuple[Size, ...] = ((10, 8), (8, 10))
BATCH_SIZE, LR, WARMUP, EMA_DECAY, DROPOUT = 128, 1e-3, 50, 0.995, 0.1
STEPS, GUIDANCE, SAMPLING_STEPS = 700, 2.0, 16

# ---------------------------------------------------------------------------------------------------------------
# Training


def crop(images: torch.Tensor, size: Size) -> torch.Tensor:
    """The middle (..., h, w) of images (..., H, W)."""
    (height, width), (h, w) = images.shape[-2:], size
    top, left = (height - h) // 2, (width - w) // 2
    return images[..., top : top + h, left : left + w]


def new_network() -> PyramidalPatchDiT:
    """PPFiT-T-2's blocks with 2x2 patches alone: 4x4 ones do not divide 8x6."""
    return create_model("PPFiT-T-2", patch_sizes=[2], input_size=8, in_channels=1, num_classes=10)


def train_network(steps: int, seed: int = 0) -> PyramidalPatchDiT:
    """The averaged network after so many steps on digits, each cropped to one of TRAINED; none is mirrored."""
    digits, transport = Digits(), create_transport()
    torch.manual_seed(seed)
    model = new_network()
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    for step in tqdm(range(steps), desc="digits of several sizes", unit="step", mininterval=10):
        (g,) = sample_generators(seed, [step], Stream.NOISE)
        numbers = torch.randint(len(digits), (BATCH_SIZE,), generator=g)
        sizes = torch.randint(len(TRAINED), (BATCH_SIZE,), generator=g).tolist()
        y = digits.labels[numbers]
        y = y.masked_fill(torch.rand(BATCH_SIZE, generator=g) < DROPOUT, digits.num_classes)
        x1 = [crop(digits.images[n], TRAINED[k]) for n, k in zip(numbers.tolist(), sizes, strict=True)]
        transport.training_losses(model, x1, y, generator=g, joint=True)["loss"].mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, ema_decay_at(step, EMA_DECAY))
    return ema


# ---------------------------------------------------------------------------------------------------------------
# Samples and their classes


def draw(model: PyramidalPatchDiT, size: Size, number: int, scale: float, steps: int, seed: int = 0) -> torch.Tensor:
    """Digits (N, 1, H, W) in about [-1, 1]; sample i has class i % 10."""
    labels = torch.arange(number) % model.num_classes
    return Pipeline(model, create_transport()).images(labels, ODE("ab2", steps), Guidance(scale), seed=seed, size=size)


class Judge:
    """A support vector machine that tells the class of digits of a size.

    Args:
        size: (H, W) of the digits, the middle of real ones

    Attributes:
        held_out: share of the last fifth of the digits, of other writers, that one fitted to the others recognises
    """

    def __init__(self, size: Size) -> None:
        digits = Digits()
        self.size, seen = size, len(digits) * 4 // 5
        images, labels = crop(digits.images, size).flatten(1).numpy(), digits.labels.numpy()
        self.held_out = float(SVC().fit(images[:seen], labels[:seen]).score(images[seen:], labels[seen:]))
        self.machine = SVC().fit(images, labels)

    def __call__(self, images: torch.Tensor) -> float:
        """Share of digits (N, 1, H, W) that are recognised, resized to this size; number i has class i % 10."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        found = self.machine.predict(images.clamp(-1, 1).flatten(1).numpy())
        return float((found == np.arange(len(images)) % 10).mean())


# ---------------------------------------------------------------------------------------------------------------
# The picture


def one_class(model: PyramidalPatchDiT, label: int, columns: int, scale: float, steps: int, zoom: int) -> Image.Image:
    """Digits of one class, a group of columns for each size, so many times enlarged, on white."""
    groups = []
    for size in (*TRAINED, *UNSEEN):
        pipe = Pipeline(model, create_transport())
        images = pipe.images([label] * columns, ODE("ab2", steps), Guidance(scale), seed=1, size=size)
        pixels = to_uint8(F.interpolate(images, scale_factor=zoom, mode="bicubic"))[:, 0]
        groups.append([Image.fromarray(image) for image in pixels.numpy()])
    gap = zoom
    width = sum(columns * (group[0].width + gap) + 2 * gap for group in groups) - 3 * gap
    height = max(group[0].height for group in groups)
    picture, left = Image.new("L", (width, height), 255), 0
    for group in groups:
        for image in group:
            picture.paste(image, (left, (height - image.height) // 2))
            left += image.width + gap
        left += 2 * gap
    return picture


# ---------------------------------------------------------------------------------------------------------------
# The command


def named(size: Size) -> str:
    """A size in words."""
    return "x".join(map(str, size))


def table(found: dict[Size, float], real: dict[Size, float]) -> str:
    """Markdown of the class accuracy of samples, and of held-out digits at the sizes of training."""
    rows = [["", *(named(size) for size in found)], ["---"] * (len(found) + 1)]
    rows.append(["samples", *(f"{value:.3f}" for value in found.values())])
    rows.append(["held-out digits", *(f"{real[size]:.3f}" if size in real else "" for size in found)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def build_parser() -> cli.ArgumentParser:
    """The flags."""
    parser = cli.ArgumentParser(prog="benchmarks.digit_sizes", description="One network for digits of several sizes.")
    add = parser.add_argument
    add("--steps", type=cli.positive_int, default=STEPS, help="optimizer steps")
    add("--guidance", type=cli.positive_float, default=GUIDANCE, metavar="SCALE", help="guidance scale")
    add("--num-samples", type=cli.positive_int, default=1000, help="samples of each size")
    add("--sampling-steps", type=cli.positive_int, default=SAMPLING_STEPS, help="ab2 steps of a sample")
    add("--shown-class", type=cli.natural_int, default=6, help="digit of the picture of one class")
    add("--threads", type=cli.positive_int, help="of the processor (default: torch's)")
    add("--out", type=Path, default=Path("results/digit-sizes"), help="folder for the network, table and pictures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw and judge with these command-line arguments."""
    args = build_parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    file = args.out / f"network-{args.steps}.pt"
    if not file.exists():
        with complete_file(file) as temporary:
            torch.save(train_network(args.steps).state_dict(), temporary)
    model = new_network().eval().requires_grad_(False)
    model.load_state_dict(torch.load(file, weights_only=True))
    judges = {size: Judge(size) for size in TRAINED}
    found = {}
    for size in (*TRAINED, *UNSEEN):
        images = draw(model, size, args.num_samples, args.guidance, args.sampling_steps)
        found[size] = judges.get(size, judges[TRAINED[0]])(images)
        shown = torch.arange(len(images))[:100].reshape(-1, 10).T.flatten()  # a row for each class
        save_grid(images[shown], args.out / f"samples-{named(size)}.png", 10)
    picture = one_class(model, args.shown_class, 3, args.guidance, args.sampling_steps, zoom=7)
    picture.save(args.out / "one-class.png")
    text = table(found, {size: judge.held_out for size, judge in judges.items()})
    with complete_file(args.out / "digit-sizes.md") as temporary:
        temporary.write_text(text)
    print(text)


if __name__ == "__main__":
    run_script(main)
