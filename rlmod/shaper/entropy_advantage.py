"""The group-normalized reward with a bonus for uncertain tokens.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class EntropyAdvantage:
    """A_{i,t} + min(alpha H_{i,t}, |A_{i,t}| / kappa), with A the reward normalized over its group (Uniform) and H in nats.

    Source: arXiv:2506.14758; alpha 0.4 is its value for GRPO (0.1 for PPO), kappa 2.
    Differs: [D] H is that of the policy that sampled; the paper detaches that of the current one, which is the same in the first update.
    Degenerate: alpha = 0 is Uniform. An advantage of 0 stays 0, and no advantage changes its sign, because kappa is above 1.
    Reads: rewards, group, mask, entropy.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "group", "mask", "entropy"})
    min_group_size: ClassVar[int] = 2
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    alpha: float = 0.4
    kappa: float = 2.0
    eps: float = 1e-6
    """Added to the std; in units of reward."""

    def __post_init__(self) -> None:
        Uniform(eps=self.eps)
        if self.alpha < 0:
            raise ValueError(f"shaper.alpha must not be negative, got {self.alpha}")
        if self.kappa <= 1:
            raise ValueError(
                f"shaper.kappa must be above 1, or the bonus could change an advantage's sign, got {self.kappa}"
            )

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        assert rollouts.entropy is not None
        advantages = Uniform(eps=self.eps)(rollouts)
        entropy = torch.where(rollouts.mask, rollouts.entropy, 0)
        return advantages + torch.minimum(self.alpha * entropy, advantages.abs() / self.kappa)
