"""Prompts that were drawn together, with all their completions and what these earned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.ops import group_sum, has_signal
from rlmod.reward._compute import RewardResult
from rlmod.types import Problem, Prompts, Rollouts, Texts, concatenate


@dataclass(frozen=True, kw_only=True)
class RewardedGroups:
    prompts: Prompts
    rollouts: Rollouts
    texts: Texts
    terms: dict[str, Float[Tensor, " R"]]
    signal: Bool[Tensor, " groups"]
    all_correct: Bool[Tensor, " groups"]
    """All own completions are right."""
    all_incorrect: Bool[Tensor, " groups"]
    """All own completions are wrong."""
    first_group: int

    @property
    def group_of_row(self) -> Int[Tensor, " R"]:
        """Within these prompts, from 0."""
        assert self.rollouts.group is not None
        return self.rollouts.group - self.first_group

    def rows_of(self, groups: Int[Tensor, " n"]) -> Rollouts:
        """The rows of these groups, which become groups 0 to n - 1, as they were before any reward."""
        place = torch.full((len(self.prompts),), -1, device=groups.device)
        place[groups] = torch.arange(len(groups), device=groups.device)
        of_row = place[self.group_of_row]
        chosen = of_row >= 0
        return replace(self.rollouts.rows(chosen), group=of_row[chosen], rewards=None, outcomes=None)

    def solved(self, threshold: float) -> Bool[Tensor, " groups"]:
        """Groups in which some completion, own or the guide's, is right."""
        correct = (self.rollouts.correctness_score > threshold).float()
        return group_sum(correct, self.group_of_row, len(self.prompts)) > 0


def interleave(own: Rollouts, guide: Rollouts) -> Rollouts:
    """The rows of both, group by group, the own ones first."""
    if own.from_guide is None:
        assert own.truncated is not None
        own = replace(own, from_guide=torch.zeros_like(own.truncated))
    both = concatenate([own, guide])
    assert both.group is not None
    return both.rows(both.group.argsort(stable=True))


def reward_groups(
    rollouts: Rollouts,
    prompts: Prompts,
    first_group: int,
    decode: Callable[[Rollouts], list[str]],
    compute: Callable[[Rollouts, Texts], RewardResult],
    *,
    threshold: float,
    over_own: bool,
) -> RewardedGroups:
    texts = texts_for_reward(rollouts, prompts.problems, decode)
    result = compute(rollouts, texts)
    assert rollouts.group is not None
    group, groups = rollouts.group, len(prompts)
    rewards, outcomes = result.rewards.to(group.device), result.outcomes.to(group.device)
    own = torch.ones_like(outcomes, dtype=torch.bool) if rollouts.from_guide is None else ~rollouts.from_guide
    correct = outcomes > threshold
    return RewardedGroups(
        prompts=prompts,
        rollouts=replace(rollouts, rewards=rewards, outcomes=outcomes, group=group + first_group),
        texts=replace(texts, group=[int(g) + first_group for g in group]),
        terms=result.terms,
        signal=has_signal(outcomes, group, groups, threshold, rows=own if over_own else None),
        all_correct=group_sum((own & ~correct).float(), group, groups) == 0,
        all_incorrect=group_sum((own & correct).float(), group, groups) == 0,
        first_group=first_group,
    )


def texts_for_reward(rollouts: Rollouts, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> Texts:
    """The rewards' view of rollouts whose ``group`` counts through ``problems``."""
    assert rollouts.group is not None and rollouts.mask is not None and rollouts.truncated is not None
    of_row = [problems[int(g)] for g in rollouts.group]
    return Texts(
        completions=decode(rollouts),
        answers=[problem.answer for problem in of_row],
        problems=of_row,
        lengths=rollouts.mask.sum(1).tolist(),
        truncated=rollouts.truncated.tolist(),
        group=rollouts.group.tolist(),
    )


def select_texts(parts: Sequence[Texts], rows: Bool[Tensor, " R"]) -> Texts:
    """The texts of those rows of all parts together."""
    kept = rows.nonzero()[:, 0].tolist()

    def joined(name: str) -> list[Any]:
        whole = list(chain.from_iterable(getattr(part, name) for part in parts))
        return [whole[row] for row in kept]

    return Texts(
        **{name: joined(name) for name in ("completions", "answers", "problems", "lengths", "truncated", "group")}
    )
