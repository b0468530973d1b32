"""Classifier-free guidance: the formula, what it costs, and its interval in time."""

import math
from itertools import pairwise

import pytest
import torch
from torchdiffeq import odeint

from transport import ClassifierFreeGuidance, Interval, Sampler, create_transport

NULL = 7


class Labelled:
    """A small non-linear network of all its inputs; remembers each call as (rows, labels, times, level)."""

    def __init__(self, num_levels: int | None = None) -> None:
        self.calls: list[tuple[int, list[int], list[float], int]] = []
        if num_levels is not None:
            self.num_levels = num_levels

    def __call__(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int = 0) -> torch.Tensor:
        self.calls.append((len(x), y.tolist(), t.tolist(), level))
        return self.value(x, t, y, level)

    @staticmethod
    def value(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int) -> torch.Tensor:
        phase = (t + 0.3 * y + 0.5 * level).reshape(-1, *[1] * (x.ndim - 1))
        return torch.sin(x + phase) + 0.1 * phase


def guided_by_hand(
    x: torch.Tensor, t: torch.Tensor, y: torch.Tensor, level: int, scale: float | torch.Tensor
) -> torch.Tensor:
    """The conditional prediction pushed away from the unconditional one (arXiv:2207.12598 with w = scale - 1)."""
    conditional = Labelled.value(x, t, y, level)
    return conditional + (scale - 1) * (conditional - Labelled.value(x, t, torch.full_like(y, NULL), level))


def inputs(n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, 2, 2, generator=generator, dtype=torch.float64)
    return x, torch.rand(n, generator=generator, dtype=torch.float64), torch.arange(n)


# -- The formula ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [4.0, 1.5, 0.5, 0.0])
def test_guidance_extrapolates_from_the_null_class(scale: float):
    x, t, y = inputs()
    network = Labelled()
    found = ClassifierFreeGuidance(network, scale, NULL)(x, t, y, level=1)
    torch.testing.assert_close(found, guided_by_hand(x, t, y, 1, scale))
    (rows, labels, times, level) = network.calls[0]
    assert len(network.calls) == 1  # both labels in one call
    assert rows == 2 * len(x)
    assert sorted(labels) == sorted([*y.tolist(), *[NULL] * len(x)])
    assert sorted(times) == sorted(2 * t.tolist())
    assert level == 1


def test_each_level_has_its_scale():
    x, t, y = inputs()
    guided = ClassifierFreeGuidance(Labelled(3), (2.0, 3.0, 4.0), NULL)
    for level, scale in enumerate((2.0, 3.0, 4.0)):
        expected = guided_by_hand(x, t, y, level, scale)
        torch.testing.assert_close(guided(x, t, y, level=level), expected)
        torch.testing.assert_close(guided.on_interval(Interval(level, 0.0, 1.0))(x, t, y=y), expected)


@pytest.mark.parametrize("num_levels", [None, 1, 3])
@pytest.mark.parametrize("scales", [2.5, 2, (2.5,)])
def test_a_single_scale_serves_all_levels(num_levels: int | None, scales: float | tuple[float, ...]):
    x, t, y = inputs()
    guided = ClassifierFreeGuidance(Labelled(num_levels), scales, NULL)
    scale = scales if isinstance(scales, (int, float)) else scales[0]
    for level in range(num_levels or 4):
        torch.testing.assert_close(guided(x, t, y, level=level), guided_by_hand(x, t, y, level, scale))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_channels_beyond_the_limit_stay_conditional(channels: int):
    x, t, y = inputs()
    guided = ClassifierFreeGuidance(Labelled(), 3.0, NULL, channels=channels)
    for found in (guided(x, t, y), guided.on_interval(Interval(0, 0.0, 1.0))(x, t, y=y)):
        torch.testing.assert_close(found[:, :channels], guided_by_hand(x, t, y, 0, 3.0)[:, :channels])
        torch.testing.assert_close(found[:, channels:], Labelled.value(x, t, y, 0)[:, channels:])


# -- The cost ------------------------------------------------------------------------------------------------------


def test_a_scale_of_one_costs_one_evaluation():
    x, t, y = inputs()
    network = Labelled(2)
    guided = ClassifierFreeGuidance(network, (1.0, 2.0), NULL)
    for call in (lambda: guided(x, t, y, level=0), lambda: guided.on_interval(Interval(0, 0.0, 0.5))(x, t, y=y)):
        network.calls.clear()
        torch.testing.assert_close(call(), Labelled.value(x, t, y, 0))
        assert [(rows, labels) for rows, labels, _, _ in network.calls] == [(len(x), y.tolist())]


def test_sampling_pays_for_two_evaluations_only_in_guided_levels():
    x, _, y = inputs()
    network = Labelled(2)
    guided = ClassifierFreeGuidance(network, (1.0, 2.0), NULL)
    Sampler(create_transport(level_edges=(0.5,))).sample_ode(guided, x, method="euler", num_steps=10, y=y)
    assert [(rows // len(x), level) for rows, _, _, level in network.calls] == 5 * [(1, 0)] + 5 * [(2, 1)]


# -- The interval --------------------------------------------------------------------------------------------------


def test_in_a_mixed_batch_each_sample_is_guided_by_its_own_time():
    x, _, y = inputs()
    t = torch.tensor([0.1, 0.31, 0.69, 0.9], dtype=torch.float64)
    guided = ClassifierFreeGuidance(Labelled(), 3.0, NULL, interval=(0.3, 0.7))
    found, conditional = guided(x, t, y), Labelled.value(x, t, y, 0)
    torch.testing.assert_close(found[[0, 3]], conditional[[0, 3]])
    torch.testing.assert_close(found[[1, 2]], guided_by_hand(x, t, y, 0, 3.0)[[1, 2]])


def test_outside_the_interval_a_sampler_pays_for_one_evaluation():
    x, t, y = inputs()
    network = Labelled()
    guided = ClassifierFreeGuidance(network, 3.0, NULL, interval=(0.3, 0.7))
    for start, stop, cost in ((0.0, 0.3, 1), (0.3, 0.7, 2), (0.7, 0.3, 2), (0.7, 1.0, 1), (1.0, 0.7, 1), (0.4, 0.5, 2)):
        network.calls.clear()
        guided.on_interval(Interval(0, start, stop))(x, t, y=y)
        assert [rows for rows, _, _, _ in network.calls] == [cost * len(x)]


@pytest.mark.parametrize("reverse", [False, True])
def test_sampling_with_an_interval_equals_sampling_its_pieces_by_hand(reverse: bool):
    x, _, y = inputs()
    guided = ClassifierFreeGuidance(Labelled(2), (2.0, 4.0), NULL, interval=(0.3, 0.7))
    sampler = Sampler(create_transport(level_edges=(0.5,)))
    found = sampler.sample_ode(guided, x, method="heun2", num_steps=20, y=y, reverse=reverse)

    state, cuts = x, [0.0, 0.3, 0.5, 0.7, 1.0]
    for a, b in pairwise(reversed(cuts) if reverse else cuts):
        level, scale = ((0, 1.0), (0, 2.0), (1, 4.0), (1, 1.0))[cuts.index(min(a, b))]
        times = torch.linspace(a, b, round(abs(b - a) * 20) + 1, dtype=torch.float64)

        def field(t: torch.Tensor, x: torch.Tensor, level: int = level, scale: float = scale) -> torch.Tensor:
            return guided_by_hand(x, t.expand(len(x)), y, level, scale)

        state = odeint(field, state, times, method="heun2")[-1]
    torch.testing.assert_close(found, state)


@pytest.mark.parametrize("method", ["euler", "heun3", "implicit_adams", "dopri5", "bosh3", "scipy_solver"])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_solver_piece_crosses_an_end_of_the_interval(method: str, reverse: bool):
    # The field jumps there. Guided evaluations are those with twice the rows.
    x, _, y = inputs()
    network = Labelled(2)
    guided = ClassifierFreeGuidance(network, 3.0, NULL, interval=(0.33, 0.71))
    sampler = Sampler(create_transport(level_edges=(0.5,)))
    sampler.sample_ode(guided, x, method=method, num_steps=21, y=y, reverse=reverse)
    assert {rows for rows, _, _, _ in network.calls} == {len(x), 2 * len(x)}
    for rows, _, times, level in network.calls:
        low, high = min(times), max(times)
        if rows == 2 * len(x):
            assert 0.33 <= low <= high <= 0.71
        else:
            assert high <= 0.33 or low >= 0.71
        assert high <= 0.5 if level == 0 else low >= 0.5


@pytest.mark.parametrize(
    ("interval", "cost"), [((0.3, 0.97), 2), ((0.97, 0.99), 1), ((0.3, 0.96), 1), ((0.96, 1.0), 2)]
)
def test_the_last_step_of_an_sde_is_guided_as_its_start_is(interval: tuple[float, float], cost: int):
    # From 0.96 on, and with the field of what follows there: the one evaluation is made at 0.96.
    x, _, y = inputs()
    network = Labelled()
    guided = ClassifierFreeGuidance(network, 3.0, NULL, interval=interval)
    Sampler(create_transport()).sample_sde(
        guided, x, num_steps=9, last_step_size=0.04, generator=torch.Generator().manual_seed(0), y=y
    )
    rows, _, times, _ = network.calls[-1]
    assert times[0] == pytest.approx(0.96)
    assert rows == cost * len(x)


def test_without_an_interval_nothing_is_cut():
    assert ClassifierFreeGuidance(Labelled(), 3.0, NULL).breakpoints == ()
    assert ClassifierFreeGuidance(Labelled(), 3.0, NULL, interval=(0.2, 0.8)).breakpoints == (0.2, 0.8)


# -- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(1.0, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_a_wrong_number_of_scales_is_refused(scales: tuple[float, ...]):
    with pytest.raises(ValueError, match=f"{len(scales)} guidance scale.* for 3 level.*one per level"):
        ClassifierFreeGuidance(Labelled(3), scales, NULL)


@pytest.mark.parametrize("num_levels", [None, 2])
def test_no_scale_at_all_is_refused(num_levels: int | None):
    with pytest.raises(ValueError, match="no guidance scale: give one, or one per level"):
        ClassifierFreeGuidance(Labelled(num_levels), (), NULL)


@pytest.mark.parametrize("scales", [(2.0, 3.0), (2.0, 3.0, 4.0, 5.0)])
def test_scales_must_fit_the_schedule_where_the_model_hides_its_levels(scales: tuple[float, ...]):
    # A wrapped network, in DistributedDataParallel say, has no num_levels.
    x, _, y = inputs()
    guided = ClassifierFreeGuidance(Labelled(), scales, NULL)
    with pytest.raises(ValueError, match=f"{len(scales)} level.* but the schedule 3"):
        Sampler(create_transport(level_edges=(0.5, 0.75))).sample_ode(guided, x, num_steps=6, y=y)


@pytest.mark.parametrize("level", [-1, 2])
def test_a_level_without_a_scale_is_refused(level: int):
    x, t, y = inputs()
    with pytest.raises(ValueError, match=f"no guidance scale for level {level}: 2 given"):
        ClassifierFreeGuidance(Labelled(), (2.0, 3.0), NULL)(x, t, y, level=level)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.7, 0.3), (math.nan, 1.0)])
def test_an_empty_interval_is_refused(interval: tuple[float, float]):
    with pytest.raises(ValueError, match="is empty: give low < high"):
        ClassifierFreeGuidance(Labelled(), 2.0, NULL, interval=interval)


@pytest.mark.parametrize("channels", [0, -3])
def test_guiding_no_channel_is_refused(channels: int):
    with pytest.raises(ValueError, match="at least one channel"):
        ClassifierFreeGuidance(Labelled(), 2.0, NULL, channels=channels)
