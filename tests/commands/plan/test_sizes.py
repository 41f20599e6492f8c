"""Bytes and seconds worked out by hand; see tests/commands/plan/runs.py for the weights of the toy policy."""

from dataclasses import replace

import pytest

from rlmod.commands.plan import activations, advice, duration, memory, traffic
from rlmod.commands.plan.run import Adapter, Model, Sampling
from rlmod.sampler._sampling import CACHE_GROWTH
from tests.commands.plan.runs import MACHINE, RUN, SHAPE

ALL = tuple(SHAPE.linears)


def part(run, phase, name):
    return next(p for p in memory.phases(run) if p.name == phase).parts.get(name, 0)


def test_the_toy_policy_has_the_weights_that_its_docstring_counts():
    assert (SHAPE.layer, SHAPE.root, SHAPE.parameters) == (592, 1608, 2792)


STANDING = {  # parameters, gradients, optimizer state
    "float32": ({}, 2792 * 4, 2792 * 4, 2792 * 8),
    "bfloat16": ({"weight_width": 2}, 2792 * 2, 2792 * 2, 2792 * 4),
    "sgd": ({"optimizer_states": 0}, 2792 * 4, 2792 * 4, 0),
    "ddp": ({"strategy": "ddp", "ranks": 4}, 2792 * 4, 2792 * 4, 2792 * 8),
    "fsdp2": ({"strategy": "fsdp2", "ranks": 4}, 2792, 2792, 2792 * 2),
    "offload": ({"strategy": "fsdp2", "ranks": 4, "offload": True}, 0, 0, 0),
    # rank 3: q, o 3 * 16 each; k, v 3 * 12 each; gate, up, down 3 * 24 each: 384 a layer
    "lora": ({"weight_width": 2, "adapter": Adapter(rank=3, targets=ALL)}, 2792 * 2 + 768 * 4, 768 * 4, 768 * 8),
}


@pytest.mark.parametrize("name", STANDING)
def test_weights_gradients_and_state_are_there_in_every_phase(name):
    changes, *expected = STANDING[name]
    run = replace(RUN, **changes)
    for phase in ("sampling", "update"):
        assert [part(run, phase, p) for p in ("parameters", "gradients", "optimizer state")] == expected


def test_what_strategies_add():
    assert part(replace(RUN, strategy="ddp", ranks=4), "training", "ddp buckets") == 2792 * 4
    sharded = replace(RUN, strategy="fsdp2", ranks=4)
    assert part(sharded, "sampling", "weights gathered") == 2792 * 4
    assert part(sharded, "training", "weights gathered") == 4 * (1608 + 3 * 592)
    assert part(replace(sharded, reduced=True), "training", "weights gathered") == 2 * (1608 + 3 * 592)
    older = replace(RUN, strategy="fsdp", ranks=4, on_policy_rows=1)
    assert part(older, "sampling", "weights gathered") == 2 * 2792 * 4  # its copy, and what it is copied from
    assert part(older, "update", "weights gathered") == 2792 * 4
    assert part(replace(RUN, autocast=True), "training", "16-bit copies") == 2 * (2 * 576 + 800)
    assert part(replace(RUN, autocast=True, weight_width=2), "training", "16-bit copies") == 0


def test_guide_and_reference_are_held_whole():
    run = replace(RUN, strategy="fsdp2", ranks=4, reference=Model(shape=SHAPE, width=4))
    assert part(run, "training", "reference") == 2792 * 4
    run = replace(run, guide=Model(shape=replace(SHAPE, layers=4), width=2, rows=2), guide_rows=2)
    assert part(run, "update", "guide") == (2792 + 2 * 592) * 2


def test_keys_and_values_of_every_row_that_is_sampled_at_once():
    # 8 rows of 10 tokens and the room ahead, 2 layers, keys and values 4 wide each, 4 bytes
    assert part(RUN, "sampling", "KV cache") == 8 * (10 + CACHE_GROWTH) * 2 * 2 * 4 * 4
    few = replace(RUN, sampling=Sampling(rows_per_batch=2))
    assert part(few, "sampling", "KV cache") == 2 * (10 + CACHE_GROWTH) * 2 * 2 * 4 * 4
    # logits and what is made of them; and the keys of a layer, copied
    assert part(few, "sampling", "prefill and logits") == 2 * 100 * (4 + 24) + 2 * (10 + CACHE_GROWTH) * 4 * 4
    mixed = replace(few, autocast=True)  # keys are rotated in float32
    assert part(mixed, "sampling", "KV cache") == 2 * (10 + CACHE_GROWTH) * 2 * 4 * (4 + 2)


def test_an_engine_takes_its_share_and_may_sleep():
    run = replace(RUN, sampling=Sampling(engine=True, share=0.25))
    assert part(run, "training", "engine") == part(run, "sampling", "engine") == 2**28
    assert part(run, "sampling", "KV cache") == 0
    run = replace(run, sampling=Sampling(engine=True, share=0.25, sleeps=True))
    assert (part(run, "training", "engine"), part(run, "sampling", "engine")) == (0, 2**28)


def test_rows_and_micro_batches():
    assert (RUN.rows, RUN.micro_batches) == (4, 2)
    assert (replace(RUN, micro_batch=64).rows, replace(RUN, micro_batch=64).micro_batches) == (8, 1)
    by_tokens = replace(RUN, micro_batch_tokens=35)  # three rows of 10
    assert (by_tokens.rows, by_tokens.micro_batches) == (3, 3)
    assert replace(RUN, micro_batch_tokens=5).rows == 1  # a longer row goes alone
    assert replace(RUN, minibatches=4).step_rows == 2


def test_a_layer_keeps_what_the_formula_says():
    # N = 40, D = A = 8, F = 16, 4 heads, rows of 10 tokens, float32: 2 norms, inputs, attention with its mask, MLP
    norms = 2 * (40 * 8 * 4 + 40 * 4 + 40 * 8 * 4)
    attention = 4 * 40 * 8 * 4 + 4 * 40 * 4 + 4 * 10 * 10 * 4
    assert activations.layer_bytes(RUN) == norms + 2 * 40 * 8 * 4 + attention + 4 * 40 * 16 * 4
    checkpointed = replace(RUN, checkpointing=True)
    assert activations.saved_bytes(RUN) - activations.saved_bytes(checkpointed) == 2 * (
        activations.layer_bytes(RUN) - 40 * 8 * 4
    )


def test_logits_are_held_a_chunk_at_a_time():
    # 4 rows of 6 completion tokens, 100 words: all in one chunk; then a vocabulary of which 220 tokens fill a chunk
    assert memory.head_buffers(RUN, entropy=False) == (2 * 2400 * 4, 2 * 2400 * 4)
    assert memory.head_buffers(RUN, entropy=True) == (4 * 2400 * 4, 3 * 2400 * 4)
    wide = replace(RUN, shape=replace(SHAPE, vocabulary=152_064), completion=4096, weight_width=2)
    assert memory.head_buffers(wide, entropy=False)[0] == 220 * 152_064 * (2 * 4 + 2)


def test_bytes_over_the_wire():
    assert traffic.bytes_sent(RUN) == {}
    ddp = replace(RUN, strategy="ddp", ranks=4, minibatches=2, epochs=3)
    assert traffic.bytes_sent(ddp) == {"all-reduce of gradients": 2 * 3 / 4 * 6 * 2792 * 4}
    sharded = traffic.bytes_sent(replace(RUN, strategy="fsdp2", ranks=4, reduced=True))  # 2 micro-batches
    assert sharded == {
        "all-gather of layers": 3 / 4 * 2 * 2 * (2 * 1184 + 1608),
        "reduce-scatter of gradients": 3 / 4 * 2 * 2792 * 4,
        "gathering to sample": 3 / 4 * 2792 * 2,
    }
    assert traffic.checkpoint_bytes(RUN) == (2792 * 4 * 4, "by rank 0")  # weights, two states, policy/


def test_seconds():
    # a row: 2 * 1152 weights * 10 tokens, attention 4 * 2 * 8 * 100, logits 2 * 800 * 6
    forward = 2 * 1152 * 10 + 6400 + 9600
    assert duration.forward_flops(SHAPE, 4, 6) == forward
    assert duration.training_flops(RUN) == 3 * (forward - 9600) + 4 * 9600
    assert duration.training_flops(replace(RUN, checkpointing=True)) == 4 * forward
    stages = {stage.name: stage.seconds for stage in duration.stages(RUN)}
    assert stages["training"] == pytest.approx(8 * duration.training_flops(RUN) / (1e6 * 0.5))
    # 6 tokens, each reads all weights and 8 rows of 7 keys and values; prompts before, with one word's logits
    read = 2792 * 4 + 8 * 7 * 2 * 4 * 2 * 4
    prefill = 8 * (2 * 1152 * 5 + 4 * 2 * 8 * 25 + 1600) / (1e6 * 0.5)
    slow = replace(RUN, hardware=replace(MACHINE, memory_gb_per_s=1e-6))
    assert duration.stages(slow)[0].seconds == pytest.approx(prefill + 6 * read / (1e3 * 0.5))
    assert duration.stages(slow)[0].bound == "memory bandwidth"
    sharded = replace(RUN, strategy="fsdp2", ranks=8)  # beyond a node
    sync = duration.stages(sharded)[-1]
    assert sync.seconds == pytest.approx(sum(traffic.bytes_sent(sharded).values()) / (1e9 * 1e-7 * 0.5))
    assert sync.bound == "links between nodes"


def test_a_reference_and_an_engine_cost_forward_passes():
    run = replace(RUN, reference=Model(shape=SHAPE, width=4), sampling=Sampling(engine=True, share=0.5))
    logprob_pass = next(stage for stage in duration.stages(run) if stage.name == "log-prob pass")
    assert logprob_pass.seconds == pytest.approx(16 * duration.forward_flops(SHAPE, 4, 6) / (1e6 * 0.5))


def machine(kib):
    return replace(MACHINE, memory_gib=kib / 2**20, reserve_gib=0.0)


def test_the_change_that_is_advised_is_one_with_which_it_fits():
    needed = memory.peak(RUN).total / 1024
    assert memory.fits(replace(RUN, hardware=machine(needed + 1)))
    small = replace(RUN, hardware=machine(needed - 1))
    assert not memory.fits(small)
    assert advice.cheapest_changes(small) == ["batch.micro_batch=2"]
    assert memory.fits(replace(small, micro_batch=2))
    assert advice.cheapest_changes(replace(RUN, hardware=machine(1))) is None
    validated = replace(RUN, validation_rows=64, hardware=machine(needed + 1))
    assert advice.cheapest_changes(validated) is not None
    assert all(
        override.startswith("+validation.sampler.rows_per_batch=") for override in advice.cheapest_changes(validated)
    )
