"""On-policy distillation: a teacher scores each token that the policy has sampled.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import ClassVar, Literal

import torch

from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A_{i,t} <- A_{i,t} + weight * (log pi_T - log pi_old) at the sampled token, with the teacher pi_T as the reference

    Its expectation is -weight * KL(pi_old || pi_T) per token, which the update therefore lowers. With shaper=zero the teacher alone
    trains the policy, without a reward; with any other shaper it trains beside the reward.

    Source: "On-Policy Distillation", Thinking Machines (2025): weight 1, no reward. The same in Trinity and ms-swift.
    Differs: [D] verl (k1) compares with the current policy in place of pi_old, clamps to [-10, 10] and adds a second loss. [D] A guide's
    tokens keep their advantage: their recorded probability is not the policy's. As a term of the loss, with the policy's own gradient:
    regularizer=[kl_k2] with reference=teacher.
    Degenerate: a teacher that equals the policy adds 0; so does weight 0.
    Reads: reference_logprobs, logprobs, advantages, mask; from_guide, with a guide.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"reference_logprobs", "logprobs", "advantages", "mask", "from_guide"})
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    weight: float = 1.0
    """lambda, in units of advantage per nat."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"correction.distillation.weight must be finite and not negative, got {self.weight}")

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        teacher = require(rollouts.reference_logprobs, "reference_logprobs")
        mask = rollouts.mask if rollouts.from_guide is None else rollouts.mask & ~rollouts.from_guide[:, None]
        advantages = require(rollouts.advantages, "advantages")
        added = torch.where(mask, teacher - require(rollouts.logprobs, "logprobs"), 0).to(advantages.dtype)
        return replace(rollouts, advantages=advantages + self.weight * added)
