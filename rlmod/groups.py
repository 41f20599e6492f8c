"""Prompts that were drawn together, with all their completions and what these earned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.ops import group_sum, has_signal
from rlmod.scoring import Scores
from rlmod.types import Problem, Prompts, Rollouts, Texts, concatenate


@dataclass(frozen=True, kw_only=True)
class Drawn:
    prompts: Prompts
    rollouts: Rollouts
    texts: Texts
    terms: dict[str, Float[Tensor, " R"]]
    signal: Bool[Tensor, " groups"]
    right: Bool[Tensor, " groups"]
    """All own completions are right."""
    wrong: Bool[Tensor, " groups"]
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
        right = (self.rollouts.judged > threshold).float()
        return group_sum(right, self.group_of_row, len(self.prompts)) > 0


def joined(own: Rollouts, guide: Rollouts) -> Rollouts:
    """The rows of both, group by group, the own ones first."""
    if own.from_guide is None:
        assert own.truncated is not None
        own = replace(own, from_guide=torch.zeros_like(own.truncated))
    both = concatenate([own, guide])
    assert both.group is not None
    return both.rows(both.group.argsort(stable=True))


def rewarded(
    rollouts: Rollouts,
    prompts: Prompts,
    first_group: int,
    decode: Callable[[Rollouts], list[str]],
    score: Callable[[Rollouts, Texts], Scores],
    *,
    threshold: float,
    over_own: bool,
) -> Drawn:
    texts = read(rollouts, prompts.problems, decode)
    scores = score(rollouts, texts)
    assert rollouts.group is not None
    group, groups = rollouts.group, len(prompts)
    rewards, outcomes = scores.rewards.to(group.device), scores.outcomes.to(group.device)
    own = torch.ones_like(outcomes, dtype=torch.bool) if rollouts.from_guide is None else ~rollouts.from_guide
    right = outcomes > threshold
    return Drawn(
        prompts=prompts,
        rollouts=replace(rollouts, rewards=rewards, outcomes=outcomes, group=group + first_group),
        texts=replace(texts, group=[int(g) + first_group for g in group]),
        terms=scores.terms,
        signal=has_signal(outcomes, group, groups, threshold, rows=own if over_own else None),
        right=group_sum((own & ~right).float(), group, groups) == 0,
        wrong=group_sum((own & right).float(), group, groups) == 0,
        first_group=first_group,
    )


def read(rollouts: Rollouts, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> Texts:
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


def texts_of(parts: Sequence[Texts], rows: Bool[Tensor, " R"]) -> Texts:
    """The texts of those rows of all parts together."""
    kept = rows.nonzero()[:, 0].tolist()

    def joined(name: str) -> list[Any]:
        whole = list(chain.from_iterable(getattr(part, name) for part in parts))
        return [whole[row] for row in kept]

    return Texts(
        **{name: joined(name) for name in ("completions", "answers", "problems", "lengths", "truncated", "group")}
    )
