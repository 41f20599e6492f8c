"""Runs the commands in this process, as a user's command line would."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from rlmod.commands.evaluate import evaluate
from rlmod.config import cli
from rlmod.train import train

SHORT = ("debug=short", "data.train.size=1000", "data.validation.size=64", "callbacks.completions.every=0")


def run_train(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    run_command(monkeypatch, train, "train", overrides)


def run_eval(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    run_command(monkeypatch, evaluate, "eval", overrides)


def run_command(
    monkeypatch: pytest.MonkeyPatch, task: Callable[[DictConfig], object], name: str, overrides: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"rlmod-{name}", *overrides])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    cli.run(task, name)


def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *overrides: str) -> str:
    """Return the answer to a command line of rlmod-train that must not run."""
    return answer(lambda: run_train(monkeypatch, f"output={tmp_path / 'refused'}", *overrides))


def refused_eval(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    return answer(lambda: run_eval(monkeypatch, *overrides))


def answer(command: Callable[[], None]) -> str:
    with pytest.raises(SystemExit) as stop:
        command()
    assert isinstance(stop.value.code, str), f"exit status {stop.value.code}"
    return stop.value.code
