"""A checkpoint whenever training ends, whatever ended it."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from rlmod.training import checkpoint as checkpoints
from tests.command_line import SHORT, answer, run_train
from tests.config.composing import ROOT
from tests.processes import ended, started, wait_until
from tests.runs import metrics, weights

QUICK = (*SHORT, "optimizer.lr=1e-3", "trainer.max_epochs=4", "shaper=token_entropy")


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints.list_checkpoints(run)]


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


def with_reward(run: Path) -> tuple[str, ...]:
    flag = run.parent / "flag"
    return (
        *QUICK,
        "reward=format",
        "reward._target_=tests.training.faults.reward",
        "~reward.pattern",
        "~reward.correct",
        "~reward.incorrect",
        f"+reward.flag={flag}",
        "validation.reward=${reward}",
        f"output={run}",
    )


def same_run(run: Path, other: Path) -> bool:
    theirs = weights(other)
    return metrics(run) == metrics(other) and all(torch.equal(w, theirs[name]) for name, w in weights(run).items())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *with_reward(run))
    assert result(run)["completed"]
    return run


def test_early_stopping_leaves_a_checkpoint_and_no_claim_to_be_complete(tmp_path, monkeypatch):
    stop = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/mean@1, mode: max, patience: 1}"
    words = (*QUICK, f"+callbacks.stop={stop}", "optimizer.lr=0", "trainer.max_epochs=9", f"output={tmp_path / 'a'}")
    run_train(monkeypatch, *words, "trainer.check_val_every_n_epoch=1")
    assert names(tmp_path / "a")[-1] == "step-000002"
    assert result(tmp_path / "a")["completed"] is False
    assert result(tmp_path / "a")["steps"] == 2
    assert "stopped the run after 2 of 9 iterations" in (tmp_path / "a" / "train.log").read_text()


def test_a_stop_in_the_middle_of_an_iteration_lets_it_finish(tmp_path, monkeypatch):
    stop = "{_target_: tests.training.faults.StopAtBatch, batch: 3}"
    run = tmp_path / "a"
    run_train(monkeypatch, *QUICK, "batch.minibatches=2", f"+callbacks.stop={stop}", f"output={run}")
    assert names(run) == ["step-000004"]
    assert result(run)["steps"] == 4
    assert not result(run)["completed"]


@pytest.mark.parametrize("call", [3, 4, 5])
def test_a_reward_that_stops_the_run_loses_nothing(undisturbed, tmp_path, monkeypatch, call):
    run = tmp_path / "a"
    (tmp_path / "flag").write_text(f"raise {call}")  # call 1 is the validation before training
    message = answer(lambda: run_train(monkeypatch, *with_reward(run)))
    assert "503 from the judge" in message
    assert names(run) == [f"step-{call - 2:06d}"]
    assert checkpoints.find_damage(checkpoints.list_checkpoints(run)[0]) is None
    (tmp_path / "flag").unlink()
    original = undisturbed.parent / "flag"
    assert not original.exists()
    run_train(monkeypatch, *with_reward(run))
    assert same_run(run, undisturbed)


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path, monkeypatch):
    (tmp_path / "flag").write_text("raise 2")
    assert "503 from the judge" in answer(lambda: run_train(monkeypatch, *with_reward(tmp_path / "a")))
    assert names(tmp_path / "a") == []


@pytest.mark.slow
def test_sigterm_while_a_reward_hangs_waits_a_while_and_keeps_the_last_state(undisturbed, tmp_path):
    run = tmp_path / "a"
    (tmp_path / "flag").write_text("hang 4")
    process = started(*with_reward(run), "callbacks.checkpoints.wait_seconds=1", cwd=ROOT, PYTHONPATH=str(ROOT))
    wait_until((tmp_path / "flag.hangs").exists, process)
    process.send_signal(signal.SIGTERM)
    output = ended(process, 128 + signal.SIGTERM)
    assert "has not finished after 1 s and is given up" in output
    assert f"resume={run}" in output
    assert names(run) == ["step-000002"]


def test_an_iteration_that_takes_optimizer_steps_is_finished_however_long_it_takes(tmp_path, monkeypatch, capsys):
    run = tmp_path / "a"
    slow = "{_target_: tests.training.faults.SignalAtStep, step: 3, seconds: 1.0}"
    words = (*QUICK, "batch.minibatches=2", f"+callbacks.slow={slow}", "callbacks.checkpoints.wait_seconds=0.1")
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, *words, f"output={run}")
    assert stop.value.code == 128 + signal.SIGTERM
    assert names(run) == ["step-000004"]
    # No validation came after the last step, so there is no number of it, and none is invented.
    held_out = result(run)["held_out"]
    assert held_out["after"] is None
    assert held_out["last"] == {"step": 0, "accuracy": held_out["before"]}
    said = f"no validation after the last step, the last one gave {held_out['before']:.4f} at step 0"
    assert said in capsys.readouterr().out


def test_the_best_checkpoint_stays_beside_the_newest(tmp_path, monkeypatch):
    run = tmp_path / "a"
    words = (
        *QUICK,
        "trainer.check_val_every_n_epoch=1",
        "trainer.max_epochs=6",
        "callbacks.checkpoints.keep=1",
        f"output={run}",
    )
    run_train(monkeypatch, *words, "callbacks.checkpoints.every=1", "optimizer.lr=3e-2")  # so high that it gets worse
    accuracies = [float(row["val/mean@1"]) for row in metrics(run) if row["val/mean@1"]][-6:]
    best = max(range(6), key=lambda i: (accuracies[i], -i)) + 1
    link = run / "checkpoints" / "best"
    assert link.is_symlink()
    assert link.resolve().name == f"step-{best:06d}"
    assert names(run) == sorted({f"step-{best:06d}", "step-000006"})
    # It can be resumed from and exported.
    other = tmp_path / "b"
    run_train(monkeypatch, *words[:-1], "optimizer.lr=1e-3", f"output={other}", f"resume={link}")
    assert result(other)["steps"] == 6


def test_without_best_only_the_newest_stay(tmp_path, monkeypatch):
    run = tmp_path / "a"
    words = (*QUICK, "trainer.check_val_every_n_epoch=1", "callbacks.checkpoints.best=false", f"output={run}")
    run_train(monkeypatch, *words)
    assert names(run) == ["step-000004"]
    assert not (run / "checkpoints" / "best").exists()


def test_what_cannot_be_written_shows_before_the_first_rollout_batch(tmp_path, monkeypatch):
    run = tmp_path / "a"
    run.mkdir()
    (run / "checkpoints").write_text("a file where a folder should be")
    message = answer(lambda: run_train(monkeypatch, *QUICK, f"output={run}"))
    assert f"checkpoints could not be written in {run / 'checkpoints'}" in message
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = answer(lambda: run_train(monkeypatch, *QUICK, f"output={tmp_path / 'b'}"))
    assert "0.0 GB are free; make room, or give another output=FOLDER" in message
    assert not (tmp_path / "b" / "metrics.csv").exists()


def test_a_run_in_a_folder_that_is_in_use_is_refused(tmp_path, monkeypatch):
    from rlmod.training.lock import hold_folder

    run = tmp_path / "a"
    run.mkdir()
    with hold_folder(run):
        message = answer(lambda: run_train(monkeypatch, *QUICK, f"output={run}"))
    assert "is in use by another run (process" in message
    assert not (run / "metrics.csv").exists()


def test_a_foreign_file_and_swapped_files_are_named(undisturbed, tmp_path):
    whole = checkpoints.list_checkpoints(undisturbed)[-1]
    bad = tmp_path / "step-000004"
    shutil.copytree(whole, bad)
    (bad / "policy" / "modeling_evil.py").write_text("")
    assert checkpoints.find_damage(bad) == "policy/modeling_evil.py does not belong to it"
    (bad / "policy" / "modeling_evil.py").unlink()
    assert checkpoints.find_damage(bad) is None
    one, two = bad / "policy" / "config.json", bad / "policy" / "generation_config.json"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert "config.json has" in str(checkpoints.find_damage(bad))
