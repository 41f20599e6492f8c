"""Every token has the same weight."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import all_sum
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class TokenMean:
    """w_{i,t} = 1 / sum_k |o_k|, over the optimizer step and all ranks.

    Source: DAPO, arXiv:2503.14476, eq. 8; GTPO, arXiv:2508.04349, eq. 7.
    Degenerate: a step without a counted token has all weights 0.
    Reads: mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"mask"})

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        counted = rollouts.mask.float()
        return counted / all_sum(counted.sum()).clamp(min=1)
