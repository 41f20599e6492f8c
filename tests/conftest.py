"""Fixtures that several files of tests use."""

from pathlib import Path

import pytest

from tests.runs import QUICK, finished


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """One finished run of four iterations."""
    return finished(tmp_path_factory.mktemp("run") / "a", *QUICK)
