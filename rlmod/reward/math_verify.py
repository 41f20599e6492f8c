r"""Mathematical correctness, checked by math-verify in worker processes."""

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlmod.reward._failures import Row
from rlmod.reward._math_text import gold_text, is_number
from rlmod.reward._pool import Reply
from rlmod.reward._pooled import LONGEST_TEXT, PooledScorer
from rlmod.types import Problem, Texts, accepted_answers

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MathVerify(PooledScorer):
    r"""reward_i = 1 if the final answer of completion_i equals answer_i (or one of several) as mathematics, else 0

    The final answer of a completion is its last ``\boxed{...}`` (none if that box is cut off). Without a box it is the number of its
    last line that ends with ``#### number``; else the last number or formula (formulas as $...$, \(...\), \[...\]). ``1,234``, ``$5``,
    ``-$5``, ``5.0``, ``1e-7`` and ``50%`` (equal to 50 and to 0.5) are numbers. The answer is read in the same way, and may also be bare
    LaTeX: ``\frac{3}{4}``. Two numbers are equal if six decimals agree, and below 0.001 also three significant digits.

    math-verify 0.9 parses with LaTeX (boxed_match_priority 0) and plain expressions, and with fallback_mode "no_fallback", so that two
    texts which are not mathematics are never compared as strings. Its own time-outs are off: they are signals, which work only in the
    main thread and cannot interrupt SymPy inside a C routine. Instead each completion has ``timeout_seconds`` of wall-clock time in a
    worker process. A worker that exceeds them is killed and replaced.

    Source: math-verify, https://github.com/huggingface/Math-Verify.
    Differs: math-verify alone prefers the text after the word "answer" to the last number, and reads expressions across line ends.
    Degenerate: a completion without a readable answer is incorrect. Completions that time out or fail also get reward 0 (``on_error``),
    with a warning, and are counted: failures/timeouts, failures/errors. A problem's answer that cannot be parsed is an error before
    anything is sampled, because nothing could ever match it; with data.unreadable_answer=drop the problem is left out. A recorded
    completion with such an answer has no reward (the reward abstains).
    Reads: completions, answers.
    """

    needs_answer: ClassVar[bool] = True
    function: ClassVar[str] = "rlmod.reward._math_grader:grade"

    def __post_init__(self) -> None:
        super().__post_init__()
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError("reward: MathVerify needs the package math-verify: pip install 'math-verify[antlr4_9_3]'")

    def find_unreadable(self, problems: Sequence[Problem]) -> dict[int, str]:
        """Parse the answers in the worker processes, except plain numbers, and return those that cannot be parsed."""
        answers = dict.fromkeys(answer for problem in problems for answer in accepted_answers(problem.answer))
        checked = [answer for answer in answers if not is_number(gold_text(answer))]
        unreadable: dict[str, str] = {}
        for answer, reply in zip(checked, self._score([("", (answer,)) for answer in checked]), strict=True):
            verdict, detail = reply.value if reply.status == "ok" else ("gold", f"{answer!r} {reply.value}")
            if verdict == "gold":
                unreadable[answer] = detail
        found: dict[int, str] = {}
        for index, problem in enumerate(problems) if unreadable else ():
            wrong = [unreadable[answer] for answer in accepted_answers(problem.answer) if answer in unreadable]
            if wrong:
                found[index] = wrong[0]
        return found

    def final_answers(self, completions: Sequence[str]) -> list[str | None]:
        """Return the final answer of each completion in a form that is equal for equal numbers: 0.5 for 1/2.

        None without an answer that can be read within ``timeout_seconds``.
        """
        texts = [self.completion_prefix + completion for completion in completions]
        read = {row: text for row, text in enumerate(texts) if len(text) <= LONGEST_TEXT}
        replies = self._score([(text,) for text in read.values()], "rlmod.reward._math_grader:read")
        answers: list[str | None] = [None] * len(texts)
        for row, reply in zip(read, replies, strict=True):
            answers[row] = reply.value if reply.status == "ok" else None
        return answers

    def _arguments(self, texts: Texts, row: int) -> tuple[Any, ...]:
        return texts.completions[row], accepted_answers(texts.answers[row])

    def _read(self, reply: Reply, texts: Texts, row: int) -> Row:
        verdict, detail = reply.value
        if verdict == "gold":
            where = f" ({texts.problems[row].source})" if texts.problems else ""
            log.warning("MathVerify cannot parse the answer %s%s and abstains from its completion", detail, where)
            return Row(None)
        if verdict == "error":
            return Row(None, failure="error", detail=detail)
        return Row(float(verdict == "correct"))
