"""Sample and grade held-out problems, both for validation during training and for ``rlmod-eval``.

Both use the same seeds and batches, so a checkpoint has one accuracy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float
from numpy.random import SeedSequence
from torch import Tensor, nn

from rlmod.interfaces import Reward, Sampler, WeightSyncedSampler
from rlmod.model.logprob_pass import logprob_pass
from rlmod.reward._compute import compute_rewards
from rlmod.reward._failures import check_failure_shares
from rlmod.reward._final_answers import find_answer_reader
from rlmod.rollout.groups import texts_for_reward
from rlmod.rollout.metrics import check_agreement, sampler_agreement
from rlmod.sampler._sampling import VLLMSamplingParameters
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
    @property
    def maj_at(self) -> Sequence[int]: ...


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
    answers: Sequence[str | None] = ()
    """The final answer of each completion, as the reward reads it; None without one. Empty if no maj@k is computed."""


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
    """Sample completions of held-out prompts, compute their rewards, and compare the correctness score with the threshold.

    ValueError if the sampler is an engine that does not sample from this policy.
    """
    rollouts = settings.sampler(policy, prompts, seed)
    check_engine(policy, prompts, rollouts, settings.sampler, seed)
    texts = texts_for_reward(rollouts, prompts.problems, decode)
    result = compute_rewards(settings.reward, texts)
    check_failure_shares(result)
    read_answers = find_answer_reader(settings.reward) if settings.maj_at else None
    device = rollouts.device
    return GradedBatch(
        rollouts=replace(rollouts, rewards=result.rewards.to(device), abstained=result.abstained.to(device)),
        texts=texts,
        rewards=result.rewards,
        correct=(result.outcomes > settings.threshold).to(device) & ~result.abstained.to(device),
        abstained=result.abstained.to(device),
        answers=() if read_answers is None else read_answers(texts.completions),
    )


def one_per_engine(samplers: Iterable[Sampler]) -> list[Sampler]:
    """Return the samplers without those that differ from an earlier one only in the number of completions: they share its engine."""
    found: list[tuple[object, Sampler]] = []
    for sampler in samplers:
        engine = replace(cast(Any, sampler), completions_per_prompt=1) if is_dataclass(sampler) else sampler
        if not any(engine == other for other, _ in found):
            found.append((engine, sampler))
    return [sampler for _, sampler in found]


COMPARED_COMPLETIONS = 8


@torch.no_grad()
def check_engine(policy: nn.Module, prompts: Prompts, rollouts: Rollouts, sampler: Sampler, seed: int) -> None:
    """Compare an engine's log-probabilities with the policy's on a few completions. ValueError above ``sampler.max_difference``.

    An engine with another policy yields an accuracy without meaning. With greedy decoding, top-p or top-k vLLM reports none, so some tokens
    are sampled without them for the comparison.
    """
    if not isinstance(sampler, WeightSyncedSampler):
        return
    if rollouts.sampler_logprobs is None:
        if not isinstance(sampler, VLLMSamplingParameters):
            return
        few = prompts.pick(range(min(len(prompts), COMPARED_COMPLETIONS)))
        length = min(sampler.max_new_tokens, 16)
        probe = replace(sampler, greedy=False, top_p=1.0, top_k=0, completions_per_prompt=1, max_new_tokens=length)
        rollouts = cast(Any, probe)(policy, few, seed)
    rows = replace(rollouts.rows(slice(COMPARED_COMPLETIONS)).trimmed(), logprobs=None, entropy=None)
    rows = logprob_pass(policy, rows, sampler.temperature, rows=COMPARED_COMPLETIONS)
    check_agreement(sampler, sampler_agreement(rows))
