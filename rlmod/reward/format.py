"""A reward for completions with a given format."""

from dataclasses import dataclass
from typing import ClassVar

from rlmod.reward._patterns import check_pattern, matches_whole
from rlmod.types import Texts


@dataclass(frozen=True, kw_only=True)
class Format:
    r"""reward_i = correct if ``pattern`` matches the whole of completion_i, else incorrect

    The dot also matches line ends. The whole completion has to match: a search would also reward the format with any text before and
    after it. To allow text before it, say so in the pattern: ``.*<answer>.*</answer>\s*``.

    Source: the format reward of DeepSeek-R1, arXiv:2501.12948, sec. 2.2.2, which gives no pattern.
    Differs: a pattern that takes longer than 5 s on a completion is an error of the reward.
    Degenerate: an empty completion is correct only if the pattern matches the empty text.
    Reads: completions.
    """

    pointwise: ClassVar[bool] = True
    pattern: str
    """A Python regular expression."""
    correct: float = 1.0
    incorrect: float = 0.0

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def __call__(self, texts: Texts) -> list[float]:
        return [self.correct if matches_whole(self.pattern, text) else self.incorrect for text in texts.completions]
