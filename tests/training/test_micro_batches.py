"""The gradient of an optimizer step does not depend on how it is cut into micro-batches, or shared among ranks."""

import socket
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlmod import ops
from rlmod.aggregation.constant import Constant
from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.config.sizes import Batch
from rlmod.correction.forking_tokens import ForkingTokens
from rlmod.loss.cispo import Cispo
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.dppo import Dppo
from rlmod.loss.fipo import Fipo
from rlmod.loss.gmpo import Gmpo
from rlmod.loss.mixed_surrogate import MixedSurrogate
from rlmod.loss.sapo import Sapo
from rlmod.loss.sequence_surrogate import SequenceSurrogate
from rlmod.model.logprobs import completion_logits
from rlmod.shaper.group_baseline import GroupBaseline
from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.shaper.uniform import Uniform
from rlmod.training.datamodule import RolloutLoader
from rlmod.types import Rollouts
from tests.rollouts import ragged

LOSSES = [
    ClippedSurrogate(),
    MixedSurrogate(guide_clip="none"),
    Cispo(),
    SequenceSurrogate(),
    SequenceSurrogate(ratio="geometric"),
    Sapo(),
    Dppo(),
    Gmpo(),
    Fipo(),
]
WEIGHTINGS = [TokenMean(), RolloutMean(), Constant(length=9)]


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=1,
        )
    )  # fmt: skip


def step(shaper=None) -> Rollouts:
    rows = ragged(3, groups=4, g=4)
    draw = torch.Generator().manual_seed(0)
    rows = replace(
        rows,
        prompt_ids=torch.randint(2, 32, (4, 5), generator=draw)[rows.group],
        prompt_mask=torch.arange(5) >= torch.randint(0, 4, (4, 1), generator=draw)[rows.group],
        completion_ids=torch.randint(2, 32, rows.mask.shape, generator=draw),
        rewards=rows.rewards.float(),
        entropy=rows.entropy.float(),
        logprobs=-3.4 + 0.3 * torch.randn(rows.mask.shape, generator=draw),
    )
    return replace(rows, advantages=(shaper or Uniform())(rows))


def gradient(policy, rollouts: Rollouts, loss, number: int, tokens: int | None = None) -> torch.Tensor:
    policy.zero_grad()
    sizes = Batch(prompts=1, micro_batch=len(rollouts) // number, micro_batch_tokens=tokens)
    for batch in RolloutLoader(
        lambda: rollouts, lambda rows: rows.weights, sizes, len(rollouts)
    ).split_into_micro_batches(rollouts):
        if not len(batch):
            continue
        logprobs = ops.token_logprobs(completion_logits(policy, batch), batch.completion_ids)
        (loss(logprobs, batch)[0] * batch.weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("aggregation", WEIGHTINGS)
def test_one_two_four_and_eight_micro_batches_give_the_same_gradient(loss, aggregation):
    policy = model()
    rollouts = step()
    rollouts = replace(rollouts, weights=aggregation(rollouts))
    whole = gradient(policy, rollouts, loss, 1)
    assert whole.norm() > 1e-3
    for number in (2, 4, 8):
        torch.testing.assert_close(gradient(policy, rollouts, loss, number), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(policy, rollouts, loss, 1, tokens=40), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_leaving_out_rows_without_signal_changes_nothing(loss):
    policy = model()
    rollouts = step()
    silent = (rollouts.group % 2 == 0)[:, None]
    rollouts = replace(rollouts, weights=TokenMean()(rollouts), advantages=rollouts.advantages.masked_fill(silent, 0))
    policy.zero_grad()
    logprobs = ops.token_logprobs(completion_logits(policy, rollouts), rollouts.completion_ids)
    (loss(logprobs, rollouts)[0] * rollouts.weights).sum().backward()
    whole = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(gradient(policy, rollouts, loss, 4), whole, atol=1e-6, rtol=0)


def on_a_rank(rank: int, port: int, shaper, correction, aggregation, result) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        rollouts = step()
        mine = rollouts.rows(slice(8 * rank, 8 * rank + 8))
        mine = correction(replace(mine, advantages=shaper(mine)))
        mine = replace(mine, weights=aggregation(mine))
        total = gradient(model(), mine, ClippedSurrogate(), 2)
        dist.all_reduce(total)
        if rank == 0:
            result.put(total.tolist())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("shaper", "correction", "aggregation"),
    [
        (TokenEntropy(), ForkingTokens(share=1.0), RolloutMean()),
        (TokenEntropy(), ForkingTokens(share=0.3), TokenMean()),
        (GroupBaseline(), ForkingTokens(share=0.3), TokenMean()),
    ],
)
def test_two_ranks_add_up_to_the_gradient_of_one(shaper, correction, aggregation):
    """Their statistics, thresholds and weights are of the batch of all ranks."""
    rollouts = correction(step(shaper))
    whole = gradient(model(), replace(rollouts, weights=aggregation(rollouts)), ClippedSurrogate(), 1)
    context = mp.get_context("spawn")
    result = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        context.Process(target=on_a_rank, args=(rank, port, shaper, correction, aggregation, result))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    total = torch.tensor(result.get())
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    torch.testing.assert_close(total, whole, atol=1e-6, rtol=0)
