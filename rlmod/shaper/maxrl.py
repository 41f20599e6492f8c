"""MaxRL: the outcome relative to the group's success rate.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod.ops import group_index, group_sum
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Maxrl:
    """A_{i,t} = (o_i - p) / p, with p the mean outcome of the group; 0 if no completion succeeds.

    Hard problems weigh more than in GRPO. G completions follow the gradient of log p, expanded to order G - 1.

    Source: MaxRL, arXiv:2602.02710, alg. 1.
    Differs: [D] Rewards below 0, and rewards with a penalty, are refused: the success rate would not be one. SkyRL adds 1e-6 to p and
    accepts any reward.
    Degenerate: equal outcomes give exactly 0; so does a group of one completion. The advantages of a group sum to 0.
    Reads: rewards, outcomes, group, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "outcomes", "group", "mask"})
    min_group_size: ClassVar[int] = 2
    accepts_penalties: ClassVar[bool] = False

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        index, groups = group_index(rollouts.group)
        # A fully masked row does not count in the mean.
        counted = rollouts.mask.any(1)
        outcomes = torch.where(counted, rollouts.correctness_score, 0)
        self._refuse_penalties(rollouts, counted)
        size = group_sum(counted.to(outcomes.dtype), index, groups).clamp(min=1)
        rate = (group_sum(outcomes, index, groups) / size)[index]
        deviation = torch.where(counted & (rate > 0), outcomes - rate, 0)
        return (deviation / torch.where(rate > 0, rate, 1))[:, None] * rollouts.mask

    @staticmethod
    def _refuse_penalties(rollouts: Rollouts, counted: Bool[Tensor, " R"]) -> None:
        outcomes = rollouts.correctness_score[counted]
        if bool((outcomes < 0).any()):
            raise ValueError(
                f"shaper=maxrl needs rewards from 0 to 1, and one is {float(outcomes.min()):g}: as in reward.incorrect=0"
            )
        if rollouts.rewards is not None and bool(((rollouts.rewards[counted] - outcomes).abs() > 0).any()):
            raise ValueError(
                "shaper=maxrl with a reward that holds a penalty (overlong, GROP): it divides by the success rate, which a penalty is not "
                "part of; give reward=exact_match or reward=math_verify"
            )
