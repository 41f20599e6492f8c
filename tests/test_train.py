"""Whole runs: what they leave, that they repeat, resume and stop, and that the first update is on-policy."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from rlmod import resume
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.module import RLModule
from tests.commands import SHORT, answer, refused, run_train

QUICK = (*SHORT, "shaper=token_entropy", "optimizer.lr=1e-4", "trainer.max_epochs=4")
TIMED = ("time/", "speed/")


def metrics(run: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that hold seconds."""
    with (run / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in csv.DictReader(file)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return AutoModelForCausalLM.from_pretrained(newest / "policy").state_dict()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """One finished run of four collections."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *QUICK, f"output={folder}")
    return folder


def test_a_run_leaves_what_a_person_looks_for(run):
    for name in ("metrics.csv", "samples.jsonl", "report.html", "config.yaml", "result.json", "train.log"):
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents.*"))
    checkpoint = run / "checkpoints" / "step-000004"
    assert (checkpoint / "trainer.ckpt").is_file()
    assert OmegaConf.load(checkpoint / "config.yaml").loss.clip_low == 0.2
    result = json.loads((run / "result.json").read_text())
    assert result["completed"]
    assert result["steps"] == 4
    assert result["held_out"]["problems"] == 64
    rows = metrics(run)
    validated = [float(row["val/mean@1"]) for row in rows if row["val/mean@1"]]
    assert validated == pytest.approx([result["held_out"]["before"], result["held_out"]["after"]], abs=1e-6)
    trained = [row for row in rows if row["reward/mean"]]
    assert len(trained) == 4
    assert result["tokens"] == sum(float(row["completions/tokens"]) for row in trained)
    for row in trained:
        shares = [float(row[f"prompts/{kind}"]) for kind in ("all_right", "mixed", "all_wrong")]
        assert sum(shares) == pytest.approx(1)
        assert float(row["train/ratio"]) == pytest.approx(1, abs=1e-5)
        assert float(row["train/grad_norm"]) > 0


def test_the_saved_policy_loads_in_transformers_and_is_the_trained_one(run):
    saved = weights(run)
    start = AutoModelForCausalLM.from_pretrained("rlmod/policies/tiny").state_dict()
    assert any(not torch.equal(saved[name], start[name]) for name in start)
    state = torch.load(run / "checkpoints" / "step-000004" / "trainer.ckpt", weights_only=False)["state_dict"]
    for name, value in saved.items():
        assert torch.equal(value, state[f"policy.{name}"]), name


def test_the_same_seed_gives_the_same_metrics_and_weights_bit_for_bit(run, tmp_path, monkeypatch):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'b'}")
    assert metrics(tmp_path / "b") == metrics(run)
    again = weights(tmp_path / "b")
    assert all(torch.equal(value, again[name]) for name, value in weights(run).items())
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'c'}", "seed=1")
    assert metrics(tmp_path / "c") != metrics(run)


def test_stopped_and_resumed_equals_uninterrupted(run, tmp_path, monkeypatch):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'half'}", "trainer.max_epochs=2")
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'rest'}", f"resume={tmp_path / 'half'}")
    whole = [row for row in metrics(run) if row["reward/mean"]]
    halves = [row for part in ("half", "rest") for row in metrics(tmp_path / part) if row["reward/mean"]]
    columns = [name for name in whole[0] if name.startswith(("reward/", "completions/", "train/", "prompts/"))]
    assert [[row[name] for name in columns] for row in halves] == [[row[name] for name in columns] for row in whole]
    resumed = weights(tmp_path / "rest")
    assert all(torch.equal(value, resumed[name]) for name, value in weights(run).items())


def test_a_checkpoint_of_another_policy_is_refused_in_a_sentence(run, tmp_path, monkeypatch):
    message = refused(monkeypatch, tmp_path, *QUICK, "adapter=lora", f"resume={run}")
    assert "resume: the checkpoint is of another policy" in message
    assert "of its 39 weights differ" in message
    assert "is missing there and of shape" in message


def test_the_first_update_after_every_collection_is_on_policy(tmp_path, monkeypatch):
    differences: dict[int, float] = {}
    plain = ClippedSurrogate.__call__
    module: list[RLModule] = []
    setup = RLModule.on_train_epoch_start

    def watched(self, logprobs, rollouts):
        step = module[0].global_step
        difference = (logprobs.detach() - rollouts.logprobs).masked_fill(~rollouts.mask, 0).abs().max().item()
        differences[step] = max(differences.get(step, 0.0), difference)
        return plain(self, logprobs, rollouts)

    monkeypatch.setattr(ClippedSurrogate, "__call__", watched)
    monkeypatch.setattr(
        RLModule, "on_train_epoch_start", lambda self: (module.clear(), module.append(self), setup(self))[-1]
    )
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "batch.updates=2", "optimizer.lr=1e-3")
    firsts = [differences[step] for step in (0, 2, 4, 6)]
    assert max(firsts) < 1e-4, differences
    # The second update is not: if it were, the collection would be repeated or the optimizer idle.
    assert min(differences[step] for step in (1, 3, 5, 7)) > 1e-3, differences


def test_a_collection_without_signal_leaves_the_policy_alone_and_says_so(tmp_path, monkeypatch, caplog):
    run_train(
        monkeypatch,
        *QUICK,
        f"output={tmp_path / 'a'}",
        "reward.pattern=null",  # the whole completion against the answer: all wrong
        "trainer.max_epochs=2",
        "optimizer.weight_decay=0.1",
    )
    start = AutoModelForCausalLM.from_pretrained("rlmod/policies/tiny").state_dict()
    assert all(torch.equal(value, start[name]) for name, value in weights(tmp_path / "a").items())
    assert "None of the 8 groups of this collection has signal" in (tmp_path / "a" / "train.log").read_text()


def test_dynamic_sampling_trains_on_groups_with_signal_only(tmp_path, monkeypatch):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "filter.dynamic_sampling=true")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert any(float(row["prompts/drawn"]) > 8 for row in rows)
    for row in rows:
        drawn, dropped = float(row["prompts/drawn"]), float(row["prompts/dropped"])
        assert drawn * (1 - dropped) + float(row["prompts/unfilled"]) == pytest.approx(8)


def test_all_completions_truncated_is_loud(tmp_path, monkeypatch):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "sampler.max_new_tokens=1", "trainer.max_epochs=1")
    text = (tmp_path / "a" / "train.log").read_text()
    assert "100 % of the 32 completions" in text
    assert "sampler.max_new_tokens" in text


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise KeyError('x')", ["bad", "KeyError"]),
        ("return [1.0]", ["bad", "1 numbers for 32 completions"]),
        ("return [float('nan')] * len(texts)", ["bad", "nan", "row 0"]),
        ("return [float('inf')] * len(texts)", ["bad", "inf", "row 0"]),
    ],
)
def test_a_reward_that_fails_is_named_and_never_a_silent_zero(body, expected, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(f"def bad(texts):\n    {body}\n")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_rewards", None)
    reward = (
        "reward=exact_match",
        "reward._target_=my_rewards.bad",
        "~reward.pattern",
        "~reward.right",
        "~reward.wrong",
    )
    message = refused(monkeypatch, tmp_path, *QUICK, *reward, "data.validation=null")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("loss", ["clipped_surrogate", "sequence_surrogate", "cispo", "mixed_surrogate"])
def test_the_debug_run_of_each_loss(loss, tmp_path, monkeypatch):
    run_train(monkeypatch, f"debug={loss}", "data.validation.size=64", f"output={tmp_path / 'a'}")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(rows) == 10
    assert any(float(row["train/ratio"]) != 1 for row in rows)


def started(*overrides: str) -> subprocess.Popen[str]:
    command = [Path(sys.executable).with_name("rlmod-train"), *QUICK, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.time() + 180
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_exits(number, tmp_path):
    folder = tmp_path / "a"
    process = started("trainer.max_epochs=10000", f"output={folder}")
    try:
        file = folder / "metrics.csv"  # written before training, and again after ten collections
        wait_until(
            lambda: file.exists() and any(row.get("reward/mean") for row in csv.DictReader(file.open())), process
        )
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, output
    assert "finishing this iteration, then a checkpoint" in output
    assert f"resume={folder}" in output
    assert "Traceback" not in output
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert AutoModelForCausalLM.from_pretrained(checkpoint / "policy")
    assert not json.loads((folder / "result.json").read_text())["completed"]


def test_ctrl_c_before_the_first_step_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RLModule, "validation_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}")
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    assert not (tmp_path / "a" / "checkpoints").exists()


@pytest.mark.slow
def test_killed_three_times_and_started_again_equals_uninterrupted(tmp_path, monkeypatch):
    """SIGKILL at random moments; the same command goes on. With dropout, so that random states matter."""
    settings = (
        "adapter=lora", "policy.adapter.dropout=0.1", "trainer.max_epochs=20", "callbacks.checkpoints.every=1",
        "batch.updates=2", "optimizer.lr=1e-3", "trainer.check_val_every_n_epoch=5",
    )  # fmt: skip
    run_train(monkeypatch, *QUICK, *settings, f"output={tmp_path / 'whole'}")
    folder, draw = tmp_path / "killed", random.Random(0)
    for steps in sorted(draw.sample(range(2, 38, 2), 3)):
        process = started(*settings, f"output={folder}")
        try:
            wait_until(lambda: (folder / "checkpoints" / f"step-{steps:06d}").exists(), process)  # noqa: B023
            time.sleep(draw.random() / 2)
            process.kill()
            process.communicate(timeout=60)
        finally:
            process.kill()
    process = started(*settings, f"output={folder}")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "going on from" in output
    assert metrics(folder) == metrics(tmp_path / "whole")
    for name in ("policy/adapter_model.safetensors", "samples.jsonl"):
        newest = [run / "checkpoints" / "step-000040" / name for run in (folder, tmp_path / "whole")]
        assert newest[0].read_bytes() == newest[1].read_bytes(), name
    results = [json.loads((run / "result.json").read_text()) for run in (folder, tmp_path / "whole")]
    for key in ("held_out", "steps", "tokens"):
        assert results[0][key] == results[1][key]


def test_a_finished_run_is_not_run_again_and_another_one_is_not_mixed_with_it(run, monkeypatch, capsys, tmp_path):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != "train.log"}
    run_train(monkeypatch, *QUICK, f"output={run}")
    assert "this run has come to its end already" in capsys.readouterr().out
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
    assert resume.newest(tmp_path / "a") == whole
    assert resume.damage(broken) == f"trainer.ckpt has {size // 2:,} of {size:,} bytes"
    (broken / "policy" / "config.json").unlink()
    file.unlink()
    assert "is missing" in str(resume.damage(broken))
    (broken / "complete.json").unlink()
    assert "complete.json cannot be read" in str(resume.damage(broken))
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match="no whole checkpoint there"):
        resume.newest(tmp_path / "a")


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path):
    for step in ("step-999999", "step-1000000", "step-000005", "step-new"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    assert [folder.name for folder in resume.checkpoints(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


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


def test_multirun_has_a_folder_a_run_and_one_failure_loses_nothing(tmp_path):
    command = [
        Path(sys.executable).with_name("rlmod-train"), "-m", *SHORT, "trainer.max_epochs=2",
        "shaper=uniform,token_entropy", "batch.micro_batch=16,5", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    with (tmp_path / "sweep" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        folder = tmp_path / "sweep" / row["run"]
        if "micro_batch=5" in row["overrides"]:
            assert "batch.micro_batch=5 does not fill" in row["error"]
        else:
            held_out = json.loads((folder / "result.json").read_text())["held_out"]
            assert float(row["objective"]) == pytest.approx(held_out["after"])


def test_the_lines_show_the_collection_that_they_name(tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "callbacks.progress_bar.lines=4")
    shown = [
        line.split("reward ")[1][:5] for line in capsys.readouterr().out.splitlines() if line.startswith("collection ")
    ]
    assert shown == [f"{float(row['reward/mean']):.3f}" for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(set(shown)) > 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sampling_has_the_precision_of_training(precision, tmp_path, monkeypatch):
    """Or the first update's ratios would be off by what bfloat16 rounds away."""
    run_train(monkeypatch, *QUICK, f"trainer.precision={precision}", f"output={tmp_path / 'a'}", "trainer.max_epochs=2")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(rows) == 2
    for row in rows:
        assert float(row["train/ratio"]) == pytest.approx(1, abs=0.02)
        assert float(row["completions/tokens"]) == int(float(row["completions/tokens"])) > 100
    assert torch.get_default_dtype() == torch.float32
