"""The training loss, and conversions of a network's output between velocity, score, noise and data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from transport.noise import GaussianNoise, StudentTNoise, noise_of, to_device
from transport.paths import PATHS, Path, like
from transport.predictions import PREDICTIONS, predictions_of, target_row
from transport.samples import Samples, kind_of, split_by_shape, take
from transport.schedule import PatchSchedule
from transport.times import Density, density_of, mass, probabilities, strata, times_of
from transport.weights import LOSS_WEIGHTS, checked_value, weight_of

# A network: model(x, t, y=..., level=...) -> tensor of the shape of x.
Model = Callable[..., torch.Tensor]

LEAST_MASS = 1e-9  # of a density on the training interval: below it float64 tells too few times apart


class Transport:
    """The process between noise and data that a network learns; built by `create_transport`.

    Args:
        path:              the interpolant
        predictions:       the network's output at each level: "velocity", "noise", "score" or "data"
        loss_weight:       one of LOSS_WEIGHTS
        train_eps:         training stays this far from singular ends of [0, 1]; None for the default
        sample_eps:        the same for sampling and likelihood
        schedule:          which level is active when
        noise:             the distribution of x_0; None for N(0, I)
        density:           of the times of training; None for uniform ones
        loss_weight_value: the weight's number; None for a weight without one
        interval:          times that the network serves; None for all
    """

    def __init__(
        self,
        path: Path,
        predictions: tuple[str, ...],
        loss_weight: str | None,
        train_eps: float | None,
        sample_eps: float | None,
        schedule: PatchSchedule,
        noise: GaussianNoise | StudentTNoise | None = None,
        density: Density | None = None,
        loss_weight_value: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.path = path
        self.predictions = predictions
        self.loss_weight = loss_weight
        self.loss_weight_value = loss_weight_value
        self.schedule = schedule
        self.noise = noise or GaussianNoise()
        self.density = density
        self.interval = interval
        default_train, default_sample = self.default_eps()
        self.train_eps = default_train if train_eps is None else train_eps
        self.sample_eps = default_sample if sample_eps is None else sample_eps

    @property
    def prediction(self) -> str:
        """The network's output in words: one name, or one for each level ("data velocity"), coarsest first."""
        return " ".join(self.predictions if len(set(self.predictions)) > 1 else self.predictions[:1])

    def prediction_at(self, level: int) -> str:
        """The network's output at a level: "velocity", "noise", "score" or "data"."""
        return self.predictions[level]

    def finest_only(self) -> Transport:
        """The same process at the finest level all the way; it may have another `sample_eps`."""
        other = copy.copy(self)
        other.schedule, other.predictions = PatchSchedule(), self.predictions[-1:]
        other.sample_eps = max(self.sample_eps, other.default_eps()[1])
        return other

    def with_edges(self, level_edges: Sequence[float]) -> Transport:
        """The same process with other level edges."""
        other = copy.copy(self)
        other.schedule = replace(self.schedule, level_edges=level_edges)
        return other

    @property
    def aug_dim(self) -> float | None:
        """D of PFGM++, the noise's degrees of freedom; None for Gaussian noise, whose D is infinite."""
        return self.noise.dof if isinstance(self.noise, StudentTNoise) else None

    # -- Intervals -----------------------------------------------------------------------------------------------

    @property
    def train_interval(self) -> tuple[float, float]:
        """Times on which the network is trained; a path that is regular at t = 0 (VP) is cut at its other end only."""
        start, stop = (0.0 if self.path.regular_at_noise else self.train_eps), 1 - self.train_eps
        low, high = self.interval or (start, stop)
        return max(start, low), min(stop, high)

    @property
    def sample_interval(self) -> tuple[float, float]:
        """Times from which and to which the ODE is solved."""
        return (0.0 if self.path.regular_at_noise else self.sample_eps), 1 - self.sample_eps

    def default_eps(self) -> tuple[float, float]:
        """Distance from the ends of [0, 1] in training and in sampling: SiT's where one of them is singular, else 0."""
        ends = zip((0.0, 1.0), self.schedule.levels_at_ends, strict=True)
        numbers = [
            self._numbers_at(end, level)
            for end, levels in ends
            for level in levels
            if end or not self.path.regular_at_noise
        ]
        in_training, in_sampling = self.path.singular_eps
        if any(not velocity.isfinite().all() for velocity, _ in numbers):
            return in_training, in_sampling
        return in_training if any(not loss.isfinite().all() for _, loss in numbers) else 0.0, 0.0

    def _numbers_at(self, end: float, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers with which the velocity, and the loss, are computed at an end; all are finite, or it is singular."""
        t = torch.tensor(end, dtype=torch.float32, device="cpu")  # as times are in training
        c, prediction = self.path.coefficients(t), self.prediction_at(level)
        velocity = torch.stack([*target_row("velocity", c), *self.conversion(t, prediction, "velocity")])
        return velocity, torch.stack([*target_row(prediction, c), self.weight(t, level)])

    def training_singularity(self) -> str | None:
        """Reason why the loss is not finite at an end of the training interval, which times reach; None if it is."""
        middle = sum(self.train_interval) / 2
        if self.loss_weight_value is not None and not self._numbers_at(middle, 0)[1].isfinite().all():
            return f"loss_weight_value {self.loss_weight_value:g} makes loss weight {self.loss_weight} infinite"
        for end, levels in zip(self.train_interval, self.schedule.levels_at_ends, strict=True):
            for level in levels:
                if not self._numbers_at(end, level)[1].isfinite().all():
                    return self._too_small("train_eps", f"the loss is infinite at t = {end:g}", level)
        return None

    def sampling_singularity(self) -> str | None:
        """Reason why no solver can take its first step; None if it can.

        The other end depends on the solver: some evaluate the network there, others do not.
        """
        start, _ = self.sample_interval
        for level in self.schedule.levels_at_ends[0]:
            if not self._numbers_at(start, level)[0].isfinite().all():
                return self._too_small("sample_eps", f"the velocity is infinite at t = {start:g}", level)
        return None

    def _too_small(self, name: str, reason: str, level: int) -> str:
        weight = f" and loss weight {self.loss_weight}" if self.loss_weight and name == "train_eps" else ""
        default = dict(zip(("train_eps", "sample_eps"), self.default_eps(), strict=True))[name]
        return (
            f"{name} {getattr(self, name):g} is too small for the {self.path.name} path with "
            f"{self.prediction_at(level)} prediction{weight}: {reason}; leave it out, which means {default:g}"
        )

    # -- Conversions ---------------------------------------------------------------------------------------------

    def conversion(self, t: torch.Tensor, source: str, target: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Coefficients (A, B) of target = A x_t + B source, at times t.

        With the path's row x_t = alpha x_1 + sigma x_0 and the rows (a, b) of source and (c, d) of target,
        Cramer's rule gives A = (c b - d a) / det and B = (d alpha - c sigma) / det, det = alpha b - sigma a.
        """
        if source == target:
            return torch.zeros_like(t), torch.ones_like(t)
        path = self.path.coefficients(t)
        row, (c, d, target_scale) = target_row(source, path), target_row(target, path)
        determinant = row.determinant(path) * target_scale
        return (c * row.b - d * row.a) / determinant, (d * path.alpha - c * path.sigma) * row.scale / determinant

    def convert(
        self, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, target: str, source: str | None = None
    ) -> torch.Tensor:
        """Turn the network's output at x_t into another quantity.

        Args:
            output: (N, ...) the network's prediction (or `source`)
            x:      (N, ...) x_t
            t:      (N,) times
            target: "velocity", "noise", "score" or "data"
            source: of these the output, as `prediction_at` tells it of a level; None where all levels have the same

        Raises:
            ValueError: if a quantity is unknown, or is the score of noise that is not Gaussian.
        """
        source = self.prediction if source is None else source
        for quantity in (source, target):
            if quantity not in PREDICTIONS:
                raise ValueError(f"unknown quantity {quantity!r}; choose one of {', '.join(PREDICTIONS)}")
        if source == target:
            return output
        if self.aug_dim is not None and "score" in (source, target):
            raise ValueError(f"the score at D = {self.aug_dim:g} is no function of the expected noise or data")
        a, b = self.conversion(like(t, x), source, target)
        return a * x + b * output

    # -- Training ------------------------------------------------------------------------------------------------

    def sample_times(self, num_samples: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw times (N,), one from each of N equally likely strata of the training interval.

        Each single time has the density, restricted to the interval, so the mean of any function over a batch is
        unbiased for every batch size; the strata only lower its variance. Neighbours in the batch are far apart in
        time: every contiguous slice (a rank, a micro-batch) is close to stratified itself, and gets its share of each
        level.
        """
        stratum, jitter = strata(num_samples, generator)
        start, stop = self.train_interval
        if self.density is None:
            return start + (stop - start) * (stratum + jitter) / num_samples
        return times_of((stratum + jitter.double()) / num_samples, self.density, self.path, (start, stop))

    def level_probabilities(self) -> list[float]:
        """Probability of each level in training: its share of the samples of a batch."""
        own = probabilities(self.schedule.edges, self.density, self.path, self.train_interval)
        return self.schedule.training_shares(own)

    def rare_levels(self, batch_size: int) -> list[str]:
        """A line that names the levels of which a batch has less than one sample on average; none without such."""
        expected = [batch_size * share for share in self.level_probabilities()]
        rare = [f"{samples:.2g} of level {level}" for level, samples in enumerate(expected) if samples < 1]
        return [f"a batch of {batch_size} has on average only {', '.join(rare)}"] if rare else []

    def training_losses(
        self,
        model: Model,
        x1: Samples,
        y: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        t: torch.Tensor | None = None,
        x0: Samples | None = None,
        joint: bool = False,
        level: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Denoising loss of each sample; its mean is an unbiased estimate of the expected loss.

        Each level's samples of one shape go through the model together. With a CPU generator (or times t on the CPU)
        the split is computed on the host, without waiting for a GPU.

        Args:
            model:     called as model(x, t, y=..., level=...), once per level present
            x1:        (N, ...) data; of many shapes, a list of N samples (...)
            y:         (N,) class ids
            generator: source of t, x0 and elastic levels where they are not given
            t:         (N,) times in the training interval
            x0:        (N, ...) noise, or a list likewise
            joint:     call the model once, with lists of groups, levels without samples included
            level:     (N,) levels; None for those of `PatchSchedule.sample_levels`

        Returns:
            "loss" (N,): mean squared error over the dimensions, weighted; "velocity_error" (N,): that of the velocity,
            unweighted and without a gradient, to compare runs of other weights by; "level" (N,) and "t" (N,).

        Raises:
            ValueError: if the model has another number of levels than the schedule.
        """
        self.check_levels(model)
        if t is None:
            t = self.sample_times(len(x1), generator)
        if x0 is None:
            x0 = self._noise_for(x1, generator)
        if level is None:
            level = self.schedule.sample_levels(t, generator)
        groups = [(index, torch.nonzero(level == index).flatten()) for index in range(self.schedule.num_levels)]
        groups = [(index, part) for index, members in groups for part in split_by_shape(x1, members)]
        groups = [(index, members) for index, members in groups if joint or len(members)]
        levels, (device, dtype) = [index for index, _ in groups], kind_of(x1)
        order = [to_device(members, device) for _, members in groups]
        places = order if isinstance(x1, torch.Tensor) else [members for _, members in groups]
        times = [to_device(t[members].to(dtype), device) for _, members in groups]
        labels = [None if y is None else y[members] for members in order]
        ends = [(take(x0, members), take(x1, members)) for members in places]
        points = [self.path.interpolate(*pair, time) for pair, time in zip(ends, times, strict=True)]
        if joint:
            outputs = model(points, times, y=labels, level=levels)
        else:
            calls = zip(points, times, labels, levels, strict=True)
            outputs = [model(point, time, y=label, level=index) for point, time, label, index in calls]
        parts = zip(outputs, ends, times, levels, strict=True)
        squares = [self._squared_error(output, *pair, time, index) for output, pair, time, index in parts]
        losses, errors = [], []
        for square, time, index in zip(squares, times, levels, strict=True):
            losses.append(square * self.weight(time, index))
            errors.append(square.detach() * self.weight(time, index, "velocity"))
        back = torch.cat(order).argsort()
        return {
            "loss": torch.cat(losses)[back],
            "velocity_error": torch.cat(errors)[back],
            "level": to_device(level, device),
            "t": to_device(t, device),
        }

    def _noise_for(self, x1: Samples, generator: torch.Generator | None) -> Samples:
        """Noise of the shapes of the samples."""
        if isinstance(x1, torch.Tensor):
            return self.noise.sample(x1.shape, generator, x1.device, x1.dtype)
        return [self.noise.sample((1, *x.shape), generator, x.device, x.dtype)[0] for x in x1]

    def _squared_error(
        self, output: torch.Tensor, x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor, level: int
    ) -> torch.Tensor:
        a, b, scale = target_row(self.prediction_at(level), self.path.coefficients(like(t, x1)))
        error = scale * output - (a * x1 + b * x0)
        return error.square().flatten(1).mean(1)

    def weight(self, t: torch.Tensor, level: int = 0, loss_weight: str | None = None) -> torch.Tensor:
        """Loss weight h / n^2 (N,) at times t, for the squared error of a level's prediction (transport/weights.py).

        Args:
            t:           (N,) times
            level:       whose prediction it is
            loss_weight: another weight, without a number, than the transport's
        """
        name, value = (loss_weight, None) if loss_weight else (self.loss_weight, self.loss_weight_value)
        if name is None:
            return torch.ones_like(t)
        c = self.path.coefficients(t)
        n = target_row(self.prediction_at(level), c).determinant(c)
        return weight_of(name, value, c) * (1 / n) ** 2

    def check_levels(self, model: Model) -> None:
        """Refuse a model with other levels than the schedule (ValueError), as far as it tells.

        It may have `num_levels`, and `fixed_edges`: the times at which some of them begin (experts).
        """
        levels = getattr(model, "num_levels", self.schedule.num_levels)
        if levels != self.schedule.num_levels:
            raise ValueError(
                f"the model has {levels} level(s) but the schedule {self.schedule.num_levels}: "
                f"give {levels - 1} level edge(s)"
            )
        for level, edge in getattr(model, "fixed_edges", {}).items():
            if self.schedule.edges[level] != edge:
                raise ValueError(
                    f"level edges {list(self.schedule.level_edges)} move {edge!r}, at which another expert takes over: "
                    "only those between patch sizes of one expert may change"
                )

    def check_served(self) -> None:
        """Refuse to go from noise to data, or back, with a lone expert (ValueError): it serves a part of the way."""
        low, high = self.interval or (0.0, 1.0)
        if (low, high) != (0.0, 1.0):
            raise ValueError(
                f"the network is an expert for t in [{low:g}, {high:g}] alone: give the files of all experts together"
            )


def create_transport(
    path_type: str = "Linear",
    prediction: str | Sequence[str] = "velocity",
    loss_weight: str | None = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    level_edges: Sequence[float] = (),
    aug_dim: float | None = None,
    loss_weight_value: float | None = None,
    time_sampling: str = "uniform",
    time_params: Sequence[float] | None = None,
    interval: Sequence[float] | None = None,
    elastic: float = 0.0,
    expert_levels: Sequence[int] = (),
    check_ends: bool = True,
) -> Transport:
    """Build a Transport from plain values.

    Args:
        path_type:         "Linear", "GVP" or "VP"
        prediction:        the network's output: "velocity", "noise", "score" or "data"; or one of these for each level,
                           coarsest first, as ("data", "velocity") or "data velocity"
        loss_weight:       one of LOSS_WEIGHTS; None is the prediction's own squared error, and that of the velocity
                           where levels predict different things
        train_eps:         distance from the singular ends of [0, 1] in training; None: VP 1e-5, others 1e-3 where the
                           loss or the velocity is infinite at an end (which for velocity prediction is with likelihood
                           weights alone), else 0
        sample_eps:        the same in sampling; None: VP 1e-3, others 1e-3 where the velocity is infinite, else 0
        level_edges:       interior times at which the level changes; () is a single level
        aug_dim:           D of PFGM++: x_0 is a Student-t with D degrees of freedom; None or infinity is Gaussian
        loss_weight_value: the number of a weight that has one: gamma of p2 (default 0.5), min-snr (5) and soft-min-snr
                           (1), the data's standard deviation of edm (1), the bias of sigmoid (0)
        time_sampling:     density of the times of training: "uniform" in t, "logit-normal" or "cosmap"
        time_params:       mean and standard deviation of log(alpha / sigma) for "logit-normal"; None is 0 and 1
        interval:          times (start, stop) that the network serves, an expert alone; None is all of [0, 1]
        elastic:           probability that training draws a sample's level from all levels; then level_edges may
                           coincide, with each other and with 0 and 1, which leaves levels out
        expert_levels:     numbers of levels of experts that are trained together; () is one network
        check_ends:        refuse an eps that is too small; False for runs of earlier versions, which may have one and
                           keep it

    Raises:
        ValueError: if a name is unknown, a number of the weight, an eps or the edges are out of range, there is not
            one prediction for each level, or the loss at an end of its interval, or the velocity from which samples
            start, is infinite; if the noise, the times or the interval do not go with the rest.
    """
    for value, name, allowed in (
        (path_type, "path type", tuple(PATHS)),
        (loss_weight, "loss weight", LOSS_WEIGHTS),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(map(str, allowed))}")
    for value, name in ((train_eps, "train_eps"), (sample_eps, "sample_eps")):
        if value is not None and not 0 <= value < 0.5:
            raise ValueError(f"{name} must be in [0, 0.5), got {value}")
    schedule = PatchSchedule(level_edges, elastic, expert_levels)
    predictions = predictions_of(prediction, schedule.num_levels)
    if len(set(predictions)) > 1 and loss_weight is None:
        loss_weight = "velocity"  # errors of different things do not compare
    loss_weight_value = checked_value(loss_weight, loss_weight_value)
    noise, density = noise_of(aug_dim, predictions, loss_weight), density_of(time_sampling, time_params)
    if density is not None and loss_weight == "likelihood":
        raise ValueError(f"likelihood weights bound the likelihood at uniform times alone, not at {time_sampling} ones")
    if interval is not None:
        interval = _checked_interval(interval, schedule)
    transport = Transport(
        PATHS[path_type],
        predictions,
        loss_weight,
        train_eps,
        sample_eps,
        schedule,
        noise,
        density,
        loss_weight_value,
        interval,
    )
    start, stop = transport.train_interval
    if not start < stop:
        raise ValueError(f"train_eps {transport.train_eps:g} leaves nothing of the expert's interval {list(interval)}")
    if density is not None and (share := mass(density, transport.path, transport.train_interval)) < LEAST_MASS:
        raise ValueError(
            f"{time_sampling} times fall into [{start:g}, {stop:g}] with probability {share:.1g}, and nothing else is "
            "trained: give other time_params"
        )
    if density is not None:
        low, high = times_of(torch.tensor([0.05, 0.95]), density, transport.path, transport.train_interval).tolist()
        if low == high:
            raise ValueError(f"time_params {list(time_params)} put nearly all times at t = {low:g}: give a mean near 0")
    if check_ends and (reason := transport.training_singularity() or transport.sampling_singularity()):
        raise ValueError(reason)
    return transport


def _checked_interval(interval: Sequence[float], schedule: PatchSchedule) -> tuple[float, float]:
    """An expert's interval (ValueError unless it is part of [0, 1] and the levels change within it)."""
    start, stop = map(float, interval)
    if not 0 <= start < stop <= 1:
        raise ValueError(f"an expert's interval is (start, stop) within [0, 1], got {list(interval)}")
    if any(not start < edge < stop for edge in schedule.level_edges):
        raise ValueError(f"level edges {list(schedule.level_edges)} are not within the interval {list(interval)}")
    return start, stop
