"""Prompts in, rewarded rollouts out: sampling, guide, reward, and DAPO's dynamic sampling with refill.

draw -> sampler -> guide -> reward -> filter -> enough groups with signal? -> rollouts
  ^                                               | no: draw again, at most max_generation_batches times
  +-----------------------------------------------+ yes
                       prompts where every own completion is wrong -> guide -> reward -> the zero-reward batch, behind them
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from itertools import count
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rlmod.interfaces import Guide, Reward, Sampler
from rlmod.reward._compute import RewardResult, compute_rewards
from rlmod.rollout import async_rewards
from rlmod.rollout.async_rewards import AsyncRewards
from rlmod.rollout.groups import RewardedGroups, interleave, reward_groups, select_texts
from rlmod.rollout.metrics import guide_metrics, rollout_metrics
from rlmod.types import Prompts, Rollouts, Texts, concatenate


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
    over: Literal["union", "own"] = "union"
    """Whose completions decide, where a guide supplies some: everybody's, or the policy's own."""
    threshold: float = 0.5
    """A completion is correct when its reward, without penalties, is above this."""

    def __post_init__(self) -> None:
        if self.max_generation_batches < 1:
            raise ValueError(f"filter.max_generation_batches must be at least 1, got {self.max_generation_batches}")


@dataclass(frozen=True, kw_only=True)
class ZeroReward:
    """J = J_1 + weight * J_0: prompts on which the policy alone failed, as a batch of their own that a guide leads.

    J_1 is the collection as the filter left it. In J_0 stand the prompts that it dropped and where all own completions are wrong, each
    interleave by ``completions_per_prompt`` completions of the guide; shaped by itself, with a normaliser of its own.

    Source: [R] MIX, arXiv:2507.12931: zero-reward samples are used again "as a distinct batch guided by the expert policy".
    Differs: [D] at most ``prompts`` of them in a collection; those beyond are dropped, and counted.
    Degenerate: weight 0 asks nothing of the guide and changes nothing, bit for bit. A prompt where the guide fails too stays
    dropped (unless ``keep_if_guide_fails``). A prompt that is all right is never among them.
    """

    weight: float = 0.0
    """lambda; 0: off."""
    completions_per_prompt: int = 2
    prompts: int | None = None
    """The most of them in a collection, over all ranks; null: as many as batch.prompts."""
    keep_if_guide_fails: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"zero_reward.weight must be finite, 0 (off) or more, got {self.weight}")
        for name in ("completions_per_prompt", "prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"zero_reward.{name} must be at least 1, got {value}")

    @property
    def active(self) -> bool:
        return self.weight > 0

    def room(self, prompts: int, ranks: int, rank: int = 0) -> int:
        """The most groups on this rank, whose collection holds ``prompts``; the first ranks have those that do not come out even."""
        if not self.active:
            return 0
        return prompts if self.prompts is None else self.prompts // ranks + (rank < self.prompts % ranks)

    def rows(self, prompts: int, ranks: int, rows_per_prompt: int) -> int:
        """The most rows on one rank."""
        return self.room(prompts, ranks) * (rows_per_prompt + self.completions_per_prompt)


@dataclass(frozen=True, kw_only=True)
class RolloutBatch:
    """One collection: its rollouts, their texts (an entry a row), and what was counted on the way."""

    rollouts: Rollouts
    texts: Texts
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What the prompts of one collection go through until they are rewarded rollouts."""

    policy: nn.Module
    decode: Callable[[Rollouts], list[str]]
    logprob_pass: Callable[[Rollouts], Rollouts]
    """Fills in pi_old's log-probabilities and entropy where they are missing."""
    draw: Callable[[int], Prompts]
    """``draw(n)``: the next n prompts."""
    sampler: Sampler
    guide: Guide | None
    reward: Reward
    filter: Filter
    zero_reward: ZeroReward
    seed: Callable[..., int]
    """``seed(i)`` of the i-th batch of this collection, ``seed(i, 1)`` of the i-th time the guide is asked: with one seed for both, a
    guide that is much like the policy would repeat its completions."""
    times_asked: Iterator[int] = field(default_factory=count)

    def sample_and_reward(self, prompts: Prompts, batch: int, first_group: int) -> RewardedGroups:
        """Own completions of these prompts and, where it joins every prompt, the guide's; rewarded, beside sampling where that can be."""
        seed = self.seed(batch)
        if not async_rewards.supports_async_rewards(self.sampler, self.reward):
            rollouts = self.with_guide(self.sampler(self.policy, prompts, seed), prompts)
            return self.reward_groups(rollouts, prompts, first_group)
        with closing(AsyncRewards(self.reward, prompts.problems, self.decode)) as early:
            own = cast(Any, self.sampler)(self.policy, prompts, seed, on_finished=early.submit)
            return self.reward_groups(self.with_guide(own, prompts), prompts, first_group, early.result)

    def with_guide(self, own: Rollouts, prompts: Prompts) -> Rollouts:
        """And the guide's, where it joins every prompt."""
        if self.guide is None or self.guide.completions_per_prompt == 0:
            return own
        return interleave(self.logprob_pass(own), self.sample_guide(prompts, self.guide.completions_per_prompt))

    def sample_guide(self, prompts: Prompts, completions_per_prompt: int) -> Rollouts:
        assert self.guide is not None
        rows = self.guide(prompts, completions_per_prompt, self.seed(next(self.times_asked), 1))
        entropy = self.logprob_pass(replace(rows, logprobs=None, entropy=None)).entropy
        assert rows.truncated is not None
        return replace(rows, entropy=entropy, from_guide=torch.ones_like(rows.truncated))

    def reward_groups(
        self,
        rollouts: Rollouts,
        prompts: Prompts,
        first_group: int,
        scores: Callable[[Rollouts, Texts], RewardResult] | None = None,
    ) -> RewardedGroups:
        own = self.filter.over == "own"
        threshold = self.filter.threshold
        scores = scores or (lambda _, texts: compute_rewards(self.reward, texts))
        return reward_groups(rollouts, prompts, first_group, self.decode, scores, threshold=threshold, over_own=own)


@torch.no_grad()
def collect(stages: Stages, *, prompts: int, room: int) -> RolloutBatch:
    """``prompts`` groups of rewarded rollouts, and behind them those of the zero-reward batch: at most ``room`` groups."""
    batches = sample_until_full(stages, prompts)
    signal = torch.cat([batch.signal for batch in batches])
    trained = signal.clone() if stages.filter.dynamic_sampling else torch.ones_like(signal)
    trained &= trained.cumsum(0) <= prompts
    collected = _filled(batches, trained, prompts)
    if not stages.zero_reward.active:
        return collected
    joint = _guided(stages, batches, room)
    if joint:  # scored here, with pi_old: later the guide's rows could no longer be told from those that still lack it
        collected = replace(collected, rollouts=stages.logprob_pass(collected.rollouts))
    return _with_zero_reward(collected, joint, len(signal), stages.zero_reward, stages.filter.threshold)


def sample_until_full(stages: Stages, prompts: int) -> list[RewardedGroups]:
    """Batches of prompts, until the filter has enough of them."""
    batches: list[RewardedGroups] = []
    drawn = usable = 0
    wanted = prompts
    while True:
        drawing = stages.draw(wanted)
        batches.append(stages.sample_and_reward(drawing, len(batches), drawn))
        drawn += len(drawing)
        usable += int(batches[-1].signal.sum())
        rounds = stages.filter.max_generation_batches if stages.filter.dynamic_sampling else 1
        if usable >= prompts or len(batches) == rounds:
            return batches
        share_with_signal = max(usable, 1) / drawn
        wanted = min(prompts, math.ceil((prompts - usable) / share_with_signal))


def _guided(stages: Stages, batches: Sequence[RewardedGroups], room: int) -> list[RewardedGroups]:
    """The first ``room`` groups without a right completion of the policy's own, interleave by completions of the guide."""
    joint: list[RewardedGroups] = []
    first_group = sum(len(batch.prompts) for batch in batches)
    for batch in batches:
        failed = (batch.all_incorrect & ~batch.signal).nonzero()[:room, 0]
        if len(failed):
            prompts = batch.prompts.pick(failed.tolist())
            guided = stages.sample_guide(prompts, stages.zero_reward.completions_per_prompt)
            rows = interleave(stages.logprob_pass(batch.rows_of(failed)), guided)
            joint.append(stages.reward_groups(rows, prompts, first_group))
            first_group += len(failed)
            room -= len(failed)
    return joint


def _filled(batches: Sequence[RewardedGroups], trained: Bool[Tensor, " groups"], prompts: int) -> RolloutBatch:
    """The groups that passed the filter; what is missing to ``prompts`` is filled with others, masked out whole."""
    rollouts = concatenate([batch.rollouts for batch in batches])
    assert rollouts.group is not None and rollouts.mask is not None
    missing = prompts - int(trained.sum())
    fillers = ~trained & ((~trained).cumsum(0) <= missing)
    rows = (trained | fillers)[rollouts.group]
    rollouts = replace(rollouts, mask=rollouts.mask & trained[rollouts.group][:, None]).rows(rows)
    texts = select_texts([batch.texts for batch in batches], rows)
    return RolloutBatch(rollouts=rollouts, texts=texts, metrics=rollout_metrics(batches, trained, prompts))


def _with_zero_reward(
    collected: RolloutBatch, joint: Sequence[RewardedGroups], drawn: int, settings: ZeroReward, threshold: float
) -> RolloutBatch:
    """The collection, and behind it the groups that the guide rescued, marked ``zero_reward``."""
    own = collected.rollouts
    assert own.truncated is not None
    nobody = torch.zeros_like(own.truncated)
    own = replace(own, zero_reward=nobody, from_guide=nobody if own.from_guide is None else own.from_guide)
    # Without own completions right, whatever is right is the guide's.
    helped = [batch.solved(threshold) for batch in joint]
    rescued = sum(int(groups.sum()) for groups in helped)
    failed = sum(len(batch.prompts) for batch in joint)
    metrics = dict(collected.metrics)
    metrics |= {
        "prompts/rescued": rescued / drawn,
        "prompts/dropped": metrics["prompts/dropped"] - rescued / drawn,
        "zero_reward/prompts": float(failed),
        "zero_reward/guide_failed": (failed - rescued) / max(failed, 1),
    }
    if not joint:
        return RolloutBatch(rollouts=own, texts=collected.texts, metrics=metrics)
    rows = torch.cat(
        [
            (groups | settings.keep_if_guide_fails)[batch.group_of_row]
            for batch, groups in zip(joint, helped, strict=True)
        ]
    )
    guide_counts = guide_metrics(joint)
    metrics |= {name.replace("guide/", "zero_reward/guide_"): value for name, value in guide_counts.items()}
    metrics["guide/tokens"] = metrics.get("guide/tokens", 0.0) + guide_counts["guide/tokens"]
    added = concatenate([batch.rollouts for batch in joint]).rows(rows)
    assert added.truncated is not None
    added = replace(added, zero_reward=torch.ones_like(added.truncated))
    texts = select_texts([batch.texts for batch in joint], rows)
    return RolloutBatch(
        rollouts=concatenate([own, added]),
        texts=Texts(**{f.name: [*getattr(collected.texts, f.name), *getattr(texts, f.name)] for f in fields(Texts)}),
        metrics=metrics,
    )
