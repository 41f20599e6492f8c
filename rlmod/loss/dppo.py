"""DPPO: a token is masked if its probability has moved too far, whatever its ratio is.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts, require

DELTA = {"tv": 0.15, "kl": 0.05}
"""The bounds where the config gives none."""
LEAST = 1e-8
"""Bound on 1 - p from below. A probability that rounds to 1 would have an infinite divergence."""


@dataclass(frozen=True, kw_only=True)
class Dppo:
    """L_{i,t} = -M sg(min(w, cap)) A log pi_theta(o_{i,t}), with w = p / q and sg = no gradient:

        p, q  probabilities of the sampled token under the policy in training and under the anchor
        M     0 if A > 0, w > 1 and D > delta_high, or A < 0, w < 1 and D > delta_low; otherwise 1
        tv    D = |p - q|
        kl    D = q log(q / p) + (1 - q) log((1 - q) / (1 - p))

    D is the divergence of the two distributions over "this token, or another one", a lower bound on that of the whole distributions. The
    clip of PPO bounds w instead: it stops a rare token after a small change of its probability, and lets a likely one change much.

    ``anchor=sampler`` takes the sampling engine's own log-probabilities, which are those of the distribution that was sampled. So w
    also corrects the difference between engine and trainer, and a correction that does so too is refused.

    Source: DPPO, arXiv:2602.04879, eq. 12 to 14; the anchor: sec. 5.2.
    Differs: [D] without the sampler's log-probabilities the anchor is pi_old. [D] ``delta_low`` and ``delta_high`` null are 0.15 (tv)
    and 0.05 (kl); verl and SkyRL default to 0.2 for both. [D] The value is that of verl, whose cap is 3 unless set; SkyRL's, -M w A, has
    the same gradient. [D] 1 - p and 1 - q are at least 1e-8, and log-ratios are clamped to [-20, 20] nats.
    Degenerate: bounds that are never reached (tv: 1) give Cispo with clip_high = cap - 1. D = |w - 1| would give the clipped
    surrogate's mask. On-policy the gradient is that of REINFORCE, -A grad log pi. The value has no meaning.
    Reads: sampler_logprobs (with ``anchor=sampler``), logprobs, advantages, mask.
    """

    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    divergence: Literal["tv", "kl"] = "tv"
    delta_low: float | None = None
    delta_high: float | None = None
    cap: float = 20.0
    anchor: Literal["sampler", "pi_old"] = "sampler"

    def __post_init__(self) -> None:
        for name in ("delta_low", "delta_high"):
            if (delta := getattr(self, name)) is not None and not delta > 0:
                raise ValueError(f"loss.{name} must be null (by the divergence), or above 0, got {delta}")
        if not self.cap >= 1:
            raise ValueError(f"loss.cap must be at least 1, the ratio of an unchanged policy, got {self.cap}")

    @property
    def reads(self) -> frozenset[str]:
        own = {"sampler_logprobs"} if self.anchor == "sampler" else set[str]()
        return frozenset({"logprobs", "mask", "advantages"} | own)

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        advantages, mask = require(rollouts.advantages, "advantages"), rollouts.mask
        own = rollouts.sampler_logprobs if self.anchor == "sampler" else None
        anchor = require(rollouts.logprobs, "logprobs") if own is None else own
        now = logprobs.detach()
        ratio = log_ratio(now, anchor, mask).exp()
        distance = self._distance(now, anchor, mask)
        low, high = (DELTA[self.divergence] if d is None else d for d in (self.delta_low, self.delta_high))
        masked = (advantages > 0) & (ratio > 1) & (distance > high) | (advantages < 0) & (ratio < 1) & (distance > low)
        weight = ratio.clamp(max=self.cap).masked_fill(masked, 0)
        metrics = {
            "ratio": ratio,
            "divergence": distance,
            # Tokens that the mask leaves without a gradient.
            "clip_fraction": masked.to(ratio.dtype),
        }
        return -weight * advantages * torch.where(mask, logprobs, 0), metrics

    def _distance(self, now: Float[Tensor, "R T"], anchor: Float[Tensor, "R T"], mask: Tensor) -> Float[Tensor, "R T"]:
        p, q = (torch.where(mask, each, 0).exp() for each in (now, anchor))
        if self.divergence == "tv":
            return (p - q).abs()
        # expm1 keeps the digits of 1 - p where p is near 1.
        rest_p, rest_q = (-torch.where(mask, each, 0).expm1().clamp(max=-LEAST) for each in (now, anchor))
        return q * log_ratio(anchor, now, mask) + rest_q * (rest_q / rest_p).log()
