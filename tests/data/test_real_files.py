"""The public problem files that recipes name, where they lie beside the repository."""

import pytest

from rlmod.config.build import Components
from rlmod.data.problem_file import ProblemFile
from rlmod.types import Texts
from tests.config.composing import composed
from tests.real import real


@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k(name, count):
    path = real(f"gsm8k/{name}.jsonl")
    problems = ProblemFile(path=path, prompt_field="question", answer_pattern="#### (.+)")()
    assert len(problems) == count
    assert all(any(c.isdigit() for c in p.answer) and "\n" not in p.answer for p in problems)
    if name == "test":
        assert problems[0].answer == "18"
        assert str(problems[0].prompt).startswith("Janet\u2019s ducks lay 16 eggs")


def test_svamp():
    problems = ProblemFile(path=real("svamp/test.jsonl"), template="{Body} {Question}", answer_field="Answer")()
    assert len(problems) == 1000
    assert problems[0].answer == "145"
    assert str(problems[0].prompt).endswith("into 93 groups How big is each group of bananas?")


def test_all_of_them_as_one_set():
    """Their columns differ, but each has a problem's text and an answer under the names of its own kind."""
    files = [str(real(f"{name}/test.jsonl")) for name in ("aime24", "amc23")]
    problems = ProblemFile(path=files, prompt_field="problem")()
    assert len(problems) == 70
    assert {p.source.rpartition(":")[0] for p in problems} == set(files)
    assert problems[0].extra.keys() != problems[-1].extra.keys()


@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("amc23", 40)])
def test_competitions(name, count):
    problems = ProblemFile(path=real(f"{name}/test.jsonl"), prompt_field="problem")()
    assert len(problems) == count
    assert all(str(p.answer).lstrip("-").isdecimal() for p in problems)
    if name == "amc23":
        assert problems[0].answer == "27"


@pytest.mark.parametrize(("name", "count"), [("aime24", 30), ("amc23", 40), ("gsm8k", 1319), ("svamp", 1000)])
def test_each_benchmark_reads_its_file_and_every_answer_is_correct(name, count):
    """One key switches from the hub to the file, and math_verify accepts each problem's own answer in a box."""
    cfg = composed(f"benchmark={name}", f"benchmark.{name}.path={real(f'{name}/test.jsonl')}", "reward=math_verify")
    cfg.output = "unused"
    parts = Components.from_config(cfg)
    problems = parts.benchmark_problems[name]()
    assert len(problems) == count
    assert all(str(each.prompt).endswith("put the final answer within \\boxed{}.\n") for each in problems)
    answers = [str(each.answer) for each in problems]
    reward = parts.benchmark[name].reward
    assert not reward.find_unreadable(problems)  # pyright: ignore[reportAttributeAccessIssue]
    texts = Texts(completions=[f"So it is \\boxed{{{answer}}}." for answer in answers], answers=answers)
    assert list(reward(texts)) == [1.0] * count
