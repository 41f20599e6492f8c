"""Prompts in, rewarded rollouts out: sampling, guide, reward, and DAPO's dynamic sampling with refill.

draw -> sampler -> guide -> reward -> filter -> enough groups with signal? -> rollouts
  ^                                               | no: draw again, at most max_generation_batches times
  +-----------------------------------------------+
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rlmod.interfaces import Guide, Reward, Sampler
from rlmod.ops import group_sum, has_signal
from rlmod.scoring import score
from rlmod.types import Problem, Prompts, Rollouts, Texts, concatenate

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which groups train.

    With ``dynamic_sampling``, groups that are all right or all wrong are dropped, and new prompts are drawn until the collection
    is full or ``max_generation_batches`` is reached; what is missing then is filled with dropped groups whose mask is
    False everywhere, so that a collection always has the same number of rows. Without it every group stays, as in GRPO.

    Source: DAPO, arXiv:2503.14476, sec. 3.2, eq. 11.
    Differs: a refill draws as many prompts as the share of groups with signal suggests are needed, not a whole batch.
    Degenerate: no group with signal in the whole collection: its optimizer steps are left out, with a warning.
    """

    dynamic_sampling: bool = False
    max_generation_batches: int = 10
    threshold: float = 0.5
    """A completion is correct when its reward, without penalties, is above this."""

    def __post_init__(self) -> None:
        if self.max_generation_batches < 1:
            raise ValueError(f"filter.max_generation_batches must be at least 1, got {self.max_generation_batches}")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One collection: its rollouts, their texts (an entry a row), and what was counted on the way."""

    rollouts: Rollouts
    texts: Texts
    metrics: Mapping[str, float]


@torch.no_grad()
def collect(
    *,
    policy: nn.Module,
    decode: Callable[[Rollouts], list[str]],
    draw: Callable[[int], Prompts],
    prompts: int,
    sampler: Sampler,
    guide: Guide | None,
    reward: Reward,
    filter: Filter,
    seed: Callable[[int], int],
) -> Collected:
    """``prompts`` groups of rewarded rollouts.

    ``draw(n)`` hands over the next n prompts; ``seed(i)`` is the seed of the i-th batch of this collection.
    """
    batches: list[_Batch] = []
    drawn = usable = 0
    wanted = prompts
    while True:
        drawing = draw(wanted)
        rollouts = sampler(policy, drawing, seed(len(batches)))
        if guide is not None:
            rollouts = guide(drawing, rollouts, seed(len(batches)))
        batches.append(_rewarded(rollouts, drawing, drawn, decode, reward, filter.threshold))
        drawn += len(drawing)
        usable += int(batches[-1].signal.sum())
        if not filter.dynamic_sampling or usable >= prompts or len(batches) == filter.max_generation_batches:
            break
        share_with_signal = max(usable, 1) / drawn
        wanted = min(prompts, math.ceil((prompts - usable) / share_with_signal))
    return _filtered(batches, prompts, filter)


@dataclass(frozen=True, kw_only=True)
class _Batch:
    rollouts: Rollouts
    texts: Texts
    terms: dict[str, Float[Tensor, " R"]]
    signal: Bool[Tensor, " groups"]
    right: Bool[Tensor, " groups"]
    """All right; a group that is neither this nor has signal is all wrong."""


def _rewarded(
    rollouts: Rollouts,
    prompts: Prompts,
    first_group: int,
    decode: Callable[[Rollouts], list[str]],
    reward: Reward,
    threshold: float,
) -> _Batch:
    texts = read(rollouts, prompts.problems, decode)
    scores = score(reward, texts)
    assert rollouts.group is not None
    group, groups = rollouts.group, len(prompts)
    rewards, outcomes = scores.rewards.to(group.device), scores.outcomes.to(group.device)
    wrong = group_sum((outcomes <= threshold).float(), group, groups)
    return _Batch(
        rollouts=replace(rollouts, rewards=rewards, outcomes=outcomes, group=group + first_group),
        texts=replace(texts, group=[int(g) + first_group for g in group]),
        terms=scores.terms,
        signal=has_signal(outcomes, group, groups, threshold),
        right=wrong == 0,
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


def _filtered(batches: Sequence[_Batch], prompts: int, filter: Filter) -> Collected:
    rollouts = concatenate([batch.rollouts for batch in batches])
    signal = torch.cat([batch.signal for batch in batches])
    assert rollouts.group is not None and rollouts.mask is not None
    trained = signal.clone() if filter.dynamic_sampling else torch.ones_like(signal)
    trained &= trained.cumsum(0) <= prompts
    metrics = _metrics(batches, rollouts, signal, trained, prompts)
    missing = prompts - int(trained.sum())
    fillers = ~trained & ((~trained).cumsum(0) <= missing)
    rows = (trained | fillers)[rollouts.group]
    rollouts = replace(rollouts, mask=rollouts.mask & trained[rollouts.group][:, None]).rows(rows)
    return Collected(rollouts=rollouts, texts=_joined([batch.texts for batch in batches], rows), metrics=metrics)


def _metrics(
    batches: Sequence[_Batch],
    rollouts: Rollouts,
    signal: Bool[Tensor, " groups"],
    trained: Bool[Tensor, " groups"],
    prompts: int,
) -> dict[str, float]:
    """Of everything that was sampled, dropped groups included, so that a filter does not flatter the policy."""
    assert rollouts.rewards is not None and rollouts.mask is not None and rollouts.truncated is not None
    right = torch.cat([batch.right for batch in batches])
    lengths = rollouts.mask.sum(1).float()
    metrics = {
        "reward/mean": rollouts.rewards.mean(),
        "completions/length": lengths.mean(),
        "completions/longest": lengths.max(),
        "completions/truncated": rollouts.truncated.float().mean(),
        "completions/tokens": lengths.sum(),
        "prompts/drawn": float(len(signal)),
        "prompts/all_right": right.float().mean(),
        "prompts/mixed": signal.float().mean(),
        "prompts/all_wrong": (~right & ~signal).float().mean(),
        "prompts/dropped": (~trained).float().mean(),
        "prompts/unfilled": float(max(prompts - int(trained.sum()), 0)),
        "prompts/generation_batches": float(len(batches)),
    }
    for term in batches[0].terms:
        metrics[f"reward/{term}"] = torch.cat([batch.terms[term] for batch in batches]).mean()
    if rollouts.entropy is not None:
        metrics["completions/entropy"] = rollouts.entropy.sum() / lengths.sum().clamp(min=1)
    if metrics["completions/truncated"] == 1:
        log.warning(
            "100 %% of the %d completions of this collection hit the limit of %d tokens before an end of sequence: rewards that need "
            "the end of the text cannot be earned. Raise sampler.max_new_tokens, or check that the policy ever ends its text.",
            len(rollouts),
            int(lengths.max()),
        )
    if not signal.any():
        log.warning(
            "None of the %d groups of this collection has signal (%.0f %% all right, %.0f %% all wrong): nothing is learned from it.",
            len(signal),
            100 * metrics["prompts/all_right"],
            100 * metrics["prompts/all_wrong"],
        )
    elif metrics["prompts/unfilled"]:
        log.warning(
            "After %d generation batches %d of %d groups are still missing (%.0f %% of the prompts drawn have signal): the step is "
            "smaller. Raise filter.max_generation_batches, or give easier or harder problems.",
            len(batches),
            int(metrics["prompts/unfilled"]),
            prompts,
            100 * metrics["prompts/mixed"],
        )
    return {name: float(value) for name, value in metrics.items()}


def _joined(parts: Sequence[Texts], rows: Bool[Tensor, " R"]) -> Texts:
    kept = rows.nonzero()[:, 0].tolist()

    def joined(name: str) -> list[Any]:
        whole = list(chain.from_iterable(getattr(part, name) for part in parts))
        return [whole[row] for row in kept]

    return Texts(
        **{name: joined(name) for name in ("completions", "answers", "problems", "lengths", "truncated", "group")}
    )
