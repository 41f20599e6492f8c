"""The reference is an exponential moving average of the policy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import HFPolicy
from rlmod.types import Problem, Rollouts


@dataclass(frozen=True, kw_only=True)
class EMA:
    """theta_ref <- decay theta_ref + (1 - decay) theta, after every iteration; initially theta_ref = theta

    The average is kept in float32: in bfloat16 a step of 1 % would be rounded away and the reference would never move.
    Its weights are in the run's checkpoint (not in a saved policy's folder), so that a resumed run continues with them.

    Source: TR-DPO, arXiv:2404.09656, eq. 3 ("soft update"), with alpha = 1 - decay.
    Degenerate: decay 1 is reference=frozen; decay 0 is the policy after the previous iteration.
    Reads: prompt_ids, prompt_mask, completion_ids.
    """

    policy: HFPolicy
    decay: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"reference.decay must be at least 0 and at most 1, got {self.decay}")

    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        return completion_logprobs(self.model.to(rollouts.device), rollouts, temperature)

    def prepare(self, problems: Sequence[Problem], tokenizer: object) -> None:
        _ = self.model

    @cached_property
    def model(self) -> nn.Module:
        return replace(self.policy, dtype="float32").frozen()

    @torch.no_grad()
    def update(self, policy: nn.Module) -> None:
        for average, value in zip(self.model.parameters(), policy.parameters(), strict=True):
            value = value.full_tensor() if isinstance(value, DTensor) else value
            average.lerp_(value.to(average), 1 - self.decay)

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)
