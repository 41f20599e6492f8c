"""Pure functions: log-probabilities, entropies, and statistics over masked tokens, over groups and over ranks."""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor


def token_logprobs(
    logits: Float[Tensor, "R T V"], ids: Int[Tensor, "R T"], temperature: float = 1.0
) -> Float[Tensor, "R T"]:
    """log softmax(logits / temperature) at ``ids``, in nats, in float32 or wider."""
    logits = _at_temperature(logits, temperature)
    return logits.gather(-1, ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Float[Tensor, "*axes V"], temperature: float = 1.0) -> Float[Tensor, "*axes"]:
    """H = -sum_v p_v log p_v with p = softmax(logits / temperature), over the full vocabulary, in nats."""
    return _entropy(_at_temperature(logits, temperature).log_softmax(-1))


def sampled_logprobs_and_entropy(
    logits: Float[Tensor, "R V"], ids: Int[Tensor, " R"], temperature: float = 1.0
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Log-probability of ``ids`` and entropy at one position, in nats, for sampling: few passes over the vocabulary, no gradient."""
    z = _at_temperature(logits, temperature)
    z = z - z.amax(-1, keepdim=True)
    p = z.exp()
    total = p.sum(-1)
    normaliser = total.log()
    logprobs = z.gather(-1, ids[:, None]).squeeze(-1) - normaliser
    # H = log S + sum_v p_v (max z - z_v): no term is negative, so nothing cancels if the entropy is small. The clamp avoids 0 * -inf = NaN.
    return logprobs, normaliser - p.mul_(z.clamp_(min=torch.finfo(z.dtype).min)).sum(-1) / total


def _entropy(log_p: Tensor) -> Tensor:
    # logsumexp - sum p z would cancel if the entropy is small, and GTPO divides by small entropies.
    p = log_p.exp()
    # A token with probability 0 contributes 0; 0 * -inf would be NaN.
    return -(p * log_p.masked_fill(p == 0, 0.0)).sum(-1)


def _at_temperature(logits: Tensor, temperature: float) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def log_ratio(
    logprobs: Float[Tensor, "R T"], old: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]
) -> Float[Tensor, "R T"]:
    """log pi - log pi_old per token, in nats, clamped to [-20, 20]; 0 where the mask is False.

    Without the clamp, a very low recorded log-probability would make the ratio infinite and its gradient NaN, even with clipping.
    """
    return torch.where(mask, logprobs - old, 0).clamp(-20, 20)


def masked_mean(
    values: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """Mean of the values where the mask is True; 0 if the mask is True nowhere. Masked-out values may be anything, NaN included."""
    counted = torch.where(mask, values, 0)
    if dim is None:
        return counted.sum() / mask.sum().clamp(min=1)
    return counted.sum(dim) / mask.sum(dim).clamp(min=1)


def group_index(group: Int[Tensor, " R"]) -> tuple[Int[Tensor, " R"], int]:
    """Return each row's group, renumbered 0, 1, ... without gaps, and the number of groups."""
    names, index = torch.unique(group, return_inverse=True)
    return index, len(names)


def group_sum(
    values: Float[Tensor, " R *axes"], index: Int[Tensor, " R"], groups: int
) -> Float[Tensor, " groups *axes"]:
    """Sum of the values of each group's rows."""
    return values.new_zeros(groups, *values.shape[1:]).index_add_(0, index, values)


def standardize(
    values: Float[Tensor, "R T"],
    counted: Bool[Tensor, "R T"],
    index: Int[Tensor, " R"],
    groups: int,
    *,
    eps: float = 1e-6,
    divide_by_std: bool = True,
    over_ranks: bool = False,
    also_normalize: Bool[Tensor, "R T"] | None = None,
) -> Float[Tensor, "R T"]:
    """(x - mean) / (std + eps) with the mean and std (ddof 1) of each group's counted entries; 0 where not counted.

    If all counted entries of a group are equal, the result is exactly 0: their std is only rounding residue (0.35 added up and divided),
    and division by it would turn the residue into an advantage. ``over_ranks`` computes the statistics over all ranks.

    ``also_normalize`` entries are normalized with the same statistics but excluded from computing them. If all counted entries are equal,
    they are centered but not divided.
    """
    sums, maxima = (all_sum, all_max) if over_ranks else (_identity, _identity)
    highest = maxima(_group_max(values, counted, index, groups))
    lowest = -maxima(_group_max(-values, counted, index, groups))
    n = sums(group_sum(counted.sum(1).to(values.dtype), index, groups))
    mean = sums(group_sum(torch.where(counted, values, 0).sum(1), index, groups)) / n.clamp(min=1)
    varies = (highest > lowest)[index, None]
    deviation = torch.where(counted & varies, values - mean[index, None], 0)
    centered = (
        deviation
        if also_normalize is None
        else torch.where(also_normalize & ~counted, values - mean[index, None], deviation)
    )
    if not divide_by_std:
        return centered
    variance = sums(group_sum(deviation.square().sum(1), index, groups)) / (n - 1).clamp(min=1)
    return centered / torch.where(varies, variance.sqrt()[index, None] + eps, 1)


def _group_max(values: Tensor, counted: Tensor, index: Tensor, groups: int) -> Tensor:
    rows = values.masked_fill(~counted, -torch.inf).amax(1)
    return rows.new_full((groups,), -torch.inf).scatter_reduce_(0, index, rows, "amax")


def has_signal(
    outcomes: Float[Tensor, " R"],
    index: Int[Tensor, " R"],
    groups: int,
    threshold: float,
    rows: Bool[Tensor, " R"] | None = None,
) -> Bool[Tensor, " groups"]:
    """Return True for groups with 0 < #correct < G, where correct means outcome > threshold (DAPO, arXiv:2503.14476, eq. 11).

    ``rows`` restricts the rows that count.
    """
    counted = torch.ones_like(outcomes) if rows is None else rows.to(outcomes.dtype)
    correct = group_sum((outcomes > threshold) * counted, index, groups)
    return (correct > 0) & (correct < group_sum(counted, index, groups))


def all_sum(value: Tensor) -> Tensor:
    """Sum over all ranks, element by element; the value itself if there is only one rank."""
    return _all_reduce(value, dist.ReduceOp.SUM)


def all_max(value: Tensor) -> Tensor:
    """Maximum over all ranks, element by element; the value itself if there is only one rank."""
    return _all_reduce(value, dist.ReduceOp.MAX)


def _all_reduce(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, op=operation)
    return value


def all_gather(values: Float[Tensor, " n"]) -> Float[Tensor, " N"]:
    """Concatenate the values of all ranks, in rank order. Ranks may have different numbers of values."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    sizes = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
    longest = int(torch.cat(sizes).max())
    padded = [values.new_zeros(longest) for _ in sizes]
    dist.all_gather(padded, torch.nn.functional.pad(values, (0, longest - len(values))))
    return torch.cat([part[: int(size)] for part, size in zip(padded, sizes, strict=True)])


def _identity(value: Tensor) -> Tensor:
    return value
