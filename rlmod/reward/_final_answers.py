"""The reward's own reading of a completion's final answer, for maj@k."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlmod.interfaces import FinalAnswerReader, declared, unwrap
from rlmod.reward._supervised import Supervised

ReadAnswers = Callable[[Sequence[str]], Sequence[str | None]]


def find_answer_reader(reward: Any) -> ReadAnswers | None:
    """Return ``final_answers`` of the reward or, in a weighted one, of the first term that decides on correctness; None without one."""
    target: Any = unwrap(reward)
    if isinstance(target, FinalAnswerReader):
        return target.final_answers
    if isinstance(reward, Supervised):
        inner, prefix = find_answer_reader(reward.supervised), reward.completion_prefix
        return None if inner is None else lambda completions: inner([prefix + text for text in completions])
    if isinstance(terms := getattr(reward, "terms", None), Mapping):
        counted = (
            term["reward"]
            for term in terms.values()
            if term.get("counts_for_correctness", True) and declared(term["reward"], "counts_for_correctness")
        )
        return next((found for each in counted if (found := find_answer_reader(each)) is not None), None)
    inner = getattr(reward, "reward", None)
    return find_answer_reader(inner) if callable(inner) else None
