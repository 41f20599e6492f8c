"""A completion from which the reward abstains is left out of its group, in every stage."""

from dataclasses import replace

import pytest
import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.reward._failures import RewardResult
from rlmod.shaper.group_baseline import GroupBaseline
from rlmod.shaper.leave_one_out import LeaveOneOut
from rlmod.shaper.sequence_entropy import SequenceEntropy
from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.shaper.uniform import Uniform
from rlmod.types import build_rollouts
from tests.rollout.scripted import exact, run


def abstaining(*rows: int):
    """The exact reward, None for these rows."""

    def reward(texts):
        return [None if row in rows else value for row, value in enumerate(exact(texts))]

    return reward


def test_the_row_is_masked_out_and_the_metrics_leave_it_out():
    # Two prompts with G = 3: rewards 1 0 0 and 1 1 0; rows 1 and 3 have none.
    collected, _ = run([1, 2], 2, reward=abstaining(1, 3))
    rollouts = collected.rollouts
    assert rollouts.abstained.tolist() == [False, True, False, True, False, False]
    assert rollouts.mask.any(1).tolist() == [True, False, True, False, True, True]
    # Their numbers are the means of their groups, 1/2 and 1/2.
    assert rollouts.rewards.tolist() == [1, 0.5, 0, 0.5, 1, 0]
    assert collected.metrics["reward/mean"] == 0.5
    assert collected.metrics["failures/abstained"] == 2
    # What was sampled counts: 6 completions of 2 tokens.
    assert collected.metrics["completions/tokens"] == 12
    assert len(collected.texts) == 6


def test_a_group_is_classified_by_its_scored_completions():
    # Without its only correct completion the first group is all incorrect, and has no signal; the second has no reward at all.
    collected, _ = run([1, 2], 2, reward=abstaining(0, 3, 4, 5))
    shares = [collected.metrics[f"prompts/{kind}"] for kind in ("all_correct", "mixed", "all_incorrect")]
    assert shares == [0, 0.5, 0.5]
    assert collected.rollouts.rewards.tolist() == [0] * 6
    filtered, _ = run([1, 2, 1], 1, reward=abstaining(0), dynamic_sampling=True, max_generation_batches=1)
    assert not filtered.rollouts.mask.any()


def test_a_batch_without_any_value_has_no_terms_and_does_not_count():
    """The first batch has no signal, so a second one is sampled, of which the reward has no value at all."""

    def reward(texts):
        values = torch.tensor(exact(texts))
        called.append(1)
        if len(called) == 1:
            return {"answer": values}
        return RewardResult(torch.zeros(len(texts)), {}, values, torch.ones(len(texts), dtype=torch.bool), {})

    called: list[int] = []
    collected, _ = run([3, 1], 1, reward=reward, dynamic_sampling=True, max_generation_batches=2)
    assert len(called) == 2
    assert collected.metrics["reward/answer"] == collected.metrics["reward/mean"] == 1


def test_a_filter_sees_no_row_from_which_the_reward_abstains():
    def noting(rollouts):
        seen.append(rollouts.mask.any(1).tolist())
        return torch.ones(2, dtype=torch.bool)

    seen: list[list[bool]] = []
    run([1, 2], 2, reward=abstaining(1, 3), filter=noting)
    assert seen == [[True, False, True, False, True, True]]


def record(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    shape = (8, 5)
    lengths = torch.randint(1, 6, (8,), generator=draw)
    return build_rollouts(
        rewards=torch.rand(8, generator=draw).round(),
        outcomes=None,
        group=torch.arange(8) // 4,
        mask=torch.arange(5) < lengths[:, None],
        logprobs=-torch.rand(shape, generator=draw),
        entropy=torch.rand(shape, generator=draw),
    )


@pytest.mark.parametrize(
    "shaper",
    [Uniform(), GroupBaseline(), LeaveOneOut(), TokenEntropy(entropy_clip=None), SequenceEntropy()],
    ids=lambda shaper: type(shaper).__name__,
)
@pytest.mark.parametrize("seed", range(6))
def test_a_shaper_returns_what_it_returns_without_the_row(shaper, seed):
    full = record(seed)
    gone = torch.zeros(8, dtype=torch.bool)
    gone[[1, 6, 7]] = True
    masked = replace(
        full, mask=full.mask & ~gone[:, None], abstained=gone, rewards=full.rewards.masked_fill(gone, 0.37)
    )
    kept, found = shaper(full.rows(~gone)), shaper(masked)
    torch.testing.assert_close(found[~gone], kept, rtol=1e-6, atol=1e-7)
    assert not found[gone].any()


@pytest.mark.parametrize("aggregation", [TokenMean(), RolloutMean()], ids=lambda each: type(each).__name__)
def test_the_weights_of_the_others_are_those_without_the_row(aggregation):
    full = record()
    gone = torch.tensor([False, True] + [False] * 6)
    masked = replace(full, mask=full.mask & ~gone[:, None])
    torch.testing.assert_close(aggregation(masked)[~gone], aggregation(full.rows(~gone)))


@pytest.mark.parametrize("shaper", [Uniform(), LeaveOneOut(), TokenEntropy(entropy_clip=None), SequenceEntropy()])
def test_a_group_with_one_scored_completion_gets_no_advantage_that_is_not_finite(shaper):
    full = record()
    gone = torch.tensor([False, True, True, True] + [False] * 4)
    found = shaper(replace(full, mask=full.mask & ~gone[:, None]))
    assert found.isfinite().all()
    assert not found[gone].any()


def test_dynamic_sampling_does_not_count_the_row():
    rollouts = build_rollouts(rewards=torch.tensor([1.0, 0, 0, 0]), group=torch.zeros(4, dtype=torch.long))
    assert DynamicSampling()(rollouts).tolist() == [True]
    without = replace(rollouts, mask=rollouts.mask & torch.tensor([False, True, True, True])[:, None])
    assert DynamicSampling()(without).tolist() == [False]
