"""Sampling with transformers' ``generate``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from rlmod.forward import uncompiled
from rlmod.sampler._sampling import check, ends_of
from rlmod.types import Prompts, Rollouts, concatenate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HF:
    """G completions a prompt, with the log-probability of each sampled token and the full-vocabulary entropy at its position.

    Both are captured while sampling, of softmax(logits / temperature) *before* top-k and top-p cut it: of the policy, not of what is
    left of it. Nothing is computed for long on behalf of rows that have ended: ``generate`` is interrupted whenever a quarter of its
    rows are done, and goes on with the others and their key-value cache.
    """

    completions_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: the whole vocabulary."""
    max_new_tokens: int = 1024
    rows_per_batch: int | None = None
    """At most so many rows are sampled at once; null: all of them."""
    greedy: bool = False
    """Take the most likely token instead of sampling; for evaluation."""

    def __post_init__(self) -> None:
        check(self)
        if self.rows_per_batch is not None and self.rows_per_batch < 1:
            raise ValueError(f"sampler.rows_per_batch must be null or at least 1, got {self.rows_per_batch}")

    @torch.no_grad()
    def __call__(self, policy: "PreTrainedModel", prompts: Prompts, seed: int) -> Rollouts:
        group = torch.arange(len(prompts), device=prompts.ids.device).repeat_interleave(self.completions_per_prompt)
        device = prompts.ids.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            parts = [self._sample(policy, prompts, rows) for rows in group.split(self.rows_per_batch or len(group))]
        return concatenate(parts)

    def _sample(self, policy: "PreTrainedModel", prompts: Prompts, group: Int[Tensor, " R"]) -> Rollouts:
        # Imported here: a mistake in the config is to show before transformers has loaded its generation code.
        from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

        from rlmod.sampler._recorder import LastLogits, Recorder

        if getattr(policy, "_is_stateful", False):
            raise ValueError(
                f"sampler=hf goes on from a key-value cache, and {type(policy).__name__} keeps a recurrent state instead; "
                "give a policy with attention alone"
            )
        ids, attention = prompts.ids[group], prompts.mask[group]
        eos = torch.tensor(ends_of(policy), device=ids.device)
        rows = len(ids)
        completion = ids.new_full((rows, self.max_new_tokens), policy.generation_config.pad_token_id)
        mask = torch.zeros_like(completion, dtype=torch.bool)
        logprobs = torch.zeros(completion.shape, dtype=torch.float32, device=ids.device)
        entropy = torch.zeros_like(logprobs)

        running = torch.arange(rows, device=ids.device)
        cache, done = DynamicCache(config=policy.config), 0
        while len(running) and done < self.max_new_tokens:
            last = LastLogits()
            recorder = Recorder(last, self.temperature, eos)
            with nothing_but_ends(policy), uncompiled(policy):
                sequences = cast(Any, policy).generate(
                    input_ids=ids,
                    attention_mask=attention.long(),
                    past_key_values=cache,
                    generation_config=self._generation_config(policy, self.max_new_tokens - done),
                    logits_processor=LogitsProcessorList([last]),
                    stopping_criteria=StoppingCriteriaList([recorder]),
                    synced_gpus=False,  # the policy is whole: ranks need not wait for each other
                )
            new = sequences[:, ids.shape[1] :]
            ended = (new[..., None] == eos).any(-1)
            counts = ended.int().cumsum(1) - ended.int() == 0
            span = slice(done, done + new.shape[1])
            completion[running, span] = torch.where(counts, new, completion[running, span])
            mask[running, span] = counts
            logprobs[running, span] = torch.stack(recorder.logprobs, 1) * counts
            entropy[running, span] = torch.stack(recorder.entropy, 1) * counts
            done += new.shape[1]
            go_on = (~ended.any(1)).nonzero()[:, 0]
            running, ids = running[go_on], sequences[go_on]
            attention = torch.nn.functional.pad(attention[go_on], (0, new.shape[1]), value=True)
            cache.batch_select_indices(go_on)
        truncated = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        truncated[running] = True
        return Rollouts(
            prompt_ids=prompts.ids[group],
            prompt_mask=prompts.mask[group],
            completion_ids=completion[:, :done],
            mask=mask[:, :done],
            group=group,
            logprobs=logprobs[:, :done],
            entropy=entropy[:, :done],
            sampler_logprobs=logprobs[:, :done],
            truncated=truncated,
        )

    def _generation_config(self, policy: "PreTrainedModel", max_new_tokens: int) -> "GenerationConfig":
        from transformers import GenerationConfig

        return GenerationConfig(
            do_sample=not self.greedy,
            temperature=None if self.greedy else self.temperature,
            top_p=None if self.greedy else self.top_p,
            top_k=None if self.greedy else self.top_k,
            max_new_tokens=max_new_tokens,
            eos_token_id=policy.generation_config.eos_token_id,
            pad_token_id=policy.generation_config.pad_token_id,
        )


@contextmanager
def nothing_but_ends(policy: "PreTrainedModel") -> Iterator[None]:
    """Without what a model's own generation_config asks for besides, such as a repetition penalty.

    ``generate`` takes it up wherever the caller is silent, and completions would no longer be draws from the policy whose
    log-probabilities are noted.
    """
    from transformers import GenerationConfig

    own = policy.generation_config
    policy.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        policy.generation_config = own
