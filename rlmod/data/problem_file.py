"""Problems from files: JSON Lines, JSON, CSV or Parquet."""

import csv
import gzip
import itertools
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from rlmod.data._records import Conversion, MissingField, float_shortener
from rlmod.data._sources import KEY, Source, check_disjoint, is_pattern, mix, parse_sources
from rlmod.types import Problem

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProblemFile:
    """The problems of files, one per record, in the files' order.

    ``.jsonl`` has one object per line, ``.json`` one list of objects, ``.csv`` a header; ``.parquet`` may nest. ``.jsonl.gz``,
    ``.json.gz`` and ``.csv.gz`` are compressed. The cells of a CSV are text and stay unchanged. In the other formats numbers become
    text as they are written (``0.10``, ``0.0000001``), but a whole number stored as a float loses its ``.0``. A list of answers is a
    problem with several correct answers. All columns of a record are in ``Problem.extra``.

    A source is ``path:line``, or ``path:record`` in JSON and Parquet. Both count from 1.
    """

    path: str | Path | Sequence[Any] | Mapping[str, Any]
    """A path, a list of paths, or a mixture: a list of {path: ..., weight: ...}, where a path may be a list.

    A path may be a pattern with ``*``, ``?``, ``[...]`` and ``**``; its files are sorted by name. A file that is named twice is read once.
    Only the fields that a problem needs must be in all files. In a mixture, ``skip`` and ``limit`` count in each entry, and an entry may
    have its own prompt_field, answer_field, template and answer_pattern.
    """
    prompt_field: str = "prompt"
    """A field with text or a list of chat messages. A dotted name goes into objects and lists: ``reward_model.ground_truth``,
    ``prompt.0.content``."""
    answer_field: str | None = "answer"
    """A field with text, a number, or a list of correct answers. null: the assistant's last message is the answer, if the prompt is a chat
    that ends in one; else the problem has no answer, for rewards that need none."""
    template: str | None = None
    """Builds the prompt from several fields, instead of prompt_field: ``{Body} {Question}``."""
    answer_pattern: str | None = None
    """A regular expression; the first group of its last match in the answer field is the answer: ``#### (.+)``."""
    limit: int | None = None
    """Maximum number of problems; null: all of them."""
    skip: int = 0
    """Number of problems to skip at the beginning, so that one file can hold both the training and the held-out set."""

    def __post_init__(self) -> None:
        for source in parse_sources(self.path):
            for path in source.paths:
                if not is_pattern(path):
                    _reader(path)
            replace(self._build_conversion(), **source.fields)  # checks the fields

    def files(self) -> list[Path]:
        """Return all files, in the order in which they are read. ValueError if a path or a pattern finds none."""
        return [Path(file).expanduser() for source in parse_sources(self.path) for file in source.find_files()]

    def __call__(self) -> Sequence[Problem]:
        sources = parse_sources(self.path)
        files = [source.find_files() for source in sources]
        for file in itertools.chain(*files):
            _reader(file)
        if sources[0].weight is None:
            return self._read(sources[0], files[0])
        check_disjoint(files)
        return mix([(source, self._read(source, names)) for source, names in zip(sources, files, strict=True)])

    def _read(self, source: Source, files: Sequence[str]) -> Sequence[Problem]:
        columns = _Columns()
        try:
            return replace(self._build_conversion(), **source.fields)(_read_records(files, columns), source.name)
        except MissingField as error:
            if (difference := columns.describe_difference()) is None:
                raise
            raise ValueError(f"{error}; {difference}") from error

    def _build_conversion(self) -> Conversion:
        return Conversion(
            prompt_field=self.prompt_field,
            answer_field=self.answer_field,
            template=self.template,
            answer_pattern=self.answer_pattern,
            limit=self.limit,
            skip=self.skip,
        )


@dataclass
class _Columns:
    """Fields of the first record of the first file, and of the file that is being read, for an error message."""

    files: list[tuple[str, dict[str, None]]] = field(default_factory=list)

    def start(self, file: str, record: object) -> None:
        self.files = [*self.files[:1], (file, dict.fromkeys(map(str, record)) if isinstance(record, Mapping) else {})]

    def describe_difference(self) -> str | None:
        """Return how the fields of the two files differ; None if they do not."""
        (first, its), (last, fields) = self.files[0], self.files[-1]
        only = [
            f"only {file} has {', '.join(names)}"
            for file, names in (
                (first, [n for n in its if n not in fields]),
                (last, [n for n in fields if n not in its]),
            )
            if names
        ]
        return f"the columns of the files differ: {'; '.join(only)}" if only else None


def _read_records(files: Sequence[str], columns: _Columns) -> Iterator[tuple[str, object]]:
    for file in files:
        record = None
        for line, record in _reader(file)(Path(file).expanduser()):
            if not columns.files or columns.files[-1][0] != file:
                columns.start(file, record)
            yield f"{file}:{line}", record
        if record is None and len(files) > 1:
            log.warning("%s holds no problems", file)


def _reader(path: str) -> Callable[[Path], Iterator[tuple[int, object]]]:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    reader = READERS.get("".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:]))
    if reader is None:
        raise ValueError(
            f"{KEY} must end in {', '.join(READERS)}, got {path}; for a folder or a name on the hub: data=hub_dataset"
        )
    return reader


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                yield number, json.loads(line, parse_float=Decimal)
            except (ValueError, RecursionError) as error:  # RecursionError: the nesting is too deep
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}:{number}: each line must be one JSON object: {reason}") from error


def _json(path: Path) -> Iterator[tuple[int, object]]:
    text = "".join(line for _, line in _lines(path))
    try:
        records = json.loads(text, parse_float=Decimal) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; if each line is one object, name the file .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(
            f"{path}:{error.lineno}: the file must be one JSON list of objects: {error.msg}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the file must be one JSON list of objects: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: the file must be one JSON list of objects, got {type(records).__name__}")
    yield from enumerate(records, 1)


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit is 131,072 characters
    reader = csv.DictReader((line for _, line in _lines(path)), strict=True)
    line = 1
    try:
        names = list(reader.fieldnames or ())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{path}:1: two columns have the name {twice[0]!r}; give each column its own name")
        for row in reader:
            # A quoted cell can hold newlines, so a record starts on the line after the end of the previous record.
            line, start = reader.line_num, line + 1
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{start}: a row must have as many cells as the header, {len(reader.fieldnames or ())}"
                )
            yield start, row
    except csv.Error as error:
        raise ValueError(f"{path}:{line + 1}: malformed CSV: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        shorten = float_shortener(pa.struct(list(file.schema_arrow)))
        batches = file.iter_batches(batch_size=1024)
        yield from enumerate((shorten(record) for batch in batches for record in batch.to_pylist()), 1)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that pyarrow can read: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    packed = path.suffix.lower() == ".gz"
    newline = "" if ".csv" in path.name.lower()[-7:] else None
    # utf-8-sig: spreadsheets write a byte-order mark before the first column's name.
    with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig", newline=newline) as file:
        number = 0
        try:
            for number, line in enumerate(cast(Iterator[str], file), 1):
                yield number, line
        except UnicodeDecodeError as error:
            # Text is decoded in blocks, ahead of the lines: the byte may be in a later line.
            raise ValueError(f"{path}: the file must be UTF-8 text: {error}, after line {number}") from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a complete gzip file: {error}, after line {number}") from error


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
READERS |= {f"{suffix}.gz": READERS[suffix] for suffix in (".jsonl", ".json", ".csv")}
