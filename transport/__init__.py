"""The generative process: paths, schedule, loss, guidance, solvers. It knows no images, files, devices, ranks."""

from transport.guidance import ClassifierFreeGuidance
from transport.noise import GaussianNoise, randn, sample_generators
from transport.paths import PATHS
from transport.sampler import DIFFUSION_FORMS, LAST_STEPS, Sampler, bits_per_dim
from transport.schedule import Interval, PatchSchedule
from transport.solvers import (
    ADAPTIVE_METHODS,
    FIXED_METHODS,
    NOISE_TO_DATA_METHODS,
    ODE_METHODS,
    SDE_METHODS,
    check_ode_method,
)
from transport.transport import LOSS_WEIGHTS, PREDICTIONS, Transport, create_transport

__all__ = [
    "ADAPTIVE_METHODS",
    "DIFFUSION_FORMS",
    "FIXED_METHODS",
    "LAST_STEPS",
    "LOSS_WEIGHTS",
    "NOISE_TO_DATA_METHODS",
    "ODE_METHODS",
    "PATHS",
    "PREDICTIONS",
    "SDE_METHODS",
    "ClassifierFreeGuidance",
    "GaussianNoise",
    "Interval",
    "PatchSchedule",
    "Sampler",
    "Transport",
    "bits_per_dim",
    "check_ode_method",
    "create_transport",
    "randn",
    "sample_generators",
]
