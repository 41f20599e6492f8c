"""The scorers of the library reasoning-gym.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from rlmod.types import Texts


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """reward_i = score_i(last match of ``pattern`` in completion_i), the score from 0 to 1 of the task of problem_i

    Source: reasoning-gym, arXiv:2505.24760.
    Differs: [D] a completion without a match gets 0, while some of the library's scorers give a small score to anything.
    Degenerate: the gold answer of an entry gets 1.
    Reads: completions, problems of data=reasoning_gym.
    """

    pointwise: ClassVar[bool] = True
    pattern: str | None = r"<answer>\s*(.*?)\s*</answer>"
    """Regular expression: group 1 of its last match; null: the whole completion."""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("reward=reasoning_gym needs the package reasoning-gym: pip install 'rlmod[reasoning-gym]'")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"reward.pattern={self.pattern!r} is not a regular expression: {error}") from error
            if groups < 1:
                raise ValueError(f"reward.pattern={self.pattern!r} has no group: put parentheses around the answer")

    def __call__(self, texts: Texts) -> list[float]:
        rewards = []
        for row, completion in enumerate(texts.completions):
            entry = texts.problems[row].entry if texts.problems else None
            if entry is None:
                raise ValueError("the reward ReasoningGym needs the problems of data=reasoning_gym")
            found = [completion] if self.pattern is None else re.findall(self.pattern, completion, re.DOTALL)
            last = found[-1] if found else None
            answer = last[0] if isinstance(last, tuple) else last
            rewards.append(
                0.0 if answer is None else float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))
            )
        return rewards


@cache
def _scorer(task: str) -> Callable[..., Any]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
