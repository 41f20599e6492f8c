"""The clipped surrogate, with a separate ratio, shaping and clip for the guide's (off-policy) completions.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class MixedSurrogate:
    """L_{i,t} = -min(f(w) A, clip(f(w), low, high) A), with w = pi_theta / pi of the policy that sampled the completion:

        on-policy completions    w = pi_theta / pi_old    f(w) = w                     bounds 1 - clip_low, 1 + clip_high
        guide completions        w = pi_theta / pi_phi    f(w) = w, or w / (w + gamma)  bounds from ``guide_clip``

    The guide stores pi_phi in ``logprobs``: its own probabilities, or 1 (guide.ratio=one). w multiplies the gradient, so guide tokens
    that are unlikely under the policy have small gradients. Saturating shaping, with w = pi_theta, increases these.

    Source: [R] MIX, arXiv:2507.12931, modelled on LUFFY, arXiv:2504.14945, eq. 5 to 7, whose form is guide.ratio=one,
    guide_shaping=saturating, guide_clip=none.
    Degenerate: without guide completions, or with the same bounds it equals ClippedSurrogate.
    Reads: logprobs, advantages, mask; from_guide, with guide completions.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages", "from_guide"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    clip_low: float | None = 0.2
    """null: no lower bound."""
    clip_high: float | None = 0.28
    """null: no upper bound."""
    guide_clip: str | Sequence[float] = "same"
    """``same`` as on on-policy tokens, ``none``, or [low, high]: the ratio is clipped to [1 - low, 1 + high]."""
    guide_shaping: Literal["none", "saturating"] = "none"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        bounds = {
            "loss.clip_low, loss.clip_high": (self.clip_low, self.clip_high),
            "loss.guide_clip": self._guide_clip(),
        }
        for key, (low, high) in bounds.items():
            if not ((low is None or 0 <= low <= 1) and (high is None or high > 0)):
                raise ValueError(
                    f"{key}: the lower bound must be at least 0 and at most 1, the upper above 0, got {[low, high]}"
                )
        if self.gamma <= 0:
            raise ValueError(f"loss.gamma must be above 0, got {self.gamma}")

    def _guide_clip(self) -> tuple[float | None, float | None]:
        if self.guide_clip == "same":
            return self.clip_low, self.clip_high
        if self.guide_clip == "none":
            return None, None
        if isinstance(self.guide_clip, str) or len(self.guide_clip) != 2:
            raise ValueError(f"loss.guide_clip must be same, none or [low, high], got {self.guide_clip!r}")
        return self.guide_clip[0], self.guide_clip[1]

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        mask = rollouts.mask
        guided = torch.zeros_like(mask) if rollouts.from_guide is None else rollouts.from_guide[:, None] & mask
        ratio = log_ratio(logprobs, rollouts.logprobs, mask).exp()
        weight = torch.where(guided, ratio / (ratio + self.gamma), ratio) if self.guide_shaping != "none" else ratio
        own, guide = _clip(weight, self.clip_low, self.clip_high), _clip(weight, *self._guide_clip())
        clipped = torch.where(guided, guide, own)
        unclipped_loss, clipped_loss = -weight * rollouts.advantages, -clipped * rollouts.advantages
        is_clipped = (clipped_loss > unclipped_loss).to(ratio.dtype)
        metrics = {
            "ratio": ratio.detach().masked_fill(guided, torch.nan),
            "clip_fraction": is_clipped.masked_fill(guided, torch.nan),
            "guide_ratio": ratio.detach().masked_fill(~guided, torch.nan),
            "guide_clip_fraction": is_clipped.masked_fill(~guided, torch.nan),
        }
        return torch.maximum(unclipped_loss, clipped_loss), metrics


def _clip(weight: Float[Tensor, "R T"], low: float | None, high: float | None) -> Float[Tensor, "R T"]:
    return weight.clamp(0.0 if low is None else 1 - low, None if high is None else 1 + high)
