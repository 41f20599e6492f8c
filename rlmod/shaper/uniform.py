"""The reward normalized over its group, the same for every token of a completion.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import group_index, standardize
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """A_{i,t} = (r_i - mean(r)) / (std(r) + eps), over the group of row i.

    ``divide_by_std=False`` omits the division (Dr. GRPO). ``pool="own"`` computes mean and std over the on-policy completions only, and
    normalizes the guide's completions with them.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.2; Dr. GRPO, arXiv:2503.20783, sec. 3.2; ``pool``: [R] MIX, arXiv:2507.12931.
    Differs: the std has ddof 1 and eps 1e-6, as in verl and NeMo-RL (TRL: 1e-4). [D] If all on-policy rewards are equal, the
    guide's are centred by them and not divided.
    Degenerate: equal rewards give exactly 0; so does a group of one completion.
    Reads: rewards, group, mask; from_guide, with ``pool=own``.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "mask", "from_guide"})
    min_group_size: ClassVar[int] = 2

    divide_by_std: bool = True
    pool: Literal["union", "own"] = "union"
    """The rewards that mean and std are computed over, with a guide: all (union), or those of on-policy completions (own)."""
    eps: float = 1e-6
    """Added to the std; in units of reward."""

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"shaper.eps must be positive, got {self.eps}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        assert rollouts.rewards is not None
        index, groups = group_index(rollouts.group)
        # A fully masked row does not count in the statistics.
        rows = counted = rollouts.mask.any(1, keepdim=True)
        if self.pool == "own" and rollouts.from_guide is not None:
            counted = counted & ~rollouts.from_guide[:, None]
        advantages = standardize(
            rollouts.rewards[:, None],
            counted,
            index,
            groups,
            eps=self.eps,
            divide_by_std=self.divide_by_std,
            also_normalize=rows,
        )
        return advantages * rollouts.mask
