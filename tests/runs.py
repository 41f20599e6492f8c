"""Small whole runs, and what they left."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.command_line import SHORT, run_train

QUICK = (*SHORT, "shaper=token_entropy", "optimizer.lr=1e-4", "trainer.max_epochs=4")


def finished(folder: Path, *overrides: str) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *overrides, f"output={folder}")
    return folder


def metrics(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that hold seconds."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(("time/", "speed/"))} for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return AutoModelForCausalLM.from_pretrained(newest / "policy").state_dict()
