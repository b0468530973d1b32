"""collection.py, sides.py and evaluation.py: one pass gives what the metrics need, however it is divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from metrics import sides as room
from metrics.collection import CHUNKS, Collector, collect
from metrics.evaluation import choose_metrics, evaluate, warnings_about
from metrics.features import Extractor, Features, Pixels
from metrics.images import open_images
from metrics.references import write_statistics
from metrics.scores import inception_score, precision_recall
from metrics.sides import as_statistics, check_side, compare_sizes, open_side, reference_features, side_features
from metrics.statistics import FrechetDistance, distance_at_infinity, frechet_distance
from runtime.distributed import Processes
from runtime.rng import sample_generators

ALONE = Processes(0, 1, torch.device("cpu"))
SIZE = 4


class Projection(Extractor):
    """Six features, four spatial ones and three classes of 4x4 images, by fixed random matrices."""

    name = "projection"
    digest = "0123456789abcdef"
    resize = "none"
    dimensions, spatial_dimensions, num_classes = 6, 4, 3
    device = torch.device("cpu")

    def __init__(self) -> None:
        (generator,) = sample_generators(0, [0])
        self.matrices = [torch.randn(48, size, generator=generator) for size in (6, 4, 3)]
        self.seen = 0

    def __call__(self, images: torch.Tensor) -> Features:
        self.seen += len(images)
        pool, spatial, logits = (images.flatten(1).float() / 255 @ matrix for matrix in self.matrices)
        return Features(pool, spatial, logits.softmax(1))


def draw(count: int, seed: int = 0) -> np.ndarray:
    """Smooth images (count, 4, 4, 3) uint8."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(120 + 10 * seed, 40, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def files(tmp_path):
    """Reference and samples, as .npz files; the samples have classes."""
    np.savez(tmp_path / "reference.npz", draw(60))
    np.savez(tmp_path / "samples.npz", arr_0=draw(50, seed=1), arr_1=np.arange(50) % 3)
    return tmp_path


ALL = {"fd", "sfid", "is", "prc", "accuracy"}


def features_of(pixels: np.ndarray) -> Features:
    return Projection()(torch.from_numpy(pixels).permute(0, 3, 1, 2))


# -- One pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_any_batch_size_gives_the_features_of_all_images_at_once(files, batch_size):
    images, whole = open_images(files / "samples.npz"), features_of(draw(50, seed=1))
    found = collect(images, Projection(), ALONE, ALL, batch_size=batch_size, chunks=CHUNKS)
    for name, exact in (("pool", whole.pool), ("spatial", whole.spatial)):
        mean, covariance = getattr(found, name)
        np.testing.assert_allclose(mean, exact.double().mean(0), rtol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(exact.double().numpy(), rowvar=False), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.features, whole.pool)
    torch.testing.assert_close(found.probabilities, whole.probabilities)
    assert found.labels.tolist() == [index % 3 for index in range(50)]
    assert [moments.count for moments in found.pool_chunks] == [5] * 10


def test_images_may_come_in_any_order_and_nothing_is_kept_that_no_metric_needs():
    pixels, extractor = torch.from_numpy(draw(20)).permute(0, 3, 1, 2), Projection()
    collector = Collector(extractor, 20, {"fd", "prc"})
    for indices in ([5, 3, 0], list(range(10, 20)), [1, 2, 4, 6, 7, 8, 9]):
        collector.add(indices, pixels[indices])
    found = collector.finish(ALONE)
    torch.testing.assert_close(found.features, extractor(pixels).pool)
    assert found.spatial is found.probabilities is found.labels is None
    assert found.pool_chunks == ()
    collector = Collector(extractor, 20, {"fd"})
    assert collector._features is None


def test_missing_images_are_no_set():
    collector = Collector(Projection(), 20, {"fd"})
    collector.add(range(5), torch.from_numpy(draw(5)).permute(0, 3, 1, 2))
    with pytest.raises(ValueError, match="5 of 20 images came"):
        collector.finish(ALONE)


def test_part_of_the_images_is_that_part(files):
    images, indices = open_images(files / "samples.npz"), [3, 4, 20, 41]
    found = collect(images, Projection(), ALONE, ALL, indices)
    torch.testing.assert_close(found.features, features_of(draw(50, seed=1)[indices]).pool)
    assert found.labels.tolist() == [index % 3 for index in indices]


def test_damaged_image_ends_the_pass_with_its_name(tmp_path):
    for number, pixels in enumerate(draw(6)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = open_images(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:40])
    with pytest.raises(OSError, match=r"3\.png"):
        collect(images, Projection(), ALONE, ALL, batch_size=2)


# -- Metrics -----------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_the_features(files):
    extractor = Projection()
    reference, samples = (open_side(files / name) for name in ("reference.npz", "samples.npz"))
    metrics, lines = choose_metrics(None, reference, samples, extractor)
    assert (set(metrics), lines) == (ALL, [])
    sets = [side_features(side, extractor, ALONE, metrics, chunks=CHUNKS) for side in (reference, samples)]
    values = evaluate(*sets, metrics, errors=True, infinity=True)
    exact = features_of(draw(60)), features_of(draw(50, seed=1))
    assert values["fd"]["value"] == pytest.approx(frechet_distance(sets[0].pool, sets[1].pool))
    assert values["sfid"]["value"] == pytest.approx(frechet_distance(sets[0].spatial, sets[1].spatial))
    assert values["is"]["value"] == pytest.approx(inception_score(exact[1].probabilities)[0])
    shares = precision_recall(exact[0].pool, exact[1].pool)
    assert (values["precision"]["value"], values["recall"]["value"]) == pytest.approx(shares)
    right = (exact[1].probabilities.argmax(1) == torch.arange(50) % 3).double().mean().item()
    assert values["accuracy"]["value"] == pytest.approx(right)
    assert values["accuracy"]["error"] == pytest.approx((right * (1 - right) / 50) ** 0.5)
    for name, part in (("fd", "pool"), ("sfid", "spatial")):
        assert 0 < values[name]["error"] < values[name]["value"]
        limit = distance_at_infinity(getattr(sets[1], f"{part}_chunks"), FrechetDistance(getattr(sets[0], part)))
        assert values[name]["infinity"] == pytest.approx(limit)


def test_statistics_replace_their_images(files):
    extractor, path = Projection(), files / "statistics.npz"
    found = collect(open_images(files / "reference.npz"), extractor, ALONE, {"sfid"})
    write_statistics(path, as_statistics(found, extractor, ""), open_images(files / "reference.npz"), range(60))
    extractor.seen = 0
    side = open_side(path)
    check_side(side, extractor)
    distance_alone = side_features(side, extractor, ALONE, {"fd", "sfid"})
    assert extractor.seen == 0
    torch.testing.assert_close((distance_alone.pool, distance_alone.spatial), (found.pool, found.spatial))
    with_images = side_features(side, extractor, ALONE, {"fd", "prc"})
    torch.testing.assert_close(with_images.features, features_of(draw(60)).pool)
    assert with_images.count == 60


def test_metrics_that_the_inputs_do_not_allow_are_told(files):
    extractor, path = Projection(), files / "statistics.npz"
    found = collect(open_images(files / "reference.npz"), extractor, ALONE, {"fd"})  # no spatial part
    write_statistics(path, as_statistics(found, extractor, ""))
    statistics, images = open_side(path), open_side(files / "reference.npz")
    metrics, lines = choose_metrics(None, statistics, images, extractor)
    assert metrics == ["fd", "is"]
    assert ["sfid" in lines[0], "no mu_s" in lines[0]] == [True, True]
    assert "no images (arr_0)" in lines[1]
    assert "classes of" in lines[2]
    assert choose_metrics(["is", "fd"], statistics, images, extractor)[0] == ["fd", "is"]
    with pytest.raises(ValueError, match="no mu_s"):
        choose_metrics(["sfid"], statistics, images, extractor)
    with pytest.raises(ValueError, match="distance is called fd"):
        choose_metrics(["fid"], images, images, extractor)
    for metric, reason in (("sfid", "no spatial part"), ("is", "no classifier")):
        with pytest.raises(ValueError, match=reason):
            choose_metrics([metric], images, images, Pixels((SIZE, SIZE)))


def test_more_classes_than_the_extractor_knows_have_no_accuracy(files):
    np.savez(files / "many.npz", arr_0=draw(10), arr_1=np.arange(10))
    many = open_side(files / "many.npz")
    assert "which knows 3" in choose_metrics(None, many, many, Projection())[1][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": None, "extractor": None}, "count as Inception's"),
        ({"digest": "f" * 16, "extractor": "inception"}, "statistics of inception"),
        ({"digest": "f" * 16}, "other weights of it"),
        ({"mean": np.zeros(5), "covariance": np.eye(5)}, "statistics of 5 features"),
    ],
)
def test_statistics_of_another_extractor_are_refused(files, change, message):
    extractor = Projection()
    found = collect(open_images(files / "reference.npz"), extractor, ALONE, {"fd"})
    write_statistics(files / "other.npz", as_statistics(found, extractor, "")._replace(**change))
    with pytest.raises(ValueError, match=message):
        check_side(open_side(files / "other.npz"), extractor)


def test_images_of_other_sizes_are_compared_where_both_are_resized(files):
    np.savez(files / "large.npz", np.zeros((5, 8, 6, 3), np.uint8))
    small, large, extractor = open_side(files / "samples.npz"), open_side(files / "large.npz"), Projection()
    assert compare_sizes(small, small, extractor) is None
    with pytest.raises(ValueError, match=r"images of 4x4 and .* of 8x6"):
        compare_sizes(small, large, extractor)
    extractor.resize = "bilinear"
    assert "each is resized (bilinear)" in compare_sizes(small, large, extractor)


# -- Warnings ----------------------------------------------------------------------------------------------------


def labelled(labels: np.ndarray, count: int = 6000):
    collector = Collector(Projection(), count, {"is"})
    (generator,) = sample_generators(0, [0])
    pixels = torch.randint(256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    collector.add(range(count), pixels, torch.from_numpy(labels))
    return collector.finish(ALONE)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.arange(6000) // 2000, True),
        (np.arange(6000) % 3, False),
        (np.random.default_rng(0).integers(0, 3, 6000), False),
        (np.zeros(6000, np.int64), False),
    ],
)
def test_samples_sorted_by_class_are_told(labels, told):
    samples = labelled(labels)
    lines = warnings_about(samples, samples, ["is"], Projection())
    assert [("share their class" in line) for line in lines] == [True] * told


def test_few_images_and_other_numbers_are_told():
    extractor, pixels = Projection(), torch.from_numpy(draw(30)).permute(0, 3, 1, 2)

    def first(count: int, chunks: int = 1):
        collector = Collector(extractor, count, {"fd"}, chunks)
        collector.add(range(count), pixels[:count])
        return collector.finish(ALONE)

    few, more = warnings_about(first(30), first(5), ["fd"], extractor)
    assert "5 samples cannot tell the covariance of 6 features" in few
    assert "5 samples against 30 reference images" in more
    (limit,) = warnings_about(first(30), first(30, CHUNKS), ["fd"], extractor, infinity=True)
    assert "read from 3 samples on" in limit
    assert warnings_about(first(30), first(30), ["fd"], extractor) == []
    assert warnings_about(first(30)._replace(count=None), first(30), ["fd"], extractor) == []


# -- Cache -------------------------------------------------------------------------------------------------------


def test_reference_is_computed_once(files):
    side, extractor, cache = open_side(files / "reference.npz"), Projection(), files / "cache"
    first = reference_features(side, extractor, ALONE, {"fd"}, cache=cache)
    assert extractor.seen == 60
    again = reference_features(side, extractor, ALONE, {"fd", "sfid"}, cache=cache)
    assert extractor.seen == 60
    torch.testing.assert_close((again.pool, again.spatial), (first.pool, first.spatial), rtol=0, atol=0)
    with_features = reference_features(side, extractor, ALONE, {"fd", "prc"}, cache=cache)  # they were not kept
    assert extractor.seen == 120
    again = reference_features(side, extractor, ALONE, {"prc"}, cache=cache)
    assert extractor.seen == 120
    torch.testing.assert_close(again.features, with_features.features, rtol=0, atol=0)
    assert again.count == 60


def test_other_images_or_weights_are_computed_again(files):
    extractor, cache = Projection(), files / "cache"
    reference_features(open_side(files / "reference.npz"), extractor, ALONE, {"fd"}, cache=cache)
    np.savez(files / "reference.npz", draw(60, seed=2))
    found = reference_features(open_side(files / "reference.npz"), extractor, ALONE, {"fd"}, cache=cache)
    np.testing.assert_allclose(found.pool.mean, features_of(draw(60, seed=2)).pool.double().mean(0), rtol=1e-6)
    extractor.digest = "other"
    extractor.seen = 0
    reference_features(open_side(files / "reference.npz"), extractor, ALONE, {"fd"}, cache=cache)
    assert extractor.seen == 60


def test_damaged_or_full_cache_is_told_and_changes_nothing(files, capsys, monkeypatch):
    side, extractor, cache = open_side(files / "reference.npz"), Projection(), files / "cache"
    first = reference_features(side, extractor, ALONE, {"fd", "prc"}, cache=cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    again = reference_features(side, extractor, ALONE, {"fd", "prc"}, cache=cache)
    assert "computed again" in capsys.readouterr().out
    torch.testing.assert_close(again.pool, first.pool)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(room, "write_statistics", full)
    reference_features(side, extractor, ALONE, {"fd"}, cache=files / "other")
    assert "not kept" in capsys.readouterr().out
