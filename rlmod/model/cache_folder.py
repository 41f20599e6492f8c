"""The folder in which rlmod keeps what it computes once: large data, and policies converted from GGUF files."""

import hashlib
import os
from pathlib import Path

VARIABLE = "RLMOD_CACHE"
"""Environment variable with the folder; empty for none."""


def cache_folder() -> Path | None:
    """Return the folder of the cache: ``$RLMOD_CACHE``, or rlmod in the user's cache folder; None if the variable is empty."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    return expand(str(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlmod"), VARIABLE)


def expand(path: str, key: str) -> Path:
    """Return the path with ~ expanded. ValueError that names the key if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{key}={path}: there is no home folder {Path(path).parts[0]}; give the whole path") from error


def hash_file(path: Path) -> str:
    """Return the SHA-256 digest of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
