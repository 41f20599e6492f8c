"""A guide that is a frozen model: it samples completions and computes their log-probabilities.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from rlmod.guide._fields import check_completions
from rlmod.interfaces import Sampler
from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import HFPolicy
from rlmod.model.vocabulary import check_same_vocabulary
from rlmod.types import Problem, Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Policy:
    """``completions_per_prompt`` completions per prompt, sampled from pi_phi, with log pi_phi of each token at the guide's temperature

    ``ratio="one"`` returns log-probabilities of 0 instead (pi_phi := 1), as if the guide were certain of every token.

    Source: [R] MIX, arXiv:2507.12931: "a frozen, pre-trained, stable guiding policy"; ratio one: LUFFY, arXiv:2504.14945.
    Degenerate: with 0 completions per prompt only the zero-reward batch uses the guide.
    """

    policy: HFPolicy
    """The guide. It may be larger than the trained policy, but must share its tokenizer."""
    sampler: Sampler
    """The guide's sampler, with its own temperature and limits."""
    completions_per_prompt: int = 2
    ratio: Literal["guide", "one"] = "guide"
    device: str | None = None
    """null: the device of the trained policy."""

    def __post_init__(self) -> None:
        check_completions(self.completions_per_prompt)

    @cached_property
    def model(self) -> nn.Module:
        return self.policy.frozen()

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load the model. Raise ValueError if the guide's vocabulary differs from the policy's."""
        check_same_vocabulary(
            self.policy,
            tokenizer,
            "guide.policy",
            "The policy trains on the guide's token ids: use a guide of the same model family, or guide=demonstrations with its texts",
        )
        _ = self.model

    @torch.no_grad()
    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        policy_device = prompts.ids.device
        device = torch.device(self.device) if self.device else policy_device
        model = self.model.to(device)
        rows = self._sampler_for(completions_per_prompt)(model, prompts.to(device), seed)
        logprobs = rows.logprobs
        if logprobs is None:  # the sampler does not return them
            logprobs = completion_logprobs(model, rows, self.sampler.temperature) * rows.mask
        rows, logprobs = rows.to(policy_device), logprobs.to(policy_device)
        if self.ratio == "one":
            logprobs = torch.zeros_like(logprobs)
        # Both are equal: these are the denominator of the ratio, so there is no difference between engines to correct.
        return replace(rows, logprobs=logprobs, sampler_logprobs=logprobs)

    def _sampler_for(self, completions_per_prompt: int) -> Sampler:
        if is_dataclass(self.sampler):
            return replace(self.sampler, completions_per_prompt=completions_per_prompt)  # pyright: ignore[reportArgumentType]
        sampler: Any = copy(self.sampler)
        sampler.completions_per_prompt = completions_per_prompt
        return sampler
