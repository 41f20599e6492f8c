"""The reward against its group, the same for every token of a completion."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import group_index, group_sum, standardize
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A_{i,t} = (r_i - mean(r)) / (std(r) + eps), over the group of row i.

    ``divide_by_std=False`` leaves the division out (Dr. GRPO). ``leave_one_out=True`` takes the mean over the *other* rows of the
    group (RLOO), which is G / (G - 1) times the centred reward.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr. GRPO, arXiv:2503.20783, sec. 3.2; RLOO, arXiv:2402.14740, eq. 7.
    Differs: the std has ddof 1 and eps 1e-6, as in verl and NeMo-RL (TRL: 1e-4).
    Degenerate: equal rewards give exactly 0; so does a group of one row.
    Needs: rewards, group, mask.
    """

    compares_within_group: ClassVar[bool] = True

    divide_by_std: bool = True
    leave_one_out: bool = False
    eps: float = 1e-6
    """Added to the std; in units of reward."""

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"shaper.eps must be positive, got {self.eps}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        assert rollouts.rewards is not None and rollouts.group is not None and rollouts.mask is not None
        index, groups = group_index(rollouts.group)
        # A row that is masked out whole belongs to nobody's statistics.
        counted = rollouts.mask.any(1, keepdim=True)
        advantages = standardize(
            rollouts.rewards[:, None], counted, index, groups, eps=self.eps, divide_by_std=self.divide_by_std
        )
        if self.leave_one_out:
            size = group_sum(counted.to(advantages.dtype), index, groups)[index]
            advantages = advantages * size / (size - 1).clamp(min=1)
        return advantages * rollouts.mask
