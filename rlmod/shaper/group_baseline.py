"""REINFORCE++ with a baseline: centred by the group, scaled by the batch."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import group_index, standardize
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class GroupBaseline:
    """a_i = r_i - mean(r) over the group of row i;   A_{i,t} = (a_i - mean(a)) / (std(a) + eps) over the tokens of the batch

    One std for the whole batch: a group that is nearly all correct or all incorrect is not blown up, as it is when each group is
    divided by its own.

    Source: REINFORCE++, arXiv:2501.03262, the variant with a group-mean baseline.
    Differs: nothing from verl's and OpenRLHF's: the statistics of the batch run over its tokens, so long completions count more in
    them, with ddof 1; eps 1e-8 is added to the std (in verl to the variance, which comes to the same within 1e-6). The KL term is a
    penalty of its own (regularizer=[kl]).
    Degenerate: a batch whose groups all have equal rewards gives exactly 0; in a mixed batch such a group gets minus the batch's
    mean, which is 0 where all completions have the same length.
    Reads: rewards, group, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "mask"})
    min_group_size: ClassVar[int] = 2

    eps: float = 1e-8
    """Added to the std; in units of reward."""

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"shaper.eps must be positive, got {self.eps}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        assert rollouts.rewards is not None
        index, groups = group_index(rollouts.group)
        counted = rollouts.mask.any(1, keepdim=True)
        centered = standardize(rollouts.rewards[:, None], counted, index, groups, divide_by_std=False)
        of_tokens = torch.where(rollouts.mask, centered, 0)
        return standardize(of_tokens, rollouts.mask, torch.zeros_like(index), 1, eps=self.eps, over_ranks=True)
