"""The reference is the policy without its adapter: no second model."""

from dataclasses import dataclass
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from rlmod.model.logprobs import completion_logprobs
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Base:
    """pi_ref = the base model under the policy's LoRA adapter, which is disabled for one forward pass

    Source: a property of LoRA, arXiv:2106.09685: the base weights are never changed.
    Degenerate: before the first update it equals the policy, because an adapter starts at 0.
    Reads: prompt_ids, prompt_mask, completion_ids; a policy with an adapter.
    """

    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        with cast(Any, policy).disable_adapter():
            return completion_logprobs(policy, rollouts, temperature)
