"""Rewards that fail, for the tests of worker pools: workers import this module."""

import os
import sys
import time
from typing import Any

from rlmod.types import Texts


def by_text(texts: Texts) -> list[float | None]:
    """Return the number that the completion holds, or do what it says."""
    return [_one(completion) for completion in texts.completions]


vars(by_text)["pointwise"] = True


def _one(completion: str) -> Any:
    match completion.split():
        case ["hang"]:
            time.sleep(600)
        case ["raise"]:
            raise KeyError("no such thing")
        case ["nan"]:
            return float("nan")
        case ["exit"]:
            os._exit(0)
        case ["sys.exit"]:
            sys.exit(0)
        case ["abstain"]:
            return None
        case ["memory"]:
            return float(len(bytearray(64 * 2**30)))
        case ["text", number]:
            return number
    return float(completion)


def environment(texts: Texts) -> list[float]:
    return [float(os.environ.get(name, "-1")) for name in texts.completions]


def terms(texts: Texts) -> dict[str, list[Any]]:
    values = [_one(completion) for completion in texts.completions]
    return {"a": values, "b": [0.5] * len(values)}


class Punished:
    """The number that the completion holds, and a term that does not count for correctness."""

    excluded_terms = ("length",)

    def __call__(self, texts: Texts) -> dict[str, list[Any]]:
        return {"answer": [_one(text) for text in texts.completions], "length": [-0.5] * len(texts)}


def hang_once(flag: str) -> float:
    """Hang at the first call, which leaves the file ``flag``."""
    if not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(600)
    return 7.0
