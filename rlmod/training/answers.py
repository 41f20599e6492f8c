"""The check that a reward can read the problems' answers: once for all ranks, and once for a run that is resumed."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlmod import distributed
from rlmod.config.build import answer_readers, check_answers, find_unreadable
from rlmod.interfaces import Reward
from rlmod.reward._failures import heartbeat
from rlmod.rollout.prompts import EncodedProblems, UnreadableAnswer


def readable_problems(
    problems: EncodedProblems, reward: Reward, treatment: UnreadableAnswer, file: Path, settings: object, seconds: float
) -> EncodedProblems:
    """Return the problems whose answers the reward can read. ValueError if ``treatment`` is ``error`` and there are others.

    Rank 0 checks them and writes the result to ``file``, which the other ranks wait for, at most ``seconds``. So all ranks have the same
    problems, although a time limit decides. ``settings`` are the reward's; with others, or with other answers, the check is repeated.
    """
    check_answers(problems, reward)
    if not answer_readers(reward):
        return problems
    digest = _digest([[problem.answer for problem in problems.problems], settings, _version("math-verify")])
    with heartbeat("the check of the answers"):
        found = _read(file, digest)
        deadline = time.monotonic() + seconds
        while found is None and not distributed.is_rank_zero():
            if time.monotonic() > deadline:
                raise ValueError(f"rank 0 has not written {file} within guard.rank_timeout={seconds:.0f} s")
            time.sleep(0.2)
            found = _read(file, digest)
        if found is None:
            found = find_unreadable(problems, reward)
            partial = file.with_name(f".partial-{file.name}")
            partial.write_text(json.dumps({"digest": digest, "unreadable": found}) + "\n", encoding="utf-8")
            os.replace(partial, file)
    return problems.without_unreadable(found, treatment)


def _read(file: Path, digest: str) -> Mapping[int, str] | None:
    """Return the result of a check with this digest, if the file holds it."""
    try:
        record: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {int(i): why for i, why in record["unreadable"].items()} if record.get("digest") == digest else None


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
