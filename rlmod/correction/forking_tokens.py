"""Training on the tokens of highest entropy only (forking tokens), where the policy could have continued differently.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from rlmod.ops import all_gather
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class ForkingTokens:
    """A_{i,t} = 0 unless H_{i,t} >= tau, where the top ``share`` of the batch's tokens have an entropy of at least tau

    The other tokens stay in the normaliser, so the gradient is that of the full loss without their terms.

    Source: FORK, arXiv:2506.01939, eq. 5 and 6, with share 0.2.
    Differs: [D] the batch is the whole rollout batch, over all ranks, with the entropies of pi_old; TRL uses those of the current
    policy in each step. All tokens whose entropy equals tau are kept.
    Degenerate: share 1 changes nothing; if all entropies are equal, every token is kept.
    Reads: entropy, mask, advantages.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"entropy", "mask", "advantages"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"correction.forking_tokens.share must be above 0 and at most 1, got {self.share}")

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        assert rollouts.entropy is not None and rollouts.advantages is not None
        entropies = all_gather(rollouts.entropy[rollouts.mask])
        if not len(entropies):
            return rollouts
        kept = max(math.ceil(self.share * len(entropies) - 1e-6), 1)  # so that 0.07 of 100 is 7 despite rounding
        tau = entropies.kthvalue(len(entropies) - kept + 1).values
        return replace(rollouts, advantages=torch.where(rollouts.entropy >= tau, rollouts.advantages, 0))
