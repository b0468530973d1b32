"""pipeline.py, and the values ODE, SDE and Guidance: samples by hand, settings refused, evaluations counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from models import create_model
from pipeline import Pipeline
from runtime.rng import Stream, sample_generators
from transport import ODE, SDE, ClassifierFreeGuidance, Guidance, Sampler, create_transport
from weights.layouts import export_state_dict


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    """Three levels with random weights on 8x8 pixels."""
    torch.manual_seed(0)
    model = create_model("PPF-T-3", input_size=8, in_channels=1, num_classes=5).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Pipeline(model, create_transport(level_edges=(0.5, 0.75)), name="PPF-T-3")


LABELS = [3, 0, 4]


def noise(seed: int) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The noise of three samples, and their generators after it was drawn."""
    generators = sample_generators(seed, range(3), Stream.SAMPLES)
    return torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators]), generators


# -- Samples ---------------------------------------------------------------------------------------------------------


def test_images_are_those_of_the_sampler(pipe: Pipeline) -> None:
    x0, _ = noise(7)
    guided = ClassifierFreeGuidance(pipe.model, (1.0, 1.5, 2.0), null_class=5, interval=(0.2, 0.9))
    expected = Sampler(pipe.transport).sample_ode(guided, x0, "heun2", (2, 3, 4), y=torch.tensor(LABELS))
    found = pipe.images(LABELS, ODE("heun2", (2, 3, 4)), Guidance((1.0, 1.5, 2.0), interval=(0.2, 0.9)), seed=7)
    assert torch.equal(found, expected)


def test_stochastic_samples_are_those_of_the_sampler(pipe: Pipeline) -> None:
    x0, generators = noise(2)
    sampler, settings = Sampler(pipe.transport), {"diffusion_form": "linear", "diffusion_norm": 0.5}
    expected = sampler.sample_sde(
        pipe.model, x0, "Heun", 9, **settings, last_step="Tweedie", generator=generators, y=torch.tensor(LABELS)
    )
    found = pipe.latents(LABELS, SDE("Heun", 9, **settings, last_step="Tweedie"), seed=2)
    assert torch.equal(found, expected)


def test_other_edges_are_those_of_the_sampler(pipe: Pipeline) -> None:
    x0, _ = noise(3)
    transport = create_transport(level_edges=(0.2, 0.9))
    expected = Sampler(transport).sample_ode(pipe.model, x0, num_steps=10, y=torch.tensor(LABELS))
    assert torch.equal(pipe.with_edges((0.2, 0.9)).latents(LABELS, ODE(num_steps=10), seed=3), expected)
    assert pipe.transport.schedule.level_edges == (0.5, 0.75)
    with pytest.raises(ValueError, match="give 2 level edge"):
        pipe.with_edges((0.2,))
    with pytest.raises(ValueError, match="must ascend"):
        pipe.with_edges((0.9, 0.2))


def test_samples_go_on_from_the_state_at_an_edge(pipe: Pipeline) -> None:
    solver, guidance = ODE(num_steps=9), Guidance((1.0, 1.5, 2.0), interval=(0.6, 0.9))
    whole = pipe.latents(LABELS, solver, guidance, seed=4)
    state = pipe.latents(LABELS, solver, guidance, seed=4, levels=range(0, 2))
    assert torch.equal(pipe.latents(LABELS, solver, guidance, x0=state, levels=range(2, 3)), whole)
    coarse = pipe.latents(LABELS, solver, guidance, seed=4, levels=range(0, 1))
    assert torch.equal(pipe.latents(LABELS, solver, guidance, x0=coarse, levels=range(1, 3)), whole)
    with pytest.raises(ValueError, match=r"range\(1, 3\) begin at an edge: give x0, the state there"):
        pipe.latents(LABELS, solver, guidance, seed=4, levels=range(1, 3))


def test_a_sample_is_a_function_of_its_own_generator(pipe: Pipeline) -> None:
    together = pipe.latents(LABELS, ODE(num_steps=6), Guidance(2.0), seed=1)
    alone = pipe.latents(LABELS[1:2], ODE(num_steps=6), Guidance(2.0), sample_generators(1, [1], Stream.SAMPLES))
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=1e-5)


def test_there_and_back(pipe: Pipeline) -> None:
    solver = ODE("dopri5", atol=1e-7, rtol=1e-7)
    x1 = pipe.latents(LABELS, solver)
    x0 = pipe.noise(x1, LABELS, solver)
    torch.testing.assert_close(x0, noise(0)[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pipe.latents(LABELS, solver, x0=x0), x1, atol=1e-4, rtol=1e-4)


def test_densities_are_those_of_the_sampler(pipe: Pipeline) -> None:
    x1 = pipe.latents(LABELS)
    probes = sample_generators(3, range(3), Stream.PROBES)
    expected, _ = Sampler(pipe.transport).log_likelihood(
        pipe.model, x1, torch.tensor(LABELS), "heun2", 8, num_probes=2, generator=probes
    )
    assert torch.equal(pipe.log_prob(x1, LABELS, ODE("heun2", 8), num_probes=2, seed=3), expected)


def test_an_adaptive_method_wants_no_steps(pipe: Pipeline) -> None:
    solver = ODE("dopri5", num_steps=2)  # fewer than there are levels
    assert solver.adaptive
    pipe.check(solver)
    torch.testing.assert_close(pipe.latents(LABELS, solver), pipe.latents(LABELS, ODE("dopri5")))


# -- Loading ---------------------------------------------------------------------------------------------------------


def test_a_file_and_a_run_are_loaded(pipe: Pipeline, tiny_run: Path, tmp_path: Path) -> None:
    torch.save(export_state_dict(pipe.model, "ppflow"), tmp_path / "weights.pt")
    overrides = {"num_heads": pipe.model.num_heads, "in_channels": 1}
    again = Pipeline.load(tmp_path / "weights.pt", vae="none", level_edges=(0.3, 0.6), num_heads=4)
    assert again.transport.schedule.edges == (0, 0.3, 0.6, 1)
    again.transport = pipe.transport
    torch.testing.assert_close(again.latents(LABELS), pipe.latents(LABELS), atol=1e-5, rtol=1e-5)
    assert overrides["in_channels"] == again.model.in_channels

    averaged, last = (Pipeline.load(tiny_run, weights=weights) for weights in ("ema", "model"))
    assert (averaged.name, averaged.step, averaged.image_size) == ("PPF-T-2", 20, (8, 8))
    assert not torch.equal(averaged.images([0]), last.images([0]))
    with pytest.raises(ValueError, match=r"--path-type is GVP, but .* was trained with Linear"):
        Pipeline.load(tiny_run, process={"path_type": "GVP"})


def test_bf16_samples_are_near_and_stay_so(tiny_run: Path) -> None:
    exact = Pipeline.load(tiny_run).to("cpu").images([0, 1, 2], ODE(num_steps=10))
    pipe = Pipeline.load(tiny_run).to("cpu", precision="bf16")
    rounded = pipe.images([0, 1, 2], ODE(num_steps=10))
    assert 0 < (rounded - exact).abs().mean() < 0.1 * exact.std()
    with pytest.raises(ValueError, match="in bf16 already"):
        pipe.to("cpu", precision="fp32")


# -- Checks and cost ---------------------------------------------------------------------------------------------------


def test_check_counts_the_evaluations_that_sampling_makes(pipe: Pipeline) -> None:
    for solver, guidance in (
        (ODE("heun2", 8), Guidance(1.0)),
        (ODE(num_steps=(2, 3, 4)), Guidance((1.0, 2.0, 2.0))),
        (SDE(num_steps=8), Guidance(2.0, interval=(0.6, 0.9))),
    ):
        counted = pipe.counted()
        counted.latents(LABELS, solver, guidance)
        rows = [3 * rows for rows in pipe.check(solver, guidance).rows]
        assert counted.model.rows == rows
        gmacs = sum(count * pipe.model.macs(level) for level, count in enumerate(rows)) / 3e9
        assert counted.model.gmacs(3) == pytest.approx(gmacs)


def test_the_finest_level_serves_all_of_time(pipe: Pipeline) -> None:
    flat = pipe.finest_only()
    x0, _ = noise(0)
    y = torch.tensor(LABELS)
    expected = Sampler(create_transport()).sample_ode(
        lambda x, t, y, level: pipe.model(x, t, y, level=2), x0, num_steps=6, y=y
    )
    assert torch.equal(flat.latents(LABELS, ODE(num_steps=6)), expected)
    assert pipe.transport.schedule.num_levels == 3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda pipe: pipe.check(ODE(num_steps=2)), "cannot cover 3 interval"),
        (lambda pipe: pipe.check(ODE(num_steps=(3, 3))), "2 numbers of steps for 3 level"),
        (lambda pipe: pipe.check(guidance=Guidance((1.0, 2.0))), "2 guidance scale"),
        (lambda pipe: pipe.check(guidance=Guidance(2.0, channels=3)), "the model has 1 channel"),
        (lambda pipe: pipe.check(ODE("dpmpp_2m"), likelihood=True), "dpmpp_2m goes from noise to data only"),
        (lambda pipe: pipe.check(SDE(last_step_size=0.3)), "would cross the level edge at 0.75"),
        (lambda pipe: pipe.images([6]), "class labels must be between 0 and 4"),
        (lambda pipe: pipe.images([-1]), "class labels must be between 0 and 4"),
        (lambda pipe: ODE("runge"), "unknown ODE method 'runge'"),
        (lambda pipe: ODE(num_steps=0), "steps must be at least 1"),
        (lambda pipe: ODE(num_steps=2.5), "steps must be whole numbers"),
        (lambda pipe: ODE("dopri5", atol=0.0), "atol must be above 0"),
        (lambda pipe: SDE("heun"), "unknown SDE method 'heun'"),
        (lambda pipe: SDE(diffusion_form="cubic"), "unknown diffusion form 'cubic'"),
        (lambda pipe: SDE(diffusion_norm=-1.0), "diffusion norm must not be negative"),
        (lambda pipe: SDE(last_step_size=1.5), "size must be in"),
        (lambda pipe: Guidance(()), "no guidance scale"),
        (lambda pipe: Guidance(2.0, channels=0), "at least one channel"),
        (lambda pipe: Guidance(2.0, interval=(0.5, 0.5)), "interval .* is empty"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(call, words: str, pipe: Pipeline) -> None:
    with pytest.raises(ValueError, match=words):
        call(pipe)


def test_values_are_values() -> None:
    assert ODE(num_steps=[2, np.int64(3)]) == ODE(num_steps=(2, 3))
    assert Guidance(2) == Guidance([2.0])
    assert len({ODE(), ODE("ab2", 50), SDE(), SDE("Euler")}) == 2
