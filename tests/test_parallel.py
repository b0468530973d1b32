"""parallel.py: a run whose weights are divided among processes is the run of DDP, and of one process."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import start_script
from PIL import Image

from models import create_model
from runtime import parallel
from runtime.distributed import Processes
from train import train
from transport import create_transport

pytestmark = pytest.mark.slow

# Each process has six of a step's twelve samples, in two passes. One or two of the twelve belong to level 1, as times
# are stratified: half of the passes have none of it, or more.
FLAGS = [
    "--data-path",
    "digits",
    "--model",
    "PPF-T-2",
    "--global-batch-size",
    12,
    "--gradient-accumulation-steps",
    2,
    "--level-edges",
    0.9,
    "--max-grad-norm",
    0.5,
    "--lr",
    1e-3,
    "--ema-decay",
    0.9,
    "--num-workers",
    0,
    "--cfg-scales",
    1,
    "--log-every",
    1,
]
STEPS = ["--max-steps", 6, "--ckpt-every", 3]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def checkpoint_file(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"{step:07d}.pt"


def flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The leaves of nested dicts and lists, with their names, in order."""
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{name}/{key}")
    else:
        yield name, value


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Checkpoints alike in every name, order, type, dtype and shape, and all numbers equal to rounding."""
    saved, expected = (torch.load(checkpoint_file(folder, 6), weights_only=True) for folder in (run_dir, reference))
    for part in ("model", "ema", "opt"):
        leaves, others = list(flat(saved[part])), list(flat(expected[part]))
        assert [name for name, _ in leaves] == [name for name, _ in others]
        for (name, a), (_, b) in zip(leaves, others, strict=True):
            assert type(a) is type(b), name
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
            else:
                assert a == b, name
    for record, other in zip(records(run_dir), records(reference)[-len(records(run_dir)) :], strict=True):
        for key in ("step", "loss", "loss_level_0", "loss_level_1", "grad_norm"):
            assert record[key] == pytest.approx(other[key], rel=1e-5), key


def torchrun(processes: int, *flags: object) -> None:
    done = start_script("train.py", *FLAGS, *STEPS, *flags, processes=processes)
    if "--shard on CPUs takes a newer torch" in done.stderr:
        pytest.skip(f"FSDP2 does not work on the CPU in torch {torch.__version__}")
    assert done.returncode == 0, done.stderr


def needs_streams() -> None:
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"FSDP2 does not work on the CPU in torch {torch.__version__}")


@pytest.fixture(scope="module")
def ddp_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of two DDP processes, and a preview."""
    run_dir = tmp_path_factory.mktemp("runs") / "ddp"
    torchrun(2, "--run-dir", run_dir)
    return run_dir


@pytest.fixture(scope="module")
def sharded_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with --shard, without the preview."""
    run_dir = tmp_path_factory.mktemp("runs") / "sharded"
    torchrun(2, "--shard", "--sample-every", 0, "--run-dir", run_dir)
    return run_dir


def test_sharded_run_is_the_ddp_run(sharded_run: Path, ddp_run: Path) -> None:
    assert all(record["grad_norm"] > 0.5 for record in records(ddp_run))  # every step is clipped
    assert_same_run(sharded_run, ddp_run)


def test_ddp_checkpoint_is_continued_by_three_sharded_processes(ddp_run: Path, tmp_path: Path) -> None:
    """Three divide neither the 11 rows of the class table, nor the 2 of the levels', nor the 80 previews."""
    torchrun(3, "--shard", "--ckpt", checkpoint_file(ddp_run, 3), "--sample-every", 5, "--run-dir", tmp_path)
    assert_same_run(tmp_path, ddp_run)  # also after the preview of step 5
    grids = [np.asarray(Image.open(folder / "samples" / "0000006.png"), np.int64) for folder in (tmp_path, ddp_run)]
    assert np.abs(grids[0] - grids[1]).max() <= 1  # of 255


def test_sharded_checkpoint_is_continued_by_one_process(sharded_run: Path, ddp_run: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, *STEPS, "--ckpt", checkpoint_file(sharded_run, 3), "--sample-every", 0, "--run-dir", tmp_path]
    train([str(flag) for flag in flags])  # without --shard, which the checkpoint's run had
    assert_same_run(tmp_path, ddp_run)


def test_sharded_run_that_diverges_ends_on_all_processes(sharded_run: Path, tmp_path: Path) -> None:
    done = start_script(
        "train.py",
        *FLAGS,
        *f"--shard --lr 1e25 --max-steps 6 --sample-every 0 --run-dir {tmp_path}".split(),
        processes=2,
    )
    assert "error: the loss is not finite at step 2 for 12 sample(s)" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_one_process_has_nobody_to_divide_with(tmp_path: Path, refuses) -> None:
    line = refuses(train, *FLAGS, "--shard", "--run-dir", tmp_path / "run")
    assert "--shard divides a model among processes" in line
    assert "torchrun" in line
    assert not (tmp_path / "run").exists()


def test_bf16_weights_give_the_gradients_of_autocast(tmp_path: Path) -> None:
    """A block's weights are bf16 before autocast sees them, so nothing is left for it to cast, nor to keep."""
    needs_streams()
    torch.manual_seed(0)
    plain = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10)
    for parameter in plain.parameters():
        nn.init.normal_(parameter, std=0.05)  # at the start gates are closed
    data = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 10]), torch.tensor([0.1, 0.3, 0.6, 0.8])
    transport, dtypes = create_transport(level_edges=(0.5,)), set()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        sharded = parallel.place(copy.deepcopy(plain), Processes(0, 1, torch.device("cpu")), True, "bf16")
        sharded.blocks[0].mlp.fc1.register_forward_pre_hook(lambda layer, _: dtypes.add(layer.weight.dtype))
        for model in (plain, sharded):
            with torch.autocast("cpu", torch.bfloat16):
                terms = parallel.LossModule(model, transport)(*data, x0=data[0].flip(0))
            terms["loss"].mean().backward()
        gradients = [parameter.grad.full_tensor() for parameter in sharded.parameters()]
        norm = parallel.gradient_norm(sharded)
    finally:
        dist.destroy_process_group()
    assert dtypes == {torch.bfloat16}
    for (name, parameter), gradient in zip(plain.named_parameters(), gradients, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(norm, parallel.gradient_norm(plain))


# -- What is sent ------------------------------------------------------------------------------------------------


@pytest.fixture
def two_processes() -> Iterator[Processes]:
    """The first of two processes without the other: messages are lost, but can be counted."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield Processes(0, 2, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("shard", [False, True])
def test_gradients_are_averaged_once_per_step(shard: bool, passes: int, two_processes: Processes) -> None:
    from torch.distributed.tensor.debug import CommDebugMode

    if shard:
        needs_streams()
    model = create_model("PPF-T-2", input_size=8, in_channels=1, num_classes=10)
    model = parallel.place(model, two_processes, shard, "fp32")
    loss = parallel.loss_module(model, create_transport(level_edges=(0.5,)))
    reductions = []
    if not shard:

        def hook(_, bucket):  # DDP reads annotations, and wants them as types
            reductions.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        loss.register_comm_hook(None, hook)
    x1, x0, y, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0.3, 0.8])
    sent = CommDebugMode() if shard else contextlib.nullcontext()
    with sent:
        for number in range(passes):
            parallel.synchronize_gradients(loss, number == passes - 1)
            loss(x1, y, t, x0)["loss"].mean().backward()
    if shard:  # a block at a time, and what is outside of blocks; weights are gathered again for the backward pass
        counts = sent.get_comm_counts()
        assert counts[torch.ops.c10d._reduce_scatter_base_] == model.depth + 1
        assert counts[torch.ops.c10d._allgather_base_] == passes * (2 * model.depth + 1)
    else:
        assert sum(reductions) == sum(parameter.numel() for parameter in model.parameters())
