"""Problems from a file: JSON Lines, JSON, CSV or Parquet."""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from rlmod.data._records import Conversion, float_shortener
from rlmod.types import Problem


@dataclass(frozen=True, kw_only=True)
class ProblemFile:
    """The problems of a file, one per record, in the file's order.

    ``.jsonl`` has one object per line, ``.json`` one list of objects, ``.csv`` a header; ``.parquet`` may nest. The cells
    of a CSV are text and stay unchanged. In the other formats numbers become text as they are written (``0.10``, ``0.0000001``), but a
    whole number stored as a float loses its ``.0``. A list of answers is a problem with several correct answers.

    A source is ``path:line``, or ``path:record`` in JSON and Parquet. Both count from 1.
    """

    path: str | Path
    prompt_field: str = "prompt"
    """A field with text or a list of chat messages. A dotted name goes into objects and lists: ``reward_model.ground_truth``,
    ``prompt.0.content``."""
    answer_field: str = "answer"
    template: str | None = None
    """Builds the prompt from several fields, instead of prompt_field: ``{Body} {Question}``."""
    answer_pattern: str | None = None
    """A regular expression; the first group of its last match in the answer field is the answer: ``#### (.+)``."""
    limit: int | None = None
    """Maximum number of problems; null: all of them."""
    skip: int = 0
    """Number of problems to skip at the beginning, so that one file can hold both the training and the held-out set."""

    def __post_init__(self) -> None:
        if Path(self.path).suffix.lower() not in READERS:
            raise ValueError(
                f"data.path (or data.validation_path) must end in {', '.join(READERS)}, got {self.path}; "
                "for a folder or a name on the hub: data=hub_dataset"
            )
        self._build_conversion()

    def __call__(self) -> Sequence[Problem]:
        path = Path(self.path).expanduser()
        if path.is_dir():
            raise ValueError(
                f"data.path (or data.validation_path): {self.path} is a folder; "
                "name a file in it, or use data=hub_dataset for the folder"
            )
        if not path.is_file():
            below = "" if path.is_absolute() else f"; relative paths start at {Path.cwd()}"
            raise ValueError(f"data.path (or data.validation_path): there is no file {self.path}{below}")
        records = READERS[path.suffix.lower()](path)
        return self._build_conversion()(((f"{self.path}:{line}", record) for line, record in records), str(self.path))

    def _build_conversion(self) -> Conversion:
        return Conversion(
            prompt_field=self.prompt_field,
            answer_field=self.answer_field,
            template=self.template,
            answer_pattern=self.answer_pattern,
            limit=self.limit,
            skip=self.skip,
        )


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
    # utf-8-sig: spreadsheets write a byte-order mark before the first column's name.
    with path.open(encoding="utf-8-sig", newline="" if path.suffix.lower() == ".csv" else None) as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                yield number, line
        except UnicodeDecodeError as error:
            # Text is decoded in blocks, ahead of the lines: the byte may be in a later line.
            raise ValueError(f"{path}: the file must be UTF-8 text: {error}, after line {number}") from error


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
