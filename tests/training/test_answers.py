"""The check of the answers is done by rank 0, once, and is the same for all ranks and after a resume."""

import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from rlmod.config.build import find_unreadable
from rlmod.data import _cache, _store
from rlmod.reward._supervised import Supervised
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.grop import Grop
from rlmod.reward.math_verify import MathVerify
from rlmod.reward.overlong import Overlong
from rlmod.reward.weighted import Weighted
from rlmod.rollout.prompts import EncodedProblems
from rlmod.training import answers
from rlmod.training.answers import readable_problems
from rlmod.types import Problem

PROBLEMS = EncodedProblems(
    problems=tuple(Problem(prompt="?", answer=answer, source=f"a:{answer}") for answer in "123"),
    ids=((5,), (6,), (7,)),
    pad_id=0,
    dropped=1,
)


@dataclass
class Reader:
    """Cannot read the answer 2."""

    calls: list[int] = field(default_factory=list)

    def __call__(self, texts):
        return [0.0] * len(texts)

    def find_unreadable(self, problems):
        self.calls.append(len(problems))
        return {i: "not a 2" for i, problem in enumerate(problems) if problem.answer == "2"}


def checked(folder: Path, reward, problems=PROBLEMS, settings: object = 5, seconds: float = 0.3):
    return readable_problems(problems, reward, "drop", folder / "answers.json", settings, seconds)


def test_rank_0_checks_once_and_the_other_ranks_and_a_resumed_run_read_the_result(tmp_path, monkeypatch, caplog):
    reader = Reader()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"rank 0 has not written .*answers\.json within guard\.rank_timeout=0 s"):
        checked(tmp_path, reader)
    monkeypatch.setenv("RANK", "0")
    first = checked(tmp_path, reader)
    monkeypatch.setenv("RANK", "1")
    assert first == checked(tmp_path, reader)
    assert ([p.answer for p in first.problems], first.ids, first.dropped) == (["1", "3"], ((5,), (7,)), 2)
    assert reader.calls == [3]
    assert "1 of 3 answers cannot be read by the reward (a:2: not a 2)" in caplog.text
    with pytest.raises(ValueError, match=r"1 of 3 answers .*data\.unreadable_answer=drop"):
        readable_problems(PROBLEMS, reader, "error", tmp_path / "answers.json", 5, 0.3)
    monkeypatch.setenv("RANK", "0")
    checked(tmp_path, reader, settings=6)
    changed = replace(PROBLEMS.problems[0], answer="4")
    checked(tmp_path, reader, replace(PROBLEMS, problems=(changed, *PROBLEMS.problems[1:])))
    assert reader.calls == [3, 3, 3]
    assert set(json.loads((tmp_path / "answers.json").read_text())["unreadable"]) == {"1"}


def test_a_reward_that_reads_every_answer_needs_no_check(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert checked(tmp_path, ExactMatch()) is PROBLEMS
    assert not list(tmp_path.iterdir())


def test_no_problem_is_left(tmp_path):
    alone = replace(PROBLEMS, problems=PROBLEMS.problems[1:2], ids=((6,),))
    with pytest.raises(ValueError, match=r"1 of 1 answers cannot be read"):
        checked(tmp_path, Reader(), alone)


def test_a_reward_that_compares_refuses_a_problem_without_an_answer(tmp_path):
    """The other rewards, which judge the completion alone, take it."""
    none = replace(PROBLEMS, problems=(*PROBLEMS.problems[:2], replace(PROBLEMS.problems[2], answer=())))
    overlong = Overlong(max_tokens=10, buffer=4)
    assert checked(tmp_path, overlong, none) == none
    weighted = Weighted(
        terms={"short": {"weight": 1, "reward": overlong}, "right": {"weight": 1, "reward": MathVerify()}}
    )
    grop = Grop(reward=Supervised(supervised=ExactMatch()), max_tokens=10, buffer=4)
    for reward, key in (
        (ExactMatch(), "reward=ExactMatch"),
        (MathVerify(), "reward=MathVerify"),
        (weighted, "reward.terms.right.reward=MathVerify"),
        (grop, "reward.reward=ExactMatch"),
    ):
        message = rf"a:3: the problem has no answer \(data\.answer_field=null\), but {re.escape(key)} compares with it"
        for check in (lambda r: checked(tmp_path, r, none), lambda r: find_unreadable(none, r)):
            with pytest.raises(ValueError, match=message):
                check(reward)


def stored(monkeypatch, folder: Path, *correct) -> EncodedProblems:
    """Problems in a file."""
    monkeypatch.setenv(_cache.VARIABLE, str(folder / "cache"))
    monkeypatch.setattr(_cache, "LARGE", 2)
    monkeypatch.setattr(_store, "BATCH_ROWS", 2)
    problems = _store.collect(Problem(prompt="?", answer=a, source=f"a:{i}") for i, a in enumerate(correct))
    assert isinstance(problems, _store.ProblemStore)
    return EncodedProblems(problems=problems, ids=((5,),) * len(correct), pad_id=0, dropped=0)


def test_the_digest_is_that_of_one_json_list_wherever_the_problems_are(tmp_path, monkeypatch):
    correct = ["1", ("2", "zwei"), "é", "4", "5"]
    whole = json.dumps([correct, {"b": 1, "a": 2}, answers._version("math-verify")], sort_keys=True)
    problems = stored(monkeypatch, tmp_path, *correct)
    for each in (problems, replace(problems, problems=list(problems.problems))):
        assert answers._digest(each, {"a": 2, "b": 1}) == hashlib.sha256(whole.encode()).hexdigest()


def test_another_run_finds_the_check_of_many_answers_in_the_cache(tmp_path, monkeypatch):
    problems = stored(monkeypatch, tmp_path, "1", "x^", "\\frac{1}{2}")
    calls = []
    original = MathVerify.find_unreadable
    monkeypatch.setattr(MathVerify, "find_unreadable", lambda self, p: calls.append(len(p)) or original(self, p))
    for run, settings, made in (("a", 1, 1), ("b", 1, 1), ("c", 2, 2)):
        (tmp_path / run).mkdir()
        checked(tmp_path / run, MathVerify(), problems, settings, 60)
        assert len(calls) == made
    first, second = (json.loads((tmp_path / run / "answers.json").read_text()) for run in "ab")
    assert first == second
    reader = Reader()
    for run in "ab":  # the code of a user's own reward may change
        checked(tmp_path / run, reader, problems, 3)
    assert reader.calls == [3, 3]
