"""The clipped surrogate with one ratio per completion."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio, masked_mean
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class SequenceSurrogate:
    """L_{i,t} = -min(W_i A_i, clip(W_i, 1 - clip_low, 1 + clip_high) A_i), the same for every token of completion i:

        arithmetic  W_i = (1/|o_i|) sum_t w_{i,t}
        geometric   W_i = (prod_t w_{i,t})^(1/|o_i|)

    with w_{i,t} = exp(log pi_theta - log pi_old). With aggregation=rollout_mean the step's loss is the mean over completions.

    Source: GRPO-S, arXiv:2508.04349, eq. 10, 11; geometric: App. C, and GSPO, arXiv:2507.18071, eq. 5, 7.
    Differs: the two clip bounds may differ, as in DAPO. Log-ratios per token are clamped to [-20, 20] nats, as in verl.
    Degenerate: completions of one token give ClippedSurrogate; A = 0, or a fully masked completion, gives no gradient.
    Reads: logprobs, advantages (constant over a completion), mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "sequence"
    proportional_to_advantage: ClassVar[bool] = True

    ratio: Literal["arithmetic", "geometric"] = "arithmetic"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if self.ratio not in ("arithmetic", "geometric"):
            raise ValueError(f"loss.ratio must be arithmetic or geometric, got {self.ratio!r}")
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"loss.clip_low must be above 0 and at most 1, got {self.clip_low}")
        if self.clip_high <= 0:
            raise ValueError(f"loss.clip_high must be above 0, got {self.clip_high}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        mask = rollouts.mask
        log_w = log_ratio(logprobs, rollouts.logprobs, mask)
        if self.ratio == "arithmetic":
            ratio = masked_mean(log_w.exp(), mask, dim=1)
        else:
            ratio = masked_mean(log_w, mask, dim=1).exp()
        ratio = ratio[:, None]
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        unclipped_loss, clipped_loss = -ratio * rollouts.advantages, -clipped * rollouts.advantages
        metrics = {
            "ratio": ratio.detach().expand_as(log_w),
            "clip_fraction": (clipped_loss > unclipped_loss).to(ratio.dtype),
        }
        return torch.maximum(unclipped_loss, clipped_loss), metrics
