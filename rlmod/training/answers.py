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
from rlmod.data import _cache
from rlmod.data._store import answers_of
from rlmod.interfaces import Reward
from rlmod.reward._failures import heartbeat
from rlmod.rollout.prompts import EncodedProblems, UnreadableAnswer


def readable_problems(
    problems: EncodedProblems, reward: Reward, treatment: UnreadableAnswer, file: Path, settings: object, seconds: float
) -> EncodedProblems:
    """Return the problems whose answers the reward can read. ValueError if ``treatment`` is ``error`` and there are others.

    Rank 0 checks them and writes the result to ``file``, which the other ranks wait for, at most ``seconds``. So all ranks have the same
    problems, although a time limit decides. ``settings`` are the reward's; with others, or with other answers, the check is repeated.
    The result for many problems is also kept in the cache, for other runs, if the reward's code is rlmod's own.
    """
    check_answers(problems, reward)
    if not answer_readers(reward):
        return problems
    digest = _digest(problems, settings)
    with heartbeat("the check of the answers"):
        found = _read(file, digest)
        deadline = time.monotonic() + seconds
        while found is None and not distributed.is_rank_zero():
            if time.monotonic() > deadline:
                raise ValueError(f"rank 0 has not written {file} within guard.rank_timeout={seconds:.0f} s")
            time.sleep(0.2)
            found = _read(file, digest)
        if found is None:
            found = _find_in_cache(problems, reward, digest)
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


def _find_in_cache(problems: EncodedProblems, reward: Reward, digest: str) -> Mapping[int, str]:
    """Return the unreadable answers: from the cache, if there are many problems and another run has checked them."""
    own = all(type(reader).__module__.startswith("rlmod.") for reader in answer_readers(reward))
    if len(problems) <= _cache.LARGE or not own:
        return find_unreadable(problems, reward)

    def make() -> tuple[_cache.Writer, dict[str, Any]]:
        return _cache.Writer(), {"unreadable": find_unreadable(problems, reward)}

    code = _cache.hash_code("reward", "config", "types.py")
    stored = _cache.obtain(f"answers-{_cache.hash_key(digest, code)}", make, _cache.WAIT_SECONDS)
    found = make()[1]["unreadable"] if stored is None else stored.facts["unreadable"]
    return {int(i): why for i, why in found.items()}


def _digest(problems: EncodedProblems, settings: object) -> str:
    """Return the hash of the JSON list [answers, settings, version of math-verify], which is not built as a whole."""
    digest, comma = hashlib.sha256(b"[["), ""
    for answers in answers_of(problems.problems):
        if answers:
            digest.update((comma + json.dumps(answers)[1:-1]).encode())
            comma = ", "
    digest.update(f"], {json.dumps(settings, sort_keys=True)}, {json.dumps(_version('math-verify'))}]".encode())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
