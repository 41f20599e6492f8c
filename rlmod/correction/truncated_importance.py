"""Importance weights between the trainer's and the sampling engine's probabilities.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from rlmod.correction._importance import Level, sampler_ratio
from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class TruncatedImportance:
    """A_{i,t} <- min(rho, cap) A_{i,t}, with pi_old as computed by the trainer and pi_sampler as reported by the engine:

        token       rho = pi_old / pi_sampler of the token
        sequence    rho = the product over the completion's tokens, which a loss with one ratio per completion needs

    Two engines with the same weights disagree (other kernels, other precision), and completions are samples from the sampler's
    distribution. The factor is positive and has no gradient, so multiplying the advantage is equivalent to multiplying the loss of
    the token.

    Source: TIS, truncated importance sampling between sampler and trainer, as described by Yao et al. (2025); cap = C, 2 there.
    Differs: [D] the logarithm of rho is clamped to [-20, 20].
    Degenerate: if both agree the factor is 1; so it is with sampler=hf, whose log-probabilities are the trainer's.
    Reads: logprobs, sampler_logprobs, mask, advantages.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "sampler_logprobs", "mask", "advantages"})

    cap: float = 2.0
    level: Level = "token"

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"correction.truncated_importance.cap must be above 0, got {self.cap}")

    @property
    def granularity(self) -> Level:
        return self.level

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        advantages = require(rollouts.advantages, "advantages")
        rho = sampler_ratio(rollouts, self.level, "correction.truncated_importance")
        return replace(rollouts, advantages=advantages * rho.clamp(max=self.cap))
