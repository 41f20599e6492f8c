"""Runs that validate on several named sets: alone, resumed, with samples of each, and what must fit together."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlmod.config.sizes import Validation
from rlmod.sampler.hf import HF
from rlmod.training.datamodule import RLData
from tests.command_line import SHORT, run_train
from tests.training.modules import encoded, module


def arithmetic(name: str, size: int, **settings: object) -> tuple[str, ...]:
    given = {"_target_": "rlmod.data.arithmetic.Arithmetic", "split": "held_out", "size": size, **settings}
    return tuple(f"+benchmark.{name}.{key}={value}" for key, value in given.items())


TWO_SETS = (
    *SHORT,
    *arithmetic("easy", 6, max_numbers=4, completions_per_prompt=2, maj_at="[2]", best_at="[1,2]", pass_at="[2]"),
    *arithmetic("hard", 5, min_numbers=6, seed=1),
    "trainer.check_val_every_n_epoch=1",
)


def curve(run: Path, column: str) -> list[float]:
    """Return the values in the order in which they were logged."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


def test_two_sets_have_curves_rows_and_samples_beside_the_held_out_problems(tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *TWO_SETS, "trainer.max_epochs=2", f"output={tmp_path / 'a'}")
    result = json.loads((tmp_path / "a" / "result.json").read_text(encoding="utf-8"))
    assert result["held_out"]["metric"] == "val/mean@1"
    assert result["held_out"]["problems"] == 64
    metrics = {"easy": "val/easy/mean@2", "hard": "val/hard/mean@1"}
    printed = capsys.readouterr().out
    for (name, metric), problems in zip(metrics.items(), (6, 5), strict=True):
        found = result["benchmarks"][name]
        assert (found["metric"], found["problems"]) == (metric, problems)
        values = curve(tmp_path / "a", metric)
        assert len(values) == 3
        assert [values[0], values[2]] == pytest.approx([found["before"], found["after"]], abs=1e-6)
        assert found["last"] == {"step": 2, "accuracy": found["after"]}
        assert f"benchmark {metric.removeprefix('val/')}: {found['before']:.4f} -> {found['after']:.4f}" in printed
    for metric in ("maj@2", "best@1", "best@2", "pass@2"):
        assert len(curve(tmp_path / "a", f"val/easy/{metric}")) == 3
    # Rewards of 0 and 1: best@k is pass@k.
    assert curve(tmp_path / "a", "val/easy/best@2") == curve(tmp_path / "a", "val/easy/pass@2")
    assert curve(tmp_path / "a", "val/easy/best@1") == curve(tmp_path / "a", "val/easy/mean@2")
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").open(encoding="utf-8")]
    assert {each.get("benchmark") for each in samples if each["when"] == "validation"} == {None, "easy", "hard"}
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert 'id="benchmarks"' in page
    assert "hard/mean@1" in page


def test_a_set_does_not_change_the_numbers_of_the_others(tmp_path, monkeypatch):
    words = (*SHORT, "trainer.max_epochs=1", *arithmetic("hard", 5, min_numbers=6, seed=1))
    run_train(monkeypatch, *words, f"output={tmp_path / 'one'}")
    run_train(monkeypatch, *words, *arithmetic("easy", 6), "trainer.max_epochs=1", f"output={tmp_path / 'two'}")
    for metric in ("val/mean@1", "val/hard/mean@1", "reward/mean"):
        assert curve(tmp_path / "one", metric) == curve(tmp_path / "two", metric)


def test_without_held_out_problems_the_first_benchmark_is_the_objective(tmp_path, monkeypatch):
    words = (*TWO_SETS, "data.validation=null", "trainer.max_epochs=2", "optimizer.lr=1e-3")
    run_train(monkeypatch, *words, f"output={tmp_path / 'a'}")
    result = json.loads((tmp_path / "a" / "result.json").read_text(encoding="utf-8"))
    assert result["held_out"]["metric"] == "val/easy/mean@2"
    assert result["held_out"]["after"] == result["benchmarks"]["easy"]["after"]
    values = curve(tmp_path / "a", "val/easy/mean@2")
    best = max((1, 2), key=lambda step: values[step])
    assert (tmp_path / "a" / "checkpoints" / "best").readlink() == Path(f"step-{best:06d}")
    assert curve(tmp_path / "a", "val/mean@1") == []


def test_a_resumed_run_knows_the_accuracies_before_training(tmp_path, monkeypatch):
    """The run loses its result and its last checkpoint, so that it resumes from the one before."""
    run, metrics = tmp_path / "a", ("val/easy/maj@2", "val/hard/mean@1", "val/mean@1")
    words = (*TWO_SETS, "trainer.max_epochs=2", "callbacks.checkpoints.every=1", "optimizer.lr=1e-3", f"output={run}")
    run_train(monkeypatch, *words)
    before = json.loads((run / "result.json").read_text(encoding="utf-8")), [curve(run, metric) for metric in metrics]
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-000002")
    run_train(monkeypatch, *words)
    after = json.loads((run / "result.json").read_text(encoding="utf-8")), [curve(run, metric) for metric in metrics]
    for key in ("held_out", "benchmarks"):
        assert before[0][key] == after[0][key]
    assert before[0]["benchmarks"]["easy"]["before"] is not None
    assert before[1] == after[1]


def test_problems_without_settings_are_refused():
    made = module(benchmark={"a": Validation(sampler=HF(completions_per_prompt=1, max_new_tokens=4), reward=len)})
    assert made.benchmark["a"].objective == "val/a/mean@1"
    data = RLData(train=encoded(20), benchmark={"a": encoded(20), "b": encoded(21)})
    data.trainer = SimpleNamespace(lightning_module=made, limit_val_batches=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="RLData has the benchmark 'b', but RLModule has no settings for it"):
        data.setup("fit")
    assert str(data) == "RLData: 1 problems, 0 held-out problems, 1 of a, 1 of b"
