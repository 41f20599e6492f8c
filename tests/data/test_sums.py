import pytest

from rlmod.data.sums import Sums
from rlmod.reward.exact_match import ExactMatch
from rlmod.types import Texts
from tests.command_line import refused
from tests.config.composing import composed

TRAIN, HELD_OUT = Sums(split="train")(), Sums(split="held_out")()


def terms(problem: str) -> tuple[int, str, int]:
    a, sign, b, _ = problem.splitlines()[-1].split()
    return int(a), sign, int(b)


def test_all_sums_and_differences_are_there_once_with_their_answers():
    seen = [terms(problem.prompt) for problem in (*TRAIN, *HELD_OUT)]
    assert sorted(seen) == sorted(
        (a, sign, b) for a in range(1, 21) for b in range(1, 21) for sign in "+-" if sign == "+" or a >= b
    )
    for problem in (*TRAIN, *HELD_OUT):
        a, sign, b = terms(problem.prompt)
        assert problem.answer == str(a + b if sign == "+" else a - b)
        assert problem.prompt == f"3 + 5 = 8\n12 - 4 = 8\n{a} {sign} {b} ="
    assert (len(TRAIN), len(HELD_OUT)) == (443, 167)


def test_no_pair_of_numbers_is_in_both_splits():
    pairs = [{frozenset(terms(problem.prompt)[::2]) for problem in problems} for problems in (TRAIN, HELD_OUT)]
    assert not pairs[0] & pairs[1]


def test_the_order_is_fixed_and_mixed():
    assert Sums(split="train")() == TRAIN
    first = [terms(problem.prompt) for problem in TRAIN[:20]]
    assert {sign for _, sign, _ in first} == {"+", "-"}
    assert len({a for a, _, _ in first}) > 5


def test_larger_numbers_and_other_examples():
    problems = Sums(split="train", largest=50, examples="1 + 1 = 2\n")()
    assert max(terms(problem.prompt)[0] for problem in problems) == 50
    assert all(str(problem.prompt).startswith("1 + 1 = 2\n") for problem in problems)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("largest=3", "data.*.largest must be from 4 to 1000, got 3"),
        ("train.split=all", "data.train.split must be one of train, held_out"),
    ],
)
def test_wrong_settings_are_named(key, sentence, monkeypatch, tmp_path):
    assert sentence in refused(monkeypatch, tmp_path, "data=sums", f"data.{key}")


def test_the_first_number_of_the_completion_is_graded():
    reward = ExactMatch(pattern=composed("reward=first_number").reward.pattern)
    completions = [" 37\n", "37", " 37.5", " 3", " -37", " x 37", ""]
    texts = Texts(completions=completions, answers=["37"] * 7)
    assert reward(texts) == [1, 1, 1, 0, 0, 0, 0]
