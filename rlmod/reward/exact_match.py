"""String equality with the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlmod.reward._patterns import PatternTimeout, check_pattern, last_match
from rlmod.types import Texts, accepted_answers


@dataclass(frozen=True, kw_only=True)
class ExactMatch:
    """reward_i = correct if extracted(completion_i) = answer_i (or one of several accepted answers), else incorrect

    The strings are compared without surrounding white space. ``extracted`` is the last match of ``pattern``: its group 1, or the
    whole match if the pattern has no group. Without a pattern it is the whole completion.

    Source: none; the simplest verifiable reward.
    Differs: a pattern that takes longer than 5 s on a completion is an error of the reward.
    Degenerate: a completion that the pattern does not match is incorrect, even if the answer is empty.
    Reads: completions, answers.
    """

    pointwise: ClassVar[bool] = True
    needs_answer: ClassVar[bool] = True
    pattern: str | None = None
    """A Python regular expression; null: the whole completion. Flags go inside: ``(?m)^#### (.*)$``."""
    correct: float = 1.0
    incorrect: float = 0.0

    def __post_init__(self) -> None:
        check_pattern(self.pattern or "")

    def __call__(self, texts: Texts) -> list[float]:
        return [
            self.correct
            if self._extracted(completion) in [text.strip() for text in accepted_answers(answer)]
            else self.incorrect
            for completion, answer in zip(texts.completions, texts.answers, strict=True)
        ]

    def final_answers(self, completions: Sequence[str]) -> list[str | None]:
        """Return ``extracted`` of each completion; None where the pattern does not match, or takes too long."""
        answers: list[str | None] = []
        for completion in completions:
            try:
                answers.append(self._extracted(completion))
            except PatternTimeout:  # the reward has reported it
                answers.append(None)
        return answers

    def _extracted(self, completion: str) -> str | None:
        if self.pattern is None:
            return completion.strip()
        text = last_match(self.pattern, completion)
        return None if text is None else text.strip()
