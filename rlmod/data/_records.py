"""Conversion of records, as files and data sets hold them, to problems."""

import itertools
import math
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from rlmod.jsonl import SURROGATE
from rlmod.types import Message, Problem

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Selects records, and reads the prompt and the answer from each."""

    prompt_field: str
    answer_field: str
    template: str | None
    answer_pattern: str | None
    limit: int | None
    skip: int

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"data.limit (or data.validation_limit) must be null (all problems) or at least 1, got {self.limit}"
            )
        if self.skip < 0:
            raise ValueError(f"data.skip (or data.validation_skip) must be at least 0, got {self.skip}")
        if self.template is not None:
            _check_template(self.template)
        if self.answer_pattern is not None:
            _check_pattern(self.answer_pattern)

    def __call__(self, records: Iterable[tuple[str, object]], name: str) -> list[Problem]:
        """Convert (source, record) pairs to problems. Nothing is read beyond the limit. ``name`` is for error messages."""
        stop = None if self.limit is None else self.skip + self.limit
        problems = [self._convert(record, source) for source, record in itertools.islice(records, self.skip, stop)]
        if not problems:
            after = f" after the {self.skip} that data.skip (or data.validation_skip) skips" if self.skip else ""
            raise ValueError(f"{name} holds no problems{after}")
        return problems

    def _convert(self, record: object, source: str) -> Problem:
        if not isinstance(record, Mapping):
            raise ValueError(f"{source}: a record must be an object with named fields, got {type(record).__name__}")
        return Problem(prompt=self._prompt(record, source), answer=self._answer(record, source), source=source)

    def _prompt(self, record: Mapping, source: str) -> str | tuple[Message, ...]:
        if self.template is not None:
            key = "data.template"
            try:
                prompt: object = _Template(source).vformat(self.template, (), record)
            except (TypeError, ValueError) as error:
                if str(error).startswith(source):
                    raise
                # Otherwise the template asks for a format or a conversion that the field's value does not support.
                raise ValueError(f"{source}: {key}={self.template!r}: {error}") from error
        else:
            key = "data.prompt_field"
            prompt = _lookup(record, self.prompt_field, f"{key}={self.prompt_field}", source)
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"{source}: {key} must give text or a list of chat messages, got {type(prompt).__name__}")
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise ValueError(f"{source}: the prompt that {key} gives is empty")
        prompt = prompt if isinstance(prompt, str) else _to_messages(prompt, source)
        for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
            if half := SURROGATE.search(text):
                raise ValueError(
                    f"{source}: the prompt holds {half[0]!r}, half a character: a surrogate without its pair is not valid text"
                )
        return prompt

    def _answer(self, record: Mapping, source: str) -> str:
        key = f"data.answer_field={self.answer_field}"
        answer = _to_text(_lookup(record, self.answer_field, key, source), key, source)
        if self.answer_pattern is not None:
            matches = list(re.finditer(self.answer_pattern, answer))
            if not matches:
                raise ValueError(
                    f"{source}: data.answer_pattern={self.answer_pattern} does not match anywhere in {self.answer_field}, "
                    f"which ends in {answer[-60:]!r}"
                )
            answer = matches[-1].group(1) or ""
        if not answer.strip():
            raise ValueError(f"{source}: the answer that {key} gives is empty")
        return answer.strip()


def _check_template(template: str) -> None:
    doubled = "write a literal brace twice, as in \\boxed{{}}"
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"data.template={template!r} is not a str.format template: {error}; {doubled}") from error
    if not names or "" in names:
        raise ValueError(f"data.template={template!r} must name the fields it uses, as in {{question}}; {doubled}")


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"data.answer_pattern={pattern} is not a regular expression: {error}") from error
    if not groups:
        raise ValueError(f"data.answer_pattern={pattern} needs a group around the answer, as in '#### (.+)'")


class _Template(string.Formatter):
    """Formats with the fields of a record, dotted names included. A field's value is inserted unchanged."""

    def __init__(self, source: str) -> None:
        self.source = source

    def get_field(self, field_name: str, args: object, kwargs: Mapping) -> tuple[object, str]:
        return _lookup(kwargs, field_name, f"data.template asks for {field_name!r}", self.source), field_name

    def format_field(self, value: object, format_spec: str) -> str:
        return format(value, format_spec) if format_spec else _to_text(value, "data.template", self.source)


def _lookup(record: Mapping, field: str, key: str, source: str) -> object:
    """Return the field of this name. A dotted name goes through objects by key and through lists by index."""
    value = _to_python(record[field]) if field in record else _lookup_nested(record, field)
    if value is None:
        raise ValueError(f"{source}: {key}, but the record has no such field, or it is empty; {_list_fields(record)}")
    return value


def _lookup_nested(value: object, field: str) -> object:
    for part in field.split("."):
        if isinstance(value, Mapping):
            value = _to_python(value.get(part))
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal() and int(part) < len(value):
            value = _to_python(value[int(part)])
        else:
            return None
    return value


def _list_fields(record: Mapping) -> str:
    names = [
        f"{name}.{inner}" if inner else str(name)
        for name, value in record.items()
        for inner in (value if isinstance(value, Mapping) and value else [""])
    ]
    return f"there are: {', '.join(names)}" if names else "there are no fields"


def _to_python(value: Any) -> object:
    """Convert numpy's objects to Python's, and the NaN of an empty cell to None."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _to_text(value: object, key: str, source: str) -> str:
    """Return the value as text. 27.0 becomes 27, because data sets store whole numbers as floats."""
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int | float | Decimal):
        return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)
    raise ValueError(f"{source}: {key} must give text or a number, got {type(value).__name__}")


def _to_messages(turns: Sequence, source: str) -> tuple[Message, ...]:
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            got = f"the keys {', '.join(map(str, turn))}" if isinstance(turn, Mapping) else type(turn).__name__
            raise ValueError(f"{source}: a chat message must have role and content, got {got}")
        if turn["role"] not in ROLES:
            raise ValueError(f"{source}: a chat message's role must be one of {', '.join(ROLES)}, got {turn['role']!r}")
        if not isinstance(turn["content"], str):
            raise ValueError(f"{source}: a chat message's content must be text, got {type(turn['content']).__name__}")
        messages.append({"role": turn["role"], "content": turn["content"]})
    if messages[-1]["role"] == "assistant":
        # Conversations for supervised training end this way: the prompt would contain the answer that the policy has to find.
        raise ValueError(
            f"{source}: the last chat message is the assistant's; a prompt ends before the assistant's turn"
        )
    if not any(message["content"].strip() for message in messages):
        raise ValueError(f"{source}: the prompt is empty: no chat message has any content")
    return tuple(messages)
