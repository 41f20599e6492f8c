"""Conversion of records, as files and data sets hold them, to problems."""

import itertools
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from rlmod.data._messages import to_messages
from rlmod.data._store import collect
from rlmod.jsonl import SURROGATE
from rlmod.types import Answer, Message, Problem

if TYPE_CHECKING:
    import pyarrow as pa

LONGEST_NUMBER = 400
"""Digits before or after the point beyond which a number stays in scientific notation."""


class MissingField(ValueError):
    """A record does not have a field that a problem needs."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Selects records, and reads the prompt and the answer from each."""

    prompt_field: str
    answer_field: str | None
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

    def __call__(self, records: Iterable[tuple[str, object]], name: str) -> Sequence[Problem]:
        """Convert (source, record) pairs to problems, which live in a file if there are many.

        Nothing is read beyond the limit. ``name`` is for error messages.
        """
        stop = None if self.limit is None else self.skip + self.limit
        selected = itertools.islice(records, self.skip, stop)
        problems = collect(self._convert(record, source) for source, record in selected)
        if not problems:
            after = f" after the {self.skip} that data.skip (or data.validation_skip) skips" if self.skip else ""
            raise ValueError(f"{name} holds no problems{after}")
        return problems

    def _convert(self, record: object, source: str) -> Problem:
        if not isinstance(record, Mapping):
            raise ValueError(f"{source}: a record must be an object with named fields, got {type(record).__name__}")
        prompt, reply = self._take_reply(self._prompt(record, source), source)
        return Problem(prompt=prompt, answer=self._answer(record, reply, source), source=source, extra=record)

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
        prompt = prompt if isinstance(prompt, str) else to_messages(prompt, source)
        for text in [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]:
            if half := SURROGATE.search(text):
                raise ValueError(
                    f"{source}: the prompt holds {half[0]!r}, half a character: a surrogate without its pair is not valid text"
                )
        return prompt

    def _take_reply(
        self, prompt: str | tuple[Message, ...], source: str
    ) -> tuple[str | tuple[Message, ...], str | None]:
        """Separate the assistant's last message, which is the answer if no field holds it, from the prompt."""
        if isinstance(prompt, str):
            return prompt, None
        turns, reply = prompt, None
        if self.answer_field is None and turns[-1]["role"] == "assistant":
            turns, reply = turns[:-1], turns[-1]["content"]
        if turns and turns[-1]["role"] == "assistant":
            # Conversations for supervised training end this way: the prompt would contain the answer that the policy has to find.
            remedy = (
                "; data.answer_field=null takes it as the answer" if reply is None else ", and so is the one before it"
            )
            raise ValueError(
                f"{source}: the last chat message is the assistant's{remedy}; a prompt ends before the assistant's turn"
            )
        if not any(message["content"].strip() for message in turns):
            before = "" if reply is None else " before the assistant's last one"
            raise ValueError(f"{source}: the prompt is empty: no chat message{before} has any content")
        return turns, reply

    def _answer(self, record: Mapping, reply: str | None, source: str) -> Answer:
        if self.answer_field is None:
            if reply is not None:
                return self._answer_text(reply, "the assistant's last message (data.answer_field=null)", source)
            if self.answer_pattern is not None:
                raise ValueError(
                    f"{source}: data.answer_pattern={self.answer_pattern} has no answer to search: data.answer_field is null, and the "
                    "prompt does not end in a message of the assistant; set data.answer_pattern=null, or name the field"
                )
            return ()
        key = f"data.answer_field={self.answer_field}"
        value = _lookup(record, self.answer_field, key, source)
        if isinstance(value, Mapping):
            raise ValueError(_describe_object(value, self.answer_field, source))
        if isinstance(value, str) or not isinstance(value, Sequence):
            return self._answer_text(value, key, source)
        if not value:
            raise ValueError(f"{source}: {key} is an empty list: it must hold at least one correct answer")
        # Without repetitions: each would be graded.
        answers = [*dict.fromkeys(self._answer_text(_to_python(one), key, source) for one in value)]
        return tuple(answers) if len(answers) > 1 else answers[0]

    def _answer_text(self, value: object, key: str, source: str) -> str:
        answer = _to_text(value, key, source)
        if self.answer_pattern is not None:
            matches = list(re.finditer(self.answer_pattern, answer))
            if not matches:
                raise ValueError(
                    f"{source}: data.answer_pattern={self.answer_pattern} does not match anywhere in {key}, "
                    f"which ends in {answer[-60:]!r}"
                )
            answer = matches[-1].group(1) or ""
        if not answer.strip():
            raise ValueError(f"{source}: the answer that {key} gives is empty")
        if half := SURROGATE.search(answer):
            raise ValueError(
                f"{source}: the answer that {key} gives holds {half[0]!r}, half a character: a surrogate without its pair is not valid text"
            )
        return answer.strip()


def _describe_object(value: Mapping, field: str, source: str) -> str:
    """Return the message for an answer that is an object: rewards compare with text."""
    names = [f"{field}.{name}" for name in value]
    choice = f"name one of its fields, {', '.join(names)}" if names else "it has no fields"
    return (
        f"{source}: data.answer_field={field} is an object, and an answer is text, a number or a list of them: {choice}; "
        f"data.answer_field=null trains without an answer, and a reward of your own finds the object in problem.extra"
    )


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
        raise MissingField(f"{source}: {key}, but the record has no such field, or it is empty; {_list_fields(record)}")
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
    if isinstance(value, np.floating):
        value = Decimal(
            str(value)
        )  # the shortest decimal of its own precision: .tolist() would give 0.10000000149011612
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if isinstance(value, float | Decimal) and math.isnan(value) else value


def float_shortener(kind: "pa.DataType") -> Callable[[Any], Any]:
    """Return a function that keeps 16- and 32-bit floats of this type in their own precision: 0.1, not 0.10000000149011612."""
    from pyarrow import types

    if types.is_float32(kind) or types.is_float16(kind):
        precision = np.float32 if types.is_float32(kind) else np.float16
        return lambda value: None if value is None else precision(value)
    if types.is_struct(kind):
        fields = {field.name: float_shortener(field.type) for field in kind}
        changed = {name: shorten for name, shorten in fields.items() if shorten is not _identity}
        if changed:
            return lambda value: value and value | {name: shorten(value[name]) for name, shorten in changed.items()}
    if types.is_list(kind) or types.is_large_list(kind):
        shorten = float_shortener(kind.value_type)
        if shorten is not _identity:
            return lambda value: value and [shorten(one) for one in value]
    return _identity


def _identity(value: Any) -> Any:
    return value


def _to_text(value: object, key: str, source: str) -> str:
    """Return the value as text: numbers as they are written, but 27.0 as 27, because data sets store whole numbers as floats."""
    if isinstance(value, str | bool | int):
        return str(value)
    if isinstance(value, float | Decimal):
        number = Decimal(repr(value)) if isinstance(value, float) else value
        if not number.is_finite() or abs(number.adjusted()) > LONGEST_NUMBER:
            return str(number)
        return str(int(number)) if number == number.to_integral_value() else f"{number:f}"
    raise ValueError(f"{source}: {key} must give text or a number, got {type(value).__name__}")
