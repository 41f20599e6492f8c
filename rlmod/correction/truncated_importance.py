"""What the sampling engine got wrong about its own probabilities, weighed back."""

from dataclasses import dataclass, replace

import torch

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class TruncatedImportance:
    """A_{i,t} <- min(pi_old / pi_sampler, cap) A_{i,t}, with pi_old as the trainer computes it and pi_sampler as the engine said

    Two engines with the same weights disagree (other kernels, other precision), and completions are drawn by the sampler's
    distribution. The factor is positive and has no gradient, so that it comes to the same whether it multiplies the advantage or
    the loss of the token.

    Source: TIS, truncated importance sampling between sampler and trainer, as described by Yao et al. (2025); cap = C, 2 there.
    Degenerate: where both agree the factor is 1; so it is with sampler=hf, whose log-probabilities are the trainer's.
    Needs: logprobs, sampler_logprobs, mask, advantages.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"correction.truncated_importance.cap must be above 0, got {self.cap}")

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        assert rollouts.logprobs is not None and rollouts.mask is not None and rollouts.advantages is not None
        if rollouts.sampler_logprobs is None:
            raise ValueError(
                "correction.truncated_importance needs the sampler's log-probabilities, and this sampler gives none"
            )
        log_ratio = torch.where(rollouts.mask, rollouts.logprobs - rollouts.sampler_logprobs, 0)
        return replace(rollouts, advantages=rollouts.advantages * log_ratio.exp().clamp(max=self.cap))
