"""Encode problems as prompts: token ids for the policy."""

import difflib
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from rlmod.types import Message, Problem, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UnreadableAnswer = Literal["error", "drop"]

FUNCTION_ARGUMENTS = ("tools", "documents", "chat_template")
"""Arguments of transformers' apply_chat_template itself that may be given."""
OWN_ARGUMENTS = {
    "conversation", "messages", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
"""Arguments of apply_chat_template that the encoder sets, or that would change the form of the result."""


OPENED_TAG = re.compile(r"(<(?:think|thinking|thought|reasoning)>)\s*$")
"""A tag at the end of a prompt that opens the model's reasoning."""


@dataclass(frozen=True, kw_only=True)
class EncodedProblems:
    """Problems with their token ids."""

    problems: tuple[Problem, ...]
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each problem's prompt, without padding."""
    pad_id: int
    dropped: int
    """Number of problems that were dropped because their prompt was too long or their answer could not be read."""

    def __len__(self) -> int:
        return len(self.problems)

    def check_max_model_len(self, sampler: object, key: str) -> None:
        """ValueError if the sampler's ``max_model_len`` is too short for a prompt with its completion: the engine would truncate it.

        ``key`` is the sampler's config key, for the message.
        """
        limit: int | None = getattr(sampler, "engine", {}).get("max_model_len", getattr(sampler, "max_model_len", None))
        if limit is None or not self.ids:
            return
        completion = cast(Any, sampler).max_new_tokens
        longest = max(range(len(self)), key=lambda i: len(self.ids[i]))
        if (length := len(self.ids[longest])) + completion > limit:
            raise ValueError(
                f"{key}.max_model_len={limit}: the longest prompt has {length} tokens ({self.problems[longest].source}), and with "
                f"{key}.max_new_tokens={completion} it needs {length + completion}; raise {key}.max_model_len to that, or lower "
                "data.encoder.max_tokens, so that longer prompts are dropped and counted"
            )

    def check_token_ids(self, embeddings: int) -> None:
        """Raise ValueError if a prompt has a token id that the policy has no embedding for."""
        for problem, row in zip(self.problems, self.ids, strict=True):
            if (highest := max(row)) >= embeddings:
                raise ValueError(
                    f"{problem.source}: the prompt has the token id {highest}, but the policy has only {embeddings} embeddings: its "
                    "tokenizer and its weights do not belong together, or the prompt names a token that the model does not have"
                )

    def without_unreadable(self, unreadable: Mapping[int, str], treatment: UnreadableAnswer) -> "EncodedProblems":
        """Drop the problems with an unreadable answer (by index, with the reason), or raise ValueError that names the first ones."""
        if not unreadable:
            return self
        named = [f"{self.problems[index].source}: {unreadable[index]}" for index in sorted(unreadable)[:3]]
        more = "; ..." if len(unreadable) > 3 else ""
        what = f"{len(unreadable)} of {len(self)} answers cannot be read by the reward ({'; '.join(named)}{more})"
        if treatment == "error" or len(unreadable) == len(self):
            raise ValueError(
                f"{what}, so no completion could ever be correct: correct them, choose another reward, or leave such problems out with "
                "data.unreadable_answer=drop"
            )
        log.warning("%s; these problems are dropped (data.unreadable_answer=drop)", what)
        kept = [index for index in range(len(self)) if index not in unreadable]
        return replace(
            self,
            problems=tuple(self.problems[index] for index in kept),
            ids=tuple(self.ids[index] for index in kept),
            dropped=self.dropped + len(unreadable),
        )

    def check_endings(self, text: str, tokenizer: "PreTrainedTokenizerBase", key: str) -> None:
        """Raise ValueError if a prompt does not end in ``text``, which is the value of ``key``. White space after it does not count."""
        endings = _decode_endings(self.ids, len(text.encode()), tokenizer)
        for problem, ending in zip(self.problems, endings, strict=True):
            if not ending.rstrip().endswith(text.rstrip()):
                raise ValueError(
                    f"{key}={text!r} must be the end of every prompt, but that of {problem.source} ends in {ending[-60:]!r}; it is for "
                    "text that the chat template, or the prompt, already begins the completion with"
                )

    def opened_tag(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """Return the tag, such as ``<think>``, with which the first prompt ends and which the completion is expected to close."""
        found = OPENED_TAG.search(_decode_endings(self.ids[:1], 20, tokenizer)[0]) if self.ids else None
        return found and found[1]

    def batch(self, indices: Sequence[int]) -> Prompts:
        """Return the prompts of the problems at these indices, token ids [len(indices) P], padded on the left to the longest."""
        rows = [self.ids[i] for i in indices]
        width = max(len(row) for row in rows)
        return Prompts(
            ids=torch.tensor([(self.pad_id,) * (width - len(row)) + row for row in rows]),
            mask=torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows]),
            problems=tuple(self.problems[i] for i in indices),
        )


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Tokenizes prompts. They go through the tokenizer's chat template, if it has one, with the generation prompt of the assistant; plain
    text is then a user message. Without a template, plain text stays unchanged, with the special tokens that the tokenizer puts before a
    text.

    Some tokenizers append an EOS to every text. It would tell the policy that the text is over, so it is removed.
    The end of a chat template stays, because an EOS there may separate the turns.
    """

    chat: bool | None = None
    """null: use the chat template if the tokenizer has one; true: a tokenizer without one is an error; false: never, so messages are an
    error."""
    system: str | None = None
    """A system message at the start of every conversation."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, as in {enable_thinking: false}; ``tools`` is a list of JSON schemas."""
    max_tokens: int | None = None
    """Maximum length of a prompt in tokens; null: any length."""
    too_long: Literal["drop", "error"] = "drop"
    """Treatment of longer prompts: ``drop`` them with a warning, or raise an ``error``."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"data.encoder.max_tokens must be null (any length) or at least 1, got {self.max_tokens}")
        if self.too_long not in ("drop", "error"):
            raise ValueError(f"data.encoder.too_long must be drop or error, got {self.too_long!r}")
        if not isinstance(self.template_arguments, Mapping):
            raise ValueError(
                "data.encoder.template_arguments must be names with values, as in {enable_thinking: false}, got "
                f"{self.template_arguments!r}"
            )
        for key, value in self._chat_settings().items():
            if self.chat is False:
                raise ValueError(
                    f"{key}={value!r} needs a chat, but data.encoder.chat is false: set data.encoder.chat to true or null, or remove {key}"
                )
        if taken := sorted(set(self.template_arguments) & OWN_ARGUMENTS):
            raise ValueError(
                f"data.encoder.template_arguments.{taken[0]} is an argument of apply_chat_template that rlmod sets itself; give arguments "
                "that the template reads, tools or documents"
            )

    def _chat_settings(self) -> dict[str, Any]:
        """Return the settings that have no effect on plain text, by key."""
        system = {} if self.system is None else {"data.encoder.system": self.system}
        return system | (
            {"data.encoder.template_arguments": dict(self.template_arguments)} if self.template_arguments else {}
        )

    def encode(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> EncodedProblems:
        """Tokenize all prompts. ValueError, with the problem's source, for a prompt that cannot be encoded."""
        if self.chat is None and tokenizer.chat_template:
            _say_that_chat_is_on()
            if problems:
                _warn_of_formatted_text(problems[0], tokenizer)
            return replace(self, chat=True).encode(problems, tokenizer)
        conversations = [self._to_conversation(problem) for problem in problems]
        messages = [each for each in conversations if each is not None]
        chats = iter(_encode_chats(messages, tokenizer, self.template_arguments))
        texts = iter(
            _encode_texts([str(p.prompt) for p, m in zip(problems, conversations, strict=True) if m is None], tokenizer)
        )
        ids = [next(texts if each is None else chats) for each in conversations]
        for problem, row in zip(problems, ids, strict=True):
            if not row:
                raise ValueError(f"{problem.source}: the tokenizer returns no tokens for the prompt {problem.prompt!r}")
        kept = [i for i, row in enumerate(ids) if self.max_tokens is None or len(row) <= self.max_tokens]
        if len(kept) < len(ids):
            self._report_too_long(problems, ids, kept)
        return EncodedProblems(
            problems=tuple(problems[i] for i in kept),
            ids=tuple(tuple(ids[i]) for i in kept),
            # The masks hide the padding, so any id will do if the tokenizer defines none.
            pad_id=0 if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id),
            dropped=len(ids) - len(kept),
        )

    def _to_conversation(self, problem: Problem) -> list[Message] | None:
        """Return the messages for the chat template; None for plain text."""
        if isinstance(problem.prompt, str):
            if not self.chat:
                for key in self._chat_settings():
                    raise ValueError(
                        f"{problem.source}: {key} is set, but the prompt is plain text, and the policy's tokenizer has no chat template; "
                        f"use an instruction-tuned policy, or remove {key}"
                    )
                return None
            messages = [{"role": "user", "content": problem.prompt}]
        elif self.chat is False:
            raise ValueError(
                f"{problem.source}: the prompt is a list of chat messages, but data.encoder.chat is false; "
                "set it to null, or select the text of a message, as in data.prompt_field=prompt.0.content"
            )
        else:
            messages = list(problem.prompt)
        if self.system is None:
            return messages
        if messages[0]["role"] == "system":
            raise ValueError(
                f"{problem.source}: the prompt already has a system message; set data.encoder.system to null to keep it"
            )
        return [{"role": "system", "content": self.system}, *messages]

    def _report_too_long(self, problems: Sequence[Problem], ids: list[list[int]], kept: list[int]) -> None:
        """Log a warning about the dropped prompts. ValueError if ``too_long`` is ``error``, or if none is left."""
        limit = f"data.encoder.max_tokens={self.max_tokens}"
        first = min(set(range(len(ids))) - set(kept))
        if self.too_long == "error":
            raise ValueError(
                f"{problems[first].source}: the prompt has {len(ids[first])} tokens, more than {limit}; "
                "raise it, or drop such problems with data.encoder.too_long=drop"
            )
        if not kept:
            raise ValueError(
                f"all {len(ids)} prompts are longer than {limit} (the shortest has {min(map(len, ids))} tokens): raise it"
            )
        log.warning(
            "%d of %d prompts are longer than %s and are dropped; the first is %s",
            *(len(ids) - len(kept), len(ids), limit, problems[first].source),
        )


@functools.cache
def _say_that_chat_is_on() -> None:
    """Log, once per process, that plain text becomes a chat."""
    log.info(
        "the prompts go through the chat template of the policy's tokenizer, plain text as a user message; "
        "data.encoder.chat=false leaves plain text as it is"
    )


def _warn_of_formatted_text(problem: Problem, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Log a warning if the text of this problem, the first one, seems to have been through a chat template already."""
    special = [str(token) for token in tokenizer.all_special_tokens]
    if isinstance(problem.prompt, str) and (found := [token for token in special if token in problem.prompt]):
        log.warning(
            "%s: the prompt holds the special token %s, so it may have been through a chat template already; "
            "data.encoder.chat=false leaves it as it is",
            *(problem.source, found[0]),
        )


def _decode_endings(rows: Sequence[Sequence[int]], length: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the text of each row's end: at least ``length`` bytes, and the white space after them."""
    tails = [list(row[-length - 16 :]) for row in rows]  # a token has at least one byte
    return cast(list[str], tokenizer.batch_decode(tails, skip_special_tokens=False))


def _encode_texts(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    # verbose=False: no warning about model_max_length, because max_tokens limits the length of a prompt.
    rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    rows = [_strip_second_bos(row, cast(int | None, tokenizer.bos_token_id)) for row in rows]
    return [_strip_eos(row, cast(int | None, tokenizer.eos_token_id)) for row in rows]


def _strip_second_bos(row: list[int], bos: int | None) -> list[int]:
    """Remove the tokenizer's BOS from a text that already begins with one, as the text of a chat template does."""
    return row[1:] if bos is not None and row[:2] == [bos, bos] else row


def _strip_eos(row: list[int], eos: int | None) -> list[int]:
    length = len(row)
    # The first token is kept: if BOS and EOS are the same token, it is the BOS.
    while length > 1 and row[length - 1] == eos:
        length -= 1
    return row[:length]


def _encode_chats(
    conversations: list[list[Message]], tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]
) -> list[list[int]]:
    if not conversations:
        return []
    if not tokenizer.chat_template:
        raise ValueError(
            "data.encoder.chat: the prompts are chats, but the policy's tokenizer has no chat template; use an instruction-tuned "
            "policy, put a chat_template.jinja beside its tokenizer, or use plain text: data.encoder.chat=null if the data is text, "
            "data.prompt_field=prompt.0.content if it is messages"
        )
    from jinja2 import TemplateError

    _warn_of_unread_arguments(tokenizer, arguments)
    try:
        return cast(Any, tokenizer).apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=False, **arguments
        )
    except (TemplateError, TypeError) as error:
        given = f" with data.encoder.template_arguments={dict(arguments)}" if arguments else ""
        raise ValueError(
            f"data.encoder: the tokenizer's chat template rejects the messages{given}: {error}; some do not support a system message"
        ) from error


def _warn_of_unread_arguments(tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any]) -> None:
    """Log a warning for each argument that the chat template does not read, because it has no effect."""
    if not set(arguments) - set(FUNCTION_ARGUMENTS):
        return
    from jinja2 import TemplateError, meta
    from transformers.utils import chat_template_utils

    try:
        template = tokenizer.get_chat_template(arguments.get("chat_template"), arguments.get("tools"))
        # The environment of transformers has tags of its own, such as {% generation %}.
        environment = chat_template_utils._compile_jinja_template(template).environment
        read = meta.find_undeclared_variables(environment.parse(template))
    except TemplateError:  # encoding reports it
        return
    for name in sorted(set(arguments) - read - set(FUNCTION_ARGUMENTS)):
        close = difflib.get_close_matches(name, read, n=1)
        log.warning(
            "data.encoder.template_arguments.%s has no effect: the tokenizer's chat template does not read it%s; it reads %s",
            *(name, f" (did you mean {close[0]}?)" if close else "", ", ".join(sorted(read))),
        )
