"""The recipe on the real problems, with the tiny policy: it cannot solve one, but everything about the run is real."""

import csv

import pytest

from tests.command_line import run_train
from tests.real import real


@pytest.mark.slow
def test_three_steps_on_the_real_training_file(tmp_path, monkeypatch):
    run_train(
        monkeypatch, "experiment=gsm8k", "policy=tiny", f"data.path={real('gsm8k/train.jsonl')}",
        f"data.validation_path={real('gsm8k/test.jsonl')}", "data.validation_limit=8", "trainer.max_epochs=3",
        "trainer.accelerator=cpu", "batch.prompts=4", "batch.micro_batch=8", "sampler.max_new_tokens=64",
        "filter.max_generation_batches=1", f"output={tmp_path / 'a'}",
    )  # fmt: skip
    with (tmp_path / "a" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    assert len(rows) == 3
    assert all(0 <= float(row["reward/mean"]) <= 1 for row in rows)
