"""Random numbers that depend on a sample's number alone."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


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
