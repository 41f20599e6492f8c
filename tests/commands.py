"""Runs the commands in this process, as a user's command line would."""

import sys
from pathlib import Path

import pytest

from rlmod import cli
from rlmod.train import train

SHORT = ("debug=short", "data.validation.size=64", "callbacks.completions.every=0")


def run_train(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    monkeypatch.setattr(sys, "argv", ["rlmod-train", *overrides])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    cli.run(train, "train")


def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *overrides: str) -> str:
    """What a command line that must not run is answered with."""
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, f"output={tmp_path / 'refused'}", *overrides)
    assert isinstance(stop.value.code, str), f"exit status {stop.value.code}"
    return stop.value.code
