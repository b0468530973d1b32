"""Small networks trained in pixels: SiT, pyramids, and what might help them; a recipe is one way to train one."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

import train_utils as cli
from data.images import ImageArchive
from experts import ExpertPatchDiT, create_expert
from models import create_model
from pipeline import Pipeline
from runtime.errors import user_input
from runtime.files import complete_file
from runtime.logs import to_uint8
from runtime.rng import Stream, sample_generators
from runtime.speed import ema_decay_at, update_ema
from transport import PatchSchedule, Transport, create_transport
from weights.layouts import initialize_levels

HELD_OUT = 5000  # images, the last ones: neither the classifier nor a run is trained on them
KEEP_EVERY = 250  # steps
EQUAL_COST = "-equal-cost"  # end of the name of a recipe that goes on with the run of the same name

# ---------------------------------------------------------------------------------------------------------------
# Runs


SQUARE = (4, 4)  # the shape of an image of --image-size
SHAPES = (SQUARE, (5, 3), (3, 5))  # with at most as many tokens: 16x16, 20x12 and 12x20


@dataclass(frozen=True)
class Recipe:
    """A network and the way it is trained; each remedy is one field.

    Args:
        model:         name in the registry
        patch_sizes:   other patches, coarsest first; None for the model's
        edges:         times at which the level changes; None for the paper's
        longer:        factor of --steps
        start:         recipe whose weights at half of --steps it starts from, for the other half
        shared:        half-width of a window around each edge in which a sample's level is drawn from both sides
        coarse_data:   every level but the finest predicts data; the loss is still that of the velocity
        coarse_batch:  so many times as many samples at every level but the finest, each with as much less weight
        coarse_weight: factor of the loss of every level but the finest
        wide:          the coarse patches are embedded by an MLP instead of a linear layer
        experts:       levels share no parameters (Patch Diffusion, arXiv:2207.04316)
        elastic:       probability that a sample's level is drawn from all levels (train.py --elastic)
        shapes:        (height, width) in quarters of the image's side: each sample has one of them, and only networks
                       with rotary positions take others than the square
    """

    model: str
    patch_sizes: tuple[tuple[int, int], ...] | None = None
    edges: tuple[float, ...] | None = None
    longer: float = 1.0
    start: str | None = None
    shared: float = 0.0
    coarse_data: bool = False
    coarse_batch: int = 1
    coarse_weight: float = 1.0
    wide: bool = False
    experts: bool = False
    elastic: float = 0.0
    shapes: tuple[tuple[int, int], ...] = (SQUARE,)


# At 16x16 pixels 1.61 and 2.03 times the steps of a pyramid cost the arithmetic of SiT's.
RECIPES = {
    "sit": Recipe("SiT-T/2"),
    "ppf2": Recipe("PPF-T-2"),
    "ppf3": Recipe("PPF-T-3"),
    "ppf2-equal-cost": Recipe("PPF-T-2", longer=1.6),
    "ppf3-equal-cost": Recipe("PPF-T-3", longer=2.0),
    "ppf2-experts-equal-cost": Recipe("PPF-T-2", longer=1.6, experts=True),
    "ppf2-coarse-data-equal-cost": Recipe("PPF-T-2", longer=1.6, coarse_data=True),
    "ppf2-elastic-equal-cost": Recipe("PPF-T-2", longer=1.6, elastic=0.5),
    "ppf2-edge-0.25": Recipe("PPF-T-2", edges=(0.25,)),
    "ppf2-edge-0.35": Recipe("PPF-T-2", edges=(0.35,)),
    "ppf2-edge-0.65": Recipe("PPF-T-2", edges=(0.65,)),
    "ppf2-from-sit": Recipe("PPF-T-2", start="sit"),
    "ppf3-from-sit": Recipe("PPF-T-3", start="sit"),
    "ppf2-shared": Recipe("PPF-T-2", shared=0.1),
    "ppf2-coarse-data": Recipe("PPF-T-2", coarse_data=True),
    "ppf2-coarse-batch": Recipe("PPF-T-2", coarse_batch=3),
    "ppf2-coarse-weight": Recipe("PPF-T-2", coarse_weight=2.0),
    "ppf2-wide": Recipe("PPF-T-2", wide=True),
    "ppf2-data-edge-0.35": Recipe("PPF-T-2", edges=(0.35,), coarse_data=True),
    "ppf2-data-edge-0.35-from-sit": Recipe("PPF-T-2", edges=(0.35,), coarse_data=True, start="sit"),
    "ppf3-coarse-data": Recipe("PPF-T-3", coarse_data=True),
    "sit-early-data": Recipe("PPF-T-2", patch_sizes=((2, 2), (2, 2)), coarse_data=True),  # SiT's tokens at all times
    "ppfit2": Recipe("PPFiT-T-2"),
    "ppfit2-shapes": Recipe("PPFiT-T-2", shapes=SHAPES),
}


class VelocityNetwork(nn.Module):
    """The network of a recipe, which predicts the velocity at every level, or at several levels in one call."""

    def __init__(self, recipe: Recipe, image_size: int, num_classes: int, transport: Transport) -> None:
        super().__init__()
        sizes = {"input_size": image_size, "in_channels": 3, "num_classes": num_classes, "learn_sigma": False}
        if recipe.patch_sizes:
            sizes["patch_sizes"] = recipe.patch_sizes
        self.inner = _experts(recipe, transport, sizes) if recipe.experts else create_model(recipe.model, **sizes)
        self.num_levels, self.num_classes = self.inner.num_levels, num_classes
        self.in_channels = 3
        self.coarse_data = recipe.coarse_data
        self.transport = transport
        if recipe.wide:
            width = self.inner.hidden_size
            for level, linear in enumerate(self.inner.x_embedder[:-1]):
                self.inner.x_embedder[level] = nn.Sequential(
                    nn.Linear(linear.in_features, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                )

    @property
    def input_size(self) -> tuple[int, int]:
        """(H, W) of the samples."""
        return self.inner.input_size

    def forward(self, x: Any, t: Any, y: Any, level: Any = 0) -> Any:
        outputs = self.inner(x, t, y, level=level)
        if not self.coarse_data:
            return outputs
        if not isinstance(level, Sequence):
            return self._velocity(outputs, x, t, level)
        return [self._velocity(*group) for group in zip(outputs, x, t, level, strict=True)]

    def _velocity(self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, level: int) -> torch.Tensor:
        if level == self.num_levels - 1:
            return output
        return self.transport.convert(output, x, t, "velocity", source="data")

    def macs(self, level: int, size: tuple[int, int] | None = None) -> int:
        """Multiply-accumulates of one evaluation at a level, those of a wide embedding left out."""
        return self.inner.macs(level, size)


def _experts(recipe: Recipe, transport: Transport, sizes: dict[str, Any]) -> ExpertPatchDiT:
    """A network of its own for each patch size."""
    edges = transport.schedule.level_edges
    networks = [create_expert(recipe.model, range(k, k + 1), **sizes) for k in range(len(edges) + 1)]
    return ExpertPatchDiT(networks, edges)


def transport_of(recipe: Recipe) -> Transport:
    """The process: the Linear path with a velocity, as published."""
    levels = create_model(recipe.model, input_size=8).num_levels
    edges = PatchSchedule.default(levels).level_edges if recipe.edges is None else recipe.edges
    return create_transport(level_edges=edges, elastic=recipe.elastic)


class Data:
    """The images of an archive, in memory: squares of --image-size, and on demand other shapes of them.

    Args:
        path:       the archive
        image_size: side of the squares
        folder:     keeps what was read from the archive
    """

    def __init__(self, path: str, image_size: int, folder: Path) -> None:
        archive = ImageArchive(path, image_size)
        self.path, self.image_size, self.folder = path, image_size, folder
        self.labels = archive.labels
        self.num_classes = archive.num_classes
        self.squares: dict[int, np.ndarray] = {}
        self.pixels = self._square(image_size)
        if len(self.pixels) <= 2 * HELD_OUT:
            raise ValueError(f"{path} has {len(self.pixels)} images, and {HELD_OUT} of them are held out: give more")

    def _square(self, side: int) -> np.ndarray:
        """The images as squares of a side, (n, S, S, 3) uint8."""
        if side not in self.squares:
            cache = self.folder / f"images-{side}.npy"
            if not cache.exists():
                archive = ImageArchive(self.path, side)
                pixels = np.empty((len(archive), side, side, 3), np.uint8)
                for index in tqdm(range(len(archive)), desc="images", unit="image"):
                    pixels[index] = to_uint8(archive.load(index)[0][None])[0].permute(1, 2, 0).numpy()
                with complete_file(cache) as temporary:
                    np.save(temporary, pixels)
            self.squares[side] = np.load(cache)
        return self.squares[side]

    @property
    def num_training(self) -> int:
        return len(self.pixels) - HELD_OUT

    def size_of(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Size (h, w) in pixels of a shape in quarters of --image-size."""
        height, width = (quarters * self.image_size / 4 for quarters in shape)
        return round(height), round(width)

    def pixels_of(self, size: tuple[int, int], indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The middle of the images that cover a size (h, w), (n, h, w, 3) uint8, as `data.sizes.cover_and_crop`."""
        side = max(size)
        top, left = ((side - length) // 2 for length in size)
        return self._square(side)[indices, top : top + size[0], left : left + size[1]]

    def batch(self, indices: torch.Tensor, size: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (n, 3, h, w) in [-1, 1], squares unless a size is given, and labels (n,)."""
        numbers = indices.numpy()
        pixels = torch.from_numpy(self.pixels_of(size or (self.image_size, self.image_size), numbers))
        return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(self.labels[numbers])


# ---------------------------------------------------------------------------------------------------------------
# What the studies share of their commands


def add_training_args(parser: cli.ArgumentParser) -> None:
    """Add the images and what training takes but for the number of steps."""
    add = parser.add_argument
    add("data_path", help="zip archive of labelled images, as EDM's CIFAR-10")
    add("--image-size", type=cli.positive_int, default=16, help="side of the images, or of the square of many sizes")
    add("--batch-size", type=cli.positive_int, default=64, help="images per step")
    add("--lr", type=cli.positive_float, default=1e-3, help="AdamW's learning rate")
    add("--threads", type=cli.positive_int, help="of the processor (default: torch's)")


def open_study(args: argparse.Namespace) -> tuple[Data, Path]:
    """The images, and the folder under --out of all that is kept for images of their size."""
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.out / f"{args.image_size}x{args.image_size}"
    folder.mkdir(parents=True, exist_ok=True)
    with user_input():
        return Data(args.data_path, args.image_size, folder), folder


# ---------------------------------------------------------------------------------------------------------------
# Training


def loss_of_step(
    recipe: Recipe, network: VelocityNetwork, data: Data, step: int, seed: int, batch_size: int
) -> torch.Tensor:
    """The loss of a step, a function of (seed, step)."""
    (g,) = sample_generators(seed, [step], Stream.NOISE)
    transport = network.transport
    schedule, finest = transport.schedule, network.num_levels - 1
    t = transport.sample_times(batch_size, g)
    level = schedule.sample_levels(t, g)
    weight = torch.where(level < finest, recipe.coarse_weight / recipe.coarse_batch, 1.0)
    if recipe.coarse_batch > 1:  # more samples at the times of coarse levels
        coarse = t[level < finest]
        moved = [(coarse + torch.rand(len(coarse), generator=g) * schedule.edges[-2]) % schedule.edges[-2]]
        t = torch.cat([t, *(moved * (recipe.coarse_batch - 1))])
        level = schedule.level_at(t)
        weight = torch.cat([weight, weight.min().expand(len(t) - batch_size)])
    if recipe.shared:
        for number, edge in enumerate(schedule.level_edges):
            near = (t - edge).abs() < recipe.shared
            level = torch.where(near, number + torch.randint(2, t.shape, generator=g), level)
    numbers = torch.randint(data.num_training, t.shape, generator=g)
    y = torch.from_numpy(data.labels[numbers.numpy()])
    mirrored = torch.rand(len(t), generator=g) < 0.5
    y = y.masked_fill(torch.rand(len(t), generator=g) < 0.1, network.num_classes)
    shape = torch.zeros_like(level)
    if len(recipe.shapes) > 1:
        shape = torch.randint(len(recipe.shapes), t.shape, generator=g)
    points, times, labels, levels, targets, weights = [], [], [], [], [], []
    for index, quarters in enumerate(recipe.shapes):
        members = torch.nonzero(shape == index).flatten()
        x1, _ = data.batch(numbers[members], data.size_of(quarters))
        x1 = torch.where(mirrored[members, None, None, None], x1.flip(3), x1)
        x0 = torch.randn(x1.shape, generator=g)
        x = transport.path.interpolate(x0, x1, t[members])
        for number in range(network.num_levels):
            group = torch.nonzero(level[members] == number).flatten()
            points.append(x[group])
            targets.append((x1 - x0)[group])
            times.append(t[members[group]])
            labels.append(y[members[group]])
            weights.append(weight[members[group]])
            levels.append(number)
    outputs = network(points, times, labels, level=levels)
    errors = [
        ((output - target).square().flatten(1).mean(1) * factor).sum()
        for output, target, factor in zip(outputs, targets, weights, strict=True)
    ]
    return sum(errors) / batch_size


def train_run(
    name: str, seed: int, steps: int, data: Data, folder: Path, batch_size: int, lr: float
) -> VelocityNetwork:
    """The averaged network of a run after its steps; what --out has of it is not trained again.

    Returns:
        the network, in evaluation mode.

    Raises:
        ValueError: if the run has gone on beyond these steps without keeping the network there.
    """
    recipe = RECIPES[name]
    run = folder / f"{name.removesuffix(EQUAL_COST)}-{seed}"  # which continues the run of that name
    last = round(steps * recipe.longer)
    image_size = data.pixels.shape[1]
    torch.manual_seed(seed)
    network = VelocityNetwork(recipe, image_size, data.num_classes, transport_of(recipe))
    first = 0
    if recipe.start:
        first = steps // 2
        source = train_run(recipe.start, seed, first, data, folder, batch_size, lr)
        initialize_levels(network.inner, source.inner)
    done = run / f"{last:06d}.pt"
    ema = copy.deepcopy(network).requires_grad_(False)
    if done.exists():
        ema.load_state_dict(torch.load(done, weights_only=True))
        return ema.eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0, fused=True)
    state_file, step = run / "state.pt", first
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    if step > last:
        raise ValueError(f"{run} has made {step} steps, and nothing is kept of step {last}: choose other --steps")
    with tqdm(total=last, initial=step, desc=f"{name}, seed {seed}", unit="step", mininterval=10) as progress:
        while step < last:
            loss = loss_of_step(recipe, network, data, step, seed, batch_size)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step - first + 1) / 100)
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, network, ema_decay_at(step - first, 0.999))
            step += 1
            progress.update()
            if step % KEEP_EVERY == 0 or step == last:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                state = {"network": network.state_dict(), "ema": ema.state_dict()}
                with complete_file(state_file) as temporary:
                    torch.save({**state, "optimizer": optimizer.state_dict(), "step": step}, temporary)
                with complete_file(run / f"{step:06d}.pt") as temporary:
                    torch.save(ema.state_dict(), temporary)
    return ema.eval()


def open_network(path: Path) -> Pipeline:
    """The network of a checkpoint, or one that `train_run` kept (ValueError, OSError if it cannot be read)."""
    run, size = re.fullmatch(r"(.+)-\d+", path.parent.name), re.fullmatch(r"(\d+)x\1", path.parent.parent.name)
    name = next((name for name in RECIPES if run and name.removesuffix(EQUAL_COST) == run[1]), None)
    if not (path.is_file() and name and size):
        return Pipeline.load(path)
    weights, recipe = torch.load(path, weights_only=True), RECIPES[name]
    table = next(tensor for key, tensor in weights.items() if key.endswith("y_embedder.embedding_table.weight"))
    transport = transport_of(recipe)
    network = VelocityNetwork(recipe, int(size[1]), len(table) - 1, transport)
    network.load_state_dict(weights)
    return Pipeline(network.eval(), transport, name=run[1])
