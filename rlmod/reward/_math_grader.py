r"""The comparison of a completion with an answer as mathematics, for the processes of the worker pool (_pool.py).

It imports SymPy but not torch, so that a worker starts quickly and stays small.
"""

import logging
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Basic, Equality, FiniteSet, Integer, Interval, Tuple
from sympy.matrices import MatrixBase

from rlmod.reward._math_text import final_answer, gold_text

# If there is a box, only the box is parsed. There is no fallback to comparing raw strings.
CONFIG = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

RELATIVE_TOLERANCE = 1e-3
LARGEST_FLOAT = 1e15
"""Numbers from here on have no six decimals in a float."""


def _parse(text: str) -> list:
    # math-verify's own time-outs are off: they are signals, which Python cannot handle while SymPy is in a C routine.
    return parse(text, CONFIG, fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True)  # pyright: ignore[reportArgumentType]


@lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list:
    text = gold_text(answer)
    return _parse(text) if text else []


def _agree_relatively(gold: list, found: list) -> bool:
    """Return False if all values differ relatively although six decimals agree: 1/2004! and 1/2006!."""
    values = [value for value in gold if isinstance(value, Basic | MatrixBase)]
    others = [value for value in found if isinstance(value, Basic | MatrixBase)]
    return not (values and others) or any(_close(value, other) for value in values for other in others)


def _close(value: Any, other: Any) -> bool:
    """Return False for two small numbers, or containers of them, that differ by more than ``RELATIVE_TOLERANCE``."""
    if isinstance(value, Equality) or isinstance(other, Equality):
        sides = [getattr(side, "rhs", side) for side in (value, other)]
        return _close(*sides)
    if isinstance(value, Tuple | Interval) and isinstance(other, Tuple | Interval):
        return all(_close(one, two) for one, two in zip(value.args, other.args, strict=False))
    if isinstance(value, MatrixBase) and isinstance(other, MatrixBase):
        return all(_close(one, two) for one, two in zip(value.flat(), other.flat(), strict=False))
    if isinstance(value, FiniteSet) and isinstance(other, FiniteSet) and len(value) == len(other):
        return all(any(_close(one, two) for two in other) for one in value)
    if not (getattr(value, "is_number", False) and getattr(other, "is_number", False)) or value == other:
        return True
    value, other = cast(Any, value), cast(Any, other)
    size, apart = abs(value.evalf(30)), abs((value - other).evalf(30))
    # Above 0.001 six decimals are more than three significant digits already.
    return bool(size >= RELATIVE_TOLERANCE) or bool(apart <= RELATIVE_TOLERANCE * size)


def grade(completion: str, answers: Sequence[str]) -> tuple[str, str]:
    """Return the verdict and its detail: ``correct``, ``incorrect``, ``gold`` (the answer cannot be parsed) or ``error``.

    With several answers the completion is correct if it equals one of them.
    """
    verdict, detail = "incorrect", ""
    for answer in answers:
        verdict, detail = _grade(completion, answer)
        if verdict == "gold":
            return verdict, f"{answer!r} {detail}".strip()
        if verdict != "incorrect":
            break
    return verdict, detail


def _grade(completion: str, answer: str) -> tuple[str, str]:
    try:
        gold = _parse_gold(answer)
    except Exception as error:  # SymPy raises many types; the trainer reports them
        return "gold", f"{type(error).__name__}: {error}"
    if not gold:
        return "gold", ""
    try:
        # A completion that cannot be parsed gives an empty list, which is incorrect.
        found = _parse(final_answer(completion))
        correct = verify(gold, found, timeout_seconds=None, raise_on_error=True) and _agree_relatively(gold, found)
    except Exception as error:
        return "error", type(error).__name__  # without its text: str() of a SymPy expression may never return
    return ("correct" if correct else "incorrect"), ""


def read(completion: str) -> str | None:
    """Return the final answer of a completion as text; None if it has none. Numbers that ``grade`` calls equal have one text."""
    try:
        found = _parse(final_answer(completion))
        return _answer_text(found[0]) if found else None
    except Exception:  # SymPy raises many types; such a completion has no answer
        return None


def _answer_text(value: Any) -> str:
    """Return a number rounded as in ``_close``, and any other expression as SymPy writes it."""
    if isinstance(value, Equality):
        left, right = value.args
        if getattr(left, "is_Symbol", False):
            return _answer_text(right)
    if isinstance(value, Integer):
        return str(value.p)
    number: Any = value.doit().evalf(30) if getattr(value, "is_number", False) else None
    if number is None or not number.is_real:
        return str(value)
    if 0 < abs(number) < RELATIVE_TOLERANCE:
        return f"{float(number):.2e}"
    if abs(number) >= LARGEST_FLOAT:
        return str(number)
    return f"{float(number):.6f}".rstrip("0").rstrip(".")


def warm_up() -> None:
    """Build the grammar's tables once, before worker processes are forked, so that they do not count against a completion's time limit."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it would warn that its time-outs are off
    sys.set_int_max_str_digits(0)  # a completion may be one very long number; the time limit bounds its cost
    grade("\\boxed{\\frac{1}{2}}", ["1"])
