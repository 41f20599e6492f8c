"""Clip-Cov: a few tokens whose update would lower the entropy most are left out of the loss.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from rlmod.correction._covariance import check_share, on_policy_covariance, share_of
from rlmod.ops import all_gather, all_sum
from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class ClipCov:
    """A_{i,t} = 0 for ``share`` of the batch's N tokens, drawn among those with low < cov_{i,t} < high

    cov is the covariance of advantage and log-probability (rlmod/correction/_covariance.py). floor(share * N) tokens are drawn, at least
    one, and no more than there are candidates. They stay in the normaliser, so the gradient is that of the full loss without their terms.

    Source: Clip-Cov, arXiv:2505.22617, eq. 11 and 12; share 2e-4, bounds 1 and 5. Its loss has no clip of the ratio: loss=unclipped.
    Differs: [D] the covariance is that of pi_old's log-probabilities over the whole rollout batch, on all ranks; verl's is the current
    policy's in each step. Both are equal in the first update. SkyRL's default share is 0.2. [D] A guide's tokens are not candidates.
    Degenerate: without candidates nothing changes. If all advantages are equal there are none.
    Reads: logprobs, advantages, mask; from_guide, with a guide.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "advantages", "mask", "from_guide"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    share: float = 2e-4
    low: float = 1.0
    """Covariance above which a token is a candidate; in nats times the unit of the advantages."""
    high: float = 5.0
    """Covariance below which a token is a candidate."""

    def __post_init__(self) -> None:
        check_share(self.share, "correction.clip_cov.share")
        if not self.low < self.high:
            raise ValueError(f"correction.clip_cov.low={self.low} must be below correction.clip_cov.high={self.high}")

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        cov, mask = on_policy_covariance(rollouts)
        candidates = mask & (self.low < cov) & (cov < self.high)
        drawn = share_of(self.share, int(all_sum(mask.sum())))
        # Rank 0 draws for all ranks: their generators may be equal, or not. torch's generator is in the checkpoint.
        counts = all_gather(candidates.sum().double()[None]).long().tolist()
        rank = dist.get_rank() if len(counts) > 1 else 0
        order = torch.randperm(sum(counts)).double() if rank == 0 else torch.zeros(sum(counts)).double()
        mine = all_sum(order.to(cov.device))[sum(counts[:rank]) :][: counts[rank]]
        left_out = torch.zeros_like(mask)
        left_out[candidates] = mine < drawn
        return replace(rollouts, advantages=torch.where(left_out, 0, require(rollouts.advantages, "advantages")))
