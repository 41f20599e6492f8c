"""A size that is too large for the policy."""

import pytest

from rlmod.model.policy import HFPolicy, positions
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from rlmod.types import Problem
from tests.command_line import SHORT, refused, refused_eval
from tests.runs import finished


def test_a_size_for_a_larger_policy_says_what_does_not_fit(monkeypatch, tmp_path):
    small = ("size=paper_7b", "policy=tiny", "data=arithmetic", "sampler=hf", "strategy=single", "trainer.devices=1")
    said = refused(monkeypatch, tmp_path, "experiment=gtpo", *small, "trainer.accelerator=cpu", *SHORT[1:3])
    assert "sampler.max_new_tokens=" in said
    assert "but the policy has 4096 (max_position_embeddings)" in said
    assert "choose a size= that fits this policy" in said


def test_evaluation_says_it_too(monkeypatch, tmp_path):
    said = refused_eval(monkeypatch, "sampler.max_new_tokens=4090", f"output={tmp_path / 'eval'}")
    assert "sampler.max_new_tokens=4090: the longest prompt has" in said


def test_the_longest_prompt_and_a_completion_may_fill_the_positions_exactly():
    tokenizer = HFPolicy(path="tiny").tokenizer()
    problems = [Problem(prompt="1+1:", answer="2", source="a"), Problem(prompt="1+1+1:", answer="3", source="b")]
    encoded = PromptEncoder().encode(problems, tokenizer)
    encoded.check_positions(10, HF(completions_per_prompt=1, max_new_tokens=4), "sampler")
    encoded.check_positions(None, HF(completions_per_prompt=1, max_new_tokens=400), "sampler")
    with pytest.raises(
        ValueError, match=r"longest prompt has 6 tokens \(b\), and .* needs 11 positions, but the policy has 10"
    ):
        encoded.check_positions(10, HF(completions_per_prompt=1, max_new_tokens=5), "sampler")
    assert positions(HFPolicy(path="tiny").shape()) == 4096
    assert positions(None) is None


def test_a_shipped_policy_on_other_problems_gets_a_word(tmp_path, capsys):
    file = tmp_path / "sums.jsonl"
    file.write_text('{"prompt": "1+1:", "answer": "2"}\n', encoding="utf-8")
    other = ("data=problem_file", f"data.path={file}", "data.validation=null", "trainer.max_epochs=1")
    said = (finished(tmp_path / "a", *SHORT[:1], *other, "batch.prompts=1") / "train.log").read_text(encoding="utf-8")
    assert "policy.path=tiny only knows the embedded arithmetic" in said
    assert "no held-out problems; 1 steps, " in capsys.readouterr().out
    said = (finished(tmp_path / "b", *SHORT, "trainer.max_epochs=1") / "train.log").read_text(encoding="utf-8")
    assert "only knows" not in said
