"""Shared code of the samplers: their parameters, and the record built from lists of tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from rlmod.interfaces import OnFinished
from rlmod.types import Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_GROWTH = 64
"""Number of tokens by which sampler=hf extends its key-value cache at a time."""


@dataclass(frozen=True, kw_only=True)
class SamplingParameters:
    """The sampling parameters that all samplers share"""

    completions_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: the full vocabulary."""
    max_new_tokens: int = 1024
    greedy: bool = False
    """Greedy decoding instead of sampling; for evaluation."""
    stop: Sequence[str] = ()
    """Texts that end a completion, as an EOS does. The token that completes one of them belongs to the completion."""

    def __post_init__(self) -> None:
        if self.completions_per_prompt < 1:
            raise ValueError(f"sampler.completions_per_prompt must be at least 1, got {self.completions_per_prompt}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"sampler.temperature must be above 0 and finite, got {self.temperature}; for greedy decoding set sampler.greedy=true"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampler.top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"sampler.top_k must be 0 (the full vocabulary) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampler.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(
                f"sampler.stop must be a list of texts that are not empty, as in ['</answer>'], got {self.stop!r}"
            )

    @property
    def samples_full_distribution(self) -> bool:
        """True without top-p, top-k and greedy decoding. Log-probabilities always refer to the full distribution."""
        return self.top_p == 1 and self.top_k == 0 and not self.greedy


@dataclass(frozen=True, kw_only=True)
class VLLMSamplingParameters(SamplingParameters):
    """The sampling parameters of a vLLM engine, in this process or behind a server"""

    max_difference: float = 0.1
    """In nats. The run stops if the mean of |log pi_old - sampler_logprobs| over the tokens of a rollout batch is larger."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.temperature <= 2:  # vLLM raises lower ones to 0.01
            raise ValueError(f"sampler.temperature must be from 0.01 to 2 with vLLM, got {self.temperature}")
        if self.max_difference <= 0:
            raise ValueError(f"sampler.max_difference must be above 0 nats, got {self.max_difference}")

    def build_requests(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """Return one request per prompt: its token ids without padding, and vLLM's sampling parameters."""
        stop_token_ids = eos_token_ids(policy)
        # Without these settings vLLM would look for stop strings in a text without special tokens.
        as_sampled = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        stop = {"stop": list(self.stop), "include_stop_str_in_output": True, **as_sampled} if self.stop else {}
        return [
            (
                ids[mask].tolist(),
                {
                    "n": 1 if self.greedy else self.completions_per_prompt,
                    "temperature": 0.0 if self.greedy else self.temperature,
                    "top_p": 1.0 if self.greedy else self.top_p,
                    "top_k": 0 if self.greedy else self.top_k,
                    "seed": None if self.greedy else request_seed(seed, index * self.completions_per_prompt),
                    "max_tokens": self.max_new_tokens,
                    "logprobs": 0 if self.samples_full_distribution else None,
                    "stop_token_ids": stop_token_ids,
                    **stop,
                },
            )
            for index, (ids, mask) in enumerate(zip(prompts.ids, prompts.mask, strict=True))
        ]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion as an engine returns it."""

    tokens: Sequence[int]
    """Token ids, including the EOS, or the token that completes a stop string, if there is one."""
    logprobs: Sequence[float] | None
    """In nats, at the sampling temperature; None if they are not those of the full distribution."""
    ended: bool
    """True if it ended with an EOS or a stop string, not at the token limit."""


def rollouts_from_completions(prompts: Prompts, completions: Sequence[Completion], padding: int) -> Rollouts:
    """Build the record of all completions, which are ordered by prompt."""
    rows, device = len(completions), prompts.ids.device
    length = max(len(completion.tokens) for completion in completions)
    ids = torch.full((rows, length), padding)
    mask = torch.zeros(rows, length, dtype=torch.bool)
    logprobs = torch.zeros(rows, length, dtype=torch.float32)  # under bf16-true the default is 16 bits
    for row, completion in enumerate(completions):
        n = len(completion.tokens)
        ids[row, :n], mask[row, :n] = torch.tensor(completion.tokens), True
        if completion.logprobs is not None:
            logprobs[row, :n] = torch.tensor(completion.logprobs, dtype=torch.float32)
    group = torch.arange(len(prompts), device=device).repeat_interleave(rows // len(prompts))
    reported = all(completion.logprobs is not None for completion in completions)
    return Rollouts(
        prompt_ids=prompts.ids[group],
        prompt_mask=prompts.mask[group],
        completion_ids=ids.to(device),
        mask=mask.to(device),
        group=group,
        sampler_logprobs=logprobs.to(device) if reported else None,
        truncated=torch.tensor([not completion.ended for completion in completions], device=device),
    )


class Answers:
    """The completions of a batch of prompts, collected and reported as an engine finishes them."""

    def __init__(
        self, policy: "PreTrainedModel", prompts: Prompts, completions_per_prompt: int, on_finished: OnFinished | None
    ) -> None:
        self.prompts, self.completions_per_prompt, self.on_finished = prompts, completions_per_prompt, on_finished
        self.padding = cast(int, policy.generation_config.pad_token_id)
        self.completions: dict[int, list[Completion]] = {}

    @property
    def missing(self) -> list[int]:
        """Indices of the prompts without completions."""
        return [index for index in range(len(self.prompts)) if index not in self.completions]

    def add(self, index: int, completions: Sequence[Completion]) -> None:
        """Add the completions of one prompt. With greedy decoding all are equal and engines return one, which is repeated."""
        found = self.completions[index] = [*completions] * (self.completions_per_prompt // len(completions))
        if self.on_finished is not None:
            rows = rollouts_from_completions(self.prompts.pick([index]), found, self.padding)
            indices = index * len(rows) + torch.arange(len(rows))
            self.on_finished(replace(rows, group=torch.full_like(rows.group, index)), indices)

    def rollouts(self) -> Rollouts:
        """Return the record of all completions. All prompts must have theirs."""
        ordered = [row for index in range(len(self.prompts)) for row in self.completions[index]]
        return rollouts_from_completions(self.prompts, ordered, self.padding)


def eos_token_ids(policy: "PreTrainedModel") -> list[int]:
    """Return the ids of the tokens that end a completion."""
    ids = policy.generation_config.eos_token_id
    return list(ids) if isinstance(ids, list) else [cast(int, ids)]


def request_seed(seed: int, row: int) -> int:
    """Return the seed of a request whose first row is ``row``; its other rows use the seeds after it."""
    return (seed + row) % 2**31
