"""SAPO: a smooth gate in place of the clip, so that no token loses its gradient at once.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Sapo:
    """L_{i,t} = -(4 / tau) sigmoid(tau (w - 1)) A, with w = pi_theta / pi_old and tau = tau_positive if A > 0, else tau_negative.

    The gradient is -4 p (1 - p) w A grad log pi_theta, with p the sigmoid: the unclipped one times a gate that is 1 at w = 1 and falls
    towards 0 on both sides. A larger tau makes the gate narrower. Where A < 0 it is narrower by default, because such a gradient
    raises the probability of all other tokens.

    Source: SAPO, arXiv:2511.20347, eq. 5; with aggregation=rollout_mean.
    Differs: [D] log-ratios are clamped to [-20, 20] nats, as in verl. verl and TRL always take the mean over completions;
    here the aggregation is a stage of its own.
    Degenerate: on-policy the gradient is that of REINFORCE and of the clipped surrogate, -A grad log pi. The value there is -2 A / tau,
    and has no meaning. tau -> 0 gives the gradient of the unclipped surrogate, -w A.
    Reads: logprobs, advantages, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_positive", "tau_negative"):
            if not 0 < (tau := getattr(self, name)) < inf:
                raise ValueError(f"loss.{name} must be above 0 and finite, got {tau}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        ratio = log_ratio(logprobs, rollouts.logprobs, rollouts.mask).exp()
        tau = torch.full_like(ratio, self.tau_negative).masked_fill(rollouts.advantages > 0, self.tau_positive)
        p = torch.sigmoid(tau * (ratio - 1))
        metrics = {
            "ratio": ratio.detach(),
            # The factor of the gradient: 1 on-policy, near 0 where a clip would have acted.
            "gate": (4 * p * (1 - p)).detach(),
        }
        return -4 / tau * p * rollouts.advantages, metrics
