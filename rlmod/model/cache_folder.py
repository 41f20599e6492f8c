"""The folder in which rlmod keeps what it computes once: large data, and policies converted from GGUF files."""

import os
from pathlib import Path

VARIABLE = "RLMOD_CACHE"
"""Environment variable with the folder; empty for none."""


def cache_folder() -> Path | None:
    """Return the folder of the cache: ``$RLMOD_CACHE``, or rlmod in the user's cache folder; None if the variable is empty."""
    named = os.environ.get(VARIABLE)
    if named == "":
        return None
    return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlmod").expanduser()
