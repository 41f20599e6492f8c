from dataclasses import replace
from math import exp

import pytest
import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.gmpo import Gmpo
from rlmod.loss.sequence_surrogate import SequenceSurrogate
from rlmod.shaper.uniform import Uniform
from tests.agreed import agreed, value_and_norm
from tests.rollouts import measured, rows_with


def test_by_hand():
    # log 1.5 = 0.405465 is held at 0.4, log 0.5 at -0.4, and the other token has 0: the mean is 0.2 and -0.2.
    lp, rows = rows_with([[1.5, 1, 9], [0.5, 1, 9]], [[1, 1, 0], [-1, -1, 0]], [[1, 1, 0], [1, 1, 0]])
    per_token, metrics = Gmpo()(lp, rows)
    assert per_token[0].tolist() == pytest.approx([-exp(0.2), -exp(0.2), 0])
    assert per_token[1].tolist() == pytest.approx([exp(-0.2), exp(-0.2), 0])
    total = (per_token * RolloutMean()(rows)).sum()
    assert total.item() == pytest.approx(-0.201336, abs=1e-6)
    total.backward()
    # Half of the mean of two rows, and half of the mean of two tokens; none where the clip is active.
    assert lp.grad[0].tolist() == pytest.approx([0, -exp(0.2) / 4, 0])
    assert lp.grad[1].tolist() == pytest.approx([0, exp(-0.2) / 4, 0])
    assert measured(metrics["clip_fraction"], rows.mask).tolist() == [1, 0, 1, 0]
    assert measured(metrics["ratio"], rows.mask).tolist() == pytest.approx([1.5, 1, 0.5, 1])


def test_a_ratio_that_the_advantage_pulls_back_is_not_clipped():
    lp, rows = rows_with([[0.2, 1], [5, 1]], [[1, 1], [-1, -1]], [[1, 1], [1, 1]])
    per_token, metrics = Gmpo()(lp, rows)
    assert per_token.tolist() == [pytest.approx([-(0.2**0.5)] * 2), pytest.approx([5**0.5] * 2)]
    assert metrics["clip_fraction"].sum() == 0


def test_the_number_that_others_agree_on():
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    found = value_and_norm(Gmpo(), lp, rows, RolloutMean())
    assert found == pytest.approx((0.00214296, 0.13297762), abs=1e-8)


def test_one_token_completions_make_it_the_clipped_surrogate():
    lp, rows = rows_with([[1.6], [0.5], [1.1], [0.6]], [[1], [-1], [2], [1]], [[1]] * 4)
    token = ClippedSurrogate(clip_low=1 - exp(-0.3), clip_high=exp(0.4) - 1)
    torch.testing.assert_close(Gmpo(clip_low=0.3, clip_high=0.4)(lp, rows)[0], token(lp, rows)[0])


def test_bounds_that_are_never_reached_give_the_geometric_sequence_surrogate():
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    wide = SequenceSurrogate(ratio="geometric", clip_low=1.0, clip_high=100.0)
    torch.testing.assert_close(Gmpo(clip_low=9.0, clip_high=9.0)(lp, rows)[0], wide(lp, rows)[0])


def test_the_order_of_the_tokens_changes_nothing_and_the_value_is_linear_in_the_advantage():
    lp, rows = rows_with([[1.5, 0.8, 1.1]], [[2, 2, 2]], [[1, 1, 1]])
    turned, _ = rows_with([[1.1, 1.5, 0.8]], [[2, 2, 2]], [[1, 1, 1]])
    torch.testing.assert_close(Gmpo()(lp, rows)[0], Gmpo()(turned, rows)[0])
    threefold = replace(rows, advantages=3 * rows.advantages)
    torch.testing.assert_close(Gmpo()(lp, threefold)[0], 3 * Gmpo()(lp, rows)[0])


def test_on_policy_the_value_is_minus_the_advantage():
    # The second row has no advantage, so nothing of it is clipped; the third is masked.
    lp, rows = rows_with(
        [[1, 1, 9], [0.1, 9, 1], [9, 9, 9]], [[2, 2, 0], [0] * 3, [0] * 3], [[1, 1, 0], [1] * 3, [0] * 3]
    )
    per_token, metrics = Gmpo()(lp, rows)
    torch.testing.assert_close(per_token * rows.mask, -rows.advantages)
    assert metrics["clip_fraction"].sum() == 0
    (gradient,) = torch.autograd.grad((per_token * RolloutMean()(rows)).sum(), lp)
    # Two rows count, and a token has half of its row.
    assert gradient.tolist() == [pytest.approx([-0.5, -0.5, 0]), [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("field", ["clip_low", "clip_high"])
@pytest.mark.parametrize("value", [0.0, -0.4])
def test_a_bad_bound_is_named(field, value):
    with pytest.raises(ValueError, match=rf"loss\.{field} must be above 0, got {value}; it bounds the log-ratio"):
        Gmpo(**{field: value})
