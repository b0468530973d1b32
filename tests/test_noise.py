"""Random numbers: a sample's own, whatever the batch; and truly independent normal ones."""

import itertools

import pytest
import torch
from scipy import stats

from runtime.rng import sample_generators
from transport import GaussianNoise, randn
from transport.noise import rademacher

SHAPE = (3, 5)


def draw(seed: int, indices: list[int], stream: int = 0) -> torch.Tensor:
    return randn((len(indices), *SHAPE), sample_generators(seed, indices, stream))


# -- Numbers that belong to a sample -------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]], [[4, 2, 0], [3, 1]]])
def test_any_batching_gives_a_sample_the_same_numbers(batches: list[list[int]]):
    together = draw(7, [0, 1, 2, 3, 4], stream=2)
    for batch in batches:
        torch.testing.assert_close(draw(7, batch, stream=2), together[batch], atol=0, rtol=0)


def test_later_draws_do_not_depend_on_the_batch_either():
    def second_draw(indices: list[int]) -> torch.Tensor:
        generators = sample_generators(1, indices)
        randn((len(indices), 4), generators)
        return randn((len(indices), 4), generators)

    torch.testing.assert_close(second_draw([3, 8])[1:], second_draw([8]), atol=0, rtol=0)


def test_seed_stream_and_index_each_change_the_numbers():
    keys = list(itertools.product((0, 1, 2**32, 2**40), (0, 1, 1000), (0, 1, 50_000, 2**31)))
    first = {key: draw(seed=key[0], stream=key[1], indices=[key[2]])[0, 0, 0].item() for key in keys}
    assert len(set(first.values())) == len(keys)


def test_no_two_of_many_samples_share_their_noise():
    # torch's CPU generator has 2^32 seeds: hashed ones would meet here (five pairs are expected).
    first = [torch.randint(2**62, (1,), generator=g).item() for g in sample_generators(3, range(200_000))]
    assert len(set(first)) == len(first)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative"):
        sample_generators(-1, [0])


# -- Their distribution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["index", "stream", "seed"])
def test_numbers_along_each_key_are_independent_standard_normals(vary: str):
    keys = {
        "index": [(0, 0, i) for i in range(3000)],
        "stream": [(0, i, 0) for i in range(3000)],
        "seed": [(i, 0, 0) for i in range(3000)],
    }[vary]
    numbers = torch.stack([randn((1, 4), sample_generators(s, [i], stream))[0] for s, stream, i in keys])
    # One column holds the same draw of consecutive keys: a poor seeding shows there, not within a generator.
    for column in numbers.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    bound = 4.5 / len(keys) ** 0.5  # of a correlation whose standard error is 1 / sqrt(n)
    for lag in (1, 2, 3):
        assert (numbers[lag:] * numbers[:-lag]).mean(0).abs().max() < bound
    assert (numbers[:, 0] * numbers[:, 1]).mean().abs() < bound


def test_the_log_density_is_torchs():
    x0 = torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    standard = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(x0), 1.0), 3)
    torch.testing.assert_close(GaussianNoise().log_prob(x0), standard.log_prob(x0))


def test_noise_takes_one_generator_or_one_per_sample():
    one = GaussianNoise().sample((4, *SHAPE), torch.Generator().manual_seed(5))
    torch.testing.assert_close(one, torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(5)), atol=0, rtol=0)
    each = GaussianNoise().sample((4, *SHAPE), sample_generators(5, range(4)), dtype=torch.float64)
    assert each.shape == (4, *SHAPE)
    assert each.dtype == torch.float64
    torch.testing.assert_close(each[2:3], randn((1, *SHAPE), sample_generators(5, [2]), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3,), (0, 2), (3, 1, 2)])
def test_per_sample_numbers_have_any_shape(shape: tuple[int, ...]):
    assert randn(shape, sample_generators(0, range(shape[0]))).shape == shape


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_wrong_number_of_generators_is_refused(count: int):
    with pytest.raises(ValueError, match=f"{count} generators for a batch of 3"):
        randn((3, 2), sample_generators(0, range(count)))


@pytest.mark.parametrize("generators", [torch.Generator(), sample_generators(0, range(3))])
def test_numbers_go_to_a_gpu_from_pinned_memory(monkeypatch, generators):
    """No GPU is needed: what is asked of torch is recorded."""
    pinned, moved = [], []

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        pinned.append(x)
        return x.clone()

    def to(x: torch.Tensor, device: str, non_blocking: bool = False) -> torch.Tensor:
        moved.append((device, non_blocking))
        return x

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    x = randn((3, 2), generators, "cuda:0")
    assert moved == [("cuda:0", True)]
    torch.testing.assert_close(x, pinned[0], atol=0, rtol=0)
    assert randn((3, 2), generators, "cpu").shape == (3, 2)
    assert len(pinned) == 1


def test_signs_are_fair_and_belong_to_their_sample():
    x = torch.empty(64, 500, dtype=torch.float64)
    signs = rademacher(x, sample_generators(0, range(64)))
    assert signs.dtype == x.dtype
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 4.5 / signs.numel() ** 0.5
    torch.testing.assert_close(rademacher(x[:1], sample_generators(0, [9])), signs[9:10], atol=0, rtol=0)
