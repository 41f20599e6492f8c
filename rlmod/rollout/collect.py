"""One rollout batch: sample, reward, filter, refill.

next prompts -> sampler -> guide -> reward -> filter -> enough groups kept? -> rollout batch
     ^                                                  | no: sample new prompts, at most max_generation_batches times
     +--------------------------------------------------+
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rlmod.contracts import name_component_on_error
from rlmod.interfaces import Filter, Guide, PromptGuide, Reward, Sampler, declared
from rlmod.reward._compute import compute_rewards
from rlmod.reward._failures import RewardResult
from rlmod.rollout.async_rewards import AsyncRewards, supports_async_rewards
from rlmod.rollout.groups import RewardedGroups, interleave, reward_groups, select_texts, without_abstained
from rlmod.rollout.metrics import rollout_metrics
from rlmod.rollout.zero_reward import ZeroReward, add_zero_reward
from rlmod.types import Prompts, Rollouts, Texts, concatenate


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """The rollouts of one iteration, their texts (one entry per row), and the metrics of sampling them."""

    rollouts: Rollouts
    texts: Texts
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The components that turn prompts into rewarded groups, and the functions and settings of the run that they need."""

    policy: nn.Module
    decode: Callable[[Rollouts], list[str]]
    logprob_pass: Callable[[Rollouts], Rollouts]
    """Fills pi_old's log-probabilities and entropy, in nats, if they are missing."""
    next_prompts: Callable[[int], Prompts]
    """``next_prompts(n)`` returns the next n prompts."""
    sampler: Sampler
    guide: Guide | PromptGuide | None
    reward: Reward
    filter: Filter
    zero_reward: ZeroReward
    threshold: float = 0.5
    """A completion is correct if its correctness score is above this."""
    rewards_train: bool = True
    """False if no advantage depends on a reward, as in distillation alone: groups without signal train then too."""
    seed: Callable[..., int]
    """``seed(i)`` for batch i of prompts, ``seed(i, 1)`` for call i of the guide. With the same seed, a guide that resembles the policy
    would repeat the policy's completions."""
    guide_calls: Iterator[int] = field(default_factory=count)

    def sample_and_reward(self, prompts: Prompts, batch: int, first_group: int) -> RewardedGroups:
        """Sample completions of these prompts, the guide's included if it completes every prompt, and reward them."""
        seed = self.seed(batch)
        if not supports_async_rewards(self.sampler, self.reward):
            rollouts = self.add_guide(self.sampler(self.policy, prompts, seed), prompts)
            return self.reward_groups(rollouts, prompts, first_group)
        with closing(AsyncRewards(self.reward, prompts.problems, self.decode)) as rewards:
            on_policy = cast(Any, self.sampler)(self.policy, prompts, seed, on_finished=rewards.submit)
            return self.reward_groups(self.add_guide(on_policy, prompts), prompts, first_group, rewards.result)

    def add_guide(self, on_policy: Rollouts, prompts: Prompts) -> Rollouts:
        """Add the guide's completions, if it completes every prompt."""
        if self.guide is None or self.guide.completions_per_prompt == 0:
            return on_policy
        on_policy = self.logprob_pass(on_policy)
        return interleave(on_policy, self.sample_guide(prompts, self.guide.completions_per_prompt))

    def sample_guide(self, prompts: Prompts, completions_per_prompt: int) -> Rollouts:
        """Sample the guide's completions of these prompts. Their log-probabilities are the guide's, their entropy is the policy's."""
        assert isinstance(self.guide, Guide)
        with name_component_on_error("guide", self.guide):
            rows = self.guide(prompts, completions_per_prompt, self.seed(next(self.guide_calls), 1))
        entropy = self.logprob_pass(replace(rows, logprobs=None, entropy=None)).entropy
        return replace(rows, entropy=entropy, from_guide=torch.ones_like(rows.truncated))

    def reward_groups(
        self,
        rollouts: Rollouts,
        prompts: Prompts,
        first_group: int,
        compute: Callable[[Rollouts, Texts], RewardResult] | None = None,
    ) -> RewardedGroups:
        """Reward and filter the groups, with ``compute`` in place of the reward if the rewards are computed already."""
        compute = compute or (lambda _, texts: compute_rewards(self.reward, texts))
        return reward_groups(
            rollouts, prompts, first_group, self.decode, compute, self.filter, threshold=self.threshold
        )


@torch.no_grad()
def collect(stages: Stages, *, num_groups: int, max_guided_groups: int = 0) -> RolloutBatch:
    """Return ``num_groups`` groups of rewarded rollouts, followed by the zero-reward batch if it is active."""
    batches = sample_until_full(stages, num_groups)
    kept = torch.cat([batch.kept for batch in batches])
    kept = kept & (kept.cumsum(0) <= num_groups)
    batch = fill_batch(batches, kept, num_groups, rewards_train=stages.rewards_train)
    return add_zero_reward(batch, batches, stages, max_guided_groups) if stages.zero_reward.active else batch


def sample_until_full(stages: Stages, num_groups: int) -> list[RewardedGroups]:
    """Sample batches of prompts, at most ``max_generation_batches``, until the filter has kept ``num_groups`` groups."""
    batches: list[RewardedGroups] = []
    seen = kept = 0
    wanted = num_groups
    while True:
        batch = stages.sample_and_reward(stages.next_prompts(wanted), len(batches), seen)
        batches.append(batch)
        seen += len(batch.prompts)
        kept += int(batch.kept.sum())
        if kept >= num_groups or len(batches) >= declared(stages.filter, "max_generation_batches"):
            return batches
        share_kept = max(kept, 1) / seen
        wanted = min(num_groups, math.ceil((num_groups - kept) / share_kept))


def fill_batch(
    batches: Sequence[RewardedGroups], kept: Bool[Tensor, " groups"], num_groups: int, *, rewards_train: bool = True
) -> RolloutBatch:
    """Return the kept groups. Dropped groups, with a mask that is False everywhere, fill up the number to ``num_groups``."""
    rollouts = concatenate([batch.rollouts for batch in batches])
    missing = num_groups - int(kept.sum())
    fillers = ~kept & ((~kept).cumsum(0) <= missing)
    rows = (kept | fillers)[rollouts.group]
    rollouts = without_abstained(rollouts)
    rollouts = replace(rollouts, mask=rollouts.mask & kept[rollouts.group][:, None]).rows(rows)
    texts = select_texts([batch.texts for batch in batches], rows)
    metrics = rollout_metrics(batches, kept, num_groups, rewards_train=rewards_train)
    return RolloutBatch(rollouts=rollouts, texts=texts, metrics=metrics)
