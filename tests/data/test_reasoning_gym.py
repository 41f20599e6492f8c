"""Problems and scorers of the library itself."""

import pytest

from rlmod.data.reasoning_gym import ReasoningGym as Problems
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward.reasoning_gym import ReasoningGym as Scorer
from rlmod.types import Texts


@pytest.mark.parametrize("task", ["leg_counting", "basic_arithmetic", "countdown", "knights_knaves"])
def test_the_gold_answer_scores_1_and_nonsense_does_not(task):
    problems = Problems(task=task, split="train", size=12)()
    assert len({problem.prompt for problem in problems}) == 12
    gold = [f"So <answer>9</answer>, no: <answer> {problem.answer}\n</answer>" for problem in problems]
    wrong = ["<answer>none of it</answer>"] * 12
    for completions, expected in ((gold, 1), (wrong, 0)):
        texts = Texts(completions=completions, answers=[p.answer for p in problems], problems=problems)
        rewards = compute_rewards(Scorer(), texts).rewards
        assert (rewards == 1).all() if expected else (rewards < 0.5).all()
    bare = Texts(completions=[p.answer for p in problems], answers=[""] * 12, problems=problems)
    assert (compute_rewards(Scorer(), bare).rewards == 0).all()
    assert (compute_rewards(Scorer(pattern=None), bare).rewards == 1).all()


def test_train_and_held_out_are_disjoint_and_repeat():
    train = Problems(task="leg_counting", split="train", size=200)()
    held_out = Problems(task="leg_counting", split="held_out", size=50, seed=3)()
    assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    assert Problems(task="leg_counting", split="train", size=200)() == train


def test_options_and_template_reach_the_task():
    (problem,) = Problems(
        task="leg_counting",
        split="train",
        size=1,
        options={"min_animals": 2, "max_animals": 2},
        template="Q: {question}\nA:",
    )()
    assert str(problem.prompt).startswith("Q: ")
    assert str(problem.prompt).endswith("\nA:")
    assert problem.extra["metadata"]["num_animals"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "leg_count"}, r"data\.task=leg_count: .*did you mean leg_counting"),
        ({"options": {"legs": 3}}, r"data\.options of leg_counting: .*legs"),
        ({"options": {"min_animals": 9, "max_animals": 3}}, r"data\.options of leg_counting"),
        ({"size": 0}, r"data\.\*\.size must be at least 1"),
        ({"template": "no question"}, r"data\.template must hold \{question\}"),
        (
            {"size": 100, "options": dict.fromkeys(("min_animals", "max_animals", "max_instances"), 1)},
            r"lower data\.\*\.size",
        ),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Problems(**{"task": "leg_counting", "split": "train", "size": 4, **changes})()


@pytest.mark.parametrize(("pattern", "message"), [("(", "not a regular expression"), ("answer", "no group")])
def test_bad_patterns_are_named(pattern, message):
    with pytest.raises(ValueError, match=rf"reward\.pattern=.*{message}"):
        Scorer(pattern=pattern)


def test_other_problems_cannot_be_scored():
    with pytest.raises(RewardError, match="data=reasoning_gym"):
        compute_rewards(Scorer(), Texts(completions=["1"], answers=["1"]))
