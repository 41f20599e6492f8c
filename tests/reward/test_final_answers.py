"""The final answer of a completion, as each reward reads it for maj@k."""

from functools import partial

import pytest

from rlmod.config.build import build_reward
from rlmod.reward._final_answers import find_answer_reader
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.math_verify import MathVerify


def test_exact_match_reads_what_it_compares():
    reward = ExactMatch(pattern="#(.*)")
    assert reward.final_answers(["1+2=3# 3 ", "no", "#4#"]) == ["3", None, "4#"]
    assert ExactMatch().final_answers([" 7\n"]) == ["7"]


def test_a_pattern_that_takes_too_long_gives_no_answer(monkeypatch):
    monkeypatch.setattr("rlmod.reward._patterns.SECONDS", 0.01)
    assert ExactMatch(pattern="(a*)*b").final_answers(["a" * 40, "b"]) == [None, ""]


def test_math_verify_gives_one_text_to_equal_numbers():
    halves = ["\\boxed{\\frac{1}{2}}", "it is 0.5", "#### 0.50", "\\boxed{50\\%}", "x = 1/2 so \\boxed{x=\\frac12}"]
    answers = MathVerify(workers=1).final_answers(
        [*halves, "\\boxed{0.51}", "\\boxed{", "nothing", "\\boxed{1+2x}", "\\boxed{2x+1}"]
    )
    assert set(answers[:5]) == {"0.5"}
    assert answers[5] == "0.51"
    assert answers[6:8] == [None, None]
    assert answers[8] == answers[9] is not None


def test_tiny_and_huge_numbers_keep_their_digits():
    texts = [
        "\\boxed{0.0000012}",
        "\\boxed{0.0000013}",
        f"\\boxed{{{10**40}}}",
        f"\\boxed{{{10**40 + 1}}}",
        "\\boxed{-0.0}",
        "\\boxed{0}",
    ]
    answers = MathVerify(workers=1).final_answers(texts)
    assert len(set(answers[:4])) == 4
    assert answers[4] == answers[5] == "0"


def test_the_first_term_that_decides_on_correctness_is_asked():
    exact = {"_target_": "rlmod.reward.exact_match.ExactMatch", "pattern": "#(.*)"}
    style = {"_target_": "rlmod.reward.exact_match.ExactMatch", "pattern": "<(.*)>"}
    terms = {
        "style": {"weight": 1.0, "reward": style, "counts_for_correctness": False},
        "answer": {"weight": 1.0, "reward": {**exact, "on_error": "zero", "completion_prefix": "#"}},
    }
    read = find_answer_reader(build_reward({"_target_": "rlmod.reward.weighted.Weighted", "terms": terms}))
    assert read is not None
    assert read(["<1>#2", "3"]) == ["<1>#2", "3"]  # the prefix opens the match


def test_a_function_may_tell_answers_and_one_that_does_not_is_known():
    def own(texts, scale=1.0):
        return [scale for _ in texts.completions]

    assert find_answer_reader(own) is None
    own.final_answers = lambda completions: [text[-1:] for text in completions]  # pyright: ignore[reportFunctionMemberAccess]
    read = find_answer_reader(partial(own, scale=2.0))
    assert read is not None
    assert read(["17"]) == ["7"]


@pytest.mark.parametrize(
    "completion", ["\\boxed{" + "9" * 5000 + "}", "\\boxed{\\int_0^1 x^x dx}", "\\boxed{\\text{yes}}"]
)
def test_unusual_answers_are_texts_or_none(completion):
    (answer,) = MathVerify(workers=1).final_answers([completion])
    assert answer is None or isinstance(answer, str)
