import pytest
import torch

from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.grop import Grop
from rlmod.reward.overlong import Overlong
from rlmod.reward.weighted import Weighted
from rlmod.types import Texts

SETTINGS = {"reward": ExactMatch(), "max_tokens": 100, "buffer": 50}


def texts(right: list[int], lengths: list[int], group: list[int] | None = None) -> Texts:
    completions = [str(r) for r in right]
    return Texts(completions=completions, answers=["1"] * len(right), lengths=lengths, group=group or [0] * len(right))


def penalties(right: list[int], lengths: list[int], **settings: object) -> list[float]:
    return compute_rewards(Grop(**{**SETTINGS, **settings}), texts(right, lengths)).terms["grop"].tolist()


def test_easy_groups_by_hand():
    # All right, lengths 10, 20, 30, 60: L = max(35, 30) = 35; only 60 is beyond: -(60 - 35) / 70
    assert penalties([1, 1, 1, 1], [10, 20, 30, 60]) == pytest.approx([0, 0, 0, -25 / 70])
    # 3 of 4: L of the correct lengths 10, 10, 40 alone: max(25, 20) = 25; 40: -15/50. The wrong one is left alone.
    assert penalties([1, 1, 1, 0], [10, 10, 40, 99]) == pytest.approx([0, 0, -0.3, 0])
    # The mean may be the larger: lengths 10, 40, 40, 40: L = max(25, 32.5)
    assert penalties([1, 1, 1, 1], [10, 40, 40, 40]) == pytest.approx([0] + [-7.5 / 65] * 3)


def test_half_is_the_most():
    # L = max(51, 20.8) = 51 of ten; 102 or more would be 2 L, which max never reaches: 101 is -50/102
    assert penalties([1] * 10, [1] * 9 + [101]) == pytest.approx([0] * 9 + [-50 / 102])
    # In a group of neither kind L is of all lengths, and a correct one is beyond 2 L only if wrong ones made L small.
    assert min(penalties([1, 1, 1, 0, 0], [1000, 1, 1, 1, 1])) > -0.5


def test_groups_of_neither_kind_punish_the_majority_of_right_else_the_wrong():
    lengths = [10, 20, 30, 40, 60]  # L = max(35, 32) = 35; 40: -5/70, 60: -25/70
    assert penalties([1, 1, 0, 1, 0], lengths) == pytest.approx([0, 0, 0, -5 / 70, 0])
    assert penalties([1, 1, 0, 0, 0], lengths) == pytest.approx([0, 0, 0, -5 / 70, -25 / 70])
    # Neither the majority: the wrong ones.
    assert penalties([1, 0, 1, 0], [10, 20, 60, 60]) == pytest.approx([0, 0, 0, -(60 - 37.5) / 75])


def test_hard_groups_are_left_alone_or_get_daposs_penalty():
    assert penalties([0, 0, 0, 1], [10, 20, 60, 90]) == [0, 0, 0, 0]
    # buffer 50 before 100: 60 -> -0.2, 90 -> -0.8
    assert penalties([0, 0, 0, 1], [10, 20, 60, 90], hard="dapo") == pytest.approx([0, 0, -0.2, -0.8])


def test_a_right_answer_stays_one_and_groups_know_nothing_of_each_other():
    reward = Grop(**SETTINGS)
    both = texts([1, 1, 1, 1, 0, 0], [10, 20, 30, 60, 5, 500], group=[7, 7, 7, 7, 3, 3])
    scores = compute_rewards(reward, both)
    assert scores.outcomes.tolist() == [1, 1, 1, 1, 0, 0]
    assert scores.terms["base"].tolist() == [1, 1, 1, 1, 0, 0]
    assert scores.rewards.tolist() == pytest.approx([1, 1, 1, 1 - 25 / 70, 0, 0])
    shuffled = [3, 4, 0, 5, 2, 1]
    picked = Texts(
        **{n: [getattr(both, n)[i] for i in shuffled] for n in ("completions", "answers", "lengths", "group")}
    )
    assert torch.equal(compute_rewards(reward, picked).rewards, scores.rewards[shuffled])


@pytest.mark.parametrize("right", [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
def test_equal_lengths_are_never_punished(right):
    assert penalties(right, [35] * 4) == [0] * 4


def test_the_base_may_have_terms_and_penalties_of_its_own():
    base = Weighted(terms={
        "right": {"weight": 1, "reward": ExactMatch()},
        "overlong": {"weight": 1, "reward": Overlong(max_tokens=100, buffer=50)},
    })  # fmt: skip
    scores = compute_rewards(Grop(**{**SETTINGS, "reward": base}), texts([1, 1, 1, 1], [10, 20, 30, 60]))
    assert set(scores.terms) == {"right", "overlong", "grop"}
    assert scores.outcomes.tolist() == [1, 1, 1, 1]
    assert scores.rewards[3].item() == pytest.approx(1 - 0.2 - 25 / 70)


def test_as_a_term_of_a_sum_its_penalty_stays_one():
    """One right of eight, 100 tokens long: DAPO's penalty of -1 must not make its group all incorrect."""
    sum_of_one = Weighted(terms={"correct": {"weight": 2.0, "reward": Grop(**{**SETTINGS, "hard": "dapo"})}})
    scores = compute_rewards(sum_of_one, texts([1] + [0] * 7, [100] + [10] * 7))
    assert sum_of_one.excluded_terms == ("correct/grop",)
    assert scores.outcomes.tolist() == [2] + [0] * 7
    assert scores.rewards.tolist() == [0] * 8
    assert scores.terms["correct/grop"].tolist() == [-2] + [0] * 7


def test_recorded_completions_have_no_lengths():
    with pytest.raises(RewardError, match="lengths of a group's completions"):
        compute_rewards(Grop(**SETTINGS), Texts(completions=["1"], answers=["1"]))


@pytest.mark.parametrize(("field", "value"), [("easy", 0.5), ("easy", 1.1), ("buffer", 0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"reward\.{field}"):
        Grop(**{**SETTINGS, "hard": "dapo", field: value})


def test_a_share_is_compared_by_counts_not_by_rounded_floats():
    """9 of 10 are 0.9, though as floats 9/10 is 0.89999998; 1 of 5 wrong is as good as 1 - 0.8, though that is 0.19999999999999996."""
    lengths = [10] * 8 + [30, 100]  # L = max(20, 110 / 9) = 20 of the nine correct ones
    assert penalties([1] * 9 + [0], lengths, easy=0.9) == pytest.approx([0] * 8 + [-10 / 40, 0])
    assert penalties([1, 0, 0, 0, 0], [10, 10, 10, 10, 30], easy=0.8) == [0] * 5  # hard: left alone
