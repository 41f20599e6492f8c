"""Inputs on which other implementations were compared with ours, and the step's loss on them."""

from typing import Any

import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.interfaces import Aggregation, Loss
from rlmod.types import Rollouts, build_rollouts


def agreed(**extra: Any) -> tuple[torch.Tensor, Rollouts]:
    """Log-probabilities with gradient, and rollouts without advantages, drawn in a fixed order; ``extra`` sets further fields."""
    g = torch.Generator().manual_seed(1234)
    b, t = 8, 12
    lens = torch.tensor([12, 7, 3, 12, 9, 1, 5, 12])
    mask = torch.arange(t) < lens[:, None]
    lp = -torch.rand(b, t, generator=g) * 3
    old = lp + 0.35 * torch.randn(b, t, generator=g)
    reference = lp + 0.2 * torch.randn(b, t, generator=g)
    sampler = old + 0.1 * torch.randn(b, t, generator=g)
    entropy = (2 * torch.rand(b, t, generator=g)).double()
    lp, old, reference, sampler = (x.clamp(max=-1e-4).double() for x in (lp, old, reference, sampler))
    values = {
        "mask": mask, "group": torch.arange(2).repeat_interleave(4),
        "rewards": torch.tensor([1, 0, 0, 1, 0.5, 0.25, 1, 0]).double(), "logprobs": old,
        "reference_logprobs": reference, "sampler_logprobs": sampler, "entropy": entropy,
    }  # fmt: skip
    return lp.requires_grad_(), build_rollouts(**{**values, **extra})


def value_and_norm(
    loss: Loss, lp: torch.Tensor, rollouts: Rollouts, aggregation: Aggregation | None = None
) -> tuple[float, float]:
    """Return the step's loss and the norm of its gradient with respect to ``lp``; token mean by default."""
    aggregation = aggregation or TokenMean()
    lengths = rollouts.mask.sum(1, keepdim=True).double()
    # In float64: the aggregations' float32 would cost the eighth digit.
    weights = rollouts.mask / (lengths.sum() if isinstance(aggregation, TokenMean) else len(rollouts) * lengths)
    assert isinstance(aggregation, TokenMean | RolloutMean)
    torch.testing.assert_close(weights.float(), aggregation(rollouts))
    total = (loss(lp, rollouts)[0] * weights).sum()
    (gradient,) = torch.autograd.grad(total, lp)
    return total.item(), gradient.norm().item()
