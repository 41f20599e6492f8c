"""Every recipe of conf/experiment runs: 20 steps with the tiny policy."""

import math
from pathlib import Path

import pytest

from tests.command_line import SHORT, run_train
from tests.runs import metrics

RECIPES = sorted({file.stem for file in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml")} - {"real"})
"""All but the one for a policy that has to be fetched: tests/test_real_policy.py."""
TOY = ("size=toy", "optimizer.lr=1e-5")


@pytest.mark.parametrize("iterations", [2, pytest.param(20, marks=pytest.mark.weekly)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs(recipe, iterations, tmp_path, monkeypatch):
    run_train(monkeypatch, f"experiment={recipe}", *SHORT, *TOY, "batch.minibatches=1",
              f"trainer.max_epochs={iterations}", f"output={tmp_path / 'a'}")  # fmt: skip
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(rows) == iterations
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    assert sum(float(row["train/grad_norm"]) > 0 for row in rows) >= 0.9 * iterations - 1
