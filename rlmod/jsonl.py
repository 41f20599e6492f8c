"""Reading of JSONL files: one JSON object per line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SURROGATE = re.compile("[\ud800-\udfff]")


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``file:line`` and the object of each line that is not blank. ValueError that names file and line if it is not an object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: {error}") from error
            except (ValueError, RecursionError) as error:  # also too many digits, or too deep nesting
                raise ValueError(f"{where}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a line must be a JSON object, got {type(record).__name__}")
            if half := SURROGATE.search(json.dumps(record, ensure_ascii=False)):
                raise ValueError(
                    f"{where}: {half[0]!r} is half a character: a surrogate without its pair is not valid text"
                )
            yield where, record
