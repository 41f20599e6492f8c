"""No advantage from the reward: all of it comes from a correction, as in distillation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Zero:
    """A_{i,t} = 0. The reward is computed and logged, and does not train the policy.

    Source: on-policy distillation without a reward, "On-Policy Distillation", Thinking Machines (2025).
    Degenerate: without a correction that adds advantages no step has a gradient, and each is skipped.
    Reads: nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        return torch.zeros(rollouts.mask.shape, dtype=torch.float32, device=rollouts.device)
