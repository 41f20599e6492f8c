from dataclasses import replace

import pytest
import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.sapo import Sapo
from rlmod.shaper.uniform import Uniform
from tests.agreed import agreed, value_and_norm
from tests.rollouts import measured, rows_with


def gradient(loss, ratios: list[float], advantage: float) -> torch.Tensor:
    lp, rows = rows_with([ratios], [[advantage] * len(ratios)], [[1] * len(ratios)])
    loss(lp, rows)[0].sum().backward()
    return lp.grad[0]


def test_by_hand():
    # p = sigmoid(0.5) = 0.622459 with tau 1, sigmoid(-0.525) = 0.371683 with tau 1.05.
    lp, rows = rows_with([[1.5, 1, 9], [0.5, 1, 9]], [[1, 1, 0], [-1, -1, 0]], [[1, 1, 0], [1, 1, 0]])
    per_token, metrics = Sapo()(lp, rows)
    assert per_token[0].tolist() == pytest.approx([-2.489837, -2, 0], abs=1e-6)
    assert per_token[1].tolist() == pytest.approx([1.415938, 1.904762, 0], abs=1e-6)
    per_token.sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([-1.410022, -1, 0], abs=1e-6)
    assert lp.grad[1].tolist() == pytest.approx([0.467070, 1, 0], abs=1e-6)
    assert measured(metrics["ratio"], rows.mask).tolist() == pytest.approx([1.5, 1, 0.5, 1])
    # The gradient over w: 1.410022 / 1.5 and 0.467070 / 0.5.
    assert measured(metrics["gate"], rows.mask).tolist() == pytest.approx([0.940015, 1, 0.934140, 1], abs=1e-6)


@pytest.mark.parametrize(
    ("aggregation", "value", "norm"),
    [(RolloutMean(), -0.07867258, 0.14867984), (TokenMean(), -0.34187035, 0.11772086)],
    ids=["rollout-mean", "token-mean"],
)
def test_the_numbers_that_others_agree_on(aggregation, value, norm):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    assert value_and_norm(Sapo(), lp, rows, aggregation) == pytest.approx((value, norm), abs=1e-8)


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_on_policy_the_gradient_is_the_clipped_surrogates(advantage):
    torch.testing.assert_close(gradient(Sapo(), [1, 1], advantage), gradient(ClippedSurrogate(), [1, 1], advantage))


@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_a_small_temperature_leaves_the_unclipped_surrogate(advantage):
    found = gradient(Sapo(tau_positive=1e-6, tau_negative=1e-6), [0.1, 1, 5], advantage)
    assert found.tolist() == pytest.approx([-0.1 * advantage, -advantage, -5 * advantage])


def test_the_gate_is_the_same_on_both_sides_and_narrower_with_a_larger_temperature():
    lp, rows = rows_with([[0.4, 1.6]], [[1, 1]], [[1, 1]])
    gates = [Sapo(tau_positive=tau)(lp, rows)[1]["gate"][0].tolist() for tau in (0.5, 1.0, 4.0)]
    assert all(low == pytest.approx(high) for low, high in gates)
    assert gates[0][0] > gates[1][0] > gates[2][0] > 0
    # Each temperature belongs to its own sign.
    assert Sapo(tau_negative=4.0)(lp, rows)[1]["gate"][0].tolist() == gates[1]
    negative = replace(rows, advantages=-rows.advantages)
    assert Sapo(tau_negative=4.0)(lp, negative)[1]["gate"][0].tolist() == gates[2]


@pytest.mark.parametrize("field", ["tau_positive", "tau_negative"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf")])
def test_a_bad_temperature_is_named(field, value):
    with pytest.raises(ValueError, match=rf"loss\.{field} must be above 0 and finite, got {value}"):
        Sapo(**{field: value})
