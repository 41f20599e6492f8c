"""Files of JSON objects, one a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``file:line`` and the object of each line that is not blank; ValueError for a line that is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: a line must be a JSON object, got {type(record).__name__}")
            yield where, record
