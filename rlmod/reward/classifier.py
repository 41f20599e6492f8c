"""A reward model: a sequence classifier of transformers with one output.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, cast

import torch

from rlmod.types import Message, Problem, Texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """reward_i = scale * logit of the reward model for (prompt_i, completion_i)

    The model has its own tokenizer and chat template. It reads text, so the policy's tokenizer may differ. Prompt and completion are a
    user's and an assistant's turn, or one text if there is no template.

    Source: Bradley-Terry reward models, as in arXiv:2203.02155, sec. 3.5.
    Differs: [D] a text longer than ``max_tokens`` loses its beginning, with a warning that counts such texts.
    Degenerate: scale 0 gives every completion reward 0. The batch size changes only the speed.
    Reads: problems, completions.
    """

    path: str
    batch_size: int = 16
    max_tokens: int = 4096
    scale: float = 1.0
    chat: bool | None = None
    """null: true if the tokenizer has a chat template."""
    dtype: str = "float32"
    device: str | None = None
    """null: a GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"reward.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")

    def prepare(self, problems: Sequence[Problem], tokenizer: object) -> None:
        """Load the model. Raise ValueError if its head does not have exactly one output."""
        _ = self.model

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            sides = {"truncation_side": "left", "padding_side": "right"}
            tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False, **sides)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"reward.path={self.path}: the tokenizer cannot be loaded ({_first_line(error)})"
            ) from error
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.chat and not tokenizer.chat_template:
            raise ValueError(f"reward.chat=true, but the tokenizer of {self.path} has no chat template")
        return tokenizer

    @cached_property
    def model(self) -> "PreTrainedModel":
        from transformers import AutoConfig, AutoModelForSequenceClassification

        try:
            outputs = AutoConfig.from_pretrained(self.path, trust_remote_code=False).num_labels
            if outputs != 1:
                raise ValueError(f"the head has {outputs} outputs, a reward model has one")
            settings = {"dtype": getattr(torch, self.dtype), "trust_remote_code": False}
            model = AutoModelForSequenceClassification.from_pretrained(self.path, **settings)
        except (OSError, ValueError, UnpicklingError) as error:
            raise ValueError(
                f"reward.path={self.path}: the reward model cannot be loaded ({_first_line(error)})"
            ) from error
        # The model finds the last token by the padding.
        model.config.pad_token_id = self.tokenizer.pad_token_id
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cast(Any, model).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, texts: Texts) -> list[float]:
        if texts.problems is None:
            raise ValueError("the reward Classifier reads the prompts, but recorded completions have none")
        rows = [self._text(p, c) for p, c in zip(texts.problems, texts.completions, strict=True)]
        special = not self._uses_chat
        encoded = [self.tokenizer(row, add_special_tokens=special, verbose=False)["input_ids"] for row in rows]
        self._warn_of_truncation([len(cast(list[int], ids)) for ids in encoded])
        # Similar lengths in one batch need less padding.
        order = sorted(range(len(rows)), key=lambda row: len(cast(list[int], encoded[row])))
        rewards = [0.0] * len(rows)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            ids = [cast(list[int], encoded[row])[-self.max_tokens :] for row in chosen]
            batch = self.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(self.model.device)
            logits = self.model(**batch).logits[:, 0].float().tolist()
            for row, logit in zip(chosen, logits, strict=True):
                rewards[row] = self.scale * logit
        return rewards

    @property
    def _uses_chat(self) -> bool:
        return bool(self.tokenizer.chat_template) if self.chat is None else self.chat

    def _text(self, problem: Problem, completion: str) -> str:
        if not self._uses_chat:
            prompt = problem.prompt
            return (prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)) + completion
        turns = [{"role": "user", "content": problem.prompt}] if isinstance(problem.prompt, str) else [*problem.prompt]
        chat: list[Message] = [*turns, {"role": "assistant", "content": completion}]
        return cast(str, self.tokenizer.apply_chat_template(chat, tokenize=False))

    def _warn_of_truncation(self, lengths: Sequence[int]) -> None:
        too_long = sum(length > self.max_tokens for length in lengths)
        if too_long:
            log.warning(
                "%d of %d texts are longer than reward.max_tokens=%d (the longest: %d) and lose their beginning",
                *(too_long, len(lengths), self.max_tokens, max(lengths)),
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
