"""Runs on files as people have them: no answers, several answers, columns that only the reward reads."""

import json
from pathlib import Path

import pytest

from rlmod.data.arithmetic import Arithmetic
from rlmod.training.callbacks.completions import _build_table
from rlmod.types import Texts
from tests.command_line import refused, run_train

RUN = (
    *("debug=short", "data=problem_file", "data.validation=null", "trainer.max_epochs=1"),
    *("batch.prompts=4", "callbacks.completions.every=1", "callbacks.completions.rows=4"),
)


def within_limit(texts: Texts) -> list[float]:
    """1 for a completion that is at most as long as its problem's column ``limit`` allows."""
    assert texts.problems is not None
    return [
        float(len(text) <= problem.extra["limit"])
        for text, problem in zip(texts.completions, texts.problems, strict=True)
    ]


def save(path: Path, **columns: object) -> str:
    problems = Arithmetic(split="train", size=8)()
    lines = [json.dumps({"prompt": p.prompt, "answer": p.answer, **columns}) + "\n" for p in problems]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_reward_of_a_column_needs_no_answer(tmp_path, monkeypatch, capsys):
    short, long = save(tmp_path / "short.jsonl", limit=0), save(tmp_path / "long.jsonl", limit=10_000)
    mixture = f"data.path=[{{path:{short},weight:1}},{{path:{long},weight:1}}]"
    reward = ("reward=format", "~reward.pattern", "~reward.correct", "~reward.incorrect")
    target = f"reward._target_={__name__}.within_limit"
    run_train(monkeypatch, *RUN, mixture, "data.answer_field=null", *reward, target, f"output={tmp_path / 'run'}")
    found = samples(tmp_path / "run")
    assert {sample["reward"] for sample in found} == {0.0, 1.0}
    assert all(sample["answer"] == [] for sample in found)
    assert "one pass over the mixture has 16 problems" in capsys.readouterr().out


def test_a_reward_that_compares_refuses_them_before_the_weights_load(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jsonl")
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("the weights are loaded"))
    message = refused(monkeypatch, tmp_path, *RUN, f"data.path={path}", "data.answer_field=null")
    assert (
        f"{path}:1: the problem has no answer (data.answer_field=null), but reward=ExactMatch compares with it"
        in message
    )


def test_several_answers_are_shown(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "a.jsonl", answer=["12", "34"])
    run_train(monkeypatch, *RUN, f"data.path={path}", f"output={tmp_path / 'run'}")
    assert samples(tmp_path / "run")[0]["answer"] == ["12", "34"]
    assert "12 | 34" in capsys.readouterr().out


def test_a_completion_without_a_reward_is_shown_without_a_number():
    sample = {"prompt": "?", "completion": "x", "answer": (), "reward": None}
    table = _build_table([sample], "completions")
    assert list(table.columns[-1].cells) == [""]
