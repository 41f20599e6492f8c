"""Whole runs: what they leave, that they repeat, and that the first update is on-policy."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.training.accuracy import interval
from rlmod.training.module import RLModule
from tests.command_line import SHORT, refused, run_train
from tests.runs import QUICK, metrics, weights


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
    # One completion for each of 64 problems: the interval is that of a count.
    for when in ("before", "after"):
        value = result["held_out"][when]
        expected = interval([1.0] * round(64 * value) + [0.0] * round(64 * (1 - value)))
        assert result["held_out"]["intervals"][when] == pytest.approx(expected, abs=1e-6)
    trained = [row for row in rows if row["reward/mean"]]
    assert len(trained) == 4
    assert result["tokens"] == sum(float(row["completions/tokens"]) for row in trained)
    for row in trained:
        shares = [float(row[f"prompts/{kind}"]) for kind in ("all_correct", "mixed", "all_incorrect")]
        assert sum(shares) == pytest.approx(1)
        assert float(row["train/ratio"]) == pytest.approx(1, abs=1e-5)
        assert float(row["train/grad_norm"]) > 0


def test_the_saved_policy_loads_in_transformers_and_is_the_trained_one(run):
    saved = weights(run)
    start = AutoModelForCausalLM.from_pretrained("rlmod/model/policies/tiny").state_dict()
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


def test_the_first_update_of_every_rollout_batch_is_on_policy(tmp_path, monkeypatch):
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
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "batch.minibatches=2", "optimizer.lr=1e-3")
    firsts = [differences[step] for step in (0, 2, 4, 6)]
    assert max(firsts) < 1e-4, differences
    # The second update is not: if it were, the rollout batch would be repeated or the optimizer idle.
    assert min(differences[step] for step in (1, 3, 5, 7)) > 1e-3, differences


def test_a_rollout_batch_without_signal_leaves_the_policy_alone_and_says_so(tmp_path, monkeypatch, caplog):
    run_train(
        monkeypatch,
        *QUICK,
        f"output={tmp_path / 'a'}",
        "reward.pattern=null",  # the whole completion against the answer: all incorrect
        "trainer.max_epochs=2",
        "optimizer.weight_decay=0.1",
    )
    start = AutoModelForCausalLM.from_pretrained("rlmod/model/policies/tiny").state_dict()
    assert all(torch.equal(value, start[name]) for name, value in weights(tmp_path / "a").items())
    assert "None of the 8 groups of this rollout batch has signal" in (tmp_path / "a" / "train.log").read_text()


def test_dynamic_sampling_trains_on_groups_with_signal_only(tmp_path, monkeypatch):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "filter=dynamic_sampling")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert any(float(row["prompts/seen"]) > 8 for row in rows)
    for row in rows:
        seen, dropped = float(row["prompts/seen"]), float(row["prompts/dropped"])
        assert seen * (1 - dropped) + float(row["prompts/unfilled"]) == pytest.approx(8)


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
        "~reward.correct",
        "~reward.incorrect",
    )
    message = refused(monkeypatch, tmp_path, *QUICK, *reward, "data.validation=null")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    "loss",
    ["clipped_surrogate", "sequence_surrogate", "cispo", "mixed_surrogate", "sapo", "dppo", "gmpo", "fipo"],
)
def test_the_debug_run_of_each_loss(loss, tmp_path, monkeypatch):
    run_train(monkeypatch, f"debug={loss}", "data.validation.size=64", f"output={tmp_path / 'a'}")
    rows = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(rows) == 10
    assert any(float(row["train/ratio"]) != 1 for row in rows)


def test_multirun_has_a_folder_a_run_and_one_failure_loses_nothing(tmp_path):
    command = [
        Path(sys.executable).with_name("rlmod-train"), "-m", *SHORT, "trainer.max_epochs=2",
        "shaper=uniform,token_entropy", "batch.minibatches=1,5", f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    with (tmp_path / "sweep" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["0", "1", "2", "3"]
    for row in rows:
        folder = tmp_path / "sweep" / row["run"]
        if "minibatches=5" in row["overrides"]:
            assert "batch.minibatches=5 does not divide" in row["error"]
        else:
            held_out = json.loads((folder / "result.json").read_text())["held_out"]
            assert float(row["objective"]) == pytest.approx(held_out["after"])


def test_the_lines_show_the_rollout_batch_that_they_name(tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", "callbacks.progress_bar.lines=4")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration ")]
    shown = [line.split("reward ")[1][:5] for line in lines]
    for line in lines[:-1]:
        assert re.search(r"tok/s [\d,]+  ETA \d:\d\d:\d\d$", line)
    assert "ETA" not in lines[-1]
    assert shown == [f"{float(row['reward/mean']):.3f}" for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert len(set(shown)) > 1


def test_the_time_to_the_end_counts_the_limit_that_comes_first(tmp_path, monkeypatch, capsys):
    limits = ("trainer.max_epochs=1000", "trainer.max_steps=2", "callbacks.progress_bar.lines=1000")
    run_train(monkeypatch, *QUICK, f"output={tmp_path / 'a'}", *limits)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration ")]
    assert [line.split()[1] for line in lines] == ["1/1000", "2/1000"]
    assert re.search(r"ETA 0:00:\d\d$", lines[0])  # one more step, not 999 more
    assert "ETA" not in lines[1]


def test_a_long_validation_shows_its_progress(tmp_path, monkeypatch, capsys):
    """Without a terminal a line after each batch here, because the time between two lines is 0."""
    monkeypatch.setattr("rlmod.training.callbacks.progress_bar.SECONDS_BETWEEN_LINES", 0.0)
    short = ("validation.prompts_per_batch=24", "trainer.limit_val_batches=1.0", "trainer.max_epochs=1")
    run_train(monkeypatch, *QUICK, *short, f"output={tmp_path / 'a'}")
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("validation:")]
    assert len(lines) == 4  # 64 problems in 3 batches, twice; the last batch ends the validation
    for line, done in zip(lines, (1, 2, 1, 2), strict=True):
        assert re.fullmatch(rf"validation: {done} of 3 batches in 0:0\d:\d\d  ETA 0:0\d:\d\d", line)
    assert output.index("validation:") < output.index("iteration 1/1")


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
