"""The scorers of reasoning-gym, for the processes of the worker pool (_pool.py). Many evaluate an answer as a Python expression."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import reasoning_gym


def score(answer: str, entry: Mapping[str, Any]) -> float:
    """Return the library's score of an answer, from 0 to 1. It raises what the task's scorer raises."""
    return float(_scorer(entry["metadata"]["source_dataset"])(answer, entry))


@cache
def _scorer(task: str) -> Callable[..., Any]:
    return reasoning_gym.get_score_answer_fn(task)
