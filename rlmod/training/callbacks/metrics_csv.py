"""metrics.csv, resumed where a run is."""

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger


class MetricsCSV(CSVLogger):
    """Lightning's, but the rows that the file holds already stay: they are the earlier part of a run that is resumed."""

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
