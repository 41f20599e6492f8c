"""Importance weights between the trainer's and the sampling engine's probabilities; tokens on which the two differ too much are left out.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rlmod.correction._importance import Level, sampler_ratio
from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class MaskedImportance:
    """A_{i,t} <- rho A_{i,t} if low <= rho <= high, otherwise 0, with pi_old as computed by the trainer:

        token       rho = pi_old / pi_sampler of the token
        sequence    rho = the product over the completion's tokens, which a loss with one ratio per completion needs

    A ratio far from 1 shows that engine and trainer disagree on the token, as after another choice of experts in a mixture-of-experts
    model. ``correction.truncated_importance`` keeps such a token with the weight ``cap``; here it has no gradient at all. It stays in
    the normaliser, so the gradient is that of the full loss without its terms.

    Source: IcePop, arXiv:2510.18855: level=token with 0.5 and 5, the defaults. Masked importance sampling (MIS): level=sequence.
    Differs: [D] log rho is clamped to [-20, 20]. TRL's default is level=sequence, low=null, high=3. ms-swift masks from above only, by
    the geometric mean of a completion's ratios, and weighs by the ratio of the token under its mask per completion. verl's rejection
    (``token_k1``) bounds 1 / rho and removes the token from the normaliser.
    Degenerate: if engine and trainer agree, nothing changes; so it is with sampler=hf. Without bounds every token has the weight rho.
    Reads: logprobs, sampler_logprobs, mask, advantages.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "sampler_logprobs", "mask", "advantages"})

    level: Level = "token"
    low: float | None = 0.5
    """Smallest ratio that is kept; None: no bound."""
    high: float | None = 5.0
    """Largest ratio that is kept; None: no bound."""

    def __post_init__(self) -> None:
        if self.low is not None and not 0 <= self.low <= 1:
            raise ValueError(
                f"correction.masked_importance.low must be null (no bound), or at least 0 and at most 1, got {self.low}"
            )
        if self.high is not None and not self.high >= 1:
            raise ValueError(
                f"correction.masked_importance.high must be null (no bound), or at least 1, got {self.high}"
            )

    @property
    def granularity(self) -> Level:
        return self.level

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        advantages = require(rollouts.advantages, "advantages")
        rho = sampler_ratio(rollouts, self.level, "correction.masked_importance")
        low, high = self.low or 0.0, torch.inf if self.high is None else self.high
        return replace(rollouts, advantages=torch.where((low <= rho) & (rho <= high), rho * advantages, 0))
