import pytest
import torch

from rlmod.aggregation.constant import Constant
from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.types import build_rollouts
from tests.rollouts import ragged

# Lengths 3, 1 and 0: the last row is masked out whole.
ROWS = build_rollouts(mask=torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool))


def test_by_hand():
    torch.testing.assert_close(TokenMean()(ROWS), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]) / 4)
    torch.testing.assert_close(RolloutMean()(ROWS), torch.tensor([[1 / 6] * 3, [1 / 2, 0, 0], [0, 0, 0]]))
    # Two rows count, of at most 3 tokens: 1 / 6 each.
    torch.testing.assert_close(Constant(length=3)(ROWS), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]) / 6)


@pytest.mark.parametrize("aggregation", [TokenMean(), RolloutMean()])
@pytest.mark.parametrize("seed", range(5))
def test_they_sum_to_one_over_what_counts(aggregation, seed):
    rows = ragged(seed)
    weights = aggregation(rows)
    assert weights.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights > 0, rows.mask)


@pytest.mark.parametrize("aggregation", [TokenMean(), RolloutMean(), Constant(length=4)])
def test_a_step_without_a_counted_token_has_no_weight(aggregation):
    weights = aggregation(build_rollouts(mask=torch.zeros(2, 3, dtype=torch.bool)))
    assert (weights == 0).all()


def test_constant_does_not_change_with_other_completions():
    rows = ragged(0)
    shorter = rows.mask.clone()
    shorter[1:, 1:] = False
    assert torch.equal(Constant(length=9)(rows)[0], Constant(length=9)(build_rollouts(mask=shorter))[0])
    with pytest.raises(ValueError, match=r"aggregation\.length"):
        Constant(length=0)
