"""Random numbers that depend on a sample's number alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
import torch

from transport import Transport


class Stream(IntEnum):
    """Uses of random numbers: the same (seed, number) in another stream draws other numbers."""

    CHOICE = 0  # images that sample.py takes from a dataset
    SHUFFLE = 1  # order of an epoch
    AUGMENTATION = 2  # mirroring, and the posterior of latents
    NOISE = 3  # x_0 of training
    TIME = 4
    DROPOUT = 5  # labels made null
    PREVIEW = 6
    SAMPLES = 7
    LABELS = 8
    PROBES = 10
    EVALUATION = 11  # samples that are measured during training
    LEVEL = 12  # elastic levels of training
    GRID = 13  # samples on which a step grid is measured


def sample_generators(seed: int, indices: Iterable[int], stream: Stream = Stream.CHOICE) -> list[torch.Generator]:
    """One CPU generator per sample: sample i's numbers depend on (seed, stream, i), not on batch, rank or restarts.

    Args:
        seed:    the experiment's seed, non-negative
        indices: numbers of the samples in this batch
        stream:  separates uses of the same (seed, i)
    """
    # torch seeds its CPU generator from 32 bits, where hashes of many indices would collide; an odd stride cannot.
    first, stride = (int(word) for word in np.random.SeedSequence(seed, spawn_key=(int(stream),)).generate_state(2))
    return [torch.Generator().manual_seed((first + index * (stride | 1)) % 2**32) for index in indices]


def label_of(index: int, num_classes: int, seed: int, sampling: str) -> int:
    """The class of sample `index` in a set of many samples.

    Args:
        seed:     of the set
        sampling: "random" for classes drawn uniformly, "balanced" for all classes equally often
    """
    if sampling == "balanced":
        return index % num_classes
    (generator,) = sample_generators(seed, [index], Stream.LABELS)
    return int(torch.randint(num_classes, (), generator=generator))


def draw_step(
    step: int,
    positions: range,
    shapes: Sequence[int] | Sequence[Sequence[int]],
    transport: Transport,
    seed: int,
    batch_size: int,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's random numbers of a step.

    Args:
        positions:  the rank's n samples, numbered over the whole run
        shapes:     shape of every sample, or one shape for each
        batch_size: of all ranks together
        dropout:    probability that a label is made null

    Returns:
        times (n,), levels (n,), noise (n, *shape) or a list of n, and which labels to drop (n,). Noise belongs to the
        sample's position; the others are drawn for the whole batch and cut.
    """
    local = slice(positions.start - step * batch_size, positions.stop - step * batch_size)
    (time_generator,) = sample_generators(seed, [step], Stream.TIME)
    (level_generator,) = sample_generators(seed, [step], Stream.LEVEL)
    (dropout_generator,) = sample_generators(seed, [step], Stream.DROPOUT)
    t = transport.sample_times(batch_size, time_generator)
    t, level = t[local], transport.schedule.sample_levels(t, level_generator)[local]
    drop = torch.rand(batch_size, generator=dropout_generator)[local] < dropout
    generators = sample_generators(seed, positions, Stream.NOISE)
    if isinstance(shapes[0], int):
        return t, level, transport.noise.sample((len(positions), *shapes), generators), drop
    x0 = [transport.noise.sample((1, *shape), [g])[0] for shape, g in zip(shapes, generators, strict=True)]
    return t, level, x0, drop
