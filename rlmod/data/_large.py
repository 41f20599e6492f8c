"""Large data sets are converted once: later starts, and the other ranks of a node, map the file that the first one wrote."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlmod.data import _cache
from rlmod.data._cache import Writer
from rlmod.data._store import ProblemStore
from rlmod.data.hub_dataset import HubDataset
from rlmod.data.problem_file import ProblemFile
from rlmod.interfaces import Problems
from rlmod.types import Problem

SMALLEST_RECORD = 16
"""Bytes that a record has at least; a file with fewer per record of ``LARGE`` cannot hold many problems."""
CODE = ("data", "types.py", "jsonl.py")


def load_problems(component: Problems, seconds: float = _cache.WAIT_SECONDS) -> Sequence[Problem]:
    """Return the problems of a set: from the cache, if it is large and was converted before, else from the component.

    Only the sets that files decide are cached. The cached file's name is the hash of their contents (not of size and time, which an edit
    may leave as they are), of the component's fields, and of rlmod's code. ``seconds`` limits the time for which a rank waits for rank 0
    of its node.
    """
    key = _key(component)
    if key is None:
        return component()
    made: Sequence[Problem] = ()

    def make() -> tuple[Writer, dict[str, Any]] | None:
        nonlocal made
        made = component()
        if not isinstance(made, ProblemStore) or not isinstance(made.owner, Writer):
            return None
        return made.owner, made.stored.facts

    found = _cache.obtain(f"problems-{key}", make, seconds)
    return made or (component() if found is None else ProblemStore(found))


def _key(component: Problems) -> str | None:
    """Return the hash of all that decides the problems; None if it cannot be known, or if the problems are few."""
    if _cache.cache_folder() is None:
        return None
    limit = getattr(component, "limit", None)
    if limit is not None and limit <= _cache.LARGE:
        return None
    files = _files(component)
    if not files or sum(file.stat().st_size for file in files) < _cache.LARGE * SMALLEST_RECORD:
        return None
    settings = {f.name: getattr(component, f.name) for f in fields(component)}  # pyright: ignore[reportArgumentType]
    # The names too: a problem's source has the name, and a pattern does not tell when a file is renamed.
    hashes = [(str(file), _cache.hash_file(file)) for file in files]
    try:
        return _cache.hash_key(type(component).__name__, settings, hashes, _cache.hash_code(*CODE))
    except TypeError:  # a setting is an object that JSON cannot hold
        return None


def _files(component: Problems) -> list[Path]:
    """Return the files whose contents decide the problems; none if there may be others."""
    if type(component) is ProblemFile:
        return component.files()
    if type(component) is HubDataset:
        return [Path(file["filename"]) for file in component._dataset().cache_files]
    return []
