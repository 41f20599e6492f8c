"""A reward for completions of a given form."""

import re
from dataclasses import dataclass
from typing import ClassVar

from rlmod.types import Texts


@dataclass(frozen=True, kw_only=True)
class Format:
    r"""reward_i = correct if ``pattern`` matches the whole of completion_i, else incorrect

    The dot matches line ends too. The whole completion has to match, and not some part of it: a search would also
    reward the right form with anything before and after it. Where that is wanted, the pattern says so:
    ``.*<answer>.*</answer>\s*``.

    Source: the format reward of DeepSeek-R1, arXiv:2501.12948, sec. 2.2.2, which gives no pattern.
    Degenerate: an empty completion is right only where the pattern matches the empty text.
    Reads: completions.
    """

    pointwise: ClassVar[bool] = True
    pattern: str
    """A Python regular expression."""
    correct: float = 1.0
    incorrect: float = 0.0

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"reward.pattern is no regular expression: {self.pattern!r}: {error}") from error

    def __call__(self, texts: Texts) -> list[float]:
        form = re.compile(self.pattern, re.DOTALL)
        return [self.correct if form.fullmatch(completion) else self.incorrect for completion in texts.completions]
