"""The zero-reward batch: prompts on which all on-policy completions failed, trained as a separate sub-batch with the guide's completions.

Everything about it is in this file. The rest of the package knows only sub-batches: rows marked by ``Rollouts.sub_batch``, which are
shaped and normalized separately and have a weight in the loss.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

from rlmod.interfaces import PromptGuide
from rlmod.rollout.groups import RewardedGroups, interleave, select_texts, without_abstained
from rlmod.rollout.metrics import guide_metrics
from rlmod.rollout.prompts import max_prompt_tokens
from rlmod.types import Texts, concatenate

if TYPE_CHECKING:
    from rlmod.rollout.collect import RolloutBatch, Stages

SUB_BATCH = 1
"""The index that marks its rows in ``Rollouts.sub_batch``."""


@dataclass(frozen=True, kw_only=True)
class ZeroReward:
    """J = J_1 + weight * J_0, with J_1 the filtered rollout batch and J_0 the zero-reward batch.

    J_0 holds the prompts that the filter dropped and whose on-policy completions are all incorrect. Each gets
    ``completions_per_prompt`` additional completions of the guide. J_0 is shaped and normalized separately.

    Source: [R] MIX, arXiv:2507.12931: zero-reward samples are used again "as a distinct batch guided by the expert policy".
    Differs: [D] at most ``prompts`` of them per rollout batch; the others are dropped and counted.
    Degenerate: with weight 0 the guide is not called and nothing changes, bit for bit. A prompt on which the guide fails too stays
    dropped (unless ``keep_if_guide_fails``). A prompt whose completions are all correct is never in J_0.
    """

    weight: float = 0.0
    """lambda; 0 turns it off."""
    completions_per_prompt: int = 2
    """The guide's completions per prompt of this batch."""
    prompts: int | None = None
    """Maximum number of prompts per rollout batch, over all ranks; null: batch.prompts."""
    keep_if_guide_fails: bool = False
    """Also train on prompts on which the guide's completions are all incorrect."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"zero_reward.weight must be finite and at least 0 (0 turns it off), got {self.weight}")
        for name in ("completions_per_prompt", "prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"zero_reward.{name} must be at least 1, got {value}")

    @property
    def active(self) -> bool:
        return self.weight > 0

    @property
    def sub_batch_weights(self) -> tuple[float, ...]:
        """The weight of each sub-batch in the loss: the main one, and this one if it is active."""
        return (1.0, self.weight) if self.active else (1.0,)

    def max_groups(self, prompts: int, ranks: int, rank: int = 0) -> int:
        """Return the maximum number of groups on this rank, which has ``prompts`` per rollout batch. The first ranks get a remainder."""
        if not self.active:
            return 0
        return prompts if self.prompts is None else self.prompts // ranks + (rank < self.prompts % ranks)

    def max_rows(self, prompts: int, ranks: int, rows_per_prompt: int) -> int:
        """Return the maximum number of rows on one rank."""
        return self.max_groups(prompts, ranks) * (rows_per_prompt + self.completions_per_prompt)


def add_zero_reward(
    batch: "RolloutBatch", batches: Sequence[RewardedGroups], stages: "Stages", max_groups: int
) -> "RolloutBatch":
    """Append the groups on which the guide succeeded, marked as a sub-batch, and their metrics."""
    settings, seen = stages.zero_reward, sum(len(each.prompts) for each in batches)
    guided, num_guided = _sample_guided(stages, batches, max_groups)
    # pi_old's log-probabilities are filled now: after the merge, rows that lack them could not be told from the guide's rows.
    main = stages.logprob_pass(batch.rollouts) if guided else batch.rollouts
    all_false = torch.zeros_like(main.truncated)
    from_guide = all_false if main.from_guide is None else main.from_guide
    main = replace(main, sub_batch=all_false.long(), from_guide=from_guide)
    # No completion of the plain prompt is correct, so a correct one is the guide's, or one of a guided prompt.
    rescued = [each.any_correct(stages.threshold) for each in guided]
    num_rescued = sum(int(groups.sum()) for groups in rescued)
    metrics = dict(batch.metrics)
    metrics |= {
        "prompts/rescued": num_rescued / seen,
        "prompts/dropped": metrics["prompts/dropped"] - num_rescued / seen,
        "zero_reward/prompts": float(num_guided),
        "zero_reward/guide_failed": (num_guided - num_rescued) / max(num_guided, 1),
    }
    if not guided:
        return replace(batch, rollouts=main, metrics=metrics)
    rows = torch.cat(
        [
            (groups | settings.keep_if_guide_fails)[each.group_of_row]
            for each, groups in zip(guided, rescued, strict=True)
        ]
    )
    measured = guide_metrics(guided)
    metrics |= {name.replace("guide/", "zero_reward/guide_"): value for name, value in measured.items()}
    metrics["guide/tokens"] = metrics.get("guide/tokens", 0.0) + measured["guide/tokens"]
    added = without_abstained(concatenate([each.rollouts for each in guided]).rows(rows))
    from_guide = torch.zeros_like(added.truncated) if added.from_guide is None else added.from_guide
    added = replace(added, sub_batch=torch.full_like(added.group, SUB_BATCH), from_guide=from_guide)
    texts = select_texts([each.texts for each in guided], rows)
    both = {f.name: [*getattr(batch.texts, f.name), *getattr(texts, f.name)] for f in fields(Texts)}
    return replace(batch, rollouts=concatenate([main, added]), texts=Texts(**both), metrics=metrics)


def _sample_guided(
    stages: "Stages", batches: Sequence[RewardedGroups], max_groups: int
) -> tuple[list[RewardedGroups], int]:
    """Guide the first ``max_groups`` dropped groups without a correct on-policy completion. Return the groups, and how many prompts."""
    guided: list[RewardedGroups] = []
    number = 0
    for each in batches:
        failed = (each.all_incorrect & ~each.kept).nonzero()[:, 0].tolist()
        if isinstance(stages.guide, PromptGuide):
            failed = [index for index in failed if stages.guide.can_guide(each.prompts.problems[index])]
        failed = failed[: max_groups - number]
        if not failed:
            continue
        number += len(failed)
        sample = _sample_prompted if isinstance(stages.guide, PromptGuide) else _sample_joined
        first_group = sum(len(groups.prompts) for groups in (*batches, *guided))
        guided += sample(stages, each, failed, first_group)
    return guided, number


def _sample_joined(stages: "Stages", each: RewardedGroups, failed: list[int], first_group: int) -> list[RewardedGroups]:
    """Add the guide's completions to the on-policy ones of each failed prompt."""
    prompts = each.prompts.pick(failed)
    guide = stages.sample_guide(prompts, stages.zero_reward.completions_per_prompt)
    rows = interleave(stages.logprob_pass(each.without_rewards(torch.tensor(failed, device=guide.device))), guide)
    return [stages.reward_groups(rows, prompts, first_group)]


def _sample_prompted(
    stages: "Stages", each: RewardedGroups, failed: list[int], first_group: int
) -> list[RewardedGroups]:
    """Let the policy complete guided prompts of the failed problems: with more help as long as no completion is correct."""
    guide, attempts = stages.guide, []
    assert isinstance(guide, PromptGuide)
    longest = max_prompt_tokens(stages.sampler)
    for attempt in range(guide.attempts):
        prompts = guide.guided_prompts(each.prompts.pick(failed), attempt)
        if longest is not None:  # a guided prompt that the engine would truncate gets no further help
            fits = (prompts.mask.sum(1) <= longest).tolist()
            failed = [index for index, short in zip(failed, fits, strict=True) if short]
            prompts = prompts.pick([row for row, short in enumerate(fits) if short])
            if not failed:
                break
        rows = stages.logprob_pass(stages.sampler(stages.policy, prompts, stages.seed(next(stages.guide_calls), 1)))
        attempts.append(stages.reward_groups(rows, prompts, first_group))
        first_group += len(failed)
        solved = attempts[-1].any_correct(stages.threshold).tolist()
        failed = [index for index, done in zip(failed, solved, strict=True) if not done]
        if not failed:
            break
    return attempts
