"""The scorers of the library reasoning-gym.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from rlmod.reward._failures import Row
from rlmod.reward._patterns import check_pattern, last_match
from rlmod.reward._pool import Reply
from rlmod.reward._pooled import PooledScorer
from rlmod.types import Texts


@dataclass(frozen=True, kw_only=True)
class ReasoningGym(PooledScorer):
    """reward_i = score_i(last match of ``pattern`` in completion_i), the score from 0 to 1 of the task of problem_i

    Some scorers evaluate the answer as a Python expression, and some raise for an answer that they cannot read. They therefore run in
    worker processes without network, without files to write and with a time limit, which evaluate nothing but arithmetic (_sandbox.py).
    A completion on which the scorer fails gets reward 0 and is counted: failures/errors, failures/timeouts.

    Source: reasoning-gym, arXiv:2505.24760.
    Differs: [D] a completion without a match gets 0, while some of the library's scorers give a small score to anything.
    Degenerate: the gold answer of an entry gets 1.
    Reads: completions, ``extra`` of the problems of data=reasoning_gym.
    """

    function: ClassVar[str] = "rlmod.reward._gym_grader:score"
    pattern: str | None = r"<answer>\s*(.*?)\s*</answer>"
    """Regular expression: group 1 of its last match; null: the whole completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ValueError("reward=reasoning_gym needs the package reasoning-gym: pip install 'rlmod[reasoning-gym]'")
        if self.pattern is not None and check_pattern(self.pattern) < 1:
            raise ValueError(f"reward.pattern={self.pattern!r} has no group: put parentheses around the answer")

    def _arguments(self, texts: Texts, row: int) -> tuple[Any, ...] | None:
        entry = texts.problems[row].extra if texts.problems else {}
        metadata = entry.get("metadata")
        if not isinstance(metadata, Mapping) or "source_dataset" not in metadata:
            raise ValueError("the reward ReasoningGym needs the problems of data=reasoning_gym")
        completion = texts.completions[row]
        answer = completion if self.pattern is None else last_match(self.pattern, completion, dot_all=True)
        return None if answer is None else (answer, dict(entry))

    def _read(self, reply: Reply, texts: Texts, row: int) -> Row:
        return Row(float(reply.value))
