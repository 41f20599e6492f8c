"""FIPO: the clipped surrogate, with each token weighted by how the policy has moved on it and the later ones.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.ops import log_ratio
from rlmod.types import Rollouts

SAFE = (0.8, 1.0)
"""Bounds of f where A < 0 and the ratio is above ``safety``."""


@dataclass(frozen=True, kw_only=True)
class Fipo:
    """L_{i,t} = the clipped surrogate of f_{i,t} A, with w = pi_theta / pi_old and sg = no gradient:

        F_{i,t} = sum_{k >= t} g^(k - t) log w_{i,k}, with g = 2^(-1 / half_life)
        f_{i,t} = sg(clip(exp F_{i,t}, influence_low, influence_high))
        f_{i,t} is clipped to [0.8, 1] too, if A < 0 and w > safety

    A token counts more if the policy has raised the probability of it and the later ones. The sum needs the current policy, so this is a
    loss: a correction is made before training, where every w is 1.

    Source: FIPO, arXiv:2603.19835, and its code. For small models the authors take influence_low = 0.8.
    Differs: [D] the authors' code also leaves tokens with w > 10 out of the sum, has a dual clip, and drops completions with two
    dual-clipped tokens; none of this is here. ms-swift's ``safety`` is 4. [D] Log-ratios are clamped to [-20, 20] nats, as in verl.
    Degenerate: in the first update on a rollout batch f = 1, which is ClippedSurrogate; so is influence_low = influence_high = 1.
    Reads: logprobs, advantages, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"
    proportional_to_advantage: ClassVar[bool] = True

    clip_low: float = 0.2
    clip_high: float = 0.28
    half_life: float = 32.0
    """Tokens after which a token's log-ratio counts half."""
    influence_low: float = 1.0
    influence_high: float = 1.2
    safety: float = 10.0

    def __post_init__(self) -> None:
        self._surrogate()
        if not 0 < self.half_life < inf:
            raise ValueError(f"loss.half_life must be above 0 and finite, in tokens, got {self.half_life}")
        if not 0 < self.influence_low <= 1 <= self.influence_high < inf:
            raise ValueError(
                "loss.influence_low must be above 0 and at most 1, loss.influence_high at least 1 and finite, so that an unchanged policy "
                f"gives 1, got {self.influence_low} and {self.influence_high}"
            )
        if not self.safety >= 1:
            raise ValueError(f"loss.safety must be at least 1, the ratio of an unchanged policy, got {self.safety}")

    def _surrogate(self) -> ClippedSurrogate:
        return ClippedSurrogate(clip_low=self.clip_low, clip_high=self.clip_high)

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.logprobs is not None and rollouts.advantages is not None
        log_w = log_ratio(logprobs.detach(), rollouts.logprobs, rollouts.mask)
        influence = discounted_sum(log_w, 2 ** (-1 / self.half_life)).exp()
        influence = influence.clamp(self.influence_low, self.influence_high)
        unsafe = (rollouts.advantages < 0) & (log_w.exp() > self.safety)
        influence = torch.where(unsafe, influence.clamp(*SAFE), influence)
        per_token, metrics = self._surrogate()(logprobs, replace(rollouts, advantages=influence * rollouts.advantages))
        return per_token, {**metrics, "influence": influence}


def discounted_sum(values: Float[Tensor, "R T"], discount: float) -> Float[Tensor, "R T"]:
    """Return sum_{k >= t} discount^(k - t) values_k at every position t."""
    # Each round doubles the number of tokens that a sum covers, so that a long completion takes few rounds.
    covered, length = 1, values.shape[1]
    while covered < length:
        later = torch.nn.functional.pad(values[:, covered:], (0, covered))
        values, covered = values + discount**covered * later, 2 * covered
    return values
