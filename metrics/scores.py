"""Scores of features: Inception score, precision and recall, class accuracy, as ADM's evaluator defines them.

Source: guided-diffusion, evaluations/evaluator.py (arXiv:2105.05233).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SPLIT = 5000  # images of a split of the Inception score
BLOCK, STRIP = 10_000, 1000  # columns and rows of distances that are in memory at a time: 40 MB


def inception_score(probabilities: torch.Tensor, split: int = SPLIT) -> tuple[float, float]:
    """exp E KL(p(y|x) || p(y)) of consecutive images (arXiv:1606.03498): its mean and its deviation over the splits.

    Args:
        probabilities: (N, K) in the samples' order, which must not be that of their classes
        split:         images of a split; the last one may have fewer and counts as much
    """
    scores = []
    for part in probabilities.split(split):
        part = part.double()
        divergence = torch.xlogy(part, part) - torch.xlogy(part, part.mean(0))
        scores.append(divergence.sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def class_accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose most probable class (N, K) is their label (N,)."""
    return (probabilities.argmax(1) == labels.to(probabilities.device)).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Precision and recall


def precision_recall(
    reference: torch.Tensor,
    samples: torch.Tensor,
    k: int = 3,
    half: bool = False,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Share of samples among the reference images, and of reference images among the samples (arXiv:1904.06991).

    A set's manifold is the union of balls around its features, each as large as the distance of its k-th neighbour.

    Args:
        reference: features (M, d) float32
        samples:   features (N, d) float32, on the same device
        k:         neighbours, the feature itself not counted
        half:      round distances to fp16 as ADM does, block by block, where they do not overflow. The numbers of
            papers were computed so; they are up to 0.01 larger, because more distances tie
        block:     rows and columns of distances that are rounded alike

    Raises:
        ValueError: if there are no k neighbours.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"precision and recall with {k} neighbours take {k + 1} images or more on each side")
    radii = [_radii(features, k, half, block) for features in (reference, samples)]
    found_samples = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    found_reference = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, columns, distances in _distances(reference, samples, half, block):
        found_samples[columns] |= (distances <= radii[0][rows, None]).any(0)
        found_reference[rows] |= (distances <= radii[1][columns]).any(1)
    return found_samples.double().mean().item(), found_reference.double().mean().item()


def _radii(features: torch.Tensor, k: int, half: bool, block: int) -> torch.Tensor:
    """Squared distance of each feature (N, d) to its k-th neighbour (N,)."""
    nearest = features.new_full((len(features), k + 1), torch.inf)  # the feature itself is the first of them
    for rows, _, distances in _distances(features, features, half, block):
        candidates = torch.cat([nearest[rows], distances], 1)
        nearest[rows] = candidates.topk(k + 1, largest=False).values
    return nearest.amax(1)


def _distances(u: torch.Tensor, v: torch.Tensor, half: bool, block: int) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Squared distances of features u (M, d) and v (N, d), in pieces: (rows, columns, (m, n) float32)."""
    for first in range(0, len(u), block):
        strips = [
            slice(start, min(start + STRIP, first + block)) for start in range(first, min(first + block, len(u)), STRIP)
        ]
        for start in range(0, len(v), block):
            columns = slice(start, start + block)
            rounded = [_rounded_distances(u[rows], v[columns]) for rows in strips] if half else []
            if not all(piece.isfinite().all() for piece in rounded):
                rounded = []
            for number, rows in enumerate(strips):
                yield rows, columns, rounded[number].float() if rounded else _squared(u[rows], v[columns])


def _squared(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    distances = torch.addmm(u.square().sum(1, keepdim=True), u, v.T, alpha=-2)
    return (distances + v.square().sum(1)).clamp(min=0)


def _rounded_distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same where every operation's result is rounded to fp16; sums are kept in fp32, as GPUs do."""
    u, v = u.half().float(), v.half().float()
    norms_u, norms_v = (x.square().half().float().sum(1).half() for x in (u, v))
    return (norms_u[:, None] - 2 * (u @ v.T).half() + norms_v).clamp(min=0)
