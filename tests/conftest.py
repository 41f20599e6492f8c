"""Fixtures that several files of tests use."""

from pathlib import Path

import pytest

from rlmod.commands.report import pictures
from tests.runs import QUICK, finished


@pytest.fixture(scope="session", autouse=True)
def coarse_pictures():
    """Draw the pictures of reports with a sixteenth of the pixels: each run writes fourteen."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pictures, "DPI", pictures.DPI // 4)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """One finished run of four iterations."""
    return finished(tmp_path_factory.mktemp("run") / "a", *QUICK)
