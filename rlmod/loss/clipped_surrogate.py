"""PPO's clipped surrogate, per token."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """L_{i,t} = -min(w A, clip(w, 1 - clip_low, 1 + clip_high) A), with w_{i,t} = exp(log pi_theta - log pi_old).

    Source: PPO, arXiv:1707.06347, eq. 7; separate bounds ("clip-higher"), DAPO, arXiv:2503.14476, eq. 10.
    Differs: no dual clip (verl has it on by default). Log-ratios are clamped to [-20, 20] nats, as in verl.
    Degenerate: on-policy (w = 1) the value is -A and the gradient that of REINFORCE; A = 0 gives no gradient.
    Reads: logprobs, advantages, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"loss.clip_low must be above 0 and at most 1, got {self.clip_low}")
        if self.clip_high <= 0:
            raise ValueError(f"loss.clip_high must be above 0, got {self.clip_high}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        ratio = log_ratio(logprobs, rollouts.logprobs, rollouts.mask).exp()
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        unclipped_loss, clipped_loss = -ratio * rollouts.advantages, -clipped * rollouts.advantages
        metrics = {
            "ratio": ratio.detach(),
            # Tokens for which the clip is active: they have no gradient.
            "clip_fraction": (clipped_loss > unclipped_loss).to(ratio.dtype),
        }
        return torch.maximum(unclipped_loss, clipped_loss), metrics
