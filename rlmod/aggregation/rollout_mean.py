"""Every completion has the same weight, whatever its length."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import all_sum
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class RolloutMean:
    """w_{i,t} = 1 / (R |o_i|), over the R completions of the optimizer step and all ranks.

    Source: GRPO, arXiv:2402.03300, eq. 3; GRPO-S, arXiv:2508.04349, eq. 10.
    Differs: a fully masked completion does not count in R, as in verl (TRL counts it), so that the weights sum to 1.
    Degenerate: a step without a counted token has all weights 0.
    Reads: mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"mask"})

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        counted = rollouts.mask.float()
        length = counted.sum(1, keepdim=True)
        rows = all_sum((length > 0).float().sum())
        return counted / (length * rows).clamp(min=1)
