"""Train on every group."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from rlmod.ops import group_index
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """keep_g = True for every group g

    Source: GRPO, arXiv:2402.03300, which filters nothing.
    Degenerate: a group whose rewards are all equal stays, with advantage 0.
    Reads: group.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"group"})

    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " groups"]:
        return torch.ones(group_index(rollouts.group)[1], dtype=torch.bool, device=rollouts.device)
