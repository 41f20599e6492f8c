"""Checks and readings that several guides share."""

import json
from collections.abc import Mapping
from typing import Any

from rlmod.types import Problem


def check_completions(completions_per_prompt: int) -> None:
    if completions_per_prompt < 0:
        raise ValueError(
            f"guide.completions_per_prompt must be 0 (only the zero-reward batch uses the guide) or more, got {completions_per_prompt}"
        )


def prompt_key(problem: Problem) -> str:
    """Return the problem's prompt as text, by which a file's records are found."""
    return problem.prompt if isinstance(problem.prompt, str) else json.dumps(problem.prompt, sort_keys=True)


def parse_prompt(record: Mapping[str, Any], where: str) -> str:
    """Return the record's prompt in the form of ``prompt_key``. ValueError, with its place, if it is neither text nor messages."""
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        return json.dumps(prompt, sort_keys=True)
    if not isinstance(prompt, str):
        raise ValueError(
            f"{where}: prompt must be text or a list of messages, the same as in the problems, got {prompt!r}"
        )
    return prompt


def shorten(text: str) -> str:
    """Return the text for a message, at most 80 characters of it."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
