"""Problems from a data set of Hugging Face's ``datasets``: on the hub, or in a local folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmod.data._records import Conversion
from rlmod.types import Problem

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_dict.json", "state.json")
"""Files that ``save_to_disk`` writes: for several splits, for one data set."""


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The problems of one split, in its order.

    ``name`` is a name on the hub, a local folder of data files, or a folder that ``save_to_disk`` made; in the last, a
    single data set counts as the split it is of, or as ``train`` where it is of none.

    A source is ``name[split]:index``, counted from 0 as the data set counts. The fields that are not explained here are
    those of rlmod.data.problem_file.ProblemFile.
    """

    name: str
    config: str | None = None
    """The subset, for a data set that has several: ``main`` of openai/gsm8k."""
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    template: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("data.name must be a name on the hub or a local folder, got nothing")
        self._conversion()

    def __call__(self) -> list[Problem]:
        name = f"{self.name}[{self.split}]"
        return self._conversion()(((f"{name}:{i}", record) for i, record in enumerate(self._dataset())), name)

    def _dataset(self) -> "Dataset":
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"data.name={self.name} needs datasets: pip install 'rlmod[datasets]'") from error
        folder = Path(self.name).expanduser()
        saved = any((folder / name).is_file() for name in SAVED)
        try:
            if not saved:
                path = str(folder) if folder.is_dir() else self.name
                return datasets.load_dataset(path, name=self.config, split=self.split)
            loaded = datasets.load_from_disk(str(folder))
        except Exception as error:  # network, hub, script, file format: datasets raises whatever it meets
            cause = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"data.name={self.name} (data.config={self.config}, split {self.split}) cannot be loaded, neither as a "
                f"folder (relative ones start at {Path.cwd()}) nor from the hub: {cause}"
            ) from error
        splits: dict[Any, Any] = dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
        if self.split not in splits:
            raise ValueError(
                f"data.split (or data.validation_split) must be one of those in {self.name}, {', '.join(splits)}; "
                f"got {self.split}"
            )
        return splits[self.split]

    def _conversion(self) -> Conversion:
        return Conversion(
            prompt_field=self.prompt_field,
            answer_field=self.answer_field,
            template=self.template,
            answer_pattern=self.answer_pattern,
            limit=self.limit,
            skip=self.skip,
        )
