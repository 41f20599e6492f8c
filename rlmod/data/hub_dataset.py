"""Problems from a data set of Hugging Face's ``datasets``: on the hub, or in a local folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlmod.data._records import Conversion, float_shortener
from rlmod.types import Problem

if TYPE_CHECKING:
    from datasets import Dataset

SAVED = ("dataset_dict.json", "state.json")
"""Files that ``save_to_disk`` writes: the first for several splits, the second for a single data set."""


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """The problems of one split, in its order.

    ``name`` is a name on the hub, a local folder of data files, or a folder that ``save_to_disk`` wrote. A single saved data set counts
    as its own split, or as ``train`` if it has none.

    A source is ``name[split]:index``, with indices from 0. Fields that are not explained here mean the same as in
    rlmod.data.problem_file.ProblemFile.
    """

    name: str
    config: str | None = None
    """The subset, if a data set has several: ``main`` of openai/gsm8k."""
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str | None = "answer"
    template: str | None = None
    answer_pattern: str | None = None
    limit: int | None = None
    skip: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("data.name must be a name on the hub or a local folder, got nothing")
        self._build_conversion()

    def __call__(self) -> Sequence[Problem]:
        name = f"{self.name}[{self.split}]"
        dataset = self._dataset()
        shorten = float_shortener(dataset.features.type)
        records = ((f"{name}:{i}", shorten(record)) for i, record in enumerate(dataset))
        return self._build_conversion()(records, name)

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
        except Exception as error:  # network, hub, script, file format: datasets raises exceptions of many types
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

    def _build_conversion(self) -> Conversion:
        return Conversion(
            prompt_field=self.prompt_field,
            answer_field=self.answer_field,
            template=self.template,
            answer_pattern=self.answer_pattern,
            limit=self.limit,
            skip=self.skip,
        )
