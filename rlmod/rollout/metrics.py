"""Metrics and warnings of a rollout batch. They cover everything sampled, including groups that the filter dropped.

So a filter does not make the policy look better than it is. Names that do not begin with ``guide/`` cover on-policy completions only.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod import ops
from rlmod.interfaces import Sampler, Shaper, WeightSyncedSampler, declared
from rlmod.reward._failures import failure_metrics
from rlmod.rollout.groups import RewardedGroups
from rlmod.types import Rollouts, concatenate, require

log = logging.getLogger(__name__)


def rollout_metrics(
    batches: Sequence[RewardedGroups], kept: Bool[Tensor, " groups"], prompts: int, *, rewards_train: bool = True
) -> dict[str, float]:
    """Return the metrics of a rollout batch of ``prompts`` groups. ``kept`` is True for the groups that train.

    With ``rewards_train=False`` no warning is logged about groups whose rewards hold no signal.
    """
    rollouts = concatenate([batch.rollouts for batch in batches])
    signal, all_correct, all_incorrect = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("signal", "all_correct", "all_incorrect")
    )
    on_policy = torch.ones_like(rollouts.truncated) if rollouts.from_guide is None else ~rollouts.from_guide
    lengths = rollouts.mask.sum(1).float()
    scored = on_policy if rollouts.abstained is None else on_policy & ~rollouts.abstained
    metrics = {
        "reward/mean": require(rollouts.rewards, "rewards")[scored].mean(),  # NaN if the reward abstained from all
        "completions/length": lengths[on_policy].mean(),
        "completions/longest": lengths[on_policy].max(),
        "completions/truncated": rollouts.truncated[on_policy].float().mean(),
        "completions/tokens": lengths[on_policy].sum(),
        "completions/scored": float(scored.sum()),
        "prompts/seen": float(len(signal)),
        "prompts/all_correct": all_correct.float().mean(),
        "prompts/mixed": (~all_correct & ~all_incorrect).float().mean(),
        "prompts/all_incorrect": all_incorrect.float().mean(),
        "prompts/dropped": (~kept).float().mean(),
        "prompts/unfilled": float(max(prompts - int(kept.sum()), 0)),
        "prompts/generation_batches": float(len(batches)),
    }
    if bool(scored.any()):
        for name, values in rollouts.terms.items():
            metrics |= _term_metrics(name, values[scored])
    metrics |= failure_metrics([batch.failed for batch in batches], rollouts.abstained)
    metrics |= mean_entropy(rollouts)
    if rollouts.from_guide is not None:
        metrics |= guide_metrics(batches)
    largest = require(rollouts.rewards, "rewards").abs().max()
    if largest > LARGE_REWARD:
        log.warning(
            "The largest reward is %.3g. The standard deviation of such rewards overflows, so the advantages become 0 and the "
            "policy learns nothing: scale the reward.",
            float(largest),
        )
    _log_warnings(
        metrics,
        int(on_policy.sum()),
        signal | (not rewards_train),
        torch.cat([batch.kept for batch in batches]),
        prompts,
    )
    return {name: float(value) for name, value in metrics.items()}


def _term_metrics(name: str, values: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Return the mean of a reward term, and its std (ddof 0), minimum and maximum. The std and the extremes do not hide in a sum."""
    spread = values.double().std(correction=0)
    return {
        f"reward/{name}": values.mean(),
        f"reward/{name}/std": spread,
        f"reward/{name}/min": values.min(),
        f"reward/{name}/max": values.max(),
    }


def mean_entropy(rollouts: Rollouts) -> dict[str, float]:
    """Average the entropy, in nats, over on-policy tokens. Empty if entropies are not computed yet."""
    if rollouts.entropy is None:
        return {}
    return {"completions/entropy": float(ops.masked_mean(rollouts.entropy, _on_policy_tokens(rollouts)))}


def advantage_spread(records: Sequence[Rollouts]) -> dict[str, float]:
    """Return how far advantages differ within completions and between them, over all ranks. Empty without an advantage other than 0.

    ``shaper/spread_within`` is the std (ddof 0) over the tokens of a completion, averaged over completions of two tokens and more.
    ``shaper/spread_between`` is the std of the completions' mean advantages. Completions without any advantage do not count.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for rollouts in records:
        advantages, mask = require(rollouts.advantages, "advantages").double(), rollouts.mask
        rows = (mask & (advantages != 0)).any(1)
        means = ops.masked_mean(advantages, mask, dim=1)
        stds = ops.masked_mean((advantages - means[:, None]).square(), mask, dim=1).sqrt()
        several = rows & (mask.sum(1) > 1)
        found = (stds[several].sum(), several.sum(), means[rows].sum(), means[rows].square().sum(), rows.sum())
        sums = sums.to(means.device) + torch.stack([each.double() for each in found])
    within, several, total, squares, rows = ops.all_sum(sums).tolist()
    if not rows:
        return {}
    between = max(squares / rows - (total / rows) ** 2, 0.0) ** 0.5
    return {"shaper/spread_within": within / max(several, 1), "shaper/spread_between": between}


def shapes_no_token(shaper: Shaper, spread: Mapping[str, float]) -> bool:
    """Return True if a token-level shaper has given each completion one advantage."""
    if declared(shaper, "granularity") != "token" or not spread:
        return False
    return spread["shaper/spread_within"] < 1e-3 * spread["shaper/spread_between"]


def sampler_agreement(rollouts: Rollouts) -> dict[str, float]:
    """Compare the sampling engine's log-probabilities with pi_old's: |difference| in nats, and the ratios pi_old / pi_sampler.

    Only on-policy tokens under the mask count. The ratios are not truncated. Empty if no token counts.
    """
    logprobs, reported = require(rollouts.logprobs, "logprobs"), require(rollouts.sampler_logprobs, "sampler_logprobs")
    difference = (logprobs - reported)[_on_policy_tokens(rollouts)]
    if not len(difference):
        return {}
    ratios = difference.exp()
    return {
        "sampler/difference": float(difference.abs().mean()),
        "sampler/difference_max": float(difference.abs().max()),
        "sampler/ratio": float(ratios.mean()),
        "sampler/ratio_min": float(ratios.min()),
        "sampler/ratio_max": float(ratios.max()),
    }


RECOMPUTED = "sampler/recomputed"
"""The difference in nats between the log-probabilities of a sampler that computes pi_old's and those of a forward pass."""
MAX_RECOMPUTED = 0.1


def check_agreement(sampler: Sampler, metrics: Mapping[str, float]) -> None:
    """ValueError if the engine's log-probabilities differ from the policy's by more than ``sampler.max_difference`` nats on average.

    A sampler that computes pi_old's log-probabilities itself, such as sampler=hf, may differ by 0.1 from a forward pass.
    """
    if (recomputed := metrics.get(RECOMPUTED)) is not None and not recomputed <= MAX_RECOMPUTED:
        raise ValueError(
            f"the log-probabilities that the sampler recorded differ from those of a forward pass by {recomputed:.4f} nats on average: the "
            "policy computes something else while it generates (noise that is on in one of them, or a cache that it does not support), so "
            "every ratio would be wrong; use sampler=vllm, or another policy"
        )
    difference = metrics.get("sampler/difference")
    if isinstance(sampler, WeightSyncedSampler) and difference is not None and not difference <= sampler.max_difference:
        raise ValueError(
            f"the sampler's log-probabilities differ from the policy's by {difference:.4f} nats on average, more than "
            f"sampler.max_difference={sampler.max_difference} (the ratios range from {metrics['sampler/ratio_min']:.3g} to "
            f"{metrics['sampler/ratio_max']:.3g}): the engine has other weights, or computes in another precision (compare "
            "sampler.dtype with trainer.precision)"
        )


def _on_policy_tokens(rollouts: Rollouts) -> Bool[Tensor, "R T"]:
    return rollouts.mask if rollouts.from_guide is None else rollouts.mask & ~rollouts.from_guide[:, None]


TOTALS = (
    "completions/tokens",
    "completions/scored",
    "prompts/seen",
    "prompts/unfilled",
    "guide/tokens",
    "zero_reward/prompts",
    "zero_reward/guide_tokens",
)
"""Metrics that are summed across ranks, like all failures/ counts."""


def reduce_across_ranks(metrics: Mapping[str, float]) -> dict[str, float]:
    """Reduce across ranks: sum totals, take the extremes of those named longest, min and max, combine each std, otherwise average.

    Averages are weighted by the number of prompts that each rank has seen; those of rewards by its completions with a reward, the
    entropy by its tokens. Ranks may have different metrics, for example if only some had failed prompts.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return dict(metrics)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dict(metrics))
    return merge_ranks(ranks)


def merge_ranks(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of all ranks together, as ``reduce_across_ranks`` says."""
    reduced: dict[str, float] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        measured = [rank for rank in ranks if name in rank]
        values = [rank[name] for rank in measured]
        if name in TOTALS or name.startswith("failures/"):
            reduced[name] = sum(values)
        elif (
            name == "completions/longest"
            or name.endswith("/max")
            or (name.startswith("sampler/") and name.endswith("_max"))
        ):
            reduced[name] = max(values)
        elif name.endswith("/min") or (name.startswith("sampler/") and name.endswith("_min")):
            reduced[name] = min(values)
        elif name.startswith("reward/") and name.endswith("/std"):
            # E[x^2] - E[x]^2 over all ranks, from each rank's std and mean.
            mean = name.removesuffix("/std")
            squares = _weighted_mean(
                measured, [v**2 + rank[mean] ** 2 for v, rank in zip(values, measured, strict=True)], name
            )
            reduced[name] = (
                max(squares - _weighted_mean(measured, [rank[mean] for rank in measured], name) ** 2, 0.0) ** 0.5
            )
        else:
            reduced[name] = _weighted_mean(measured, values, name)
    return reduced


def _weighted_mean(ranks: Sequence[Mapping[str, float]], values: Sequence[float], name: str) -> float:
    """Average the ranks' values of a metric. A rank of weight 0 has no value to speak of: NaN if all have."""
    weights_of = {"reward": "completions/scored", "zero_reward": "zero_reward/prompts"}
    weight = weights_of.get(name.split("/")[0], "prompts/seen")
    weight = "completions/tokens" if name == "completions/entropy" else weight
    weights = [rank[weight] for rank in ranks]
    if not sum(weights):
        return values[0]
    return sum(value * share for value, share in zip(values, weights, strict=True) if share) / sum(weights)


def guide_metrics(batches: Sequence[RewardedGroups]) -> dict[str, float]:
    """Return the mean reward and length, and the number of tokens, of the guide's completions, or of guided prompts."""
    records = [batch.rollouts for batch in batches]
    rows = [each if each.from_guide is None else each.rows(each.from_guide) for each in records]
    guide = concatenate(rows)
    tokens = float(guide.mask.sum())
    return {
        "guide/reward": float(require(guide.rewards, "rewards").mean()),
        "guide/length": tokens / max(len(guide), 1),
        "guide/tokens": tokens,
    }


LARGE_REWARD = 1e15
"""Above this the squares of rewards, which a standard deviation needs, come near the largest float32."""


def _log_warnings(
    metrics: dict[str, Tensor | float],
    completions: int,
    signal: Bool[Tensor, " groups"],
    kept: Bool[Tensor, " groups"],
    prompts: int,
) -> None:
    if metrics["completions/truncated"] == 1:
        log.warning(
            "100 %% of the %d completions of this rollout batch hit the limit of %d tokens before an end of sequence: rewards that need "
            "the end of the text cannot be earned. Raise sampler.max_new_tokens, or check that the policy generates an EOS token.",
            completions,
            int(metrics["completions/longest"]),
        )
    if not signal.any():
        log.warning(
            "None of the %d groups of this rollout batch has signal (%.0f %% all correct, %.0f %% all incorrect): the policy learns "
            "nothing from it.",
            len(signal),
            100 * metrics["prompts/all_correct"],
            100 * metrics["prompts/all_incorrect"],
        )
    elif not kept.any():
        log.warning(
            "The filter dropped all %d groups of this rollout batch: the policy learns nothing from it.", len(kept)
        )
    elif metrics["prompts/unfilled"]:
        log.warning(
            "After %d generation batches %d of %d groups are still missing (the filter keeps %.0f %% of the prompts), so the "
            "step has fewer groups. Raise filter.max_generation_batches, or use easier or harder problems.",
            int(metrics["prompts/generation_batches"]),
            int(metrics["prompts/unfilled"]),
            prompts,
            100 * float(kept.float().mean()),
        )
