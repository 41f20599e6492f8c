"""Every recipe of conf/experiment runs: 20 steps with the tiny policy."""

import math
from pathlib import Path

import pytest

from tests.command_line import SHORT, run_train
from tests.runs import metrics

RECIPES = sorted(file.stem for file in (Path(__file__).parents[2] / "conf" / "experiment").glob("*.yaml"))
ON_TINY = ("policy=tiny", "data=arithmetic", "reward=exact_match", "optimizer.lr=1e-5")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_its_20_steps(recipe, tmp_path, monkeypatch):
    run_train(monkeypatch, f"experiment={recipe}", *SHORT, *ON_TINY, "batch.minibatches=1", f"output={tmp_path / 'a'}")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(rows) == 20
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)
    assert sum(float(row["train/grad_norm"]) > 0 for row in rows) >= 18
