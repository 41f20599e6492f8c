"""CISPO: the clipped ratio weighs the log-probability, and no token loses its gradient.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Cispo:
    """L_{i,t} = -sg(clip(w, 1 - clip_low, 1 + clip_high)) A log pi_theta(o_{i,t}), with w = pi_theta / pi_old and sg = no gradient.

    The clipped surrogate drops a token whose ratio is outside the bounds; this loss keeps it with a bounded weight.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.
    Differs: [D] ``clip_high`` is 4, because the paper gives no number (TRL: a weight of at most ``epsilon_high``, which is 1 + clip_high
    here). ``clip_low`` null sets no lower bound, as the paper does in effect and TRL does; verl and NeMo-RL clip on both sides.
    [D] Log-ratios are clamped to [-20, 20] nats, as in verl.
    Degenerate: on-policy the gradient is that of REINFORCE and of the clipped surrogate, -A grad log pi. The value is not
    -A, and has no meaning.
    Reads: logprobs, advantages, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    clip_low: float | None = None
    clip_high: float = 4.0

    def __post_init__(self) -> None:
        if self.clip_low is not None and not 0 <= self.clip_low <= 1:
            raise ValueError(
                f"loss.clip_low must be null (no lower bound), or at least 0 and at most 1, got {self.clip_low}"
            )
        if self.clip_high <= 0:
            raise ValueError(f"loss.clip_high must be above 0, got {self.clip_high}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        mask = rollouts.mask
        ratio = log_ratio(logprobs.detach(), rollouts.logprobs, mask).exp()
        low = 0.0 if self.clip_low is None else 1 - self.clip_low
        weight = ratio.clamp(low, 1 + self.clip_high)
        metrics = {
            "ratio": ratio,
            # Clipped tokens keep their gradient, with the bound as their weight.
            "clip_fraction": (weight != ratio).to(ratio.dtype),
        }
        return -weight * rollouts.advantages * torch.where(mask, logprobs, 0), metrics
