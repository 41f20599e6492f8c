"""Several validation sets on two ranks: the numbers of one."""

import csv
import json
from pathlib import Path

import pytest

from tests.command_line import SHORT
from tests.processes import ended, started

pytestmark = pytest.mark.slow

SETTINGS = (
    *SHORT,
    "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.limit_val_batches=1.0",
    # The seeds of sampling differ between ranks; greedy decoding needs none.
    "validation.sampler.greedy=true", "data.validation.size=5", "validation.prompts_per_batch=2",
    "+benchmark.easy._target_=rlmod.data.arithmetic.Arithmetic", "+benchmark.easy.split=held_out", "+benchmark.easy.size=7",
    "+benchmark.easy.completions_per_prompt=3", "+benchmark.easy.maj_at=[2]", "+benchmark.easy.best_at=[3]",
    "+benchmark.one._target_=rlmod.data.arithmetic.Arithmetic", "+benchmark.one.split=held_out", "+benchmark.one.size=1",
)  # fmt: skip
COLUMNS = ("val/mean@1", "val/easy/mean@3", "val/easy/maj@2", "val/easy/best@3", "val/one/mean@1")


def validated(folder: Path, *words: str) -> dict[str, float]:
    output = ended(started(*SETTINGS, *words, f"output={folder}"))
    assert "benchmark easy/mean@3" in output
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    assert first["step"] == "0"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    low, high = result["benchmarks"]["easy"]["intervals"]["before"]
    return {**{column: float(first[column]) for column in COLUMNS}, "low": low, "high": high}


def test_two_ranks_measure_what_one_measures(tmp_path):
    """Five, seven and one problems in batches of two: the last batches of a rank are padding."""
    one = validated(tmp_path / "one", "strategy=single")
    assert 0 < one["val/easy/mean@3"] < 1
    for strategy in ("ddp", "fsdp2"):
        assert validated(tmp_path / strategy, f"strategy={strategy}", "trainer.devices=2") == pytest.approx(one)
