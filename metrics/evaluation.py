"""An evaluation: which metrics the two sides allow, their values, and what to know about them.

    reference = reference_features(open_side("imagenet256.npz"), extractor, processes, metrics)
    samples   = side_features(open_side("samples.npz"), extractor, processes, metrics)
    values    = evaluate(reference, samples, metrics)      # on the main process

Samples that are drawn and not kept go to a `metrics.collection.Collector` as they come.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from metrics.collection import FeatureSet
from metrics.features import Extractor, exact_arithmetic
from metrics.scores import SPLIT, class_accuracy, inception_score, precision_recall
from metrics.sides import Side
from metrics.statistics import FrechetDistance, Gaussian, Moments, distance_at_infinity, distance_error

DISTANCES = {"inception": "fid", "dinov2": "fd-dinov2"}  # names of the distance; of other features it is "fd"
METRICS = ("fid", "fd-dinov2", "fd", "sfid", "is", "prc", "accuracy")
SORTED = 0.1  # surplus of neighbours of one class above which images count as sorted by class


def distance_name(extractor: Extractor) -> str:
    """The metric that is the Fréchet distance in an extractor's features: fid, fd-dinov2 or fd."""
    return DISTANCES.get(extractor.name, "fd")


def choose_metrics(
    asked: Collection[str] | None, reference: Side, samples: Side, extractor: Extractor, k: int = 3
) -> tuple[list[str], list[str]]:
    """The metrics to compute, and a line about each that the inputs do not allow.

    Args:
        asked: names among METRICS; None for all that are possible
        k:     neighbours of precision and recall

    Raises:
        ValueError: if the extractor has not what a metric needs, or no metric is left.
    """
    wanted = [distance_name(extractor), "sfid", "is", "prc", "accuracy"] if asked is None else list(asked)
    chosen, lines = [], []
    for metric in METRICS:
        if metric not in wanted:
            continue
        if reason := _lacks(metric, extractor):
            if asked is not None:
                raise ValueError(f"--metrics {metric}: {reason}")
        elif reason := _misses(metric, reference, samples, extractor, k):
            lines.append(f"no {metric}: {reason}")
        else:
            chosen.append(metric)
    if not chosen:
        raise ValueError("; ".join(lines))
    return chosen, lines


def _lacks(metric: str, extractor: Extractor) -> str | None:
    """The reason why a metric cannot be of this extractor; None if it can."""
    if metric in ("fid", "fd-dinov2", "fd") and metric != distance_name(extractor):
        return f"in the features of {extractor.name} the distance is called {distance_name(extractor)}"
    if metric == "sfid" and extractor.spatial_dimensions is None:
        return f"the features of {extractor.name} have no spatial part"
    if metric in ("is", "accuracy") and extractor.num_classes is None:
        return f"{extractor.name} is no classifier"
    if metric == "accuracy" and extractor.name == "inception":
        return "Inception numbers its classes otherwise than ImageNet does"
    return None


def _misses(metric: str, reference: Side, samples: Side, extractor: Extractor, k: int) -> str | None:
    """The reason why the two sides do not allow a metric; None if they do."""
    for side in (reference, samples):
        if metric == "sfid" and side.statistics is not None and side.statistics.spatial_mean is None:
            return f"{side.source} has no mu_s and sigma_s"
        if metric == "prc" and side.images is None:
            return f"{side.source} has no images (arr_0)"
        if metric == "prc" and len(side.images) <= k:
            return f"{side.source} has {len(side.images)} images, and {k} neighbours take {k + 1} or more"
    if metric in ("is", "accuracy") and samples.images is None:
        return f"{samples.source} has no images (arr_0)"
    if metric == "accuracy":
        if samples.images.labels is None:
            return f"the classes of {samples.source} are unknown (arr_1, or settings.json of sample_ddp.py)"
        if samples.images.labels.max() >= extractor.num_classes:
            return f"{samples.source} has more classes than {extractor.name}, which knows {extractor.num_classes}"
    return None


# ---------------------------------------------------------------------------------------------------------------
# Metrics


def evaluate(
    reference: FeatureSet,
    samples: FeatureSet,
    metrics: Collection[str],
    k: int = 3,
    half: bool = False,
    errors: bool = False,
    infinity: bool = False,
) -> dict[str, dict[str, float]]:
    """Compute the metrics.

    Args:
        metrics:  names among METRICS that both sides allow
        k, half:  as of precision_recall
        errors:   standard errors over draws of the samples as well; distances need CHUNKS chunks
        infinity: the distances that infinitely many samples would have as well, likewise

    Returns:
        for each value ("precision" and "recall" for prc): "value", and where asked for and known "error" and
        "infinity"; for "is" also "deviation", that of the splits.

    Raises:
        ValueError: if features are not finite.
    """
    values: dict[str, dict[str, float]] = {}
    for metric in metrics:
        if metric in ("fid", "fd-dinov2", "fd"):
            values[metric] = _distance(reference.pool, samples.pool, samples.pool_chunks, errors, infinity)
        elif metric == "sfid":
            values[metric] = _distance(reference.spatial, samples.spatial, samples.spatial_chunks, errors, infinity)
        elif metric == "is":
            mean, deviation = inception_score(samples.probabilities)
            values[metric] = {"value": mean, "deviation": deviation}
        elif metric == "prc":
            with exact_arithmetic():
                shares = precision_recall(reference.features, samples.features, k, half)
            values |= {name: {"value": share} for name, share in zip(("precision", "recall"), shares, strict=True)}
        else:
            values[metric] = {"value": class_accuracy(samples.probabilities, samples.labels)}
    shares = {"precision": samples.features, "accuracy": samples.probabilities} if errors else {}
    for name in shares.keys() & values.keys():  # means of zeros and ones
        share = values[name]["value"]
        values[name]["error"] = (share * (1 - share) / len(shares[name])) ** 0.5
    return values


def _distance(
    reference: Gaussian, samples: Gaussian, chunks: Sequence[Moments], errors: bool, infinity: bool
) -> dict[str, float]:
    distance = FrechetDistance(reference)
    values = {"value": distance(samples)}
    if errors and chunks:
        values["error"] = distance_error(chunks, distance)
    if infinity and chunks:
        values["infinity"] = distance_at_infinity(chunks, distance)
    return values


def warnings_about(
    reference: FeatureSet, samples: FeatureSet, metrics: Collection[str], extractor: Extractor, infinity: bool = False
) -> list[str]:
    """Lines about numbers that are computed and yet mean little."""
    lines = []
    sets = [(samples.count, "samples"), (reference.count, "reference images")]
    distances = [metric for metric in metrics if metric in ("fid", "fd-dinov2", "fd", "sfid")]
    for metric in distances:
        dimensions = extractor.spatial_dimensions if metric == "sfid" else extractor.dimensions
        few = [f"{count:,} {what}" for count, what in sets if count is not None and count <= dimensions]
        if few:
            lines.append(
                f"{' and '.join(few)} cannot tell the covariance of {dimensions:,} features: {metric} is far too "
                "large, and compares with that of as many images alone"
            )
        elif infinity and samples.pool_chunks[0].count <= dimensions:
            lines.append(
                f"the limit of {metric} is read from {samples.pool_chunks[0].count:,} samples on, which cannot tell "
                f"the covariance of {dimensions:,} features: it means little"
            )
    if distances and None not in (samples.count, reference.count) and samples.count != reference.count:
        lines.append(
            f"{samples.count:,} samples against {reference.count:,} reference images: distances fall as their numbers "
            "grow, so compare with those of the same numbers"
        )
    if "is" in metrics and len(samples.probabilities) > SPLIT and _sorted_by_class(samples):
        lines.append(
            f"consecutive samples share their class, and the Inception score takes {SPLIT} in a row: it is too small; "
            "shuffle the samples"
        )
    return lines


def _sorted_by_class(samples: FeatureSet) -> bool:
    labels = samples.probabilities.argmax(1) if samples.labels is None else samples.labels
    shares = labels.bincount().double() / len(labels)
    return bool((labels[1:] == labels[:-1]).double().mean() > shares.square().sum() + SORTED)
