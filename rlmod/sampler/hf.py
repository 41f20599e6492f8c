"""Sampling with transformers' ``generate``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.interfaces import OnFinished
from rlmod.model.policy import tokenizer_of
from rlmod.model.shared_prompts import uncompiled
from rlmod.sampler._sampling import SamplingParameters, eos_token_ids
from rlmod.sampler._stop_strings import StopStrings
from rlmod.types import Prompts, Rollouts, concatenate

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class HF(SamplingParameters):
    """G completions per prompt, with the log-probability of each sampled token and the full-vocabulary entropy at its position.

    Both are computed while sampling, from softmax(logits / temperature) *before* top-k and top-p: they belong to the policy, not to
    the truncated distribution. Finished rows cost little: ``generate`` is interrupted whenever a quarter of its rows have ended, and
    resumes with the others and their key-value cache.
    """

    rows_per_batch: int | None = None
    """Maximum number of rows sampled at once; null: all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_batch is not None and self.rows_per_batch < 1:
            raise ValueError(f"sampler.rows_per_batch must be null or at least 1, got {self.rows_per_batch}")

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        group = torch.arange(len(prompts), device=prompts.ids.device).repeat_interleave(self.completions_per_prompt)
        device = prompts.ids.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            batches = torch.arange(len(group), device=device).split(self.rows_per_batch or len(group))
            sampled = [self._sample(policy, prompts, group[indices], indices, on_finished) for indices in batches]
        return concatenate(sampled)

    def _sample(
        self,
        policy: "PreTrainedModel",
        prompts: Prompts,
        group: Int[Tensor, " R"],
        indices: Int[Tensor, " R"],
        on_finished: OnFinished | None,
    ) -> Rollouts:
        # Imported here, so that a mistake in the config is reported before transformers loads its generation code.
        from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList

        from rlmod.sampler._cache import preallocate
        from rlmod.sampler._recorder import LastLogits, Recorder

        cache = preallocate(DynamicCache(config=policy.config))
        # Layers of a hybrid model, such as convolutions, have a state from which unfinished rows cannot be selected.
        recurrent = [layer for layer in cache.layers if not hasattr(layer, "batch_select_indices")]
        if recurrent or getattr(policy, "_is_stateful", False):
            raise ValueError(
                f"sampler=hf resumes from a key-value cache, but {type(policy).__name__} keeps a recurrent state instead; "
                "use a policy with attention layers only, or sampler=vllm"
            )
        check_rope(policy, prompts.ids.shape[1] + self.max_new_tokens)
        ids, attention = prompts.ids[group], prompts.mask[group]
        eos = torch.tensor(eos_token_ids(policy), device=ids.device)
        padding = cast(int, policy.generation_config.pad_token_id)
        record = _Record(prompts, group, self.max_new_tokens, padding)
        stop_strings = StopStrings(tokenizer_of(policy), self.stop) if self.stop else None

        def report_finished(rows: Int[Tensor, " n"]) -> None:
            if on_finished is not None and len(rows):
                on_finished(record.rollouts().rows(rows), indices[rows])

        running = torch.arange(len(ids), device=ids.device)
        while len(running) and record.done < self.max_new_tokens:
            last = LastLogits()
            recorder = Recorder(last, self.temperature, eos, stop_strings, start=prompts.ids.shape[1])
            with plain_generation_config(policy), uncompiled(policy), _name_diverged_policy():
                sequences = cast(Any, policy).generate(
                    input_ids=ids,
                    attention_mask=attention.long(),
                    past_key_values=cache,
                    generation_config=self._generation_config(policy, self.max_new_tokens - record.done),
                    logits_processor=LogitsProcessorList([last]),
                    stopping_criteria=StoppingCriteriaList([recorder]),
                    synced_gpus=False,  # the policy is not sharded here, so ranks need not wait for each other
                )
            new = sequences[:, ids.shape[1] :]
            ended = torch.stack(recorder.ends, 1)
            record.append(running, new, ended, torch.stack(recorder.logprobs, 1), torch.stack(recorder.entropy, 1))
            report_finished(running[ended.any(1)])
            unfinished = (~ended.any(1)).nonzero()[:, 0]
            running, ids = running[unfinished], sequences[unfinished]
            attention = torch.nn.functional.pad(attention[unfinished], (0, new.shape[1]), value=True)
            cache.batch_select_indices(unfinished)
        record.truncated[running] = True
        report_finished(running)
        return record.rollouts()

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


class _Record:
    """The tokens sampled so far: ``done`` per row, or fewer if a row has ended."""

    def __init__(self, prompts: Prompts, group: Int[Tensor, " R"], max_tokens: int, padding: int) -> None:
        self.prompts, self.group, self.done = prompts, group, 0
        shape, device = (len(group), max_tokens), group.device
        self.completion = torch.full(shape, padding, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.logprobs, self.entropy = (torch.zeros(shape, dtype=torch.float32, device=device) for _ in range(2))
        self.truncated = torch.zeros(len(group), dtype=torch.bool, device=device)

    def append(
        self,
        rows: Int[Tensor, " n"],
        tokens: Int[Tensor, "n new"],
        ended: Bool[Tensor, "n new"],
        logprobs: Float[Tensor, "n new"],
        entropy: Float[Tensor, "n new"],
    ) -> None:
        """Append the next tokens of these rows, up to the first token that ``ended`` the completion."""
        counts = ended.int().cumsum(1) - ended.int() == 0
        span = slice(self.done, self.done + tokens.shape[1])
        self.completion[rows, span] = torch.where(counts, tokens, self.completion[rows, span])
        self.mask[rows, span] = counts
        self.logprobs[rows, span] = logprobs * counts
        self.entropy[rows, span] = entropy * counts
        self.done += tokens.shape[1]

    def rollouts(self) -> Rollouts:
        logprobs = self.logprobs[:, : self.done]
        return Rollouts(
            prompt_ids=self.prompts.ids[self.group],
            prompt_mask=self.prompts.mask[self.group],
            completion_ids=self.completion[:, : self.done],
            mask=self.mask[:, : self.done],
            group=self.group,
            logprobs=logprobs,
            entropy=self.entropy[:, : self.done],
            sampler_logprobs=logprobs,
            truncated=self.truncated,
        )


def check_rope(policy: "PreTrainedModel", longest: int) -> None:
    """Raise ValueError if the model's rotary embedding would change while a sequence grows to ``longest`` tokens.

    The frequencies of the types ``dynamic`` and ``longrope`` depend on the longest sequence of a batch. Beyond the original context, keys
    in the cache would have other frequencies than in the training pass, and the ratios would not begin at 1.
    """
    rope = getattr(policy.config, "rope_parameters", None) or {}
    kinds = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    for kind in kinds:
        name = kind.get("rope_type", "default")
        original = kind.get("original_max_position_embeddings") or policy.config.max_position_embeddings
        if name in ("dynamic", "longrope") and longest > original:
            raise ValueError(
                f"sampler=hf: the policy's rotary embedding ({name}) changes beyond {original} tokens, and prompt and completion may have "
                f"{longest}; lower sampler.max_new_tokens or data.encoder.max_tokens so that both together have at most {original}"
            )


@contextmanager
def plain_generation_config(policy: "PreTrainedModel") -> Iterator[None]:
    """Replace the model's generation_config by one with nothing but the EOS and padding tokens, and restore it afterwards.

    ``generate`` fills in other settings from it, such as a repetition penalty. Completions would then not be samples from the policy
    whose log-probabilities are recorded.
    """
    from transformers import GenerationConfig

    own = policy.generation_config
    policy.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        policy.generation_config = own


@contextmanager
def _name_diverged_policy() -> Iterator[None]:
    """Turn torch's error about a distribution that is none into a sentence. On a GPU the same fault is an assertion of the device."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor contains" in str(error) or "device-side assert" in str(error):
            raise ValueError(
                "the policy's logits are not finite, so nothing can be sampled: its weights have diverged. Lower the learning rate, and "
                "resume from an earlier checkpoint"
            ) from error
        raise
