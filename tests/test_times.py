"""Densities of the times of training, against scipy's distributions."""

import math

import pytest
import torch
from closed_form import PATH_NAMES, alpha_sigma
from scipy import stats

from transport import PATHS, create_transport
from transport.times import CosMap, LogitNormal, density_of

JIT = {"time_sampling": "logit-normal", "time_params": (-0.8, 0.8)}


def draw_times(n: int, repeats: int, **settings: object) -> torch.Tensor:
    transport, generator = create_transport(**settings), torch.Generator().manual_seed(n)
    return torch.stack([transport.sample_times(n, generator) for _ in range(repeats)])


def log_ratio(path: str, t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = alpha_sigma(path, t.double())
    return (alpha / sigma).log()


@pytest.mark.parametrize("n", range(1, 18))
def test_every_place_of_a_batch_has_the_density(n: int):
    """Linear, so that log(alpha / sigma) is the logit of t."""
    for place, times in enumerate(draw_times(n, 600, **JIT).T):
        assert stats.kstest(torch.logit(times.double()).numpy(), stats.norm(-0.8, 0.8).cdf).pvalue > 1e-5, place
    for place, times in enumerate(draw_times(n, 600, time_sampling="cosmap").T):
        found = 2 / math.pi * torch.atan(times.double() / (1 - times.double()))
        assert stats.kstest(found.numpy(), "uniform").pvalue > 1e-5, place


@pytest.mark.parametrize("path", PATH_NAMES)
def test_noise_levels_have_the_same_density_on_every_path(path: str):
    """EDM's, log sigma ~ N(-1.2, 1.2^2) for data of standard deviation 0.5, is one of them."""
    mean, std = 1.2 - math.log(2), 1.2  # of log(alpha / sigma), for data of standard deviation 1
    times = draw_times(500, 8, path_type=path, time_sampling="logit-normal", time_params=(mean, std)).flatten()
    ends = log_ratio(path, torch.tensor(create_transport(path).train_interval))
    law = stats.truncnorm(*((ends.numpy() - mean) / std), mean, std)
    # The strata make the whole batch even: far closer than independent times would be.
    assert stats.kstest(log_ratio(path, times).numpy(), law.cdf).statistic < 0.01


def test_cosmap_is_the_uniform_time_of_gvp():
    linear = log_ratio("Linear", draw_times(400, 10, time_sampling="cosmap").flatten())
    gvp = log_ratio("GVP", draw_times(400, 10, path_type="GVP").flatten())
    assert stats.ks_2samp(linear.numpy(), gvp.numpy()).statistic < 0.01


def test_a_shift_is_another_mean():
    """Stable Diffusion 3's t_noise -> s t / (1 + (s - 1) t), of the noise's time 1 - t here."""
    shift, u = 3.0, torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    noise = 1 - LogitNormal(0.2, 0.9).quantile(u)
    shifted = shift * noise / (1 + (shift - 1) * noise)
    torch.testing.assert_close(1 - shifted, LogitNormal(0.2 - math.log(shift), 0.9).quantile(u))


@pytest.mark.parametrize("path", PATH_NAMES)
def test_a_paths_time_is_found_from_its_share_of_data(path: str):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(PATHS[path].time_at(PATHS[path].share_at(t)), t, atol=1e-9, rtol=0)
    alpha, sigma = alpha_sigma(path, t)
    torch.testing.assert_close(PATHS[path].share_at(t), alpha / (alpha + sigma))


@pytest.mark.parametrize("density", [LogitNormal(), LogitNormal(-1.2, 0.3), CosMap()])
def test_quantiles_invert_the_distribution_function(density: LogitNormal | CosMap):
    u = torch.linspace(0, 1, 201, dtype=torch.float64)
    tau = density.quantile(u)
    assert tau.isfinite().all()
    assert (tau.diff() >= 0).all()
    assert (tau[0].item(), tau[-1].item()) == (0.0, 1.0)
    torch.testing.assert_close(density.cdf(tau), u, atol=1e-12, rtol=0)


def test_times_keep_to_the_training_interval_and_have_its_restricted_density():
    times = draw_times(64, 50, **JIT, train_eps=0.2)
    low, high = torch.tensor(0.2).item(), torch.tensor(0.8).item()
    assert low <= times.min().item() <= times.max().item() <= high
    law = stats.truncnorm(*((stats.logistic.ppf(0.2) + 0.8) / 0.8, (stats.logistic.ppf(0.8) + 0.8) / 0.8), -0.8, 0.8)
    assert stats.kstest(torch.logit(times.flatten().double()).numpy(), law.cdf).statistic < 0.02


def test_a_levels_share_of_the_batch_is_its_probability():
    for settings in ({}, JIT, {"time_sampling": "cosmap"}, {**JIT, "path_type": "VP"}):
        transport = create_transport(level_edges=(0.5, 0.75), **settings)
        shares = transport.level_probabilities()
        assert sum(shares) == pytest.approx(1)
        levels = transport.schedule.level_at(draw_times(1000, 4, **settings).flatten())
        for level, share in enumerate(shares):
            assert (levels == level).double().mean().item() == pytest.approx(share, abs=2e-3)
    jit = create_transport(level_edges=(0.5,), **JIT).level_probabilities()
    assert jit == pytest.approx([stats.norm(-0.8, 0.8).cdf(0), stats.norm(-0.8, 0.8).sf(0)])


@pytest.mark.parametrize(
    ("n", "settings", "bits"),
    [
        (5, {"train_eps": 0.1}, [1063053320, 1054755263, 1049620378, 1059132018, 1045318038]),
        (3, {"path_type": "VP"}, [1054496100, 1040815201, 1063869311]),
    ],
)
def test_uniform_times_have_the_bits_of_earlier_versions(n: int, settings: dict[str, object], bits: list[int]):
    generator = torch.Generator().manual_seed(0 if n == 5 else 1)
    assert create_transport(**settings).sample_times(n, generator).view(torch.int32).tolist() == bits


@pytest.mark.parametrize(
    ("sampling", "params", "message"),
    [
        ("lognormal", None, "unknown time sampling 'lognormal'; choose one of uniform, logit-normal, cosmap"),
        ("uniform", (0.0, 1.0), "leave them out for uniform ones"),
        ("cosmap", (0.0, 1.0), "leave them out for cosmap ones"),
        ("logit-normal", (0.0,), "a mean and a standard deviation above 0"),
        ("logit-normal", (0.0, 0.0), "above 0"),
        ("logit-normal", (math.nan, 1.0), "above 0"),
    ],
)
def test_wrong_densities_are_refused(sampling: str, params: tuple[float, ...] | None, message: str):
    with pytest.raises(ValueError, match=message):
        density_of(sampling, params)
    with pytest.raises(ValueError, match=message):
        create_transport(time_sampling=sampling, time_params=params)


def test_densities_at_one_end_alone_are_refused():
    with pytest.raises(ValueError, match="put nearly all times at t = 1"):
        create_transport(time_sampling="logit-normal", time_params=(900.0, 1.0))


@pytest.mark.parametrize("path", PATH_NAMES)
def test_an_expert_draws_the_times_of_its_interval_by_the_density_there(path: str):
    for settings in ({}, {"time_sampling": "logit-normal", "time_params": (-0.4, 1.1)}):
        everywhere = draw_times(1000, 40, path_type=path, **settings).flatten()
        inside = everywhere[(everywhere > 0.2) & (everywhere <= 0.45)]
        alone = draw_times(500, 10, path_type=path, interval=(0.2, 0.45), **settings).flatten()
        assert alone.min() >= 0.2
        assert alone.max() <= 0.45
        assert stats.ks_2samp(alone.numpy(), inside.numpy()).statistic < 0.01
