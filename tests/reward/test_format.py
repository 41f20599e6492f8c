import pytest

from rlmod.config.build import build_reward
from rlmod.reward.format import Format
from rlmod.types import Texts
from tests.config.composing import composed


def rewards(reward, *completions):
    return list(reward(Texts(completions=completions, answers=[""] * len(completions))))


def test_the_whole_completion_has_to_match():
    reward = Format(pattern=r"<a>.*</a>")
    assert rewards(reward, "<a>1</a>", "so <a>1</a>", "<a>1</a> so", "<a>1") == [1.0, 0.0, 0.0, 0.0]


def test_the_dot_matches_line_ends():
    assert rewards(Format(pattern=r"<a>.*</a>"), "<a>1\n2</a>") == [1.0]


def test_a_trailing_line_end_counts():
    assert rewards(Format(pattern=r"\d+$"), "12", "12\n") == [1.0, 0.0]


def test_right_and_wrong_are_the_rewards():
    assert rewards(Format(pattern="a", correct=0.5, incorrect=-0.25), "a", "b") == [0.5, -0.25]


def test_a_broken_pattern_names_its_key():
    with pytest.raises(ValueError, match=r"reward\.pattern='\['"):
        Format(pattern="[")


def test_the_pattern_of_the_yaml():
    reward = build_reward(composed("reward=format").reward)
    assert rewards(reward, "<think>\n1\n</think>\n<answer>2</answer>\n", "<answer>2</answer>") == [1.0, 0.0]
