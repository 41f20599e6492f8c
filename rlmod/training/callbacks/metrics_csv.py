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
            rows = list(csv.DictReader(file.open(newline=""))) if file.is_file() else []
            writer: Any = super().experiment
            writer.metrics = [{name: value for name, value in row.items() if value != ""} for row in rows]
            self.save()
        return super().experiment
