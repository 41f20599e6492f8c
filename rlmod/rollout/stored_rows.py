"""Tokens of many prompts: computed in parts, written to a file, and found there by later starts and by the other ranks of a node."""

import datetime
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlmod.data import _cache
from rlmod.data._cache import Stored, Writer
from rlmod.data._store import ProblemStore
from rlmod.rollout.token_rows import TokenRows, flatten
from rlmod.types import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART_PROBLEMS = 2000
PART_CHARACTERS = 1 << 22
"""Limits of the prompts that are tokenized at once. A tokenizer's result takes much more memory than the ids."""
CODE = ("data", "types.py", "rollout/prompts.py", "rollout/stored_rows.py", "rollout/token_rows.py")


def encode_rows(
    problems: Sequence[Problem],
    encode: Callable[[list[Problem]], list[list[int]]],
    key: Callable[[], str | None],
    seconds: float,
) -> TokenRows:
    """Return the tokens of all prompts. Those of many problems live in a file, which later starts find if ``key`` gives the same name.

    ``key`` gives None if the tokens cannot be found again: then the file ends with the rows.
    """
    if len(problems) <= _cache.LARGE:
        return TokenRows.of(row for part in _parts(problems) for row in encode(part))

    def make() -> tuple[Writer, dict[str, Any]]:
        return _write(problems, encode)

    name = key() if _cache.cache_folder() is not None else None
    stored = None if name is None else _cache.obtain(f"tokens-{name}", make, seconds)
    if stored is None:
        writer, facts = make()
        stored = writer.stored(facts)
    return _map_rows(stored)


def hash_prompts(problems: Sequence[Problem]) -> str:
    """Return the hash of the prompts; of a stored set, that of its problems."""
    if isinstance(problems, ProblemStore):
        return problems.digest
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(problem.prompt).encode() + b"\n")
    return digest.hexdigest()


def hash_encoding(
    settings: Mapping[str, Any], arguments: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase"
) -> str | None:
    """Return the hash of all that decides the tokens of a text: the encoder's settings, the tokenizer, the versions and the code.

    None if it cannot be known: the tokenizer has code of its own, or is not described by data, or a setting is an object.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not type(tokenizer).__module__.startswith("transformers."):
        return None
    content = json.loads(backend.to_str())
    # Other calls of the tokenizer leave these behind. The encoder sets both itself.
    content.pop("truncation", None)
    content.pop("padding", None)
    templates = [tokenizer.chat_template, arguments.get("chat_template")]
    # A template may write the date into the prompt.
    day = datetime.date.today().isoformat() if "strftime_now" in repr(templates) else None
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "split_special_tokens", None)]
    special.append({name: str(token) for name, token in tokenizer.special_tokens_map.items()})
    try:
        return _cache.hash_key(
            dict(settings), type(tokenizer).__qualname__, content, templates, day, special, _cache.hash_code(*CODE)
        )
    except TypeError:
        return None


def _write(
    problems: Sequence[Problem], encode: Callable[[list[Problem]], list[list[int]]]
) -> tuple[Writer, dict[str, Any]]:
    from rich.progress import Progress

    writer, lengths, highest = Writer(), [], -1
    with Progress(transient=True) as progress:
        task = progress.add_task("tokenizing", total=len(problems))
        for part in _parts(problems):
            rows = encode(part)
            flat = flatten(rows)
            writer.write(flat)
            lengths.append(np.fromiter(map(len, rows), np.int32, len(rows)))
            highest = max(highest, int(flat.max()))
            progress.advance(task, len(part))
    tokens = writer.length // 4
    writer.write(np.concatenate(lengths))
    return writer, {"rows": len(problems), "tokens": tokens, "highest": highest}


def _map_rows(stored: Stored) -> TokenRows:
    tokens, rows = stored.facts["tokens"], stored.facts["rows"]
    flat = np.frombuffer(stored.payload, np.int32, tokens)
    lengths = np.frombuffer(stored.payload, np.int32, rows, offset=4 * tokens)
    return TokenRows.from_flat(flat, lengths, stored, stored.facts["highest"])


def _parts(problems: Sequence[Problem]) -> Iterator[list[Problem]]:
    part: list[Problem] = []
    characters = 0
    for problem in problems:
        part.append(problem)
        characters += _count_characters(problem)
        if len(part) >= PART_PROBLEMS or characters >= PART_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def _count_characters(problem: Problem) -> int:
    if isinstance(problem.prompt, str):
        return len(problem.prompt)
    return sum(len(str(message.get("content"))) for message in problem.prompt)
