"""What a collection is counted and warned of: of everything that was sampled, dropped groups included.

So that a filter does not flatter the policy. Names that do not begin with ``guide/`` speak of the policy's own completions.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

from rlmod import ops
from rlmod.interfaces import Sampler, WeightSyncedSampler
from rlmod.rollout.groups import RewardedGroups
from rlmod.types import Rollouts, concatenate

log = logging.getLogger(__name__)


def rollout_metrics(
    drawn: Sequence[RewardedGroups], trained: Bool[Tensor, " groups"], prompts: int
) -> dict[str, float]:
    """The metrics of a collection of ``prompts`` groups, of which ``trained`` ones passed the filter."""
    rollouts = concatenate([batch.rollouts for batch in drawn])
    assert rollouts.rewards is not None and rollouts.mask is not None and rollouts.truncated is not None
    signal, all_correct, all_incorrect = (
        torch.cat([getattr(b, name) for b in drawn]) for name in ("signal", "all_correct", "all_incorrect")
    )
    own = torch.ones_like(rollouts.truncated) if rollouts.from_guide is None else ~rollouts.from_guide
    lengths = rollouts.mask.sum(1).float()
    metrics = {
        "reward/mean": rollouts.rewards[own].mean(),
        "completions/length": lengths[own].mean(),
        "completions/longest": lengths[own].max(),
        "completions/truncated": rollouts.truncated[own].float().mean(),
        "completions/tokens": lengths[own].sum(),
        "prompts/seen": float(len(signal)),
        "prompts/all_correct": all_correct.float().mean(),
        "prompts/mixed": (~all_correct & ~all_incorrect).float().mean(),
        "prompts/all_incorrect": all_incorrect.float().mean(),
        "prompts/dropped": (~trained).float().mean(),
        "prompts/unfilled": float(max(prompts - int(trained.sum()), 0)),
        "prompts/generation_batches": float(len(drawn)),
    }
    for term in drawn[0].terms:
        metrics[f"reward/{term}"] = torch.cat([batch.terms[term] for batch in drawn]).to(own.device)[own].mean()
    metrics |= mean_entropy(rollouts)
    if rollouts.from_guide is not None:
        metrics |= guide_metrics(drawn)
    _warn(metrics, int(own.sum()), signal, prompts)
    return {name: float(value) for name, value in metrics.items()}


def mean_entropy(rollouts: Rollouts) -> dict[str, float]:
    """Over the policy's own tokens; nothing where entropies are not known (yet)."""
    if rollouts.entropy is None or rollouts.mask is None:
        return {}
    own = rollouts.mask if rollouts.from_guide is None else rollouts.mask & ~rollouts.from_guide[:, None]
    return {"completions/entropy": float(ops.masked_mean(rollouts.entropy, own))}


def agreement(rollouts: Rollouts) -> dict[str, float]:
    """How far the sampling engine's log-probabilities are from pi_old's, over the counted tokens of the policy's own rows, in nats.

    And the ratios pi_old / pi_sampler, as they are before any truncation.
    """
    assert rollouts.mask is not None and rollouts.logprobs is not None and rollouts.sampler_logprobs is not None
    own = rollouts.mask if rollouts.from_guide is None else rollouts.mask & ~rollouts.from_guide[:, None]
    apart = (rollouts.logprobs - rollouts.sampler_logprobs)[own]
    if not len(apart):
        return {}
    ratios = apart.exp()
    return {
        "sampler/difference": float(apart.abs().mean()),
        "sampler/difference_max": float(apart.abs().max()),
        "sampler/ratio": float(ratios.mean()),
        "sampler/ratio_min": float(ratios.min()),
        "sampler/ratio_max": float(ratios.max()),
    }


def check_agreement(sampler: Sampler, metrics: Mapping[str, float]) -> None:
    """ValueError where the engine samples from another policy than the one that is trained."""
    apart = metrics.get("sampler/difference")
    if isinstance(sampler, WeightSyncedSampler) and apart is not None and not apart <= sampler.max_difference:
        raise ValueError(
            f"the sampler's log-probabilities are {apart:.4f} nats from the policy's in the mean, more than sampler.max_difference="
            f"{sampler.max_difference} (the ratios go from {metrics['sampler/ratio_min']:.3g} to {metrics['sampler/ratio_max']:.3g}): "
            "the engine has other weights, or computes in another precision (sampler.dtype, trainer.precision)"
        )


TOTALS = ("completions/tokens", "prompts/seen", "prompts/unfilled", "guide/tokens", "zero_reward/prompts")


def reduce_across_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Of all ranks: totals added up, the longest the longest of all, shares and means weighted by the prompts that a rank drew,
    the entropy of a token by its tokens.

    Ranks may have measured different things, as where only some had failed prompts.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(metrics)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dict(metrics))
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        having = [rank for rank in ranks if name in rank]
        if name in TOTALS:
            found[name] = sum(rank[name] for rank in having)
        elif name == "completions/longest" or name.endswith("_max"):
            found[name] = max(rank[name] for rank in having)
        elif name.endswith("_min"):
            found[name] = min(rank[name] for rank in having)
        else:
            weight = "completions/tokens" if name == "completions/entropy" else "prompts/seen"
            total = sum(rank[weight] for rank in having)
            found[name] = sum(rank[name] * rank[weight] for rank in having) / max(total, 1)
    return found


def guide_metrics(drawn: Sequence[RewardedGroups]) -> dict[str, float]:
    """The guide's own rows: what they earned, and what they cost."""
    rows = [batch.rollouts.rows(batch.rollouts.from_guide) for batch in drawn if batch.rollouts.from_guide is not None]
    guide = concatenate(rows)
    assert guide.rewards is not None and guide.mask is not None
    tokens = float(guide.mask.sum())
    return {
        "guide/reward": float(guide.rewards.mean()),
        "guide/length": tokens / max(len(guide), 1),
        "guide/tokens": tokens,
    }


def _warn(metrics: dict[str, Tensor | float], rows: int, signal: Bool[Tensor, " groups"], prompts: int) -> None:
    if metrics["completions/truncated"] == 1:
        log.warning(
            "100 %% of the %d completions of this collection hit the limit of %d tokens before an end of sequence: rewards that need "
            "the end of the text cannot be earned. Raise sampler.max_new_tokens, or check that the policy ever ends its text.",
            rows,
            int(metrics["completions/longest"]),
        )
    if not signal.any():
        log.warning(
            "None of the %d groups of this collection has signal (%.0f %% all right, %.0f %% all wrong): nothing is learned from it.",
            len(signal),
            100 * metrics["prompts/all_correct"],
            100 * metrics["prompts/all_incorrect"],
        )
    elif metrics["prompts/unfilled"]:
        log.warning(
            "After %d generation batches %d of %d groups are still missing (%.0f %% of the prompts drawn have signal): the step is "
            "smaller. Raise filter.max_generation_batches, or give easier or harder problems.",
            int(metrics["prompts/generation_batches"]),
            int(metrics["prompts/unfilled"]),
            prompts,
            100 * float(signal.float().mean()),
        )
