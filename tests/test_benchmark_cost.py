"""The cost on paper against PyTorch's own counts: FLOPs, bytes that autograd keeps, bytes of the optimizer."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost
from benchmarks.memory import kept_for_backward
from benchmarks.timing import random_model
from models import FREQUENCY_FEATURES, create_model
from runtime.speed import use_precision
from transport import PatchSchedule, create_transport

CPU = torch.device("cpu")


def forward(model, precision="fp32", joint=True):
    """A forward pass of 8 samples, and how many there are of each level."""
    transport = create_transport(level_edges=PatchSchedule.default(model.num_levels).level_edges)
    shape = (8, model.in_channels, *model.input_size)
    x1, x0, t = torch.randn(shape), torch.randn(shape), (torch.arange(8) + 0.5) / 8
    y = torch.arange(8) % model.num_classes

    def loss():
        with use_precision(precision, CPU):
            return transport.training_losses(model, x1, y=y, t=t, x0=x0, joint=joint)["loss"].mean()

    return loss, torch.bincount(transport.schedule.level_at(t), minlength=model.num_levels).tolist()


# -- FLOPs ---------------------------------------------------------------------------------------------------------


def test_flops_of_a_step_by_hand():
    """The published sizes: PPF-XL-2 takes 29.04 and 118.62 GMACs; half of 256 samples are on each level."""
    with torch.device("meta"):
        model = create_model("PPF-XL-2")
    by_hand = 128 * 3 * 2 * (29.04e9 + 118.62e9)
    assert cost.step_flops(model, (128, 128), checkpointing=False) == pytest.approx(by_hand, rel=1e-4)
    # Nearly everything is in the blocks.
    assert cost.step_flops(model, (128, 128), checkpointing=True) == pytest.approx(by_hand * 4 / 3, rel=2e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_flops_of_a_step_are_those_that_pytorch_counts(joint, checkpointing):
    model = random_model("PPF-T-3", CPU, num_classes=5, depth=2)
    model.activation_checkpointing = checkpointing
    loss, samples = forward(model, joint=joint)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    # The first layers, of the patches and of t, need no gradient of their input.
    pixels = model.in_channels * model.input_size[0] * model.input_size[1]
    spared = sum(samples) * model.hidden_size * (pixels + FREQUENCY_FEATURES)
    assert counter.get_total_flops() == cost.step_flops(model, samples, checkpointing) - 2 * spared


# -- Bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["SiT-T/2", "PPF-T-2", "PPF-T-3"])
def test_activations_are_those_that_autograd_keeps(name, precision, joint, checkpointing):
    model = random_model(name, CPU, num_classes=5, mlp_ratio=3.0, depth=2)
    model.activation_checkpointing = checkpointing
    loss, samples = forward(model, precision, joint)
    _, kept = kept_for_backward(loss, model.parameters())
    on_paper = cost.kept_bytes(model, samples, precision, joint, checkpointing)
    on_paper += cost.autocast_bytes(model, precision, checkpointing)
    if precision == "bf16" and checkpointing:  # of the block that is at work in the backward pass, not yet
        on_paper -= 2 * cost.linear_weights(model.blocks[0])
    assert on_paper == pytest.approx(kept, rel=1e-4, abs=200)


def test_one_block_is_what_a_deeper_model_keeps_more():
    """The bytes of one block, which checkpointing adds while it computes the block again."""
    kept = {}
    for depth in (1, 2):
        model = random_model("PPF-T-2", CPU, num_classes=5, depth=depth)
        loss, samples = forward(model)
        _, kept[depth] = kept_for_backward(loss, model.parameters())
    assert cost.block_bytes(model, samples, "fp32", True, model.blocks[0]) == kept[2] - kept[1]


def test_state_is_that_of_the_optimizer():
    model = random_model("PPF-T-2", CPU, num_classes=5)
    optimizer = torch.optim.AdamW(model.parameters())
    forward(model)[0]().backward()
    optimizer.step()
    args = cost.build_parser().parse_args(["--precision", "fp32"])
    used = cost.memory(model, (4, 4), 1, args)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert used.adam == sum(moment.nbytes for moment in moments)
    assert used.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert used.weights == used.ema == sum(p.nbytes for p in model.parameters())
    assert used.total == 5 * used.weights + used.activations
    assert cost.memory(model, (4, 4), 2, args) == used  # DDP keeps gradients in its buckets


def test_shards_divide_the_state():
    with torch.device("meta"):
        model = create_model("PPF-S-2")
    whole, shard = (
        cost.memory(model, (4, 4), 64, cost.build_parser().parse_args(flags)) for flags in ([], ["--shard"])
    )
    assert (shard.adam, shard.ema) == (whole.adam / 64, whole.ema / 64)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    others = sum(p.numel() for p in model.parameters()) - 12 * block
    # Two blocks in bf16, all else in fp32 and the copies that autocast makes of it; gradients of a block in fp32
    copies = cost.autocast_bytes(model, "bf16", False) - 2 * 12 * cost.linear_weights(model.blocks[0])
    assert shard.weights == whole.ema / 64 + 2 * 2 * block + 4 * others + copies
    assert shard.gradients == whole.ema / 64 + 4 * block


# -- Communication -------------------------------------------------------------------------------------------------


def ring_reduce_scatter(values):
    """The ring algorithm on W lists of W chunks: each sends a chunk to the next one, W - 1 times.

    Returns the chunk of which each ends up with the sum, and how many chunks each has sent.
    """
    world, sent = len(values), 0
    for turn in range(world - 1):
        chunks = [values[rank][(rank - turn) % world] for rank in range(world)]
        for rank, chunk in enumerate(chunks):
            values[(rank + 1) % world][(rank - turn) % world] += chunk
        sent += 1
    return [values[rank][(rank + 1) % world] for rank in range(world)], sent


@pytest.mark.parametrize("world", [1, 2, 5])
def test_bytes_sent_are_those_of_a_ring(world):
    values = [[10**rank] * world for rank in range(world)]
    sums, sent = ring_reduce_scatter(values)
    assert sums == [sum(10**rank for rank in range(world))] * world  # so it is one
    model = create_model("PPF-T-2", num_classes=5, depth=2)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    everything = sum(p.numel() for p in model.parameters())
    once = sent / world  # of the data; an all-gather sends as much
    expected = {
        (False, "bf16"): 4 * (once + once) * everything,
        (True, "fp32"): 4 * (once + once) * blocks + 4 * once * (everything - blocks) + 4 * once * everything,
        (True, "bf16"): 2 * (once + once) * blocks + 4 * once * (everything - blocks) + 4 * once * everything,
    }
    for (shard, precision), number in expected.items():
        assert cost.sent_bytes(model, world, shard, precision) == pytest.approx(number)


# -- What is printed -----------------------------------------------------------------------------------------------


def rows(capsys, *flags):
    """The table's rows by column, and everything else that is printed."""
    cost.main(flags)
    printed = capsys.readouterr().out
    head, body = printed.split("\n\n")
    header, *lines = body.splitlines()
    columns = re.split(r"\s{2,}", header)
    cells = [re.split(r"\s{2,}", line) for line in lines if line[0].isdigit() and "divide" not in line]
    return [dict(zip(columns, line, strict=True)) for line in cells], head + body


def test_the_table_follows_from_the_assumptions(capsys):
    found, text = rows(capsys, "--model", "ppf_s_2", "--world-size", "8", "64", "512", "--global-batch-size", "256",
                       "--peak-tflops", "100", "--mfu", "0.5", "--nvlink", "200", "--network", "50",
                       "--max-steps", "3600000")  # fmt: skip
    assert "256 samples do not divide among 512 GPUs" in text
    assert "50% of 100 TFLOP/s" in text
    assert [(row["GPUs"], row["per GPU"]) for row in found] == [("8", "32"), ("64", "4")]
    parameters = 32_940_064
    flops = 256 * 3 * (1.413e9 + 6.056e9)
    for row, world, bandwidth in zip(found, (8, 64), (200e9, 50e9), strict=True):
        compute, sent = flops / world / 50e12, 2 * (world - 1) / world * 4 * parameters / bandwidth
        assert float(row["compute ms"]) == pytest.approx(compute * 1e3, rel=1e-2)
        assert float(row["sent ms"]) == pytest.approx(sent * 1e3, rel=1e-2)
        assert float(row["overlapped"]) == pytest.approx(max(compute, sent) * 1e3, rel=1e-2)
        assert float(row["in turn"]) == pytest.approx((compute + sent) * 1e3, rel=1e-2)
        assert float(row["images/s"]) == pytest.approx(256 / max(compute, sent), rel=1e-2)
        assert float(row["hours"]) == pytest.approx(1000 * max(compute, sent), rel=2e-2)
        sizes = ("weights", "gradients", "Adam", "EMA", "activations")
        assert float(row["GB"]) == pytest.approx(sum(float(row[size]) for size in sizes), abs=0.03)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard"], ["FSDP2", "gathered in bf16", "3 forward passes", "all levels in one pass"]),
        (["--activation-checkpointing"], ["DDP", "4 forward passes of the blocks", "one block in full"]),
        (["--precision", "fp32"], ["all levels in one pass", "activations in fp32"]),
    ],
)
def test_assumptions_say_what_was_chosen(capsys, flags, words):
    _, text = rows(capsys, "--model", "PPF-T-2", "--world-size", "1", *flags)
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--model", "PPF-T-9"], "unknown model"),
        (["--model", "PPF-T-2", "--level-edges", "0.2", "0.4"], "1 edge(s)"),
        (["--model", "PPF-T-2", "--input-size", "31"], "does not divide"),
        (["--mfu", "1.5"], "between 0 and 1"),
    ],
)
def test_bad_flags_are_answered_in_one_line(refuses, flags, what):
    assert what in refuses(cost.main, *flags)
