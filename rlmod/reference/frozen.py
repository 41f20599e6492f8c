"""The reference is a frozen policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor, nn

from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import HFPolicy
from rlmod.model.vocabulary import check_same_vocabulary
from rlmod.types import Problem, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """pi_ref = the policy as it was loaded, usually the one before training.

    Source: GRPO, arXiv:2402.03300, sec. 4.1.1.
    Degenerate: before the first update policy and reference give the same log-probabilities.
    Reads: prompt_ids, prompt_mask, completion_ids.
    """

    policy: HFPolicy
    """The reference policy; by default ${policy}, loaded a second time."""

    def __call__(self, policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
        return completion_logprobs(self.model.to(rollouts.device), rollouts, temperature)

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load the model. Raise ValueError if its vocabulary differs from the policy's."""
        check_same_vocabulary(
            self.policy,
            tokenizer,
            "reference.policy",
            "The reference, or teacher, scores the policy's token ids: use one of the same model family",
        )
        _ = self.model

    @cached_property
    def model(self) -> nn.Module:
        return self.policy.frozen()
