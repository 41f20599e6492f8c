"""GMPO: the geometric mean of the token ratios, each clipped before the mean is taken.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio, masked_mean
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Gmpo:
    """L_{i,t} = -A_i exp((1/|o_i|) sum_t m_{i,t}), the same for every token of completion i, with log w = log pi_theta - log pi_old:

        A > 0    m = min(log w, clip_high)
        A < 0    m = max(log w, -clip_low)

    The bounds are in nats, on each token's log-ratio. A clipped token has no gradient, and the others keep theirs; the ratio of
    SequenceSurrogate is clipped as a whole instead. With aggregation=rollout_mean the step's loss is the mean over completions.

    Source: GMPO, arXiv:2507.20673; both bounds are 0.4 there.
    Differs: [D] the two bounds may differ. [D] Log-ratios are clamped to [-20, 20] nats; verl and TRL do not clamp them here.
    Degenerate: completions of one token give ClippedSurrogate with the bounds e^-clip_low and e^clip_high. Bounds that are never reached
    give the geometric SequenceSurrogate. On-policy the value is -A. A = 0, or a fully masked completion, gives no gradient.
    Reads: logprobs, advantages (constant over a completion), mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "sequence"
    proportional_to_advantage: ClassVar[bool] = True

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high"):
            if not (bound := getattr(self, name)) > 0:
                raise ValueError(f"loss.{name} must be above 0, got {bound}; it bounds the log-ratio, in nats")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        advantages = rollouts.advantages
        log_w = log_ratio(logprobs, rollouts.logprobs, rollouts.mask)
        clipped = torch.where(advantages > 0, log_w.clamp(max=self.clip_high), log_w.clamp(min=-self.clip_low))
        ratio = masked_mean(clipped, rollouts.mask, dim=1).exp()[:, None]
        metrics = {
            "ratio": log_w.detach().exp(),
            # Tokens for which the clip is active: they have no gradient.
            "clip_fraction": ((clipped != log_w) & (advantages != 0)).to(log_w.dtype),
        }
        return -ratio * advantages, metrics
