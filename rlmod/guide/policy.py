"""A frozen model that samples and scores.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from rlmod.guide._fields import check_completions
from rlmod.interfaces import Sampler
from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import HFPolicy
from rlmod.types import Problem, Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Policy:
    """``completions_per_prompt`` completions a prompt, drawn by pi_phi, with log pi_phi of each token at the guide's own temperature

    ``ratio="one"`` hands over log-probabilities of 0 instead (pi_phi := 1), as if the guide were certain of every token.

    Source: [R] MIX, arXiv:2507.12931: "a frozen, pre-trained, stable guiding policy"; ratio one: LUFFY, arXiv:2504.14945.
    Degenerate: 0 completions a prompt: it serves the zero-reward batch alone.
    """

    policy: HFPolicy
    """May be larger than the policy that is trained, but must share its tokenizer."""
    sampler: Sampler
    """The guide's own sampler settings: temperature, limits."""
    completions_per_prompt: int = 2
    ratio: Literal["guide", "one"] = "guide"
    device: str | None = None
    """null: where the trained policy is."""

    def __post_init__(self) -> None:
        check_completions(self.completions_per_prompt)

    @cached_property
    def model(self) -> nn.Module:
        return self.policy.frozen()

    def prepare(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> None:
        """ValueError for a guide whose token ids mean something else."""
        own = self.policy.tokenizer()
        mine, theirs = own.get_vocab(), tokenizer.get_vocab()
        if mine != theirs or own.eos_token_id != tokenizer.eos_token_id:
            differ = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
            example = (
                f", {differ[0]!r} for one"
                if differ
                else f", but for the EOS token: {own.eos_token!r}, not {tokenizer.eos_token!r}"
            )
            raise ValueError(
                f"guide.policy.path={self.policy.path}: its tokenizer has another vocabulary than the policy's: "
                f"{len(differ)} of {len(theirs)} tokens differ{example}. The guide's completions are trained on as token ids: "
                "give a guide of the same model family, or guide=demonstrations with its texts"
            )
        _ = self.model

    @torch.no_grad()
    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        home = prompts.ids.device
        device = torch.device(self.device) if self.device else home
        model = self.model.to(device)
        rows = self._asking_for(completions_per_prompt)(model, prompts.to(device), seed)
        logprobs = rows.logprobs
        if logprobs is None:  # an engine that hands over none
            logprobs = completion_logprobs(model, rows, self.sampler.temperature) * rows.mask
        rows, logprobs = rows.to(home), logprobs.to(home)
        if self.ratio == "one":
            logprobs = torch.zeros_like(logprobs)
        # Nothing to correct between engines: what the ratio divides by is what the guide hands over.
        return replace(rows, logprobs=logprobs, sampler_logprobs=logprobs)

    def _asking_for(self, completions_per_prompt: int) -> Sampler:
        if is_dataclass(self.sampler):
            return replace(self.sampler, completions_per_prompt=completions_per_prompt)  # pyright: ignore[reportArgumentType]
        sampler = copy(self.sampler)
        sampler.completions_per_prompt = completions_per_prompt
        return sampler
