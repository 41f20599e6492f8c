"""What several files of tests look at."""

from pathlib import Path

import pytest

from tests.commands import run_train
from tests.runs import QUICK


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """One finished run of four collections."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *QUICK, f"output={folder}")
    return folder
