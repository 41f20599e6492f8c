"""REINFORCE++ with a baseline: rewards centred by the group's mean and divided by the batch's std."""

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

    There is one std for the whole batch. Dividing by each group's own std would enlarge the advantages of a group that is nearly all
    correct or all incorrect.

    Source: REINFORCE++, arXiv:2501.03262, the variant with a group-mean baseline.
    Differs: nothing from verl's and OpenRLHF's. The statistics of the batch are computed over its tokens, so long completions count
    more, with ddof 1. eps 1e-8 is added to the std (in verl to the variance; the results agree within 1e-6). The KL term is a separate
    component (regularizer=[kl]).
    Degenerate: a batch whose groups all have equal rewards gives exactly 0. In a mixed batch such a group gets minus the batch's
    mean, which is 0 if all completions have the same length.
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
        per_token = torch.where(rollouts.mask, centered, 0)
        return standardize(per_token, rollouts.mask, torch.zeros_like(index), 1, eps=self.eps, over_ranks=True)
