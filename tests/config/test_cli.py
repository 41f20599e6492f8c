"""A wrong command line: the message names the key and what would be right, and nothing heavy is loaded before it shows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import refused

REFUSED = {
    "unknown option": (["shaper=bogus"], ["shaper/bogus", "uniform", "token_entropy", "sequence_entropy"]),
    "unknown recipe": (["experiment=bogus"], ["experiment/bogus", "quickstart", "gtpo"]),
    "unknown key": (["loss.clip_lo=0.2"], ["loss.clip_lo", "did you mean loss.clip_low", "clip_high"]),
    "unknown top-level key": (["sed=1"], ["unknown key sed", "did you mean seed"]),
    "unknown group": (["expriment=quickstart"], ["unknown key expriment", "did you mean experiment?"]),
    "an endless temperature": (["sampler.temperature=inf"], ["sampler.temperature must be above 0 and finite"]),
    "unknown added field": (["+loss.foo=1"], ["loss", "foo"]),
    "text for a number of the optimizer": (["optimizer.lr=abc"], ["optimizer.lr must be a number", "abc"]),
    "optimizer out of range": (["optimizer.lr=-1"], ["optimizer: Invalid learning rate: -1"]),
    "seed": (["seed=-1"], ["seed must be a whole number from 0 to 4294967295, got -1"]),
    "text for a seed": (["validation.seed=abc"], ["validation.seed must be a whole number"]),
    "nan": (["shaper.eps=nan"], ["shaper.eps must be a number, got nan"]),
    "nan for a threshold": (["threshold=nan"], ["threshold must be a number, got nan"]),
    "null for a number": (["loss.clip_high=null"], ["loss.clip_high must be a number, got null"]),
    "text for a threshold": (["validation.threshold=abc"], ["validation.threshold must be a number"]),
    "number for a list": (["validation.pass_at=3"], ["validation.pass_at must be a list", "got 3"]),
    "no prompts a batch": (["validation.prompts_per_batch=0"], ["validation.prompts_per_batch must be at least 1"]),
    "text for a reward's number": (["reward.correct=abc"], ["reward.correct must be a number", "'abc'"]),
    "a reward's nan": (["reward.incorrect=nan"], ["reward.incorrect must be a number, got nan"]),
    "text in a list": (
        ["shaper=token_entropy", "shaper.entropy_clip=[a,b]"],
        ["shaper.entropy_clip must be a list", "or null", "['a', 'b']"],
    ),
    "a callback's number": (
        ["callbacks.checkpoints.every=abc"],
        ["callbacks.checkpoints.every must be a whole number"],
    ),
    "a callback's range": (["callbacks.completions.rows=0"], ["callbacks.completions", "at least 1"]),
    "compiled layers that are sharded": (
        ["policy.compile=true", "strategy=fsdp"],
        ["policy.compile=true with strategy=fsdp", "strategy=fsdp2"],
    ),
    "a trainer's precision": (["trainer.precision=foo"], ["trainer.precision must be", "bf16-mixed"]),
    "a trainer's number": (["trainer.limit_val_batches=abc"], ["trainer.limit_val_batches must be"]),
    "a trainer's clip": (["trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val must be null or at least 0"]),
    "weight": (
        ["reference=frozen", "regularizer=[kl]", "regularizer.kl.weight=inf"],
        ["regularizer.kl.weight must be finite"],
    ),
    "unquoted": (
        ["data.answer_pattern=#### (.+"],
        ["data.answer_pattern", "quotes", "'data.answer_pattern=\"#### (.+\"'"],
    ),
    "unknown optimizer argument": (["+optimizer.lrr=1"], ["optimizer.lrr", "AdamW", "lr"]),
    "negative clip": (["loss.clip_low=-1"], ["loss.clip_low", "above 0", "-1"]),
    "text for a number": (["shaper.eps=foo"], ["shaper.eps must be a number", "'foo'"]),
    "number for a switch": (["filter=dynamic_sampling", "filter.over=3"], ["filter.over must be one of union, own"]),
    "fraction for a count": (["batch.prompts=1.5"], ["batch.prompts must be a whole number"]),
    "one completion": (["sampler.completions_per_prompt=1"], ["sampler.completions_per_prompt=1", "at least 2"]),
    "minibatches": (["batch.minibatches=33"], ["batch.minibatches=33", "256 completions", "32, 64"]),
    "temperature": (["sampler.temperature=0"], ["sampler.temperature", "above 0", "sampler.greedy"]),
    "top_p": (["sampler.top_p=1.5"], ["sampler.top_p", "at most 1"]),
    "threshold of pass@k": (["validation.pass_at=[4]"], ["validation.pass_at", "between 1 and", "= 1"]),
    "missing policy": (["policy=hf"], ["policy.path is missing"]),
    "missing data": (["data=problem_file"], ["data.path is missing"]),
    "no such policy": (["policy.path=/nowhere"], ["policy.path=/nowhere", "strong, tiny"]),
    "no such component": (["shaper._target_=nowhere.F"], ["shaper._target_", "nowhere.F", "current folder"]),
    "no such reward": (["reward._target_=nowhere.f"], ["reward._target_", "nowhere.f", "current folder"]),
    "sequence loss, token shaper": (
        ["shaper=token_entropy", "loss=sequence_surrogate"],
        ["SequenceSurrogate", "TokenEntropy", "loss=clipped_surrogate"],
    ),
    "sequence loss, forking tokens": (
        ["correction=[forking_tokens]", "loss=sequence_surrogate"],
        ["SequenceSurrogate", "ForkingTokens", "one ratio per completion"],
    ),
    "updates with a zero-reward batch": (
        [
            "zero_reward.weight=1",
            "filter=dynamic_sampling",
            "guide=policy",
            "guide.policy.path=strong",
            "batch.minibatches=3",
        ],
        ["batch.minibatches=3"],
    ),
    "no such choice": (["shaper.pool=mine"], ["shaper.pool must be one of union, own", "'mine'"]),
    "nested field": (
        ["guide=policy", "guide.policy.path=strong", "guide.sampler.top_k=many"],
        ["guide.sampler.top_k must be a whole number"],
    ),
    "missing guide": (["guide=policy"], ["guide.policy.path is missing"]),
    "zero-reward without a guide": (["zero_reward.weight=1", "filter=dynamic_sampling"], ["guide=policy"]),
    "zero-reward without dynamic sampling": (
        ["zero_reward.weight=1", "guide=policy", "guide.policy.path=strong"],
        ["filter=dynamic_sampling"],
    ),
    "no demonstrations": (
        ["guide=demonstrations", "guide.path=/nowhere.jsonl"],
        ["guide.path=/nowhere.jsonl", "no such file"],
    ),
    "kl without a reference": (["regularizer=[kl]"], ["regularizer.kl reads reference_logprobs", "reference=frozen"]),
    "share of forks": (
        ["correction=[forking_tokens]", "correction.forking_tokens.share=0"],
        ["correction.forking_tokens.share must be above 0"],
    ),
    "guide's clip": (
        ["loss=mixed_surrogate", "loss.guide_clip=[0.2]"],
        ["loss.guide_clip must be same, none or [low, high]"],
    ),
    "decay": (["reference=ema", "reference.decay=2"], ["reference.decay must be at least 0 and at most 1"]),
    "no epochs": (["trainer.max_epochs=abc"], ["trainer.max_epochs", "whole number"]),
    "not to resume": (["resume=/nowhere"], ["resume=/nowhere", "no intact checkpoint"]),
    "accumulation is ours": (["trainer.accumulate_grad_batches=2"], ["unknown key trainer.accumulate_grad_batches"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_override_is_named_with_what_would_be_right(name, monkeypatch, tmp_path):
    overrides, expected = REFUSED[name]
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("weights were loaded"))
    message = refused(monkeypatch, tmp_path, *overrides)
    missing = [part for part in expected if part not in message]
    assert not missing, message
    assert "Traceback" not in message


def test_an_output_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "refused").write_text("a file where the folder should be")
    message = refused(monkeypatch, tmp_path)
    assert "refused" in message
    assert "output=FOLDER" in message


def test_problem_files_are_checked_before_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("weights were loaded"))
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"prompt": "1+1:", "answer": "2"}) + "\n{broken\n")
    message = refused(monkeypatch, tmp_path, "data=problem_file", f"data.path={file}", "data.validation=null")
    assert "train.jsonl:2" in message
    file.write_text(json.dumps({"prompt": "1+1:"}) + "\n")
    message = refused(monkeypatch, tmp_path, "data=problem_file", f"data.path={file}", "data.validation=null")
    assert "train.jsonl:1" in message
    assert "answer" in message


def test_the_command_exits_with_one_paragraph_before_lightning_is_imported():
    program = (
        "import sys\n"
        "from rlmod.train import main\n"
        "sys.argv = ['rlmod-train', 'loss.clip_low=-1', 'output=' + sys.argv[1]]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('heavy:', [m for m in ('lightning', 'torchmetrics', 'transformers.generation') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "/tmp/never-written"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "heavy: []" in done.stdout
    assert "loss.clip_low must be above 0 and at most 1, got -1" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_groups_and_options():
    done = subprocess.run(
        [Path(sys.executable).with_name("rlmod-train"), "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    for line in (
        "shaper: entropy_advantage, gdpo, group_baseline",
        "loss: cispo, clip_higher",
        "size: gsm8k, paper_32b, paper_7b, toy",
    ):
        assert line in done.stdout
    assert "clip_low: 0.2" in done.stdout
    assert "experiment=gtpo" in done.stdout
