"""statistics.py: Gaussians, distances between them, and the errors of these, against closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from metrics.statistics import (
    FrechetDistance,
    Gaussian,
    Moments,
    chunk_numbers,
    distance_at_infinity,
    distance_error,
    frechet_distance,
)


def draw(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    """Correlated features (count, dimensions)."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64) @ mixing + seed


def moments_of(features: torch.Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.add(features)
    return moments


def gaussian_of(features: torch.Tensor) -> Gaussian:
    return moments_of(features).gaussian()


# -- Moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 0, 66, 1]])
def test_moments_are_numpys_whatever_the_batches(sizes):
    features = draw(100, 5)
    moments = Moments(5)
    for part in features.split(sizes):
        moments.add(part)
    mean, covariance = moments.gaussian()
    np.testing.assert_allclose(mean, features.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-11, atol=1e-12)
    assert moments.count == 100


def test_moments_keep_float64_far_from_the_origin():
    features = draw(1000, 4).float() + 1000
    _, covariance = gaussian_of(features)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=0, atol=1e-8)


def test_moments_add_and_subtract():
    features = draw(50, 3)
    a, b = moments_of(features[:20]), moments_of(features[20:])
    both = gaussian_of(features)
    for moments, expected in ((a + b, both), (a + b - a, gaussian_of(features[20:]))):
        torch.testing.assert_close(moments.gaussian(), expected, rtol=1e-11, atol=1e-11)
    assert (a.count, b.count, (a + b).count, (a + b - a).count) == (20, 30, 50, 30)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="two images or more, and there is 1"):
        gaussian_of(draw(1, 3))


# -- Distance ----------------------------------------------------------------------------------------------------


def test_distance_of_commuting_covariances_is_the_closed_form():
    """|m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2 for covariances with the same eigenvectors."""
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    means = torch.arange(6.0, dtype=torch.float64), torch.full((6,), 2.0, dtype=torch.float64)
    values = torch.tensor([[4, 1, 9, 0.25, 0, 1], [1, 1, 4, 2.25, 1, 0]], dtype=torch.float64)
    a, b = (Gaussian(mean, rotation * value @ rotation.T) for mean, value in zip(means, values, strict=True))
    expected = (means[0] - means[1]).square().sum() + (values[0].sqrt() - values[1].sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_distance_agrees_with_the_matrix_root():
    a, b = gaussian_of(draw(400, 12, seed=1)), gaussian_of(draw(500, 12, seed=2) * torch.linspace(0.5, 2, 12))
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (
        (a.mean - b.mean).square().sum().item() + (a.covariance + b.covariance).trace().item() - 2 * np.trace(root)
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_distance_to_itself_is_zero_and_both_ways_are_equal():
    a, b = gaussian_of(draw(300, 40, seed=1)), gaussian_of(draw(300, 40, seed=2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * a.covariance.trace().item())
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 1


def test_distance_of_fewer_images_than_features_is_exact():
    """tr (S1 S2)^(1/2) is the nuclear norm of A B^T, where S1 = A^T A and S2 = B^T B: no root of rounding noise."""
    features = [draw(30, 200, seed) for seed in (1, 2)]
    a, b = (gaussian_of(part) for part in features)
    centred = [(part - part.mean(0)) / np.sqrt(len(part) - 1) for part in features]
    nuclear = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-11)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * a.covariance.trace().item())


def test_distances_that_mean_nothing_are_refused():
    a, b = gaussian_of(draw(30, 4)), gaussian_of(draw(30, 5))
    with pytest.raises(ValueError, match="statistics of 4 and of 5 features"):
        frechet_distance(a, b)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(a, Gaussian(a.mean * torch.nan, a.covariance))


# -- Bias and error ----------------------------------------------------------------------------------------------


def test_chunks_are_equal_in_size_random_and_repeatable():
    numbers = chunk_numbers(1003, 10)
    assert set(np.bincount(numbers)) == {100, 101}
    np.testing.assert_array_equal(numbers, chunk_numbers(1003, 10))
    assert len(set(numbers[::10])) == 10  # labels that repeat every ten samples do not share a chunk


def chunks_of(features: torch.Tensor, number: int = 10) -> list[Moments]:
    numbers = torch.from_numpy(chunk_numbers(len(features), number))
    return [moments_of(features[numbers == chunk]) for chunk in range(number)]


def test_intercept_of_distances_that_fall_as_one_over_n_is_found():
    """A distance that is 3 + 50 / N exactly."""
    chunks = chunks_of(draw(1000, 2))

    class Synthetic(FrechetDistance):
        def __init__(self):
            self.sizes = []

        def __call__(self, samples):
            self.sizes.append(100 * (len(self.sizes) + 1))
            return 3 + 50 / self.sizes[-1]

    distance = Synthetic()
    assert distance_at_infinity(chunks, distance) == pytest.approx(3, rel=1e-10)
    assert distance.sizes == list(range(100, 1001, 100))


def test_bias_of_few_images_is_removed():
    """Samples of the reference's own Gaussian have distance 0, and above 0 if there are few."""
    dimensions = 20
    distance = FrechetDistance(Gaussian(torch.zeros(dimensions), torch.eye(dimensions)))
    plain, infinite = [], []
    for seed in range(8):
        features = torch.randn(2000, dimensions, generator=torch.Generator().manual_seed(seed))
        plain.append(distance(gaussian_of(features)))
        infinite.append(distance_at_infinity(chunks_of(features), distance))
    assert np.mean(plain) > 0.05
    assert abs(np.mean(infinite)) < 0.1 * np.mean(plain)


def test_jackknife_error_is_the_spread_over_seeds():
    dimensions, distances, errors = 8, [], []
    distance = FrechetDistance(Gaussian(torch.full((dimensions,), 0.5), torch.eye(dimensions)))
    for seed in range(60):
        features = torch.randn(500, dimensions, generator=torch.Generator().manual_seed(seed))
        distances.append(distance(gaussian_of(features)))
        errors.append(distance_error(chunks_of(features), distance))
    assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.25)
