from itertools import combinations

import pytest
import torch

from rlmod.training.accuracy import MeanAtK, PassAtK, pass_at_k


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


def test_more_than_were_sampled_is_refused():
    with pytest.raises(ValueError, match="pass@3 needs at least 3"):
        pass_at_k(torch.zeros(1, 2, dtype=torch.bool), 3)
