"""An entropy bonus, which keeps the policy exploring."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """-weight * H(pi_theta(. | o_{i,<t})) per token, over the full vocabulary, in nats, with its gradient

    Source: A3C, arXiv:1602.01783, sec. 4; PPO, arXiv:1707.06347, eq. 9.
    Degenerate: weight 0 logs the entropy and changes nothing; a uniform policy has gradient 0. A negative weight sharpens the policy.
    Reads: policy_entropy, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"policy_entropy", "mask"})

    weight: float = 0.001

    def __post_init__(self) -> None:
        if not isfinite(self.weight):
            raise ValueError(f"regularizer.entropy_bonus.weight must be a finite number, got {self.weight}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.policy_entropy is not None
        entropy = torch.where(rollouts.mask, rollouts.policy_entropy, 0)
        return -self.weight * entropy, {"policy_entropy": entropy.detach()}
