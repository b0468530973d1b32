"""The distance of a network's samples to a reference while it trains (train.py --eval-every)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from metrics.collection import Collector
from metrics.evaluation import distance_name
from metrics.features import load_extractor
from metrics.sides import check_side, open_side, reference_features
from metrics.statistics import FrechetDistance
from runtime.distributed import Processes, agree, shares
from runtime.errors import UserError, user_input
from runtime.logs import to_uint8
from runtime.run import Run
from weights.published import cache_folder

# Images (n, C, H, W) in [-1, 1] of the samples with these numbers (n,) and class ids (n,)
Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class TrainingEvaluation:
    """Measures samples of a network in training; every measurement asks for the same numbers and classes.

    Classes are spread evenly over the samples. Images are kept nowhere: their features go into sums as they are drawn.

    Args:
        reference:   statistics, or images, as evaluate.py takes them
        features:    name of the extractor, as of `load_extractor`
        weights:     file of the extractor's weights; None for the one in the cache
        number:      samples of a measurement
        num_classes: classes of the data
        image_shape: (C, H, W) of the samples

    Collective.

    Raises:
        UserError: if the reference or the weights are missing or damaged, or do not fit each other or the samples.
    """

    def __init__(
        self,
        reference: str,
        features: str,
        weights: str | None,
        number: int,
        num_classes: int,
        image_shape: tuple[int, int, int],
        processes: Processes,
    ) -> None:
        self.number, self.num_classes, self.processes = number, num_classes, processes
        channels, *image_size = image_shape

        def open_all() -> None:
            if channels not in (1, 3):
                raise ValueError(f"samples of {channels} channels are no pictures to evaluate: give --eval-every 0")
            self.side = open_side(reference)
            try:
                self.extractor = load_extractor(features, tuple(image_size), processes.device, weights)
            except (OSError, ValueError) as error:
                reason = re.sub(r"--(inception|dino|classifier)\b", "--eval-weights", str(error))
                raise ValueError(
                    f"--eval-features {features}: {reason.replace('--features', '--eval-features')}"
                ) from error
            check_side(self.side, self.extractor)
            found = None if self.side.images is None else self.side.images.image_size
            if self.extractor.resize == "none" and found not in (None, tuple(image_size)):
                sizes = ["x".join(map(str, size)) for size in (found, image_size)]
                raise ValueError(
                    f"--eval-ref {reference} holds images of {sizes[0]}, the samples are {sizes[1]}, and the features "
                    f"of {features} are of one size: give a reference of the samples' size"
                )

        agree(open_all, processes)
        metric = distance_name(self.extractor)
        with user_input():
            found = reference_features(
                self.side, self.extractor, processes, {metric}, cache=cache_folder() / "statistics"
            )
            self.distance = FrechetDistance(found.pool) if processes.is_main else None
        self.metric = metric
        self.name = ("fid" if metric == "fid" else "fd") + (f"{number // 1000}k" if number % 1000 == 0 else f"{number}")

    def measure(self, step: int, draw: Draw, this_run: Run, batch_size: int) -> None:
        """Log the distance at a step, unless the run is asked to stop meanwhile or a sample is not finite. Collective.

        Args:
            draw:       makes samples; it is called as often on every process, for some samples twice
            batch_size: samples that a process draws together
        """
        start = time.perf_counter()
        collector = Collector(self.extractor, self.number, (self.metric,))
        failed: list[FloatingPointError] = []
        progress = tqdm(
            total=self.number, unit="image", desc=self.name, leave=False, disable=not self.processes.is_main
        )
        with progress:
            for numbers in shares(self.number, batch_size, self.processes):
                if this_run.any_should_stop():
                    this_run.say(f"{self.name} of step {step} is left out: the run is asked to stop")
                    return
                indices = numbers % self.number
                try:
                    images = draw(indices, indices * self.num_classes // self.number)
                except FloatingPointError as error:
                    failed.append(error)
                    continue
                first = numbers < self.number
                collector.add(indices[first], to_uint8(images)[first].expand(-1, 3, -1, -1))
                progress.update(min(len(numbers) * self.processes.world_size, self.number - progress.n))

        def check() -> None:
            if failed:
                raise failed[0]

        try:
            agree(check, self.processes)
        except UserError as error:  # no reason to end a run
            this_run.say(f"warning: {self.name} of step {step} is left out: {error}")
            return
        found = collector.finish(self.processes)
        if found is not None:
            this_run.record_evaluation(step, self.name, self.distance(found.pool), time.perf_counter() - start)
