"""The covariance of advantage and log-probability, token by token, which two corrections share.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod.ops import all_sum
from rlmod.types import Rollouts, require


def covariance(
    advantages: Float[Tensor, "R T"], logprobs: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]
) -> Float[Tensor, "R T"]:
    """cov_{i,t} = (A_{i,t} - mean(A)) (log pi_{i,t} - mean(log pi)), with the means over all tokens under the mask, on all ranks.

    0 where the mask is False. A token of high covariance is probable and favoured, so its update lowers the entropy.

    Source: arXiv:2505.22617, eq. 10.
    """
    number = all_sum(mask.sum().to(advantages.dtype)).clamp(min=1)
    first, second = (
        torch.where(mask, values - all_sum(torch.where(mask, values, 0).sum()) / number, 0)
        for values in (advantages, logprobs)
    )
    return first * second


def on_policy_covariance(rollouts: Rollouts) -> tuple[Float[Tensor, "R T"], Bool[Tensor, "R T"]]:
    """Return the covariance with pi_old's log-probabilities, and the tokens that it is computed over: not the guide's."""
    mask = rollouts.mask if rollouts.from_guide is None else rollouts.mask & ~rollouts.from_guide[:, None]
    advantages, logprobs = require(rollouts.advantages, "advantages"), require(rollouts.logprobs, "logprobs")
    return covariance(advantages, logprobs, mask), mask


def share_of(share: float, number: int) -> int:
    """floor(share * number), at least 1. Rounding never costs one: 0.07 of 100 is 7."""
    return max(math.floor(share * number + 1e-6), 1)


def check_share(share: float, key: str) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{key} must be above 0 and at most 1, got {share}")
