"""scores.py: Inception score, precision and recall, accuracy, against closed forms and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from metrics.scores import class_accuracy, inception_score, precision_recall


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- Inception score ---------------------------------------------------------------------------------------------


def test_inception_score_of_uniform_probabilities_is_one():
    assert inception_score(torch.full((100, 8), 1 / 8)) == pytest.approx((1, 0))


def test_inception_score_of_certain_classes_is_their_number():
    assert inception_score(torch.eye(7).repeat(20, 1)) == pytest.approx((7, 0))


def test_inception_score_splits_consecutive_images_as_adm_does():
    """ADM's own formula in numpy, the last split being short."""
    probabilities = normal(25, 6).softmax(1)
    scores = []
    for start in range(0, 25, 10):
        part = probabilities[start : start + 10].numpy()
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    assert inception_score(probabilities, 10) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-5)


def test_inception_score_of_images_sorted_by_class_is_wrong():
    """The reason of evaluate.py's warning: each split sees one class."""
    probabilities = torch.eye(4).repeat_interleave(10, 0)
    assert inception_score(probabilities, 10)[0] == pytest.approx(1)
    assert inception_score(probabilities.reshape(4, 10, 4).transpose(0, 1).reshape(40, 4), 20)[0] == pytest.approx(4)


# -- Precision and recall ----------------------------------------------------------------------------------------


def by_brute_force(reference: torch.Tensor, samples: torch.Tensor, k: int) -> tuple[float, float]:
    """Precision and recall from all distances, in float64."""

    def radii(features):
        distances = torch.cdist(features, features).fill_diagonal_(math.inf)
        return distances.sort(1).values[:, k - 1]

    reference, samples = reference.double(), samples.double()
    between = torch.cdist(reference, samples)
    precision = (between <= radii(reference)[:, None]).any(0).double().mean()
    recall = (between <= radii(samples)[None]).any(1).double().mean()
    return precision.item(), recall.item()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("half", [False, True])
def test_precision_and_recall_are_those_of_brute_force(k, half):
    reference, samples = normal(80, 4), normal(60, 4, seed=1) * 0.7 + 0.5
    expected = by_brute_force(reference, samples, k)
    assert min(expected) > 0.1
    assert max(expected) < 1
    assert precision_recall(reference, samples, k, half) == pytest.approx(expected, abs=0.02 if half else 1e-12)


@pytest.mark.parametrize("half", [False, True])
def test_blocks_of_seven_give_what_one_block_gives(half):
    reference, samples = normal(50, 6), normal(40, 6, seed=1)
    whole = precision_recall(reference, samples, half=half)
    assert precision_recall(reference, samples, half=half, block=7) == whole


def test_half_of_one_disc_covers_it_by_half():
    """Samples of the disc's right half are all inside; half of the disc's images are far from them."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 81)] * 2, indexing="ij"), -1).reshape(-1, 2)
    disc = grid[grid.norm(dim=1) <= 1]
    precision, recall = precision_recall(disc, disc[disc[:, 0] > 0] + 1e-3)
    assert precision == 1
    assert recall == pytest.approx(0.5, abs=0.05)


def test_two_discs_apart_have_nothing_in_common():
    assert precision_recall(normal(100, 2), normal(100, 2) + 100) == (0, 0)


def test_same_set_has_precision_and_recall_of_one():
    features = normal(100, 3)
    assert precision_recall(features, features) == (1, 1)


def test_collapsed_generator_has_precision_without_recall():
    """Every sample is one and the same good image, which is no image of the reference."""
    reference = normal(200, 3)
    samples = (reference[7] + 0.001).expand(50, 3).clone()
    assert precision_recall(reference, samples) == (1, 0)


def test_duplicates_count_as_neighbours():
    """Four copies of a point are each other's three neighbours, so their balls hold themselves alone."""
    reference = torch.tensor([[0.0, 0]] * 4 + [[10.0, 0], [11, 0], [12, 0], [13, 0]])
    samples = torch.tensor([[0.0, 0], [0.1, 0], [10.5, 0], [12.5, 0]])
    assert precision_recall(reference, samples)[0] == 0.75


def test_distances_beyond_fp16_stay_in_fp32():
    reference, samples = normal(40, 4) * 300, normal(30, 4, seed=1) * 300
    assert precision_recall(reference, samples, half=True) == precision_recall(reference, samples)


def test_sets_without_k_neighbours_are_refused():
    with pytest.raises(ValueError, match="with 3 neighbours take 4 images or more"):
        precision_recall(normal(10, 2), normal(3, 2))


# -- Accuracy ----------------------------------------------------------------------------------------------------


def test_accuracy_is_the_share_of_right_classes():
    assert class_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75
