import pytest

from rlmod.reward.exact_match import ExactMatch
from rlmod.types import Texts


def rewards(reward, completions, answers):
    return list(reward(Texts(completions=completions, answers=answers)))


def test_without_a_pattern_the_whole_completion_is_compared_without_surrounding_white_space():
    assert rewards(ExactMatch(), [" 6\n", "6.", "is 6"], ["6", "6", " 6 "]) == [1.0, 0.0, 0.0]


def test_the_last_match_counts():
    completions = ["3+5=8#1,8*2=6#6", "#6 or #7"]
    assert rewards(ExactMatch(pattern=r"#(\d)"), completions, ["6", "6"]) == [1.0, 0.0]


def test_group_1_is_compared_and_the_whole_match_where_there_is_no_group():
    assert rewards(ExactMatch(pattern=r"#(\d)(\d)"), ["#67", "#67"], ["6", "#67"]) == [1.0, 0.0]
    assert rewards(ExactMatch(pattern=r"#\d"), ["#6", "#6"], ["6", "#6"]) == [0.0, 1.0]


def test_no_match_is_wrong_even_for_an_empty_answer():
    reward = ExactMatch(pattern=r"#(\d)|stop")
    assert rewards(reward, ["nothing", "stop"], ["", ""]) == [0.0, 0.0]
    assert rewards(ExactMatch(), [""], [""]) == [1.0]


def test_right_and_wrong_are_the_rewards():
    assert rewards(ExactMatch(correct=2.0, incorrect=-1.0), ["a", "b"], ["a", "a"]) == [2.0, -1.0]


def test_equality_is_of_strings():
    assert rewards(ExactMatch(), ["6.0", "A"], ["6", "a"]) == [0.0, 0.0]


def test_a_broken_pattern_names_its_key():
    with pytest.raises(ValueError, match=r"reward\.pattern=.*missing"):
        ExactMatch(pattern="(")
