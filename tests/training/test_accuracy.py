"""mean@k and pass@k, by hand and over batches."""

from itertools import combinations

import pytest
import torch

from rlmod.training.accuracy import MeanAtK, MeanInterval, PassAtK, interval, pass_at_k


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(right, k):
    correct = [True] * right + [False] * (5 - right)
    subsets = list(combinations(correct, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(torch.tensor([correct]), k).item() == pytest.approx(expected)


def test_over_batches():
    # 1 of 4, 0 of 4, 4 of 4: pass@2 = 1 - C(3,2)/C(4,2) = 1/2, 0, 1
    rows = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    passed, mean = PassAtK(2), MeanAtK()
    for batch in (rows[:2], rows[2:]):
        passed.update(batch)
        mean.update(batch)
    assert passed.compute().item() == pytest.approx(0.5)
    assert mean.compute().item() == pytest.approx(5 / 12)


def test_completions_without_a_reward_count_neither_as_correct_nor_as_completions():
    correct = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    counted = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    # 1 of 3: 1 - C(2,2)/C(3,2) = 2/3; 2 of 2: 1; one completion is too few for k = 2.
    passed = pass_at_k(correct, 2, counted)
    assert passed[:2].tolist() == pytest.approx([2 / 3, 1])
    assert passed[2].isnan()
    metric, mean = PassAtK(2), MeanAtK()
    metric.update(correct, counted=counted)
    mean.update(correct, counted=counted)
    assert metric.compute().item() == pytest.approx(5 / 6)
    # 1 of 3, 2 of 2, 1 of 1: each problem counts alike, as in rlmod-eval.
    assert mean.compute().item() == pytest.approx((1 / 3 + 1 + 1) / 3)


def test_an_interval_over_batches_and_abstentions_is_that_of_the_problems_shares():
    rows = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    counted = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    metric, mean = MeanInterval(), MeanAtK()
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(rows[part], counted=counted[part])
        mean.update(rows[part], counted=counted[part])
    shares = [0.5, 1.0, 0.0, 0.5]  # no completion of the last problem has a reward
    low, high = metric.compute().tolist()
    assert (low, high) == pytest.approx(interval(shares))
    assert low < mean.compute().item() < high
    empty = MeanInterval()
    empty.update(rows[4:], counted=counted[4:])
    assert empty.compute().isnan().all()


def test_values_above_1_have_a_normal_interval():
    """std of 0.5 and 1.5 is sqrt(1/2), and that of the mean of two is 1/2."""
    assert interval([0.5, 1.5]) == pytest.approx((1 - 1.959964 / 2, 1 + 1.959964 / 2))


def test_more_than_were_sampled_is_refused():
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k(torch.zeros(1, 2, dtype=torch.bool), 3)
