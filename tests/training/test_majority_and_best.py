"""maj@k and best@k: by hand, against all subsets, in degenerate cases, and in any order."""

import math
import random
from collections import Counter
from itertools import combinations

import pytest
import torch

from rlmod.training.accuracy import ProblemMean, best_at_k, majority_at_k, pass_at_k


def majority(answers: list[str | None], right: str, k: int) -> float:
    correct = torch.tensor([[answer == right for answer in answers]])
    return majority_at_k(correct, answers, k).item()


def test_the_majority_of_all_completions_by_hand():
    """Two of four say 7; the others say 8, and nothing."""
    assert majority(["7", "8", None, "7"], "7", 4) == 1
    assert majority(["7", "8", None, "7"], "8", 4) == 0
    # A tie of three answers, of which one is correct.
    assert majority(["7", "8", "9", None], "7", 4) == pytest.approx(1 / 3)
    assert majority([None, None], "7", 2) == 0


def test_the_majority_of_two_of_three_by_hand():
    # {7, 7}: 1; {7, 8} twice: a tie, 1/2 each.
    assert majority(["7", "7", "8"], "7", 2) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


def test_the_majority_is_the_mean_over_all_subsets():
    draw = random.Random(0)
    for _ in range(60):
        answers = [draw.choice(["a", "a", "b", "b", "c", "d", None]) for _ in range(draw.randint(1, 9))]
        k = draw.randint(1, len(answers))
        expected = []
        for subset in combinations(answers, k):
            votes = Counter(answer for answer in subset if answer is not None)
            most = [answer for answer, number in votes.items() if number == max(votes.values())]
            expected.append(most.count("a") / len(most) if most else 0)
        assert majority(answers, "a", k) == pytest.approx(sum(expected) / len(expected), abs=1e-12)


def test_one_completion_is_its_own_majority_and_its_own_best():
    correct = torch.tensor([[True, False, True, False], [False, False, False, False], [True, True, True, True]])
    answers = ["1", "2", "1", None, "3", "3", None, "4", "5", "5", "5", "5"]
    assert majority_at_k(correct, answers, 1).tolist() == correct.double().mean(1).tolist() == [0.5, 0, 1]
    rewards = torch.tensor([[0.5, -1.0, 2.0]])
    assert best_at_k(rewards, 1).item() == pytest.approx(0.5)


def test_the_best_of_two_of_three_by_hand():
    # Pairs of 1, 2, 4: max 2, 4, 4.
    assert best_at_k(torch.tensor([[4.0, 1.0, 2.0]]), 2).item() == pytest.approx(10 / 3)
    assert best_at_k(torch.tensor([[4.0, 1.0, 2.0]]), 3).item() == 4
    assert best_at_k(torch.full((2, 5), -0.25), 3).tolist() == [-0.25, -0.25]


def test_the_best_of_right_and_wrong_is_pass_at_k():
    correct = torch.rand(20, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    for k in (1, 4, 9):
        torch.testing.assert_close(best_at_k(correct.float(), k), pass_at_k(correct, k))


def test_the_order_of_the_completions_does_not_matter():
    draw = random.Random(1)
    for _ in range(20):
        rows = [(answer := draw.choice(["a", "b", "c", None]), answer == "a", draw.random()) for _ in range(8)]
        mixed = draw.sample(rows, len(rows))
        values = []
        for each in (rows, mixed):
            answers, correct, rewards = (list(column) for column in zip(*each, strict=True))
            values.append(
                (
                    majority_at_k(torch.tensor([correct]), answers, 5).item(),
                    best_at_k(torch.tensor([rewards]), 5).item(),
                )
            )
        assert values[0] == pytest.approx(values[1])


def test_completions_without_a_reward_neither_vote_nor_are_the_best():
    correct = torch.tensor([[False, True, True], [True, False, False]])
    counted = torch.tensor([[False, True, True], [True, False, False]])
    answers = ["8", "7", "7", "7", "8", "8"]
    values = majority_at_k(correct, answers, 2, counted)
    assert values[0] == 1
    assert values[1].isnan()
    best = best_at_k(torch.tensor([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]]), 2, counted)
    assert best[0] == 2
    assert best[1].isnan()
    metric = ProblemMean()
    metric.update(values)
    metric.update(torch.tensor([0.0], dtype=torch.float64))
    assert metric.compute() == 0.5


def test_an_answer_that_is_only_sometimes_correct_counts_by_its_share():
    correct = torch.tensor([[True, False, False]])
    assert majority_at_k(correct, ["7", "7", "8"], 3).item() == 0.5


@pytest.mark.parametrize("k", [0, 3])
def test_more_than_were_sampled_is_refused(k):
    with pytest.raises(ValueError, match=f"maj@{k} needs at least {k}"):
        majority_at_k(torch.zeros(1, 2, dtype=torch.bool), ["1", "1"], k)
    with pytest.raises(ValueError, match=f"best@{k} needs at least {k}"):
        best_at_k(torch.zeros(1, 2), k)


def test_many_completions_are_counted_in_floating_point():
    answers: list[str | None] = [*["right"] * 130, *["wrong"] * 126]
    value = majority(answers, "right", 128)
    assert 0.5 < value < 1
    assert math.isclose(value + majority(answers, "wrong", 128), 1, rel_tol=1e-9)


def test_thousands_of_completions_are_counted_exactly():
    from rlmod.training.accuracy import _majority

    # Two answers with equally many votes: each wins as often as the other. Python's whole numbers do not overflow.
    assert _majority([[1030, 1030], [1030, 0]], 0, 515) == pytest.approx(0.5)
    assert _majority([[2048, 2048]], 0, 1024) == 1.0
    # The numbers of subsets are the same just below and above the bound at which the arithmetic changes.
    assert _majority([[600, 600], [399, 0]], 1, 3) == pytest.approx(_majority([[600, 600], [399, 0]], 2, 3), abs=2e-3)
