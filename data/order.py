"""The order in which training sees a dataset: which sample is where in which step, whatever the processes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.datasets import AnyDataset
from data.images import UnreadableImage
from data.sizes import draw_version
from runtime.distributed import Processes
from runtime.errors import UserError
from runtime.preemption import ignore_preemption_signals
from runtime.rng import Stream, sample_generators


class TrainingStream(Dataset):
    """An endless sequence of samples: item p is a function of (seed, p), whatever the workers, ranks or restarts.

    Every epoch is a fresh permutation, so each image comes once per epoch; positions run on across epochs.
    """

    def __init__(self, dataset: AnyDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)  # the last one used

    def index(self, position: int) -> int:
        """Index in the dataset of the sample at a position of the run."""
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self._epoch:
            (generator,) = sample_generators(self.seed, [epoch], Stream.SHUFFLE)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.dataset), generator=generator).numpy()
        return int(self._permutation[offset])

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        (generator,) = sample_generators(self.seed, [position], Stream.AUGMENTATION)
        return self.dataset.load(self.index(position), generator)

    def __getitems__(self, positions: Sequence[int]) -> tuple[torch.Tensor | list[torch.Tensor], torch.Tensor]:
        """Items (n, C, H, W) and labels (n,) at these positions; the DataLoader asks for a batch this way.

        Items of many sizes are a list of n tensors (C, H, W).
        """
        if not hasattr(self.dataset, "load_many"):
            items, labels = zip(*(self[position] for position in positions), strict=True)
            return list(items) if self.dataset.sizes else torch.stack(items), torch.tensor(labels)
        generators = sample_generators(self.seed, positions, Stream.AUGMENTATION)
        return self.dataset.load_many([self.index(position) for position in positions], generators)


def posterior_generators(seed: int, positions: Sequence[int]) -> list[torch.Generator]:
    """Generators of the posterior noise of images that are encoded on the fly: those that latent files use.

    With it, training on images and on their shards sees the same latents at the same positions.
    """
    generators = sample_generators(seed, positions, Stream.AUGMENTATION)
    for generator in generators:
        draw_version(generator)  # load drew it
    return generators


class StepSampler(Sampler[list[int]]):
    """Positions of this rank's part of each global batch: one list per step, from `start` up to `stop`."""

    def __init__(self, start: int, stop: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.steps = range(start, stop)
        self.global_batch_size = global_batch_size
        self.local = global_batch_size // world_size
        self.offset = rank * self.local

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.global_batch_size + self.offset
            yield list(range(first, first + self.local))


def training_loader(
    dataset: AnyDataset, seed: int, sampler: StepSampler, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Batches (n, C, H, W) and labels (n,), one per step of the sampler."""
    return DataLoader(
        TrainingStream(dataset, seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=identity_collate,
    )


def identity_collate(batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream gives whole batches; a lambda could not be sent to workers."""
    return batch


class TrainingBatches:
    """This process's part of each global batch from step `start` up to `stop`, with the positions of its samples.

    Args:
        dataset:     what is trained on
        seed:        of the order and the augmentation
        batch_size:  samples of a step, all processes
        num_workers: processes that load data for this one
    """

    def __init__(
        self,
        dataset: AnyDataset,
        seed: int,
        start: int,
        stop: int,
        batch_size: int,
        processes: Processes,
        num_workers: int,
    ) -> None:
        self.steps = StepSampler(start, stop, batch_size, processes.rank, processes.world_size)
        self.local_size = self.steps.local
        pin_memory = processes.device.type == "cuda"
        self.loader = training_loader(dataset, seed, self.steps, num_workers, pin_memory)
        self.loader.worker_init_fn = ignore_preemption_signals

    def index(self, position: int) -> int:
        """The dataset's index of the sample at a position of the run."""
        return self.loader.dataset.index(position)

    def __iter__(self) -> Iterator[tuple[int, range, torch.Tensor, torch.Tensor]]:
        """Yield step, positions, images (n, C, H, W) and labels (n,).

        Raises:
            UserError: if data cannot be read; the message names them.
        """
        batches = iter(self.loader)
        for step, positions in zip(self.steps.steps, self.steps, strict=True):
            try:
                images, labels = next(batches)
            except OSError as error:  # from a worker the text is a traceback, which ends with the error itself
                message = re.sub(r"^[\w.]+: ", "", str(error).strip().splitlines()[-1])
                if isinstance(error, UnreadableImage):
                    message += "; remove it, or train on extract_latents.py --skip-unreadable's latents"
                raise UserError(message) from error
            yield step, range(positions[0], positions[-1] + 1), images, labels
