"""Files of statistics: ADM's, EDM's and ours; read back as written, by others too; damaged ones are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metrics.images import open_images
from metrics.references import StoredStatistics, read_statistics, write_statistics

RANDOM = np.random.default_rng(0)
POOL, SPATIAL = RANDOM.normal(size=(40, 5)), RANDOM.normal(size=(40, 3))
MOMENTS = {"mu": POOL.mean(0), "sigma": np.cov(POOL.T)}
SPATIAL_MOMENTS = {"mu_s": SPATIAL.mean(0), "sigma_s": np.cov(SPATIAL.T)}
PIXELS = RANDOM.integers(0, 256, (9, 4, 6, 3), dtype=np.uint8)


def save(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def refusal(path: Path) -> str:
    """The message of an error while reading: one printable line."""
    with pytest.raises((ValueError, OSError)) as error:
        read_statistics(path)
    assert str(error.value).isprintable()
    return str(error.value)


# -- Files of others -----------------------------------------------------------------------------------------------


def test_files_of_adm_have_spatial_statistics_and_images(tmp_path: Path) -> None:
    """As VIRTUAL_imagenet256_labeled.npz: means in float32."""
    moments = MOMENTS | SPATIAL_MOMENTS | {"mu": MOMENTS["mu"].astype(np.float32)}
    path = save(tmp_path / "VIRTUAL.npz", arr_0=PIXELS, **moments)
    found = read_statistics(path)
    assert found.source == str(path)
    assert found.mean.dtype == found.covariance.dtype == np.float64
    np.testing.assert_allclose(found.mean, MOMENTS["mu"], rtol=1e-6)
    np.testing.assert_array_equal(found.covariance, MOMENTS["sigma"])
    np.testing.assert_array_equal(found.spatial_mean, SPATIAL_MOMENTS["mu_s"])
    np.testing.assert_array_equal(found.spatial_covariance, SPATIAL_MOMENTS["sigma_s"])
    assert found[-4:] == (None, None, None, None)
    np.testing.assert_array_equal(open_images(path).read(range(9)), PIXELS)


def test_files_of_edm_have_mean_and_covariance_alone(tmp_path: Path) -> None:
    found = read_statistics(save(tmp_path / "cifar10-32x32.npz", **MOMENTS))
    np.testing.assert_array_equal(found.covariance, MOMENTS["sigma"])
    assert found.spatial_mean is found.spatial_covariance is None


def test_compressed_files_and_those_in_fortran_order_are_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "other.npz", mu=MOMENTS["mu"], sigma=np.asfortranarray(MOMENTS["sigma"]))
    np.testing.assert_array_equal(read_statistics(tmp_path / "other.npz").covariance, MOMENTS["sigma"])


def test_images_alone_are_no_statistics(tmp_path: Path) -> None:
    assert read_statistics(save(tmp_path / "images.npz", arr_0=PIXELS)) is None
    assert read_statistics(tmp_path) is None
    assert read_statistics("digits") is None


# -- Ours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spatial", [True, False])
def test_statistics_are_read_back_as_written(spatial: bool, tmp_path: Path) -> None:
    moments = [*MOMENTS.values(), *(SPATIAL_MOMENTS.values() if spatial else (None, None))]
    written = StoredStatistics("", *moments, 40, "inception", "6726825d", "bilinear")
    write_statistics(tmp_path / "ours.npz", written)
    found = read_statistics(tmp_path / "ours.npz")
    for name, value in written._asdict().items():
        if name != "source":
            np.testing.assert_array_equal(getattr(found, name), value)


def test_other_tools_read_our_files_with_images(tmp_path: Path) -> None:
    """numpy.load without pickles finds ADM's six arrays, and images in the order of their numbers."""
    images = open_images(save(tmp_path / "images.npz", arr_0=PIXELS))
    statistics = StoredStatistics("", *MOMENTS.values(), *SPATIAL_MOMENTS.values(), 9, "inception", "digest", "none")
    write_statistics(tmp_path / "ours.npz", statistics, images, [7, 2, 5])
    with np.load(tmp_path / "ours.npz") as file:
        for name, value in (MOMENTS | SPATIAL_MOMENTS | {"arr_0": PIXELS[[7, 2, 5]]}).items():
            np.testing.assert_array_equal(file[name], value)
    np.testing.assert_array_equal(open_images(tmp_path / "ours.npz").read([1]), PIXELS[[2]])


def test_a_file_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    images = open_images(save(tmp_path / "images.npz", arr_0=PIXELS))
    with pytest.raises(IndexError):
        write_statistics(tmp_path / "ours.npz", StoredStatistics("", *MOMENTS.values()), images, [0, 99])
    assert [file.name for file in tmp_path.iterdir()] == ["images.npz"]
    with pytest.raises(ValueError, match=r"ours does not end in .npz"):
        write_statistics(tmp_path / "ours", StoredStatistics("", *MOMENTS.values()))


# -- Refused -------------------------------------------------------------------------------------------------------

ASYMMETRIC = MOMENTS["sigma"] + np.triu(np.ones((5, 5)), 1)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": POOL.mean(0)}, "has only one of mu and sigma"),
        (MOMENTS | {"mu_s": POOL.mean(0)}, "has only one of mu_s and sigma_s"),
        (MOMENTS | {"mu": np.zeros(4)}, "mu and sigma are (4,) float64 and (5, 5) float64, not floats (d,) and (d, d)"),
        (MOMENTS | {"mu": np.zeros((1, 5))}, "mu and sigma are (1, 5) float64"),
        (MOMENTS | {"mu": np.float64(1)}, "mu and sigma are () float64"),
        (MOMENTS | {"sigma": np.eye(5, dtype=int)}, "and (5, 5) int64, not floats"),
        (MOMENTS | {"mu": np.full(5, np.nan)}, "mu or sigma has values that are not finite"),
        (MOMENTS | {"sigma": ASYMMETRIC}, "sigma is not symmetric"),
        (MOMENTS | {"extractor": np.zeros(3)}, "extractor is"),
        (MOMENTS | {"sigma": np.array([[None]])}, "and (1, 1) object, not floats"),
        (MOMENTS | {"extractor": np.array(None)}, "extractor holds pickled objects"),
    ],
)
def test_what_is_no_statistics_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = save(tmp_path / "wrong.npz", **arrays)
    found = refusal(path)
    assert str(path) in found
    assert message in found


def test_missing_damaged_and_pickled_files_are_refused(tmp_path: Path) -> None:
    assert "absent.npz does not exist" in refusal(tmp_path / "absent.npz")
    (tmp_path / "edm2.pkl").write_bytes(b"")
    assert "is a pickle" in refusal(tmp_path / "edm2.pkl")
    path = save(tmp_path / "damaged.npz", **MOMENTS)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged.npz is damaged" in refusal(path)
    content = bytearray(save(path, mu=np.zeros(50), sigma=np.eye(50)).read_bytes())
    content[content.index(np.eye(50).tobytes()) + 15000] ^= 1
    path.write_bytes(content)
    assert "damaged.npz: sigma is damaged" in refusal(path)
