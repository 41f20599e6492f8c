"""Problems of a public data set: from the hub, or from a local file with the same fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmod.data.hub_dataset import HubDataset
from rlmod.data.problem_file import ProblemFile
from rlmod.types import Problem


@dataclass(frozen=True, kw_only=True)
class HubOrFile:
    """The problems of the file ``path`` or, if that is null, of one split of the data set ``name``.

    The other fields mean the same as in rlmod.data.problem_file.ProblemFile and rlmod.data.hub_dataset.HubDataset.
    """

    name: str
    path: str | Path | Sequence[Any] | Mapping[str, Any] | None = None
    config: str | None = None
    split: str = "test"
    prompt_field: str = "prompt"
    answer_field: str | None = "answer"
    template: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        self._source()

    def __call__(self) -> Sequence[Problem]:
        try:
            return self._source()()
        except ValueError as error:
            if self.path is None and ("cannot be loaded" in str(error) or "needs datasets" in str(error)):
                raise ValueError(
                    f"{error}; without the hub, give a local file with the same fields: data.path=FILE"
                ) from error
            raise

    def _source(self) -> HubDataset | ProblemFile:
        shared: dict[str, Any] = {
            "prompt_field": self.prompt_field,
            "answer_field": self.answer_field,
            "template": self.template,
            "answer_pattern": self.answer_pattern,
            "limit": self.limit,
            "skip": self.skip,
        }
        if self.path is not None:
            return ProblemFile(path=self.path, **shared)
        return HubDataset(name=self.name, config=self.config, split=self.split, **shared)
