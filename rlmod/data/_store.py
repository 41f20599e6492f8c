"""Problems in an Arrow file that is mapped into memory: each is built when it is read."""

import bisect
import datetime
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast, overload

import numpy as np

from rlmod.data import _cache
from rlmod.data._cache import Stored, Writer
from rlmod.jsonl import SURROGATE
from rlmod.types import Answer, Problem

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

BATCH_ROWS = 4096
BATCH_CHARACTERS = 1 << 26
"""Limits of a record batch. The second keeps the text of a column far below the 2 GiB that Arrow's offsets can address."""
FORGET_BATCHES = 16
"""Batches after which a pass over all problems drops their pages from memory."""
CHAT, SEVERAL = 1, 2
"""Bits of the column ``kind``: the prompt is JSON of messages, the answer is JSON of several answers."""
OWN_COLUMNS = ("prompt", "answer", "source")
OTHER_FIELDS = {
    f.name: None if f.default is MISSING and f.default_factory is MISSING else f
    for f in fields(Problem)
    if f.name not in OWN_COLUMNS
}
"""Fields of a problem that are kept as JSON, unless they have their default value."""
TAG = "__rlmod__"
"""Key of a JSON object for a value that JSON does not have."""
ISO_TYPES: dict[str, Any] = {c.__name__: c for c in (datetime.datetime, datetime.date, datetime.time)}


class NotStorable(Exception):
    """A problem holds a value that would not be read back as it is."""


class ProblemStore(Sequence[Problem]):
    """A sequence of problems that live in a file."""

    def __init__(self, stored: Stored, chosen: np.ndarray | None = None, owner: object = None) -> None:
        import pyarrow as pa

        self.stored, self.chosen, self.owner = stored, chosen, owner
        file = pa.ipc.open_file(pa.py_buffer(stored.payload))
        self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._starts = [0, *itertools.accumulate(batch.num_rows for batch in self._batches)]

    @property
    def digest(self) -> str:
        """The hash of the problems."""
        chosen = None if self.chosen is None else _cache.hash_key(self.chosen.tolist())
        return _cache.hash_key(self.stored.facts["digest"], chosen)

    def __len__(self) -> int:
        return self._starts[-1] if self.chosen is None else len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | Sequence[Problem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # IndexError, and negative indices
        row = place if self.chosen is None else int(self.chosen[place])
        number = bisect.bisect_right(self._starts, row) - 1
        batch = self._batches[number].slice(row - self._starts[number], 1)
        return next(_to_problems(batch))

    def __iter__(self) -> Iterator[Problem]:
        for batch in self._chosen_batches(("kind", "rest", *OWN_COLUMNS)):
            yield from _to_problems(batch)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(Problem.__eq__, self, other))

    def select(self, indices: Sequence[int] | np.ndarray) -> "ProblemStore":
        """Return the problems at these ascending indices, without reading them."""
        rows = np.asarray(indices, dtype=np.int64)
        return ProblemStore(self.stored, rows if self.chosen is None else self.chosen[rows], self.owner)

    def answers(self) -> Iterator[list[Answer]]:
        """Yield all answers, batch by batch."""
        for batch in self._chosen_batches(("kind", "answer")):
            yield [
                tuple(json.loads(answer)) if kind & SEVERAL else answer
                for kind, answer in zip(*_columns(batch, ("kind", "answer")), strict=True)
            ]

    def sources(self) -> Iterator[list[str]]:
        """Yield all sources, batch by batch."""
        for batch in self._chosen_batches(("source",)):
            yield _columns(batch, ("source",))[0]

    def _chosen_batches(self, names: tuple[str, ...]) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa

        for number, (start, stop) in enumerate(itertools.pairwise(self._starts)):
            batch = self._batches[number].select(list(names))
            if self.chosen is not None:
                first, last = np.searchsorted(self.chosen, (start, stop))
                batch = batch.take(pa.array(self.chosen[first:last] - start))
            yield batch
            if (number + 1) % FORGET_BATCHES == 0:
                self.stored.forget()
        self.stored.forget()


def collect(problems: Iterable[Problem]) -> Sequence[Problem]:
    """Return the problems: as a list, or, if there are many, in a file that ends with the sequence.

    A list is also returned, with a warning, if a problem holds a value that the file cannot hold.
    """
    stream = iter(problems)
    first = list(itertools.islice(stream, _cache.LARGE + 1))
    if len(first) <= _cache.LARGE:
        return first
    writer, batches, todo = Writer(), _Batches(), itertools.chain(_drain(first), stream)
    kept: list[Problem] = []
    try:
        for problem in todo:
            kept.append(problem)
            if batches.add(problem):
                batches.flush(writer)
                kept.clear()
        return _finish(writer, batches)
    except NotStorable as error:
        log.warning(
            "%s: the problem cannot be kept in a file (%s), so all problems stay in memory", kept[-1].source, error
        )
        return [*_written(writer, batches), *kept, *todo]


def answers_of(problems: Sequence[Problem]) -> Iterator[list[Answer]]:
    """Yield all answers in parts."""
    if isinstance(problems, ProblemStore):
        yield from problems.answers()
    else:
        yield [problem.answer for problem in problems]


def sources_of(problems: Sequence[Problem]) -> Iterator[list[str]]:
    """Yield all sources in parts."""
    if isinstance(problems, ProblemStore):
        yield from problems.sources()
    else:
        yield [problem.source for problem in problems]


def _drain(items: list[Problem]) -> Iterator[Problem]:
    """Yield the items, in order, and remove them, so that their memory is free once they are written."""
    items.reverse()
    while items:
        yield items.pop()


class _Batches:
    """Rows of the record batch that is being filled, and the Arrow writer."""

    def __init__(self) -> None:
        import pyarrow as pa

        text = pa.string()
        self.schema = pa.schema({"kind": pa.int8(), "prompt": text, "answer": text, "source": text, "rest": text})
        self.rows: list[tuple[Any, ...]] = []
        self.characters = 0
        self.stream: Any = None

    def add(self, problem: Problem) -> bool:
        """Add a row. Return True if the batch is full."""
        row = _to_row(problem)
        self.rows.append(row)
        self.characters += len(row[1]) + len(row[4] or "")
        return len(self.rows) >= BATCH_ROWS or self.characters >= BATCH_CHARACTERS

    def flush(self, writer: Writer) -> None:
        """Write the rows as a record batch."""
        import pyarrow as pa

        self.stream = self.stream or pa.ipc.new_file(pa.PythonFile(writer, mode="w"), self.schema)
        if self.rows:
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)
            ]
            self.stream.write_batch(pa.record_batch(arrays, schema=self.schema))
        self.rows, self.characters = [], 0


def _finish(writer: Writer, batches: _Batches) -> ProblemStore:
    batches.flush(writer)
    batches.stream.close()
    return ProblemStore(writer.stored({"digest": writer.digest.hexdigest()}), owner=writer)


def _written(writer: Writer, batches: _Batches) -> list[Problem]:
    """Return the problems that have been written so far."""
    batches.rows = []
    return list(_finish(writer, batches))


def _to_row(problem: Problem) -> tuple[int, str, str, str, str | None]:
    prompt, answer = problem.prompt, problem.answer
    kind = (0 if isinstance(prompt, str) else CHAT) | (0 if isinstance(answer, str) else SEVERAL)
    rest = {
        name: getattr(problem, name) for name, field in OTHER_FIELDS.items() if not _is_default(problem, name, field)
    }
    row = (
        kind,
        prompt if isinstance(prompt, str) else json.dumps([_to_json(turn) for turn in prompt], ensure_ascii=False),
        answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False),
        problem.source,
        json.dumps({name: _to_json(value) for name, value in rest.items()}, ensure_ascii=False) if rest else None,
    )
    for text in filter(None, row[1:]):
        if not text.isascii() and (half := SURROGATE.search(text)):
            raise NotStorable(f"{half[0]!r} is half a character")
    return row


def _is_default(problem: Problem, name: str, field: Any) -> bool:
    value = getattr(problem, name)
    if field is None:
        return False
    default = field.default if field.default is not MISSING else field.default_factory()
    return value is default or (isinstance(value, Mapping) and not value and default == value)


def _columns(batch: "pa.RecordBatch", names: Sequence[str]) -> list[list[Any]]:
    return [batch.column(name).to_pylist() for name in names]


def _to_problems(batch: "pa.RecordBatch") -> Iterator[Problem]:
    for kind, prompt, answer, source, rest in zip(*_columns(batch, ("kind", *OWN_COLUMNS, "rest")), strict=True):
        yield Problem(
            prompt=tuple(json.loads(prompt, object_hook=_from_json)) if kind & CHAT else prompt,
            answer=tuple(json.loads(answer)) if kind & SEVERAL else answer,
            source=source,
            **(json.loads(rest, object_hook=_from_json) if rest else {}),
        )


def _to_json(value: Any) -> Any:
    """Return the value as JSON can hold it; NotStorable if it would be read back as another."""
    kind = type(value)
    if value is None or kind in (str, int, bool, float):
        return value
    if kind is list:
        return [_to_json(one) for one in value]
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value) or TAG in value:
            raise NotStorable(f"an object with the keys {list(value)[:5]}")
        return {key: _to_json(one) for key, one in value.items()}
    if kind is tuple:
        return {TAG: "tuple", "value": [_to_json(one) for one in value]}
    if kind is Decimal:
        return {TAG: "Decimal", "value": str(value)}
    if kind is bytes:
        return {TAG: "bytes", "value": value.hex()}
    if kind.__name__ in ISO_TYPES and kind is ISO_TYPES[kind.__name__] and getattr(value, "tzinfo", None) is None:
        return {TAG: kind.__name__, "value": value.isoformat()}
    if isinstance(value, np.generic) and kind.__name__ in NUMPY_TYPES:
        return {TAG: "numpy", "kind": kind.__name__, "value": value.item()}
    raise NotStorable(f"a value of type {kind.__name__}")


NUMPY_TYPES = {
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
}  # fmt: skip


def _from_json(value: dict[str, Any]) -> Any:
    if (tag := value.get(TAG)) is None:
        return value
    content = value["value"]
    if tag == "tuple":
        return tuple(content)
    if tag == "Decimal":
        return Decimal(content)
    if tag == "bytes":
        return bytes.fromhex(content)
    if tag == "numpy":
        return cast(Any, getattr(np, value["kind"]))(content)
    return ISO_TYPES[tag].fromisoformat(content)
