"""Runs that are stopped, killed or full, and go on: as if nothing had happened."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlmod.training import checkpoint as checkpoints
from rlmod.training.module import RLModule
from tests.command_line import answer, refused, run_train
from tests.killed import check_killed_equals_whole
from tests.processes import ended, kill, started, wait_until
from tests.runs import QUICK, metrics, weights


@pytest.mark.parametrize(
    "schedule",
    [(), pytest.param(("schedule=constant", "schedule.num_warmup_steps=3"), marks=pytest.mark.weekly)],
    ids=["", "warm-up"],
)
def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path, monkeypatch, schedule):
    if schedule:
        run_train(monkeypatch, *QUICK, *schedule, f"output={(run := tmp_path / 'run')}")
    run_train(monkeypatch, *QUICK, *schedule, f"output={tmp_path / 'half'}", "trainer.max_epochs=2")
    run_train(monkeypatch, *QUICK, *schedule, f"output={tmp_path / 'rest'}", f"resume={tmp_path / 'half'}")
    whole = [row for row in metrics(run) if row["reward/mean"]]
    halves = [row for part in ("half", "rest") for row in metrics(tmp_path / part) if row["reward/mean"]]
    columns = [name for name in whole[0] if name.startswith(("reward/", "completions/", "train/", "prompts/"))]
    assert [[row[name] for name in columns] for row in halves] == [[row[name] for name in columns] for row in whole]
    resumed = weights(tmp_path / "rest")
    assert all(torch.equal(value, resumed[name]) for name, value in weights(run).items())


def test_a_checkpoint_of_another_policy_is_refused_in_a_sentence(run, tmp_path, monkeypatch):
    message = refused(monkeypatch, tmp_path, *QUICK, "adapter=lora", f"resume={run}")
    assert "resume: the checkpoint belongs to another policy" in message
    assert "weights differ" in message
    assert "is missing there and of shape" in message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_exits(number, tmp_path):
    folder = tmp_path / "a"
    process = started(*QUICK, "trainer.max_epochs=10000", f"output={folder}")
    try:
        file = folder / "metrics.csv"  # written before training, and again after ten iterations
        wait_until(
            lambda: file.exists() and any(row.get("reward/mean") for row in csv.DictReader(file.open())), process
        )
        process.send_signal(number)
        output = ended(process, status=128 + number)
    finally:
        kill(process)
    assert "finishing this iteration, then writing a checkpoint" in output
    assert f"resume={folder}" in output
    assert "Traceback" not in output
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
    assert not json.loads((folder / "result.json").read_text())["completed"]


@pytest.mark.parametrize("folder", ["a", "b"])
def test_what_the_last_validation_found_holds_for_the_same_run_alone(folder, tmp_path, monkeypatch):
    settings = (*QUICK, "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1")
    run_train(monkeypatch, *settings, f"output={tmp_path / 'a'}")
    before = json.loads((tmp_path / "a" / "result.json").read_text())["held_out"]["after"]
    others = ("data.validation.size=32", f"resume={tmp_path / 'a'}", f"output={tmp_path / folder}")
    run_train(monkeypatch, *settings, *others)
    found = json.loads((tmp_path / folder / "result.json").read_text())["held_out"]
    assert found["problems"] == 32
    told = (tmp_path / folder / "train.log").read_text()
    assert "settings that differ from the checkpoint's: data.validation.size was 64, now 32" in told
    assert found["after"] != before
    assert (tmp_path / folder / "report.html").is_file()


def test_ctrl_c_before_the_first_step_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RLModule, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}")
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.slow
def test_killed_three_times_and_started_again_equals_uninterrupted(tmp_path):
    """SIGKILL at random moments; the same command goes on. With dropout, so that random states matter."""
    settings = (*QUICK, "adapter=lora", "policy.adapter.dropout=0.1", "batch.minibatches=2", "optimizer.lr=1e-3")
    check_killed_equals_whole(tmp_path, settings, iterations=20, kills=3, updates=2)
    assert (tmp_path / "killed" / "result.json").is_file()


def test_a_finished_run_is_not_run_again_and_another_one_is_not_mixed_with_it(run, monkeypatch, capsys, tmp_path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "train.log"}
    run_train(monkeypatch, *QUICK, f"output={run}")
    assert "this run is already complete" in capsys.readouterr().out
    assert "output=" in answer(lambda: run_train(monkeypatch, *QUICK, f"output={run}", "seed=5"))
    message = answer(lambda: run_train(monkeypatch, *QUICK, f"output={run}", "loss.clip_high=0.3"))
    assert "holds a run with other settings (loss.clip_high was 0.2, now 0.3)" in message
    after = {file: file.read_bytes() for file in before if ".hydra" not in file.parts}
    assert after == {file: before[file] for file in after}


def test_a_broken_checkpoint_is_named_and_passed_over(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / "a")
    whole, broken = (tmp_path / "a" / "checkpoints" / name for name in ("step-000004", "step-000009"))
    shutil.copytree(whole, broken)
    file = broken / "trainer.ckpt"
    size = file.stat().st_size
    os.truncate(file, size // 2)
    assert checkpoints.newest_checkpoint(tmp_path / "a") == whole
    assert checkpoints.find_damage(broken) == f"trainer.ckpt has {size // 2:,} of {size:,} bytes"
    (broken / "policy" / "config.json").unlink()
    file.unlink()
    assert "is missing" in str(checkpoints.find_damage(broken))
    (broken / "complete.json").unlink()
    assert "complete.json cannot be read" in str(checkpoints.find_damage(broken))
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match="no intact checkpoint there"):
        checkpoints.newest_checkpoint(tmp_path / "a")


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in ("step-999999", "step-1000000", "step-000005", "step-new"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path)] == [
        "step-000005",
        "step-999999",
        "step-1000000",
    ]


def test_a_disk_that_is_full_ends_the_run_with_a_sentence_and_keeps_what_is_there(tmp_path):
    """A limit on the size of a file stands in for the disk: the policy fits, the optimizer's state does not."""
    program = (
        "import resource, signal, sys\n"
        "from rlmod.train import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "main()\n"
    )
    command = [sys.executable, "-c", program, *QUICK, f"output={tmp_path / 'a'}", "trainer.max_epochs=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "the checkpoint step-000002 could not be written" in done.stderr
    assert "there is no earlier one" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "a" / "checkpoints").iterdir())


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.weekly)])
def test_killed_with_nothing_left_but_the_result_equals_uninterrupted(every, tmp_path, monkeypatch, capsys):
    """The last validation stands in the checkpoint where it came before it, and is made again where it came after."""
    settings = (*QUICK, "trainer.max_epochs=3", f"trainer.check_val_every_n_epoch={every}", f"output={tmp_path / 'a'}")
    run_train(monkeypatch, *settings)
    shutil.copytree(tmp_path / "a", tmp_path / "whole")
    for name in ("result.json", "report.html"):
        (tmp_path / "a" / name).unlink()
    run_train(monkeypatch, *settings)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "whole")
    samples = [(tmp_path / run / "samples.jsonl").read_bytes() for run in ("a", "whole")]
    assert samples[0] == samples[1]
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("a", "whole")]
    for key in ("held_out", "steps", "tokens", "completed"):
        assert results[0][key] == results[1][key]
    (tmp_path / "a" / "report.html").unlink()  # killed between the result and the report
    run_train(monkeypatch, *settings)
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "a" / "report.html").is_file()
