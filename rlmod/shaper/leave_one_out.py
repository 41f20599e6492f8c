"""RLOO: the reward minus the mean of the group's other rewards."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import group_index, group_sum, standardize
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut:
    """A_{i,t} = r_i - mean_{j != i}(r_j) = G / (G - 1) (r_i - mean(r)), over the group of row i.

    Source: RLOO, arXiv:2402.14740, eq. 7.
    Differs: nothing. RLOO treats the whole completion as one action, which is up to the loss (see conf/experiment/rloo.yaml).
    Degenerate: equal rewards give exactly 0; so does a group of one completion.
    Reads: rewards, group, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "mask"})
    min_group_size: ClassVar[int] = 2

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        assert rollouts.rewards is not None
        index, groups = group_index(rollouts.group)
        # A fully masked row does not count in the statistics.
        counted = rollouts.mask.any(1, keepdim=True)
        centered = standardize(rollouts.rewards[:, None], counted, index, groups, divide_by_std=False)
        size = group_sum(counted.to(centered.dtype), index, groups)[index]
        return centered * size / (size - 1).clamp(min=1) * rollouts.mask
