"""Sample and grade held-out problems, both for validation during training and for ``rlmod-eval``.

Both use the same seeds and batches, so a checkpoint has one accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from numpy.random import SeedSequence
from torch import Tensor, nn

from rlmod.interfaces import Reward, Sampler
from rlmod.reward._compute import compute_rewards
from rlmod.reward._failures import check_failure_shares
from rlmod.rollout.groups import texts_for_reward
from rlmod.types import Prompts, Rollouts, Texts


@runtime_checkable
class ValidationSettings(Protocol):
    """The components of validation, and the threshold above which a correctness score counts as correct."""

    @property
    def sampler(self) -> Sampler: ...
    @property
    def reward(self) -> Reward: ...
    @property
    def threshold(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class GradedBatch:
    """The completions of a batch of held-out prompts, with their rewards and correctness."""

    rollouts: Rollouts
    texts: Texts
    rewards: Float[Tensor, " R"]
    """On the CPU."""
    correct: Bool[Tensor, " R"]
    abstained: Bool[Tensor, " R"]
    """True if the reward has no value for the completion: it counts neither as correct nor as incorrect."""


def validation_seed(run_seed: int, validation_seed: int, batch: int, rank: int = 0) -> int:
    """Return the sampling seed of one batch of held-out problems."""
    return int(SeedSequence([run_seed, rank, validation_seed, batch]).generate_state(1)[0])


@torch.no_grad()
def sample_and_grade(
    policy: nn.Module,
    prompts: Prompts,
    settings: ValidationSettings,
    *,
    decode: Callable[[Rollouts], list[str]],
    seed: int,
) -> GradedBatch:
    """Sample completions of held-out prompts, compute their rewards, and compare the correctness score with the threshold."""
    rollouts = settings.sampler(policy, prompts, seed)
    texts = texts_for_reward(rollouts, prompts.problems, decode)
    result = compute_rewards(settings.reward, texts)
    check_failure_shares(result)
    device = rollouts.device
    return GradedBatch(
        rollouts=replace(rollouts, rewards=result.rewards.to(device), abstained=result.abstained.to(device)),
        texts=texts,
        rewards=result.rewards,
        correct=(result.outcomes > settings.threshold).to(device) & ~result.abstained.to(device),
        abstained=result.abstained.to(device),
    )
