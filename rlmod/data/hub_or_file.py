"""Problems of a public data set: from the hub, or from a local file with the same fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmod.data.hub_dataset import HubDataset
from rlmod.data.problem_file import ProblemFile
from rlmod.types import Problem


@dataclass(frozen=True, kw_only=True)
class HubOrFile(HubDataset):
    """The problems of the file ``path`` or, if that is null, of one split of the data set ``name``.

    The other fields mean the same as in rlmod.data.hub_dataset.HubDataset.
    """

    path: str | Path | Sequence[Any] | Mapping[str, Any] | None = None
    """A file, or several, as in rlmod.data.problem_file.ProblemFile."""
    split: str = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path is not None:
            self._build_file()

    def __call__(self) -> Sequence[Problem]:
        if self.path is not None:
            return self._build_file()()
        try:
            return super().__call__()
        except ValueError as error:
            if "cannot be loaded" in str(error) or "needs datasets" in str(error):
                raise ValueError(
                    f"{error}; without the hub, give a local file with the same fields: data.path=FILE"
                ) from error
            raise

    def _build_file(self) -> ProblemFile:
        assert self.path is not None
        return ProblemFile(path=self.path, **vars(self._build_conversion()))
