"""Memory that a size or batch takes: bounds from below of what is really taken, and refusals before the work."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_any_size import SIZE, random_weights, save_run
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
import sample_ddp
import train
from benchmarks.memory import kept_for_backward
from models import create_model
from pipeline import Pipeline
from runtime import memory
from transport import Guidance, create_transport

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """Kept tensors are looked for among Python's objects: those of all modules loaded so far would take a second."""
    gc.freeze()
    yield
    gc.unfreeze()


class LargestLive(TorchDispatchMode):
    """The most bytes of tensors made inside that lived at once, beside those that are there already."""

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self.live, self.most = 0, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.data_ptr(), storage.nbytes())
        self.most = max(self.most, self.live)
        return results

    def freed(self, pointer: int, size: int) -> None:
        self.known.discard(pointer)
        self.live -= size


@pytest.mark.parametrize("name", ["PPF-T-2", "PPFiT-T-2", "SiT-T/2"])
def test_an_evaluation_takes_as_much_or_more_but_not_many_times(name: str) -> None:
    model = random_weights(create_model(name, num_classes=5, depth=2)).eval()
    for level in range(model.num_levels):
        rows = [3 * (own == level) for own in range(model.num_levels)]
        x, t, y = torch.randn(3, *model.sample_shape), torch.rand(3), torch.zeros(3, dtype=torch.long)
        with torch.no_grad(), LargestLive(x, t, y, *model.parameters(), *model.buffers()) as seen:
            model(x, t, y, level)
        least = memory.evaluation_bytes(model, rows, "fp32")
        assert least < seen.most < 4 * least


@pytest.mark.parametrize("name", ["PPF-T-2", "PPFiT-T-2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_keeps_as_much_or_more_but_not_many_times(name: str, checkpointing: bool) -> None:
    model = create_model(name, num_classes=5)
    model.activation_checkpointing = checkpointing
    x, t, y = torch.randn(4, *model.sample_shape), torch.rand(4), torch.zeros(4, dtype=torch.long)
    groups = ([each[:3], each[3:]] for each in (x, t, y))
    _, kept = kept_for_backward(lambda: model(*groups, level=[0, 1]), list(model.parameters()))
    least = memory.training_bytes(model, [3, 1], "fp32", checkpointing)
    assert least < kept < (4 if not checkpointing else 6) * least


# -- Sampling ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""
    return lambda number: monkeypatch.setattr(memory, "free_memory", lambda device: number)


TOKEN = (2 * 128 + 128 * 8 // 3) * 4  # bytes of a token: two inputs of width 128, and the inner values of SwiGLU


def test_a_batch_or_a_size_that_fits_is_named(free) -> None:
    pipe = Pipeline(create_model("PPFiT-T-2", **SIZE), create_transport(level_edges=(0.5,)))
    pipe.use_size((32, 64))
    image = 16 * 32 * TOKEN  # the finest level: 2x2 patches
    free(10 * image)
    pipe.check(batch=10)
    with pytest.raises(ValueError, match=r"11 sample\(s\) of 32x64 together .*: draw 10 together at most"):
        pipe.check(batch=11)
    pipe.check(guidance=Guidance((2.0, 1.0)), batch=10)  # a guided evaluation counts two, here of the coarse level
    with pytest.raises(ValueError, match="draw 5 together at most"):
        pipe.check(guidance=Guidance(2.0), batch=10)
    free(image - 1)
    with pytest.raises(ValueError, match="draw one alone, of 28x60 at most"):
        pipe.check()
    pipe.use_size((28, 60))
    pipe.check()
    free(TOKEN)
    with pytest.raises(ValueError, match="no single one fits"):
        pipe.check()


def test_a_network_of_one_size_and_its_finest_level(free) -> None:
    model = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10)
    pipe = Pipeline(model, create_transport(level_edges=(0.5,)))
    least = memory.evaluation_bytes(model, [0, 1], "fp32")
    free(least)
    pipe.check()
    pipe.finest_only().check()
    free(least - 1)
    for other in (pipe, pipe.finest_only()):
        with pytest.raises(ValueError, match="no single one fits"):
            other.check()


def test_commands_refuse_before_they_draw(free, tmp_path: Path, refuses) -> None:
    model = random_weights(create_model("PPFiT-T-2", **SIZE))
    ckpt = save_run(model, tmp_path / "a.pt")
    common = ["ODE", "--ckpt", ckpt, "--image-size", 64, 32, "--cfg-scales", 1, "--num-sampling-steps", 2]
    free(3 * 32 * 16 * TOKEN)
    line = refuses(sample.main, *common, "--out", tmp_path / "a.png", "--class-labels", 1, 2, 3, 4)
    assert "4 sample(s) of 64x32 together take" in line
    assert "draw 3 together at most" in line
    line = refuses(sample_ddp.main, *common, "--sample-dir", tmp_path / "s", "--per-proc-batch-size", 5)
    assert "5 sample(s) of 64x32 together take" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    sample.main([*map(str, common), "--out", str(tmp_path / "a.png"), "--class-labels", "1", "2", "3"])


# -- Training ----------------------------------------------------------------------------------------------------------


def test_training_refuses_a_batch_and_warns_where_sizes_are_many(free, tmp_path: Path, refuses, capsys) -> None:
    model = create_model("PPF-T-2", input_size=8, in_channels=1)
    sample_bytes = memory.training_bytes(model, [0.5, 0.5], "fp32", checkpointing=False)
    free(20.5 * sample_bytes)
    flags = [*TINY, "--run-dir", tmp_path / "run", "--max-steps", 1]
    line = refuses(train.train, *flags)
    assert "32 samples in one pass keep" in line
    assert "enough for 20: give --gradient-accumulation-steps or --activation-checkpointing" in line
    assert not (tmp_path / "run").exists()
    how = {"precision": "fp32", "device": torch.device("cpu"), "checkpointing": True, "many_sizes": True}
    free(1)
    (warning,) = memory.check_training(model, [0.5, 0.5], 32, **how)
    assert "where all images are of the largest size, 32 samples in one pass keep" in warning
    free(20.5 * sample_bytes)
    assert memory.check_training(model, [0.5, 0.5], 32, **how) == []


def test_memory_is_free_here() -> None:
    assert memory.free_memory(torch.device("cpu")) > 10**6
