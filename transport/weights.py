"""Weights of the loss over time, each one function h of a path's alpha and sigma.

An error e of the data is one of e n / sigma in what the network predicts, with n = sigma for data, alpha for noise and
(times sigma) the score, and W = sigma d_alpha - alpha d_sigma for the velocity. So (error / n)^2 is the same for every
prediction, and a loss of h / n^2 times the squared error does not depend on what is predicted.

In the words of the literature h / sigma^2 is the weight of the data's error, h / alpha^2 that of the noise's and
h / W^2 that of the velocity's, which on the Linear path is h itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from transport.paths import Coefficients


class Weight(NamedTuple):
    """h and the number that it may have, which lies between low and high."""

    h: Callable[..., torch.Tensor]  # of Coefficients, and of the number
    default: float | None = None
    low: float = 0.0
    high: float = math.inf


def wronskian(c: Coefficients) -> torch.Tensor:
    """W = sigma d_alpha - alpha d_sigma: 1 on the Linear path, pi / 2 on GVP, d_alpha / sigma on VP."""
    return c.sigma * c.d_alpha - c.alpha * c.d_sigma


def snr_plus(c: Coefficients, std: float) -> torch.Tensor:
    """The SNR alpha^2 / sigma^2 and 1 / std^2, for data of the standard deviation std, times sigma^2."""
    return c.alpha**2 + c.sigma**2 / std**2


def p2(c: Coefficients, gamma: float) -> torch.Tensor:
    """The noise's error weighs 1 / (1 + SNR)^gamma."""
    return c.alpha**2 * (c.sigma**2 / (c.sigma**2 + c.alpha**2)) ** gamma


def soft_min_snr(c: Coefficients, gamma: float) -> torch.Tensor:
    """SNR gamma / (SNR + gamma), a smooth minimum of both, times sigma^2."""
    return c.alpha**2 * c.sigma**2 / (c.sigma**2 + c.alpha**2 / gamma)


def sigmoid(c: Coefficients, bias: float) -> torch.Tensor:
    """The noise's error weighs d/dt log(SNR) / 2 sigmoid(bias - log SNR): the likelihood's weight at a large bias."""
    return wronskian(c) * c.alpha * c.sigma / (c.sigma**2 + math.exp(-bias) * c.alpha**2)


WEIGHTS: dict[str, Weight] = {
    "velocity": Weight(lambda c: wronskian(c) ** 2),
    "likelihood": Weight(lambda c: wronskian(c) * c.alpha / c.sigma),  # SiT (arXiv:2401.08740), section 3.2
    "data": Weight(lambda c: c.sigma**2),
    "noise": Weight(lambda c: c.alpha**2),
    "snr": Weight(lambda c: c.alpha**2),  # times the data's error, which makes it that of the noise
    "sqrt-snr": Weight(lambda c: c.alpha * c.sigma),  # Patch Diffusion's (arXiv:2207.04316)
    "snr+1": Weight(lambda c: snr_plus(c, 1.0)),  # this and the next: arXiv:2202.00512
    "truncated-snr": Weight(lambda c: torch.maximum(c.alpha**2, c.sigma**2)),
    "p2": Weight(p2, 0.5),  # arXiv:2204.00227
    "min-snr": Weight(lambda c, gamma: torch.minimum(c.alpha**2, gamma * c.sigma**2), 5.0),  # arXiv:2303.09556
    "soft-min-snr": Weight(soft_min_snr, 1.0),  # arXiv:2401.11605
    "edm": Weight(snr_plus, 1.0),  # arXiv:2206.00364; its number is the data's standard deviation
    "sigmoid": Weight(sigmoid, 0.0, low=-80.0, high=80.0),  # arXiv:2303.00848
}
LOSS_WEIGHTS = (None, *WEIGHTS)


def checked_value(name: str | None, value: float | None) -> float | None:
    """The number of a weight: `value`, or its own where that is None; None for a weight without one.

    Raises:
        ValueError: if the weight has no number, or not this one.
    """
    weight = WEIGHTS[name] if name is not None else None
    if weight is None or weight.default is None:
        if value is not None:
            having = ", ".join(known for known, each in WEIGHTS.items() if each.default is not None)
            what = "without a loss weight" if name is None else f"with loss weight {name}"
            raise ValueError(f"loss_weight_value {value:g} has no effect {what}: leave it out, or choose {having}")
        return None
    if value is None:
        return weight.default
    if not weight.low < value < weight.high:
        bounds = f"between {weight.low:g} and {weight.high:g}" if weight.high < math.inf else f"above {weight.low:g}"
        raise ValueError(f"loss_weight_value of {name} must be a number {bounds}, got {value:g}")
    return float(value)


def weight_of(name: str, value: float | None, c: Coefficients) -> torch.Tensor:
    """h of a weight at a path's numbers, of their shape."""
    h = WEIGHTS[name].h
    return h(c) if value is None else h(c, value)
