"""An entropy bonus whose coefficient follows the policy's entropy.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class AdaptiveEntropy:
    """-c H(pi_theta(. | o_{i,<t})) per token, if the step before had H <= target; else 0. After a step with mean entropy H:

        c <- min(c + step, maximum) if H <= target,   max(c - step, 0) if not

    H is the mean over the tokens of the optimizer step, on all ranks, in nats. c and H are in the run's checkpoint.

    Source: Skywork-OR1, arXiv:2505.22312, sec. 4; target 0.2, step 0.005, initial 0. The same in TRL.
    Differs: [D] a step that is skipped, because its gradient is not finite, changes nothing.
    Degenerate: step 0 is entropy_bonus with the weight ``initial``, where the entropy is low. Above the target nothing is added.
    Reads: policy_entropy, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"policy_entropy", "mask"})

    target: float = 0.2
    """Mean entropy per token at which the bonus begins, in nats."""
    step: float = 0.005
    initial: float = 0.0
    maximum: float = 1.0

    def __post_init__(self) -> None:
        for name in ("target", "step", "initial", "maximum"):
            if not 0 <= (value := getattr(self, name)) < inf:
                raise ValueError(f"regularizer.adaptive_entropy.{name} must be finite and not negative, got {value}")
        if self.initial > self.maximum:
            raise ValueError(
                f"regularizer.adaptive_entropy.initial={self.initial} must be at most maximum={self.maximum}"
            )

    @cached_property
    def state(self) -> dict[str, float]:
        """The coefficient c, and the mean entropy of the step before; infinite before the first one."""
        return {"coefficient": self.initial, "entropy": inf}

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"] | float]]:
        assert rollouts.policy_entropy is not None
        entropy = torch.where(rollouts.mask, rollouts.policy_entropy, 0)
        coefficient = self.state["coefficient"] if self.state["entropy"] <= self.target else 0.0
        return -coefficient * entropy, {"policy_entropy": entropy.detach(), "entropy_coefficient": coefficient}

    def after_step(self, metrics: Mapping[str, float]) -> None:
        entropy, coefficient = metrics["policy_entropy"], self.state["coefficient"]
        change = self.step if entropy <= self.target else -self.step
        self.state.update(coefficient=min(max(coefficient + change, 0.0), self.maximum), entropy=entropy)

    def state_dict(self) -> Mapping[str, float]:
        return dict(self.state)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.state.update(state)
