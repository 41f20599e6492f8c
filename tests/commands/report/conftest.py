"""Quick pictures."""

import pytest

from rlmod.commands.report import pictures


@pytest.fixture(autouse=True)
def drawn_small(monkeypatch):
    """Drawing takes nearly all the time of a report; the pictures have a test of their own."""
    monkeypatch.setattr(pictures, "DPI", 30)
