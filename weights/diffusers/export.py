"""A trained network as a folder that diffusers loads without this program: download.py export --format diffusers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from data.autoencoder import LatentSpace, PixelSpace
from experts import Network
from transport.budgets import LevelErrors
from transport.schedule import PatchSchedule
from transport.transport import Transport
from weights.diffusers.pipeline import PPFlowPipeline
from weights.diffusers.pyramid_scheduler import PyramidScheduler
from weights.diffusers.pyramid_transformer import PyramidTransformer

CARD = Path(__file__).with_name("pipeline_card.md")  # a template
CARD_STEPS = 50  # of the costs in the card
CARD_BUDGETS = (1, 0.8, 0.6, 0.4, 0.3)  # of those that can be met
TAGS = ["diffusion", "flow-matching", "class-conditional", "arxiv:2506.23543", "arxiv:2401.08740"]


def pipeline_of(
    network: Network,
    transport: Transport,
    autoencoder: LatentSpace | PixelSpace,
    id2label: Mapping[int, str] | None = None,
    level_errors: LevelErrors | None = None,
) -> PPFlowPipeline:
    """A network, its process and its autoencoder as a pipeline of diffusers; weights are shared, not copied.

    Args:
        id2label:     names of the classes by their ids
        level_errors: of elastic levels in training, by which budgets are met
    """
    latent = isinstance(autoencoder, LatentSpace)
    return PPFlowPipeline(
        PyramidTransformer.of(network),
        PyramidScheduler.of(transport, level_errors),
        autoencoder.model if latent else None,
        None if id2label is None else {str(number): name for number, name in id2label.items()},
        asdict(autoencoder.scaling) if latent else None,
    )


def class_names(labels: str, num_classes: int) -> dict[int, str]:
    """Names of the classes by their ids.

    Args:
        labels: a text file with one name a line, or "imagenet" for its 1000 classes in the order of their folders

    Raises:
        ValueError: if there are not so many, or the file is no text.
        OSError:    if it cannot be read.
    """
    if labels == "imagenet":
        from torchvision.models import ResNet50_Weights  # which has their names

        names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    else:
        names = [line.strip() for line in Path(labels).read_text(encoding="utf-8").splitlines()]
    if len(names) != num_classes:
        raise ValueError(f"{labels} has {len(names)} names for {num_classes} classes: give one for each")
    return dict(enumerate(names))


def check_new(folder: str | Path) -> Path:
    """A folder that is not there, or empty (FileExistsError otherwise)."""
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already: give a new folder")
    return folder


def export(pipeline: PPFlowPipeline, folder: str | Path, name: str, step: int = 0) -> None:
    """Write a pipeline with its code and a model card; the folder appears when it is complete.

    Args:
        folder: to write: new, or empty
        name:   of the network, for the card
        step:   of training, for the card; 0 if unknown

    Raises:
        FileExistsError: if the folder holds something.
    """
    folder = check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        pipeline.save_pretrained(temporary, max_shard_size="1TB")  # in one file, which load_pretrained reads as well
        model_card(pipeline, name, step).save(temporary / "README.md")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def model_card(pipeline: PPFlowPipeline, name: str, step: int = 0) -> ModelCard:
    """The README.md of an exported folder, with a table of the levels and what they cost, and one of budgets."""
    network, walk = pipeline.transformer.network, pipeline.scheduler.walk(pipeline.transformer, CARD_STEPS)
    schedule = walk.sampler.transport.schedule
    gmacs = [network.macs(level) / 1e9 for level in range(network.num_levels)]
    steps = steps_of(schedule)
    total, finest = sum(n * cost for n, cost in zip(steps, gmacs, strict=True)), CARD_STEPS * gmacs[-1]
    patches = [patch for part in network.networks.values() for patch in part.patch_sizes]
    levels = [
        {
            "times": f"[{start:g}, {stop:g}]",
            "patch": f"{p}x{q}",
            "tokens": network.num_tokens(level),
            "gmacs": f"{gmacs[level]:.3g}",
            "steps": steps[level],
        }
        for level, ((start, stop), (p, q)) in enumerate(zip(pairwise(schedule.edges), patches, strict=True))
    ]
    data = ModelCardData(
        license="mit", library_name="diffusers", pipeline_tag="unconditional-image-generation", tags=TAGS
    )
    fields = {
        "name": name,
        "step": step,
        "levels": levels,
        "budgets": budget_rows(pipeline, gmacs),
        "num_steps": CARD_STEPS,
        "total": f"{total:.4g}",
        "finest": f"{finest:.4g}",
        "times_less": f"{finest / total:.2f}" if network.num_levels > 1 else None,
        "num_classes": network.num_classes,
        "in_channels": network.in_channels,
        "input_size": network.input_size,
        "image_size": [side * pipeline.vae_scale_factor for side in network.input_size],
        "parameters": network.num_parameters,
        "rotary": network.position == "rope",
        "latents": pipeline.vae is not None,
        "student": pipeline.scheduler.config.aug_dim is not None,
        "named": bool(pipeline.id2label),
    }
    return ModelCard.from_template(data, template_path=str(CARD), **fields)


def steps_of(schedule: PatchSchedule) -> list[int]:
    """The card's steps, level by level."""
    steps, intervals = [0] * schedule.num_levels, schedule.intervals(0.0, 1.0)
    for interval, count in zip(intervals, schedule.share_steps(CARD_STEPS, intervals), strict=True):
        steps[interval.level] = count
    return steps


def budget_rows(pipeline: PPFlowPipeline, gmacs: Sequence[float]) -> list[dict[str, str]]:
    """Budgets with the edges that they lead to, and what an image then costs; none without elastic levels.

    Args:
        gmacs: of an evaluation at each level
    """
    rows = []
    for budget in CARD_BUDGETS:
        try:
            walk = pipeline.scheduler.walk(pipeline.transformer, CARD_STEPS, budget=budget)
        except ValueError:  # there are none, or this one is less than the coarsest level takes
            break
        schedule = walk.sampler.transport.schedule
        cost = sum(n * each for n, each in zip(steps_of(schedule), gmacs, strict=True))
        edges = ", ".join(f"{edge:g}" for edge in schedule.level_edges)
        rows.append({"budget": f"{budget:g}", "edges": edges, "gmacs": f"{cost:.4g}"})
    return rows
