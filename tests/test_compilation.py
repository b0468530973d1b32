"""torch.compile: how many graphs there are, and that they compute what the network computes."""

import copy

import pytest
import torch
from closed_form import EDGES
from test_models import SQUARE, random_inputs, random_model
from torch._dynamo.testing import CompileCounterWithBackend

from models import PyramidalPatchDiT
from runtime.errors import UserError
from runtime.speed import compile_levels
from transport import ClassifierFreeGuidance, Sampler, create_transport


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(backend: str = "aot_eager", **fields: int) -> tuple[PyramidalPatchDiT, PyramidalPatchDiT, object]:
    """A network, its compiled copy, and the counter of the latter's graphs."""
    model = random_model({**SQUARE, **fields}, torch.float32)
    compiled, counter = copy.deepcopy(model), CompileCounterWithBackend(backend)
    compile_levels(compiled, counter)
    return model, compiled, counter


def check(model: PyramidalPatchDiT, compiled: PyramidalPatchDiT, n: int, level: int) -> None:
    inputs = random_inputs(model, n, torch.float32)
    torch.testing.assert_close(compiled(*inputs, level=level), model(*inputs, level=level), atol=1e-5, rtol=1e-5)


def test_each_level_has_one_graph_whatever_the_batch():
    model, compiled, counter = pair(depth=4)
    with torch.no_grad():
        for level in range(3):
            check(model, compiled, 6, level)
            assert counter.frame_count == level + 1  # warm-up: one graph, which all blocks share
        for n in (1, 2, 3, 6, 12, 16):
            for level in (2, 0, 1):
                check(model, compiled, n, level)
    assert counter.frame_count == 3


@pytest.mark.slow
def test_training_steps_of_changing_shares_need_one_graph():
    model, compiled, counter = pair()
    transport = create_transport(level_edges=EDGES[3])
    generator = torch.Generator().manual_seed(0)
    for sizes in ((4, 2, 2), (4, 3, 1), (3, 0, 5), (8, 0, 0), (2, 2, 4)):
        t = torch.cat([torch.full((n,), time) for n, time in zip(sizes, (0.2, 0.6, 0.9), strict=True)])
        x1, x0 = (torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2))
        found = []
        for network in (model, compiled):
            network.zero_grad()
            terms = transport.training_losses(network, x1, y=torch.arange(8) % 5, t=t, x0=x0, joint=True)
            terms["loss"].mean().backward()
            found.append([terms["loss"], *(p.grad for p in network.parameters())])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_training_level_by_level_needs_a_graph_for_each():
    _, compiled, counter = pair()
    transport = create_transport(level_edges=EDGES[3])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x1 = torch.randn(7, 3, 8, 8, generator=generator)  # a quarter of 7 is no whole number: the shares change
        transport.training_losses(compiled, x1, y=torch.arange(7) % 5, generator=generator)["loss"].mean().backward()
    assert counter.frame_count == 3


@pytest.mark.slow
def test_a_guided_trajectory_does_not_compile_again():
    model, compiled, counter = pair()
    transport = create_transport(level_edges=EDGES[3])
    samples = []
    x0 = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for network in (compiled, model):
        guided = ClassifierFreeGuidance(network, (1.0, 1.5, 2.0), network.num_classes, interval=(0.3, 0.9))
        for batch in (x0, x0[:1]):  # a last batch of one
            samples.append(Sampler(transport).sample_ode(guided, batch, num_steps=12, y=torch.arange(len(batch))))
    assert counter.frame_count == 3
    for a, b in zip(samples[:2], samples[2:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_checkpointed_blocks_compile():
    model, compiled, counter = pair()
    compiled.activation_checkpointing = True
    inputs = random_inputs(model, 4, torch.float32)
    found = [
        torch.autograd.grad(network(*inputs, level=1).square().sum(), network.blocks[0].mlp.fc1.weight)[0]
        for network in (model, compiled)
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_more_levels_than_dynamos_limit_of_graphs():
    sizes = [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
    model, compiled, counter = pair("eager", patch_sizes=sizes, depth=1)
    for level in range(len(sizes)):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                check(model, compiled, 3, level)
    assert counter.frame_count == 2 * 5


def test_the_state_dict_and_the_original_stay_as_they_were():
    model, compiled, _ = pair()
    assert list(compiled.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.zero_()
        inputs = random_inputs(model, 3, torch.float32)
        assert torch.equal(compiled(*inputs), torch.zeros_like(inputs[0]))  # today's weights, not those of the start
        assert model(*inputs).abs().max() > 0.1


def test_a_compiler_that_fails_is_reported_in_one_line():
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler found")

    model = random_model(SQUARE, torch.float32)
    compile_levels(model, no_compiler)
    with pytest.raises(UserError, match=r"--compile failed: .*no C\+\+ compiler found.*leave it out$"):
        model(*random_inputs(model, 3, torch.float32))


@pytest.mark.slow
def test_inductor_computes_the_same_and_says_how_long_it_took():
    model, lines = random_model({**SQUARE, "depth": 2}, torch.float32), []
    compiled = copy.deepcopy(model)
    compile_levels(compiled, tell=lines.append)
    inputs = random_inputs(model, 5, torch.float32)
    found = [
        [
            output := network(*inputs, level=2),
            *torch.autograd.grad(output.square().sum(), list(network.blocks.parameters())),
        ]
        for network in (model, compiled)
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(lines) == 1
    assert lines[0].startswith("compiled a block for 16 tokens in ")
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs, level=2), model(*inputs, level=2), atol=0.1, rtol=0.1)
