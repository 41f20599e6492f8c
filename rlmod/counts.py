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

from rlmod.groups import Drawn
from rlmod.types import concatenate

log = logging.getLogger(__name__)


def counted(drawn: Sequence[Drawn], trained: Bool[Tensor, " groups"], prompts: int) -> dict[str, float]:
    """The metrics of a collection of ``prompts`` groups, of which ``trained`` ones passed the filter."""
    rollouts = concatenate([batch.rollouts for batch in drawn])
    assert rollouts.rewards is not None and rollouts.mask is not None and rollouts.truncated is not None
    signal, right, wrong = (torch.cat([getattr(b, name) for b in drawn]) for name in ("signal", "right", "wrong"))
    own = torch.ones_like(rollouts.truncated) if rollouts.from_guide is None else ~rollouts.from_guide
    lengths = rollouts.mask.sum(1).float()
    metrics = {
        "reward/mean": rollouts.rewards[own].mean(),
        "completions/length": lengths[own].mean(),
        "completions/longest": lengths[own].max(),
        "completions/truncated": rollouts.truncated[own].float().mean(),
        "completions/tokens": lengths[own].sum(),
        "prompts/drawn": float(len(signal)),
        "prompts/all_right": right.float().mean(),
        "prompts/mixed": (~right & ~wrong).float().mean(),
        "prompts/all_wrong": wrong.float().mean(),
        "prompts/dropped": (~trained).float().mean(),
        "prompts/unfilled": float(max(prompts - int(trained.sum()), 0)),
        "prompts/generation_batches": float(len(drawn)),
    }
    for term in drawn[0].terms:
        metrics[f"reward/{term}"] = torch.cat([batch.terms[term] for batch in drawn]).to(own.device)[own].mean()
    if rollouts.entropy is not None:
        metrics["completions/entropy"] = rollouts.entropy[own].sum() / lengths[own].sum().clamp(min=1)
    if rollouts.from_guide is not None:
        metrics |= of_guide(drawn)
    _warn(metrics, int(own.sum()), signal, prompts)
    return {name: float(value) for name, value in metrics.items()}


TOTALS = ("completions/tokens", "prompts/drawn", "prompts/unfilled", "guide/tokens", "zero_reward/prompts")


def over_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
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
        elif name == "completions/longest":
            found[name] = max(rank[name] for rank in having)
        else:
            weight = "completions/tokens" if name == "completions/entropy" else "prompts/drawn"
            total = sum(rank[weight] for rank in having)
            found[name] = sum(rank[name] * rank[weight] for rank in having) / max(total, 1)
    return found


def of_guide(drawn: Sequence[Drawn]) -> dict[str, float]:
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
            100 * metrics["prompts/all_right"],
            100 * metrics["prompts/all_wrong"],
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
