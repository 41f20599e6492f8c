"""The run of one process with which the strategies are compared."""

from pathlib import Path

import pytest

from tests.processes import ended, started
from tests.strategy.scripted import SETTINGS, folder_of_runs


@pytest.fixture(scope="session")
def one(tmp_path_factory) -> Path:
    """Three steps of one process."""
    folder = folder_of_runs(tmp_path_factory.mktemp("one"))
    ended(started(*SETTINGS, "output=run", cwd=folder))
    return folder / "run"
