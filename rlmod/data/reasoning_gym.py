"""Problems of the library reasoning-gym: a hundred generated tasks, each with its own scorer."""

import difflib
import hashlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlmod.types import Problem

log = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
MAX_DRAWS_PER_PROBLEM = 50
"""Maximum number of questions drawn per requested problem. If they do not suffice, the task is too small."""


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """``size`` distinct problems of ``task``; score them with reward=reasoning_gym.

    The train and held-out splits are disjoint for all sizes and seeds: a hash of the question decides the split.
    """

    task: str
    split: Literal["train", "held_out"]
    size: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task, as in {min_animals: 5}."""
    template: str = "{question}"

    def __post_init__(self) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("data=reasoning_gym needs the package reasoning-gym: pip install 'rlmod[reasoning-gym]'")
        if self.size < 1:
            raise ValueError(f"data.*.size must be at least 1, got {self.size}")
        if "{question}" not in self.template:
            raise ValueError(f"data.template must hold {{question}}, got {self.template!r}")

    def __call__(self) -> list[Problem]:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        if self.task not in DATASETS:
            close = difflib.get_close_matches(self.task, DATASETS, n=3) or sorted(DATASETS)[:5]
            raise ValueError(
                f"data.task={self.task}: reasoning-gym has no such task among its {len(DATASETS)}; did you mean {', '.join(close)}?"
            )
        try:
            entries = reasoning_gym.create_dataset(
                self.task, seed=self.seed, size=MAX_DRAWS_PER_PROBLEM * self.size, **self.options
            )
        except (TypeError, AssertionError, ValueError) as error:
            raise ValueError(f"data.options of {self.task}: {error}") from error
        log.info("drawing %d %s problems of %s", self.size, self.split, self.task)
        problems: dict[str, Problem] = {}
        for number in range(MAX_DRAWS_PER_PROBLEM * self.size):
            entry = entries[number]
            question = entry["question"].strip()
            if is_held_out(question) == (self.split == "held_out") and question not in problems:
                answer = "" if entry["answer"] is None else str(entry["answer"])
                prompt = self.template.replace("{question}", question)
                source = f"{self.task}[{number}]"
                problems[question] = Problem(prompt=prompt, answer=answer, source=source, extra=entry)
            if len(problems) == self.size:
                return list(problems.values())
        raise ValueError(
            f"data.*.size is {self.size}, but {MAX_DRAWS_PER_PROBLEM * self.size} draws of {self.task} gave only {len(problems)} distinct "
            f"{self.split} problems: lower data.*.size, or make the task larger with data.options"
        )


def is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] < 256 * HELD_OUT_SHARE
