"""Encode problems as the token ids that prompt a policy."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from rlmod.types import Message, Problem, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodedProblems:
    """Problems with their token ids, of which batches are made."""

    problems: tuple[Problem, ...]
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each problem's prompt, without padding."""
    pad_id: int
    dropped: int
    """How many problems were left out because their prompt was too long."""

    def __len__(self) -> int:
        return len(self.problems)

    def check_max_model_len(self, sampler: object, key: str) -> None:
        """ValueError where the sampler's ``max_model_len`` is too short for a prompt with its completion, which an engine would cut off."""
        limit: int | None = getattr(sampler, "engine", {}).get("max_model_len", getattr(sampler, "max_model_len", None))
        if limit is None or not self.ids:
            return
        completion = cast(Any, sampler).max_new_tokens
        longest = max(range(len(self)), key=lambda i: len(self.ids[i]))
        if (length := len(self.ids[longest])) + completion > limit:
            raise ValueError(
                f"{key}.max_model_len={limit}: the longest prompt has {length} tokens ({self.problems[longest].source}), and with "
                f"{key}.max_new_tokens={completion} that makes {length + completion}; give that many, or a shorter "
                "data.encoder.max_tokens, with which longer prompts are dropped and counted"
            )

    def batch(self, indices: Sequence[int]) -> Prompts:
        """The problems at these indices, in this order, padded on the left to the longest of them."""
        rows = [self.ids[i] for i in indices]
        width = max(len(row) for row in rows)
        return Prompts(
            ids=torch.tensor([(self.pad_id,) * (width - len(row)) + row for row in rows]),
            mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
            problems=tuple(self.problems[i] for i in indices),
        )


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Tokenizes prompts: chat messages with the tokenizer's chat template, up to where the assistant speaks; plain text
    as it is, with the special tokens that the tokenizer puts before a text.

    Some tokenizers put an EOS after every text. To the policy that says the text is over, so it is taken off again.
    What a chat template puts at the end stays: there the EOS may be what separates the turns.
    """

    chat: bool | None = None
    """null: the chat template for prompts that are messages; true: for plain text too, as one user message;
    false: never, so messages are an error."""
    system: str | None = None
    """A system message to put before every conversation."""
    max_tokens: int | None = None
    """The longest prompt; null: any length."""
    too_long: Literal["drop", "error"] = "drop"

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.encoder.max_tokens must be null (any length) or at least 1, got {self.max_tokens}")
        if self.too_long not in ("drop", "error"):
            raise ValueError(f"data.encoder.too_long must be drop or error, got {self.too_long!r}")
        if self.system is not None and self.chat is False:
            raise ValueError(
                "data.encoder.system needs a chat: set data.encoder.chat to true or null, or system to null"
            )

    def encode(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> EncodedProblems:
        conversations = [self._conversation(problem) for problem in problems]
        chats = iter(_encode_chats([messages for messages in conversations if messages is not None], tokenizer))
        texts = iter(
            _encode_texts([str(p.prompt) for p, m in zip(problems, conversations, strict=True) if m is None], tokenizer)
        )
        ids = [next(texts if messages is None else chats) for messages in conversations]
        for problem, row in zip(problems, ids, strict=True):
            if not row:
                raise ValueError(f"{problem.source}: the tokenizer makes no tokens of the prompt {problem.prompt!r}")
        kept = [i for i, row in enumerate(ids) if self.max_tokens is None or len(row) <= self.max_tokens]
        if len(kept) < len(ids):
            self._too_long(problems, ids, kept)
        return EncodedProblems(
            problems=tuple(problems[i] for i in kept),
            ids=tuple(tuple(ids[i]) for i in kept),
            # Padding is never read under the masks: any id will do where the tokenizer names none.
            pad_id=0 if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id),
            dropped=len(ids) - len(kept),
        )

    def _conversation(self, problem: Problem) -> list[Message] | None:
        """Return the messages for the chat template; None for plain text."""
        if isinstance(problem.prompt, str):
            if not self.chat:
                if self.system is not None:
                    raise ValueError(
                        f"{problem.source}: data.encoder.system is set, but the prompt is plain text; "
                        "data.encoder.chat=true makes it a user message"
                    )
                return None
            messages = [{"role": "user", "content": problem.prompt}]
        elif self.chat is False:
            raise ValueError(
                f"{problem.source}: the prompt is a list of chat messages, but data.encoder.chat is false; "
                "set it to null, or take a text, as with data.prompt_field=prompt.0.content"
            )
        else:
            messages = list(problem.prompt)
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError(
                f"{problem.source}: the prompt has a system message of its own; "
                "set data.encoder.system to null to keep it"
            )
        return [{"role": "system", "content": self.system}, *messages]

    def _too_long(self, problems: Sequence[Problem], ids: list[list[int]], kept: list[int]) -> None:
        limit = f"data.encoder.max_tokens={self.max_tokens}"
        first = min(set(range(len(ids))) - set(kept))
        if self.too_long == "error":
            raise ValueError(
                f"{problems[first].source}: the prompt has {len(ids[first])} tokens, more than {limit}; "
                "raise it, or leave such problems out with data.encoder.too_long=drop"
            )
        if not kept:
            raise ValueError(
                f"all {len(ids)} prompts are longer than {limit} (the shortest: {min(map(len, ids))} tokens)"
            )
        log.warning(
            "%d of %d prompts are longer than %s and are left out; the first is %s",
            *(len(ids) - len(kept), len(ids), limit, problems[first].source),
        )


def _encode_texts(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # verbose=False: no warning about model_max_length; how long a prompt may be is for max_tokens to say.
    rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return [_without_eos(row, cast(int | None, tokenizer.eos_token_id)) for row in rows]


def _without_eos(row: list[int], eos: int | None) -> list[int]:
    length = len(row)
    # A first token is kept: where BOS and EOS are the same token, it is the BOS.
    while length > 1 and row[length - 1] == eos:
        length -= 1
    return row[:length]


def _encode_chats(conversations: list[list[Message]], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise ValueError(
            "data.encoder.chat: the prompts are chats, but the policy's tokenizer has no chat template; take an "
            "instruction-tuned policy, put a chat_template.jinja beside its tokenizer, or prompt with plain text: "
            "data.encoder.chat=null where the data is text, data.prompt_field=prompt.0.content where it is messages"
        )
    from jinja2 import TemplateError

    try:
        return cast(Any, tokenizer).apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise ValueError(
            f"data.encoder: the tokenizer's chat template refuses the messages: {error}; some know no system message"
        ) from error
