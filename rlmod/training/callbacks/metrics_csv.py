"""A CSV logger that appends to the file of a resumed run."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class MetricsCSV(CSVLogger):
    """Lightning's CSVLogger, but it keeps the rows that metrics.csv already holds: the earlier steps of a resumed run."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            file = Path(self.log_dir) / "metrics.csv"
            rows = _read_rows(file) if file.is_file() else []
            writer: Any = super().experiment
            writer.metrics = [{name: value for name, value in row.items() if value != ""} for row in rows]
            self.save()
        return super().experiment


def _read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv. ValueError that names the file if it is not such a table."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read, so the run cannot continue it: {error}") from error
    for line, row in rows:
        if None in row or None in row.values():
            raise ValueError(
                f"{file}:{line}: a row must have as many cells as the header, so the run cannot continue it"
            )
    return [row for _, row in rows]
