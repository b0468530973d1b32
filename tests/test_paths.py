"""Interpolants against the papers' formulas, finite differences and 50-digit arithmetic."""

import mpmath
import pytest
import torch
from closed_form import PATH_NAMES, alpha_sigma

from transport import PATHS

TIMES = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)


@pytest.mark.parametrize("name", PATH_NAMES)
def test_alpha_and_sigma_are_those_of_the_papers(name: str):
    alpha, sigma, _, _ = PATHS[name].coefficients(TIMES)
    expected_alpha, expected_sigma = alpha_sigma(name, TIMES)
    torch.testing.assert_close(alpha, expected_alpha, atol=1e-14, rtol=0)
    torch.testing.assert_close(sigma, expected_sigma, atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", PATH_NAMES)
def test_derivatives_equal_finite_differences(name: str):
    t, h = TIMES[1:-1], 1e-6
    ahead, behind = PATHS[name].coefficients(t + h), PATHS[name].coefficients(t - h)
    _, _, d_alpha, d_sigma = PATHS[name].coefficients(t)
    torch.testing.assert_close(d_alpha, (ahead.alpha - behind.alpha) / (2 * h), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(d_sigma, (ahead.sigma - behind.sigma) / (2 * h), atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("name", PATH_NAMES)
def test_derivatives_equal_autograd_up_to_the_ends(name: str):
    t = torch.tensor([0.0, 1e-3, 1 - 1e-3, 1 - 1e-5], dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = PATHS[name].coefficients(t)
    torch.testing.assert_close(d_alpha, torch.autograd.grad(alpha.sum(), t, retain_graph=True)[0])
    torch.testing.assert_close(d_sigma, torch.autograd.grad(sigma.sum(), t)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATH_NAMES)
def test_a_path_leads_from_noise_to_data(name: str, dtype: torch.dtype):
    alpha, sigma, _, _ = PATHS[name].coefficients(torch.tensor([0.0, 1.0], dtype=dtype))
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha[1] == 1
    assert sigma[1] == 0  # exactly: no noise is left in the data
    if name == "VP":  # exp(-0.1 / 2 - 19.9 / 4): not quite vanished
        assert alpha[0].item() == pytest.approx(0.00657, abs=1e-5)
        assert sigma[0].item() == pytest.approx(0.99998, abs=1e-5)
    else:
        assert (alpha[0], sigma[0]) == (0, 1)


@pytest.mark.parametrize("name", ["GVP", "VP"])
def test_variance_preserving_paths_have_unit_variance(name: str):
    alpha, sigma, d_alpha, d_sigma = PATHS[name].coefficients(TIMES[:-1])
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-14, rtol=0)
    torch.testing.assert_close(alpha * d_alpha, -sigma * d_sigma, atol=1e-13, rtol=1e-12)  # the derivative of that


@pytest.mark.parametrize("name", ["GVP", "VP"])
def test_single_precision_holds_where_the_noise_vanishes(name: str):
    # 1 - alpha^2 would cancel here: 1 - (1 - 1e-6) has one correct digit in float32.
    times = torch.tensor([0.5, 0.9, 1 - 1e-2, 1 - 1e-3, 1 - 1e-4, 1 - 1e-5, 1 - 1e-6], dtype=torch.float32)
    _, sigma, _, d_sigma = PATHS[name].coefficients(times)
    with mpmath.workdps(50):
        for i, t in enumerate(times.tolist()):

            def exact(u: mpmath.mpf) -> mpmath.mpf:
                if name == "GVP":
                    return mpmath.cos(mpmath.pi * u / 2)
                s = 1 - u
                return mpmath.sqrt(1 - mpmath.exp(-(s / 10 + mpmath.mpf(199) / 20 * s**2)))

            assert sigma[i].item() == pytest.approx(float(exact(mpmath.mpf(t))), rel=2e-6)
            assert d_sigma[i].item() == pytest.approx(float(mpmath.diff(exact, mpmath.mpf(t))), rel=2e-6)


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 4, 5)])
def test_each_sample_is_interpolated_at_its_own_time(name: str, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    mixed = PATHS[name].interpolate(x0, x1, t)
    for i in range(6):
        alpha, sigma = alpha_sigma(name, t[i])
        torch.testing.assert_close(mixed[i], alpha * x1[i] + sigma * x0[i])


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("snr", [1e-3, 0.25, 1.0, 5.0, 1e4])
def test_a_signal_to_noise_ratio_is_reached_at_one_time(name: str, snr: float):
    t = PATHS[name].time_of_snr(snr)
    alpha, sigma = alpha_sigma(name, torch.tensor(t, dtype=torch.float64))
    assert 0 < t < 1
    assert (alpha / sigma).item() ** 2 == pytest.approx(snr, rel=1e-9)


def test_patch_diffusions_threshold_is_a_third_on_the_linear_path():
    assert PATHS["Linear"].time_of_snr(0.25) == pytest.approx(1 / 3, abs=1e-15)
    assert PATHS["VP"].time_of_snr(1e-6) < 0  # VP is never so noisy: alpha(0) = 0.0066
