"""Encode problems as prompts: token ids for the policy."""

import difflib
import functools
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from rlmod.data._cache import WAIT_SECONDS
from rlmod.data._store import ProblemStore
from rlmod.rollout.stored_rows import encode_rows, hash_encoding, hash_prompts
from rlmod.rollout.token_rows import TokenRows
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


ONLY_IDS: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False}
"""Arguments of the tokenizer that leave out lists as long as the ids."""
ENDINGS = 10_000
"""Endings of prompts that are decoded at once."""
OPENED_TAG = re.compile(r"(<(?:think|thinking|thought|reasoning)>)\s*$")
"""A tag at the end of a prompt that opens the model's reasoning."""


def _max_model_len(sampler: object) -> int | None:
    return getattr(sampler, "engine", {}).get("max_model_len", getattr(sampler, "max_model_len", None))


def max_prompt_tokens(sampler: object) -> int | None:
    """Return the length of the longest prompt that a sampler can complete, in tokens; None: any."""
    limit = _max_model_len(sampler)
    return None if limit is None else limit - cast(Any, sampler).max_new_tokens


@dataclass(frozen=True, kw_only=True)
class EncodedProblems:
    """Problems with their token ids."""

    problems: Sequence[Problem]
    """A tuple or, for large data, a sequence that reads each problem from a file."""
    ids: Sequence[Sequence[int]]
    """Token ids of each problem's prompt, without padding. They are kept as ``rows``, whatever sequence is given."""
    pad_id: int
    dropped: int
    """Number of problems that were dropped because their prompt was too long or their answer could not be read."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", TokenRows.of(self.ids))

    @property
    def rows(self) -> TokenRows:
        """Token ids in one flat array."""
        return cast(TokenRows, self.ids)

    def __len__(self) -> int:
        return len(self.problems)

    def check_max_model_len(self, sampler: object, key: str) -> None:
        """ValueError if the sampler's ``max_model_len`` is too short for a prompt with its completion: the engine would truncate it.

        ``key`` is the sampler's config key, for the message.
        """
        limit = _max_model_len(sampler)
        if limit is None or not self.ids:
            return
        completion = cast(Any, sampler).max_new_tokens
        longest = int(self.rows.lengths.argmax())
        if (length := int(self.rows.lengths[longest])) + completion > limit:
            raise ValueError(
                f"{key}.max_model_len={limit}: the longest prompt has {length} tokens ({self.problems[longest].source}), and with "
                f"{key}.max_new_tokens={completion} it needs {length + completion}; raise {key}.max_model_len to that, or lower "
                "data.encoder.max_tokens, so that longer prompts are dropped and counted"
            )

    def check_positions(self, positions: int | None, sampler: object, key: str) -> None:
        """ValueError if the policy has fewer ``positions`` than the longest prompt and a completion need. ``key`` is the sampler's."""
        completion: int | None = getattr(sampler, "max_new_tokens", None)
        if positions is None or completion is None or not self.ids:
            return
        longest = int(self.rows.lengths.argmax())
        if (length := int(self.rows.lengths[longest])) + completion > positions:
            raise ValueError(
                f"{key}.max_new_tokens={completion}: the longest prompt has {length} tokens ({self.problems[longest].source}), and with a "
                f"completion it needs {length + completion} positions, but the policy has {positions} (max_position_embeddings): lower "
                f"{key}.max_new_tokens or data.encoder.max_tokens, or choose a size= that fits this policy"
            )

    def check_token_ids(self, embeddings: int) -> None:
        """Raise ValueError if a prompt has a token id that the policy has no embedding for."""
        if self.rows.highest < embeddings:
            return
        for index in range(len(self)):
            if (highest := int(self.rows.array(index).max())) >= embeddings:
                problem = self.problems[index]
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
            problems=_select(self.problems, kept),
            ids=self.rows.select(kept),
            dropped=self.dropped + len(unreadable),
        )

    def check_endings(self, text: str, tokenizer: "PreTrainedTokenizerBase", key: str) -> None:
        """Raise ValueError if a prompt does not end in ``text``, which is the value of ``key``. White space after it does not count."""
        for index, ending in self._other_endings(text, tokenizer):
            if not ending.rstrip().endswith(text.rstrip()):
                source = self.problems[index].source
                raise ValueError(
                    f"{key}={text!r} must be the end of every prompt, but that of {source} ends in {ending[-60:]!r}; it is for "
                    "text that the chat template, or the prompt, already begins the completion with"
                )

    def _other_endings(self, text: str, tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[int, str]]:
        """Yield index and ending of the prompts that do not end in the same tokens as the first one, if that ends in ``text``.

        Most prompts end alike, because a chat template writes the end, so few have to be decoded.
        """
        length, others = len(text.encode()), np.arange(len(self))
        first = self.rows[:1].tails(length + 16)[0] if len(self) else []
        for size in range(1, len(first) + 1):
            if cast(str, tokenizer.decode(first[-size:], skip_special_tokens=False)).rstrip().endswith(text.rstrip()):
                others = np.flatnonzero(~self.rows.end_alike(np.array(first[-size:], dtype=np.int32)))
                break
        for start in range(0, len(others), ENDINGS):
            part = others[start : start + ENDINGS]
            yield from zip(part.tolist(), _decode_endings(self.rows.select(part), length, tokenizer), strict=True)
            self.rows.forget()

    def opened_tag(self, tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """Return the tag, such as ``<think>``, with which the first prompt ends and which the completion is expected to close."""
        found = OPENED_TAG.search(_decode_endings(self.rows[:1], 20, tokenizer)[0]) if self.ids else None
        return found and found[1]

    def batch(self, indices: Sequence[int]) -> Prompts:
        """Return the prompts of the problems at these indices, token ids [len(indices) P], padded on the left to the longest."""
        rows = [self.rows.array(i) for i in indices]
        width = max(len(row) for row in rows)
        ids, mask = np.full((len(rows), width), self.pad_id), np.zeros((len(rows), width), dtype=bool)
        for place, row in enumerate(rows):
            ids[place, width - len(row) :] = row
            mask[place, width - len(row) :] = True
        problems = tuple(self.problems[i] for i in indices)
        # Each place that was read maps 16 pages of a large file. Without this the process would seem to hold all of it in the end.
        self.rows.forget()
        if isinstance(self.problems, ProblemStore):
            self.problems.stored.forget()
        return Prompts(ids=torch.from_numpy(ids), mask=torch.from_numpy(mask), problems=problems)


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

    def encode(
        self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", wait_seconds: float = WAIT_SECONDS
    ) -> EncodedProblems:
        """Tokenize all prompts. ValueError, with the problem's source, for a prompt that cannot be encoded.

        The tokens of many problems live in a file of the cache. ``wait_seconds`` limits the time for which a rank waits for rank 0 of its
        node, which writes that file.
        """
        if self.chat is None and tokenizer.chat_template:
            _say_that_chat_is_on()
            if problems:
                _warn_of_formatted_text(problems[0], tokenizer)
            return replace(self, chat=True).encode(problems, tokenizer, wait_seconds)
        if self.template_arguments and problems and tokenizer.chat_template:
            _warn_of_unread_arguments(tokenizer, self.template_arguments)

        def encode(part: list[Problem]) -> list[list[int]]:
            return self._encode_part(part, tokenizer)

        rows = encode_rows(problems, encode, lambda: self._key(problems, tokenizer), wait_seconds)
        kept = np.arange(len(rows)) if self.max_tokens is None else np.flatnonzero(rows.lengths <= self.max_tokens)
        if len(kept) < len(rows):
            self._report_too_long(problems, rows.lengths, kept)
        return EncodedProblems(
            problems=_select(problems, kept),
            ids=rows if len(kept) == len(rows) else rows.select(kept),
            # The masks hide the padding, so any id will do if the tokenizer defines none.
            pad_id=0 if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id),
            dropped=len(rows) - len(kept),
        )

    def _encode_part(self, problems: list[Problem], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
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
        return ids

    def _key(self, problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase") -> str | None:
        """Return the hash of all that decides the tokens; None if it cannot be known. Long prompts are dropped afterwards."""
        if type(self) is not PromptEncoder:
            return None
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("max_tokens", "too_long")}
        settings["template_arguments"] = dict(self.template_arguments)
        settings["problems"] = hash_prompts(problems)
        return hash_encoding(settings, self.template_arguments, tokenizer)

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

    def _report_too_long(self, problems: Sequence[Problem], lengths: np.ndarray, kept: np.ndarray) -> None:
        """Log a warning about the dropped prompts. ValueError if ``too_long`` is ``error``, or if none is left."""
        limit = f"data.encoder.max_tokens={self.max_tokens}"
        first = int((lengths > self.max_tokens).argmax())
        if self.too_long == "error":
            raise ValueError(
                f"{problems[first].source}: the prompt has {lengths[first]} tokens, more than {limit}; "
                "raise it, or drop such problems with data.encoder.too_long=drop"
            )
        if not len(kept):
            raise ValueError(
                f"all {len(lengths)} prompts are longer than {limit} (the shortest has {lengths.min()} tokens): raise it"
            )
        log.warning(
            "%d of %d prompts are longer than %s and are dropped; the first is %s",
            *(len(lengths) - len(kept), len(lengths), limit, problems[first].source),
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


def _select(problems: Sequence[Problem], kept: Sequence[int] | np.ndarray) -> Sequence[Problem]:
    """Return the problems at these ascending indices: a tuple, or a selection of a stored set."""
    if isinstance(problems, ProblemStore):
        return problems if len(kept) == len(problems) else problems.select(kept)
    return tuple(problems[i] for i in kept)


def _decode_endings(rows: TokenRows, length: int, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Return the text of each row's end: at least ``length`` bytes, and the white space after them."""
    tails = rows.tails(length + 16)  # a token has at least one byte
    return cast(list[str], tokenizer.batch_decode(tails, skip_special_tokens=False))


def _encode_texts(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    rows = _tokenize(texts, tokenizer, add_special_tokens=True)
    rows = [_strip_second_bos(row, cast(int | None, tokenizer.bos_token_id)) for row in rows]
    return [_strip_eos(row, cast(int | None, tokenizer.eos_token_id)) for row in rows]


def _tokenize(texts: list[str], tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool) -> list[list[int]]:
    """Return the tokens of each text, without their offsets in the text if the tokenizer is transformers' own: a tenth less time."""
    # The first text takes the usual way, which also sets the backend: no truncation, no padding, special tokens as the tokenizer says.
    # verbose=False: no warning about model_max_length, because max_tokens limits the length of a prompt.
    usual = functools.partial(tokenizer, verbose=False, add_special_tokens=add_special_tokens, **ONLY_IDS)
    if not texts or not _has_usual_methods(tokenizer, "__call__", "_encode_plus"):
        return cast(Any, usual(texts))["input_ids"] if texts else []
    first = cast(Any, usual(texts[:1]))["input_ids"]
    rest = cast(Any, tokenizer).backend_tokenizer.encode_batch_fast(texts[1:], add_special_tokens=add_special_tokens)
    return [*first, *(encoding.ids for encoding in rest)]


def _has_usual_methods(tokenizer: "PreTrainedTokenizerBase", *names: str) -> bool:
    """Return True if the tokenizer is transformers' own fast one, and its class does nothing else in these methods."""
    from transformers import TokenizersBackend

    return isinstance(tokenizer, TokenizersBackend) and all(
        getattr(type(tokenizer), name, None) is getattr(TokenizersBackend, name, tokenizer) for name in names
    )


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

    render = functools.partial(
        cast(Any, tokenizer).apply_chat_template, conversations, add_generation_prompt=True, **arguments
    )
    try:
        if _has_usual_methods(tokenizer, "apply_chat_template"):
            return _tokenize(render(tokenize=False), tokenizer, add_special_tokens=False)
        return render(tokenize=True, return_dict=False, tokenizer_kwargs=dict(ONLY_IDS))
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
