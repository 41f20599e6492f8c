"""Real problem files, which are not the project's to hand on: they lie beside a checkout, or nowhere."""

from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "shared" / "data"


def real(name: str) -> Path:
    """The test is skipped, and says which file it needs, where it is not there."""
    if not (FOLDER / name).exists():
        pytest.skip(f"needs {FOLDER / name}")
    return FOLDER / name
