"""Groups: prompts with all their completions and the rewards of the completions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.contracts import name_component_on_error
from rlmod.interfaces import Filter, component_name
from rlmod.ops import group_sum, has_signal
from rlmod.reward._failures import FailedRows, RewardResult, check_failure_shares
from rlmod.types import Problem, Prompts, Rollouts, Texts, concatenate


@dataclass(frozen=True, kw_only=True)
class RewardedGroups:
    """A batch of prompts with their completions and rewards, before any group is dropped."""

    prompts: Prompts
    rollouts: Rollouts
    texts: Texts
    failed: dict[str, FailedRows]
    """The completions on which a reward failed, by term."""
    kept: Bool[Tensor, " groups"]
    """True if the filter keeps the group."""
    signal: Bool[Tensor, " groups"]
    """True if the group holds both correct and incorrect completions."""
    all_correct: Bool[Tensor, " groups"]
    """True if every on-policy completion is correct."""
    all_incorrect: Bool[Tensor, " groups"]
    """True if every on-policy completion is incorrect."""
    first_group: int
    """The index of the first of these groups within the rollout batch."""

    @property
    def group_of_row(self) -> Int[Tensor, " R"]:
        """The index of each row's prompt in ``prompts``."""
        return self.rollouts.group - self.first_group

    def without_rewards(self, groups: Int[Tensor, " n"]) -> Rollouts:
        """Select the rows of these groups, renumbered 0 to n - 1, without their rewards."""
        new_index = torch.full((len(self.prompts),), -1, device=groups.device)
        new_index[groups] = torch.arange(len(groups), device=groups.device)
        group = new_index[self.group_of_row]
        chosen = group >= 0
        rows = self.rollouts.rows(chosen)
        return replace(rows, group=group[chosen], rewards=None, outcomes=None, terms={}, abstained=None)

    def any_correct(self, threshold: float) -> Bool[Tensor, " groups"]:
        """Return True for groups with a correct completion, on-policy or the guide's."""
        correct = self.rollouts.correctness_score > threshold
        if self.rollouts.abstained is not None:
            correct = correct & ~self.rollouts.abstained
        return group_sum(correct.float(), self.group_of_row, len(self.prompts)) > 0


def interleave(on_policy: Rollouts, guide: Rollouts) -> Rollouts:
    """Merge both group by group, on-policy completions first."""
    if on_policy.from_guide is None:
        on_policy = replace(on_policy, from_guide=torch.zeros_like(on_policy.truncated))
    both = concatenate([on_policy, guide])
    return both.rows(both.group.argsort(stable=True))


def reward_groups(
    rollouts: Rollouts,
    prompts: Prompts,
    first_group: int,
    decode: Callable[[Rollouts], list[str]],
    compute: Callable[[Rollouts, Texts], RewardResult],
    group_filter: Filter,
    *,
    threshold: float,
) -> RewardedGroups:
    """Decode the completions, compute their rewards, and let the filter choose the groups that train.

    RewardError if the reward fails, or on more completions than it may; ValueError if the filter does not return one bool per group.
    """
    texts = texts_for_reward(rollouts, prompts.problems, decode)
    result = compute(rollouts, texts)
    check_failure_shares(result)
    group, groups = rollouts.group, len(prompts)
    abstained, device = result.abstained.to(group.device), group.device
    rewards, outcomes, *terms = (
        _fill_abstained(values.to(device), abstained, group, groups)
        for values in (result.rewards, result.outcomes, *result.terms.values())
    )
    named = dict(zip(result.terms, terms, strict=True))
    rollouts = replace(rollouts, rewards=rewards, outcomes=outcomes, terms=named, abstained=abstained)
    own = ~abstained if rollouts.from_guide is None else ~abstained & ~rollouts.from_guide
    correct = outcomes > threshold
    any_own = group_sum(own.float(), group, groups) > 0
    return RewardedGroups(
        prompts=prompts,
        rollouts=replace(rollouts, group=group + first_group),
        texts=replace(texts, group=[int(g) + first_group for g in group]),
        failed=result.failed,
        kept=_apply_filter(group_filter, without_abstained(rollouts), groups).to(device),
        signal=has_signal(outcomes, group, groups, threshold, rows=~abstained),
        all_correct=any_own & (group_sum((own & ~correct).float(), group, groups) == 0),
        all_incorrect=any_own & (group_sum((own & correct).float(), group, groups) == 0),
        first_group=first_group,
    )


def _apply_filter(group_filter: Filter, rollouts: Rollouts, groups: int) -> Bool[Tensor, " groups"]:
    with name_component_on_error("filter", group_filter):
        return _validate_kept(group_filter(rollouts), group_filter, groups)


def without_abstained(rollouts: Rollouts) -> Rollouts:
    """Mask out the rows from which the reward abstained, so that no statistics and no loss count them."""
    if rollouts.abstained is None or not bool(rollouts.abstained.any()):
        return rollouts
    return replace(rollouts, mask=rollouts.mask & ~rollouts.abstained[:, None])


def _fill_abstained(
    values: Float[Tensor, " R"], abstained: Bool[Tensor, " R"], group: Int[Tensor, " R"], groups: int
) -> Float[Tensor, " R"]:
    """Set rows without a value to the mean of their group, which leaves the mean as it is for a component that overlooks the mask."""
    if not bool(abstained.any()):
        return values
    counted = (~abstained).to(values.dtype)
    mean = group_sum(values * counted, group, groups) / group_sum(counted, group, groups).clamp(min=1)
    return torch.where(abstained, mean[group], values)


def _validate_kept(kept: Any, group_filter: Filter, groups: int) -> Bool[Tensor, " groups"]:
    name = component_name(group_filter)
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != (groups,):
        found = f"{kept.dtype} {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise ValueError(
            f"filter: {name} returned {found}; expected a boolean tensor with one entry per group: [{groups}]"
        )
    return kept


def texts_for_reward(rollouts: Rollouts, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> Texts:
    """Build the input of a reward from rollouts whose ``group`` indexes ``problems``."""
    row_problems = [problems[int(g)] for g in rollouts.group]
    return Texts(
        completions=decode(rollouts),
        answers=[problem.answer for problem in row_problems],
        problems=row_problems,
        lengths=rollouts.mask.sum(1).tolist(),
        truncated=rollouts.truncated.tolist(),
        group=rollouts.group.tolist(),
    )


def select_texts(batches: Sequence[Texts], rows: Bool[Tensor, " R"]) -> Texts:
    """Concatenate the texts of several batches and select rows."""
    kept = rows.nonzero()[:, 0].tolist()

    def select(name: str) -> list[Any]:
        values = list(chain.from_iterable(getattr(batch, name) for batch in batches))
        return [values[row] for row in kept]

    names = ("completions", "answers", "problems", "lengths", "truncated", "group")
    return Texts(**{name: select(name) for name in names})
