"""Gaussian data, for which every prediction, sample and density is known: the oracle of the transport tests.

For x_1 ~ N(m, S) the marginals are x_t ~ N(alpha m, alpha^2 S + sigma^2), with S diagonal (after a rotation, if one
is given). Nothing here comes from `transport`: alpha and sigma are written out again, their derivatives are autograd's.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from scipy import stats

PATH_NAMES = ("Linear", "GVP", "VP")
QUANTITIES = ("velocity", "noise", "score", "data")
EDGES = {1: (), 2: (0.5,), 3: (0.5, 0.75)}  # by number of levels


def alpha_sigma(path: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The interpolant's two factors, from the papers."""
    if path == "Linear":
        return t, 1 - t
    if path == "GVP":
        return torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
    s = 1 - t  # VP: alpha^2 = exp(-integral of beta from 0 to s), beta from 0.1 to 20
    integral = 0.1 * s + (20 - 0.1) * s**2 / 2
    return torch.exp(-integral / 2), torch.sqrt(1 - torch.exp(-integral))


def coefficients(path: str, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """alpha, sigma and their derivatives at float64 times of any shape."""
    with torch.enable_grad():
        t = t.detach().double().requires_grad_()
        alpha, sigma = alpha_sigma(path, t)
        d_alpha, d_sigma = (torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in (alpha, sigma))
    return alpha.detach(), sigma.detach(), d_alpha, d_sigma


@cache
def numbers(path: str, t: float) -> tuple[float, ...]:
    """`coefficients` at one time, as plain numbers."""
    return tuple(c.item() for c in coefficients(path, torch.tensor(t, dtype=torch.float64)))


def default_interval(path: str, prediction: str) -> tuple[float, float]:
    """Start and end of sampling by default: SiT's `check_interval` (github.com/willisma/SiT)."""
    if path == "VP":
        return 0.0, 1 - 1e-3
    return (0.0, 1.0) if prediction == "velocity" else (1e-3, 1 - 1e-3)


def solve_for(path: str, x: torch.Tensor, t: torch.Tensor, value: torch.Tensor, source: str) -> dict[str, torch.Tensor]:
    """All quantities at x (N, ...) and t (N,) from one of them: the 2x2 system in (x_1, x_0), solved by LAPACK."""
    alpha, sigma, d_alpha, d_sigma = coefficients(path, t)
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    rows = {"velocity": (d_alpha, d_sigma), "noise": (zero, one), "score": (zero, -1 / sigma), "data": (one, zero)}
    system = torch.stack([torch.stack([alpha, sigma], -1), torch.stack(rows[source], -1)], -2)  # (N, 2, 2)
    right = torch.stack([x.flatten(1), value.flatten(1)], 1).double()  # (N, 2, D)
    ends = torch.linalg.solve(system, right)
    return {q: (torch.stack(r, -1)[:, None] @ ends).reshape(x.shape) for q, r in rows.items()}


class Gaussian:
    """Data N(mean, diag(variance)), turned by `rotation` (an orthogonal matrix) where one is given."""

    def __init__(self, mean: list[float], variance: list[float], rotation: torch.Tensor | None = None) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float64)
        self.variance = torch.tensor(variance, dtype=torch.float64)
        self.rotation = rotation

    def to_axes(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotation is None else x @ self.rotation

    def from_axes(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.rotation is None else x @ self.rotation.T

    def sample(self, n: int, seed: int) -> torch.Tensor:
        z = torch.randn(n, len(self.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.from_axes(self.mean + self.variance.sqrt() * z)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        normal = torch.distributions.Normal(self.mean, self.variance.sqrt())
        return normal.log_prob(self.to_axes(x)).sum(1)

    def moments(self, path: str, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of x_t along the axes of the rotation."""
        alpha, sigma, _, _ = numbers(path, t)
        return alpha * self.mean, alpha**2 * self.variance + sigma**2

    def flow(self, path: str, x: torch.Tensor, start: float, stop: float) -> torch.Tensor:
        """The probability-flow ODE solved exactly: it keeps (x_t - mean_t) / std_t."""
        (mean_a, var_a), (mean_b, var_b) = self.moments(path, start), self.moments(path, stop)
        return self.from_axes(mean_b + (var_b / var_a).sqrt() * (self.to_axes(x) - mean_a))

    def drift(self, path: str, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(slope, constant) of the velocity, affine in x: the time derivatives of `moments`, along the axes."""
        alpha, sigma, d_alpha, d_sigma = numbers(path, t)
        slope = (alpha * d_alpha * self.variance + sigma * d_sigma) / (alpha**2 * self.variance + sigma**2)
        return slope, (d_alpha - slope * alpha) * self.mean

    def predictions(self, path: str, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """The conditional expectation of every quantity given x_t = x (N, D), at times t (N,)."""
        if bool((t == t[0]).all()):
            alpha, sigma, d_alpha, d_sigma = numbers(path, t[0].item())
        else:
            alpha, sigma, d_alpha, d_sigma = (c[:, None] for c in coefficients(path, t))
        deviation = self.to_axes(x.double()) - alpha * self.mean
        score = -deviation / (alpha**2 * self.variance + sigma**2)
        data, noise = self.mean - alpha * self.variance * score, -sigma * score
        velocity = d_alpha * data + d_sigma * noise
        found = {"velocity": velocity, "noise": noise, "score": score, "data": data}
        return {name: self.from_axes(value).to(x.dtype) for name, value in found.items()}


class Network:
    """The exact network for Gaussian data. It remembers each call as (earliest t, latest t, level, rows)."""

    def __init__(self, data: Gaussian, path: str, prediction: str, num_levels: int = 1) -> None:
        self.data, self.path, self.prediction, self.num_levels = data, path, prediction, num_levels
        self.calls: list[tuple[float, float, int, int]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        self.calls.append((t.min().item(), t.max().item(), level, len(x)))
        return self.data.predictions(self.path, x, t)[self.prediction]


class LevelField:
    """A velocity that jumps where the level does: dx/dt = (level + 1) x, so x_1 = x_0 exp(sum of (l + 1) length_l)."""

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.calls: list[tuple[float, float, int, int]] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        self.calls.append((t.min().item(), t.max().item(), level, len(x)))
        return (level + 1) * x

    @staticmethod
    def growth(edges: tuple[float, ...]) -> float:
        bounds = (0.0, *edges, 1.0)
        return math.exp(sum((level + 1) * (bounds[level + 1] - bounds[level]) for level in range(len(edges) + 1)))


def assert_each_level_kept_to_its_time(
    calls: list[tuple[float, float, int, int]], edges: tuple[float, ...], dtype: torch.dtype = torch.float64
) -> None:
    """No evaluation outside [edges[l], edges[l + 1]], to the last bit, and every level evaluated."""
    bounds = torch.tensor([0.0, *edges, 1.0], dtype=torch.float64).to(dtype).tolist()
    assert {level for _, _, level, _ in calls} == set(range(len(edges) + 1))
    for low, high, level, _ in calls:
        assert bounds[level] <= low <= high <= bounds[level + 1], (low, high, level)


def observed_order(errors: list[float], steps: list[int]) -> float:
    """Slope of log error over log step size (least squares)."""
    log_h = torch.tensor([-math.log(n) for n in steps], dtype=torch.float64)
    log_e = torch.tensor(errors, dtype=torch.float64).log()
    return (((log_h - log_h.mean()) * (log_e - log_e.mean())).sum() / (log_h - log_h.mean()).square().sum()).item()


def diffusion(path: str, form: str, t: float) -> float:
    """w_t of SiT (arXiv:2401.08740), table 2, as `compute_diffusion` of its code has it."""
    alpha, sigma, d_alpha, d_sigma = numbers(path, t)
    return {
        "constant": lambda: 1.0,
        "SBDM": lambda: sigma * (d_alpha / alpha * sigma - d_sigma),
        "sigma": lambda: sigma,
        "linear": lambda: 1 - t,
        "decreasing": lambda: (math.cos(math.pi * t) + 1) ** 2 / 4,
        "increasing-decreasing": lambda: math.sin(math.pi * t) ** 2,
    }[form]()


def sde_chain(
    data: Gaussian,
    path: str,
    prediction: str,
    edges: tuple[float, ...],
    steps: tuple[int, ...],
    form: str,
    norm: float,
    method: str,
    last_step: str | None,
    size: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, variance and gain (x_end = gain x_0 + ...) of an SDE's discrete chain, which is affine in x.

    `steps` are those of each level before the last step, which has the length `size`.
    """

    def sde(t: float) -> tuple[torch.Tensor, torch.Tensor, float]:
        w = norm * diffusion(path, form, t)
        (slope, constant), (mean, variance) = data.drift(path, t), data.moments(path, t)
        return slope - w / variance, constant + w * mean / variance, w

    start, stop = default_interval(path, prediction)
    if form == "SBDM" and path != "VP":
        start = 1e-3
    stop = min(stop, 1 - 1e-3) if last_step is None else 1 - size
    sigma = numbers(path, start)[1]
    mean, variance, gain = torch.zeros_like(data.mean), torch.full_like(data.mean, sigma**2), sigma
    for (a, b), n in zip(pairwise([start, *edges, stop]), steps, strict=True):
        grid, h = torch.linspace(a, b, n + 1, dtype=torch.float64).tolist(), (b - a) / n
        for t, t_next in pairwise(grid):
            slope, constant, w = sde(t)
            if method == "Euler":
                factor, shift, spread = 1 + h * slope, h * constant, 1.0
            else:
                slope2, constant2, _ = sde(t_next)
                factor = 1 + h / 2 * (slope + slope2 * (1 + h * slope))
                shift, spread = h / 2 * (constant + slope2 * h * constant + constant2), factor
            mean, variance = factor * mean + shift, factor**2 * variance + spread**2 * 2 * w * h
            gain = gain * factor

    alpha = numbers(path, stop)[0]
    if last_step is None:
        factor, shift = 1 / alpha, 0.0
    elif last_step == "Tweedie":
        m, v = data.moments(path, stop)
        factor, shift = alpha * data.variance / v, data.mean - alpha * data.variance / v * m
    else:
        slope, constant = sde(stop)[:2] if last_step == "Mean" else data.drift(path, stop)
        factor, shift = 1 + size * slope, size * constant
    return factor * mean + shift, factor**2 * variance, factor * gain


# Different means and variances in each dimension; the fourth is wide, the fifth narrow.
DATA = Gaussian([0.3, -0.2, 0.5, 0.0, -0.4], [1.0, 0.25, 0.5, 2.0, 0.1])


# -- Student-t noise -----------------------------------------------------------------------------------------------


class GaussianInStudentNoise:
    """The exact network for data N(m, S) and independent noise t_D: what Gaussian noise of variance 1 / g would see,
    averaged over g ~ chi2_D / D given x_t. The flow turns noise into N(m, S) whatever D is; in one dimension it keeps
    quantiles."""

    def __init__(
        self, data: Gaussian, path: str, prediction: str, dof: float, num_levels: int = 1, nodes: int = 300
    ) -> None:
        self.data, self.path, self.prediction, self.num_levels = data, path, prediction, num_levels
        law = stats.chi2(dof)  # the trapezoidal rule in log g
        log_g = torch.linspace(math.log(law.ppf(1e-16)), math.log(law.isf(1e-16)), nodes, dtype=torch.float64)
        self.log_weight = (dof / 2 * log_g - log_g.exp() / 2)[:, None]  # (G, 1)
        self.g = (log_g.exp() / dof)[:, None, None]  # (G, 1, 1)

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        alpha, sigma, d_alpha, d_sigma = numbers(self.path, t[0].item())
        deviation = x - alpha * self.data.mean
        variance = alpha**2 * self.data.variance + sigma**2 / self.g  # (G, 1, D)
        log_likelihood = -0.5 * (deviation**2 / variance + variance.log()).sum(2)
        posterior = torch.softmax(self.log_weight + log_likelihood, 0)[..., None]  # (G, N, 1)
        data = self.data.mean + (posterior * alpha * self.data.variance / variance).sum(0) * deviation
        noise = (posterior * sigma / self.g / variance).sum(0) * deviation
        return {"data": data, "noise": noise, "velocity": d_alpha * data + d_sigma * noise}[self.prediction]


class TwoPoints:
    """The exact network for the data -1 (probability 0.3) and +1 (0.7) in Student-t noise, in one dimension.

    The flow keeps the order of points, so noise below the noise's 0.3 quantile goes to -1 and the rest to +1.
    """

    def __init__(self, path: str, dof: float) -> None:
        self.path, self.dof, self.num_levels = path, dof, 1

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, level: int = 0) -> torch.Tensor:
        alpha, sigma, _, _ = numbers(self.path, t[0].item())
        minus, plus = (torch.log1p(((x - alpha * point) / sigma) ** 2 / self.dof) for point in (-1, 1))
        return torch.tanh((minus - plus) * (self.dof + 1) / 4 + math.log(0.7 / 0.3) / 2)  # E[x_1 | x_t]
