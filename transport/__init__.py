"""The generative process: paths, schedule, loss, guidance, solvers. It knows no images, files, devices, ranks."""

from transport.budgets import LevelErrors, at_budget, edges_for
from transport.grids import shifted_grid
from transport.guidance import ClassifierFreeGuidance, Guidance
from transport.noise import GaussianNoise, StudentTNoise, randn
from transport.paths import PATHS
from transport.predictions import PREDICTIONS
from transport.sampler import Sampler, bits_per_dim
from transport.schedule import ExpertPart, Interval, PatchSchedule, expert_parts
from transport.solvers import (
    ADAPTIVE_METHODS,
    DIFFUSION_FORMS,
    FIXED_METHODS,
    GRID_METHODS,
    LAST_STEPS,
    NOISE_TO_DATA_METHODS,
    ODE,
    ODE_METHODS,
    SDE,
    SDE_METHODS,
    STEPWISE_METHODS,
    check_ode_method,
)
from transport.times import TIME_SAMPLINGS
from transport.transport import Transport, create_transport
from transport.weights import LOSS_WEIGHTS

__all__ = [
    "ADAPTIVE_METHODS",
    "DIFFUSION_FORMS",
    "FIXED_METHODS",
    "GRID_METHODS",
    "LAST_STEPS",
    "LOSS_WEIGHTS",
    "NOISE_TO_DATA_METHODS",
    "ODE",
    "ODE_METHODS",
    "PATHS",
    "PREDICTIONS",
    "SDE",
    "SDE_METHODS",
    "STEPWISE_METHODS",
    "TIME_SAMPLINGS",
    "ClassifierFreeGuidance",
    "ExpertPart",
    "GaussianNoise",
    "Guidance",
    "Interval",
    "LevelErrors",
    "PatchSchedule",
    "Sampler",
    "StudentTNoise",
    "Transport",
    "at_budget",
    "bits_per_dim",
    "check_ode_method",
    "create_transport",
    "edges_for",
    "expert_parts",
    "randn",
    "shifted_grid",
]
