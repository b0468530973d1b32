"""Several levels in one pass of the network, and blocks computed again instead of kept, against level by level."""

from itertools import product

import pytest
import torch
from closed_form import PATH_NAMES, QUANTITIES
from test_models import CONFIGS, OBLONG, SQUARE, random_inputs, random_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models import PyramidalPatchDiT
from transport import create_transport

Group = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def groups_of(model: PyramidalPatchDiT, sizes: list[int]) -> list[Group]:
    """Different samples for each group."""
    x, t, y = random_inputs(model, n=sum(sizes) + 1)
    return list(zip(*(tensor[1:].split(sizes) for tensor in (x, t, y)), strict=True))


def gradients(model: PyramidalPatchDiT, outputs: list[torch.Tensor]) -> list[torch.Tensor | None]:
    loss = sum((output**2).sum() * (1 + index) for index, output in enumerate(outputs))
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    ("config", "levels", "sizes"),
    [
        (SQUARE, [0, 1, 2], [3, 1, 2]),
        (OBLONG, [0, 1, 2], [1, 4, 1]),
        (SQUARE, [2, 0], [2, 3]),
        (SQUARE, [1, 1, 2], [2, 1, 1]),
        (SQUARE, [1], [2]),
        (SQUARE, [0, 1, 2], [2, 0, 3]),
        (SQUARE, [0, 1, 2], [0, 0, 1]),
    ],
)
def test_one_pass_over_several_levels_is_one_pass_for_each(config, levels, sizes):
    model = random_model(config)
    groups = groups_of(model, sizes)
    found = model(*zip(*groups, strict=True), level=levels)
    expected = [model(*group, level=level) for group, level in zip(groups, levels, strict=True)]
    for a, b, group in zip(found, expected, groups, strict=True):
        assert a.shape == group[0].shape
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    for name, a, b in zip(
        dict(model.named_parameters()), gradients(model, found), gradients(model, expected), strict=True
    ):
        if b is None:  # a level that is not called
            assert a is None, name
        else:
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


def test_a_level_without_samples_takes_part_with_gradient_zero():
    model = random_model(SQUARE)
    x, t, y = groups_of(model, [2])[0]
    empty = (x[:0], t[:0], y[:0])
    torch.cat(model([x, empty[0]], [t, empty[1]], [y, empty[2]], level=[2, 0])).sum().backward()
    for parameter in model.level_parameters(0):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(parameter.grad is None for parameter in model.level_parameters(1))
    assert all(parameter.grad.abs().max() > 0 for parameter in model.level_parameters(2))


def test_one_pass_costs_the_arithmetic_of_its_samples():
    """No row is padded to the length of another: the dense packing of the published code fails this."""
    model = random_model(SQUARE)
    sizes = [3, 2, 1]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # torch 2.6 counts no other on CPUs
        model(*zip(*groups_of(model, sizes), strict=True), level=[0, 1, 2])
    assert counter.get_total_flops() == 2 * sum(n * model.macs(level) for level, n in enumerate(sizes))


def test_groups_and_levels_must_be_as_many():
    model = random_model(SQUARE)
    x, t, y = random_inputs(model)
    with pytest.raises(ValueError, match="3 levels, but 2, 2 and 2 groups"):
        model([x, x], [t, t], [y, y], level=[0, 1, 2])


# -- The loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "prediction"), [*product(PATH_NAMES, QUANTITIES)])
def test_the_joint_loss_is_the_loss_of_each_level(path, prediction):
    model = random_model(SQUARE)
    transport = create_transport(path, prediction, "velocity", level_edges=(0.5, 0.75))
    x1, x0 = (random_inputs(model, n=7)[0] * scale for scale in (1.0, 0.7))
    t = torch.tensor([0.9, 0.1, 0.6, 0.3, 0.8, 0.7, 0.05], dtype=torch.float64)
    y = torch.arange(7) % 6
    terms = [transport.training_losses(model, x1, y=y, t=t, x0=x0, joint=joint) for joint in (True, False)]
    assert terms[0]["level"].tolist() == terms[1]["level"].tolist() == [2, 0, 1, 0, 2, 1, 0]
    torch.testing.assert_close(terms[0]["loss"], terms[1]["loss"], atol=1e-10, rtol=1e-10)


def test_the_joint_loss_names_every_level_in_a_single_call():
    calls = []

    class Recorder:
        num_levels = 3

        def __call__(self, x, t, y, level):
            calls.append((level, [len(group) for group in x], y))
            return [torch.zeros_like(group) for group in x]

    t = torch.tensor([0.9, 0.1, 0.2])
    loss = create_transport(level_edges=(0.5, 0.75)).training_losses(Recorder(), torch.ones(3, 2), t=t, joint=True)
    assert calls == [([0, 1, 2], [2, 0, 1], [None, None, None])]
    assert loss["loss"].shape == (3,)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("weight", [None, "velocity", "likelihood"])
def test_the_loss_reads_nothing_back_from_the_device(weight, joint):
    """Times on the host say all that must be known there: on "meta" there are no values, and reading one raises."""
    model = random_model(SQUARE, torch.float32).to("meta")
    x1, x0, y = (*torch.randn(2, 7, 3, 8, 8, device="meta").unbind(), torch.zeros(7, dtype=torch.long, device="meta"))
    transport = create_transport("GVP", "noise", weight, level_edges=(0.5, 0.75))
    t = transport.sample_times(7, torch.Generator().manual_seed(0))
    terms = transport.training_losses(model, x1, y=y, t=t, x0=x0, joint=joint)
    terms["loss"].mean().backward()
    assert {term.device.type for term in terms.values()} == {"meta"}


# -- Activation checkpointing ----------------------------------------------------------------------------------------


def kept_bytes(model: PyramidalPatchDiT, group: Group) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd keeps of one forward pass, and the gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*group, level=model.num_levels - 1)
    return sum(kept.values()), gradients(model, [output])


@CONFIGS
def test_checkpointing_keeps_less_and_changes_nothing(config):
    model = random_model({**config, "depth": 6})
    (group,) = groups_of(model, [4])
    kept, expected = kept_bytes(model, group)
    model.activation_checkpointing = True
    kept_less, found = kept_bytes(model, group)
    assert kept_less < 0.4 * kept
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_checkpointing_works_for_several_levels_in_one_pass_and_without_gradients():
    model = random_model(SQUARE)
    groups = groups_of(model, [2, 1, 3])
    expected = model(*zip(*groups, strict=True), level=[0, 1, 2])
    model.activation_checkpointing = True
    found = model(*zip(*groups, strict=True), level=[0, 1, 2])
    for a, b in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(*groups[2], level=2), expected[2], atol=1e-10, rtol=1e-10)


# -- Precision -------------------------------------------------------------------------------------------------------


def test_predictions_are_in_the_precision_of_the_input_also_under_autocast():
    model = random_model(SQUARE, torch.float32)
    inputs = random_inputs(model, dtype=torch.float32)
    expected = model(*inputs, level=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs, level=1)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_blocks_that_are_stored_in_bf16_compute_what_autocast_makes_of_them():
    model = random_model(SQUARE, torch.float32)
    inputs = random_inputs(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(*inputs, level=2)
        model.blocks.bfloat16()
        assert torch.equal(model(*inputs, level=2), expected)
