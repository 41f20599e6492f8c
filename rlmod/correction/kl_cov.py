"""KL-Cov, first half: select the tokens whose update would lower the entropy most. The regularizer kl_cov holds them back.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rlmod.correction._covariance import check_share, on_policy_covariance, share_of
from rlmod.ops import all_gather
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class KLCov:
    """extra["kl_cov"]_{i,t} = True for the ``share`` of the batch's N tokens of highest covariance cov_{i,t}

    cov is the covariance of advantage and log-probability (rlmod/correction/_covariance.py). floor(share * N) tokens are selected, at
    least one; ties at the threshold are all selected. ``regularizer=[kl_cov]`` adds a penalty on them. The advantages do not change.

    Source: KL-Cov, arXiv:2505.22617, eq. 13; share 2e-3 at 7 B, 2e-4 at 32 B. Its loss has no clip of the ratio: loss=unclipped.
    Differs: [D] the covariance is that of pi_old's log-probabilities over the whole rollout batch, on all ranks; verl's is the current
    policy's in each step. Both are equal in the first update. SkyRL's default share is 0.2. [D] A guide's tokens are not selected.
    Degenerate: share 1 selects every token. If all advantages are equal, so are all covariances, and every token is selected.
    Reads: logprobs, advantages, mask; from_guide, with a guide.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"logprobs", "advantages", "mask", "from_guide"})

    share: float = 2e-3

    def __post_init__(self) -> None:
        check_share(self.share, "correction.kl_cov.share")

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        cov, mask = on_policy_covariance(rollouts)
        everyone = all_gather(cov[mask])
        selected = torch.zeros_like(mask)
        if len(everyone):
            number = share_of(self.share, len(everyone))
            selected = mask & (cov >= everyone.kthvalue(len(everyone) - number + 1).values)
        return replace(rollouts, extra={**rollouts.extra, "kl_cov": selected})
