import re
from dataclasses import replace
from math import exp

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.fipo import Fipo, discounted_sum
from rlmod.shaper.uniform import Uniform
from tests.agreed import agreed, value_and_norm
from tests.rollouts import measured, rows_with


def test_by_hand():
    # g = 1/2, log w = 0, 0.2, -0.1: F = 0.075, 0.15, -0.1, and the last f is held at 1. The masked token adds nothing.
    ratios = [[1, exp(0.2), exp(-0.1), 9]]
    lp, rows = rows_with(ratios, [[1, 1, 1, 0]], [[1, 1, 1, 0]])
    per_token, metrics = Fipo(half_life=1.0)(lp, rows)
    influence = [1.077884, 1.161834, 1]
    assert measured(metrics["influence"], rows.mask).tolist() == pytest.approx(influence, abs=1e-6)
    expected = [-w * f for w, f in zip(ratios[0], influence, strict=False)]
    assert per_token[0].tolist() == pytest.approx([*expected, 0], abs=1e-6)
    per_token.sum().backward()
    # f has no gradient, so a token's gradient is -f w A.
    assert lp.grad[0].tolist() == pytest.approx([*expected, 0], abs=1e-6)
    assert measured(metrics["ratio"], rows.mask).tolist() == pytest.approx(ratios[0][:3])
    assert metrics["clip_fraction"].sum() == 0


def test_the_clip_stays():
    lp, rows = rows_with([[1.5, 1.5, 0.5]], [[1, -1, -1]], [[1, 1, 1]])
    per_token, metrics = Fipo(half_life=1.0, influence_low=0.1, influence_high=9.0)(lp, rows)
    f = metrics["influence"][0].tolist()
    assert f[2] == pytest.approx(0.5)
    assert per_token[0].tolist() == pytest.approx([-1.28 * f[0], 1.5 * f[1], 0.8 * f[2]])
    assert metrics["clip_fraction"][0].tolist() == [1, 0, 1]


def test_a_risky_token_is_not_weighed_up():
    # Risky: A < 0 and a ratio above the safety bound. The weight is 0.8 to 1 there.
    lp, rows = rows_with([[1, 12, 1], [1, 12, 0.05]], [[-1] * 3, [-1] * 3], [[1] * 3, [1] * 3])
    wide = {"half_life": 1.0, "influence_low": 0.1, "influence_high": 2.0}
    found = Fipo(**wide)(lp, rows)[1]["influence"]
    assert found.tolist() == [[2, 1, 1], pytest.approx([12**0.5 * 0.05**0.25, 1, 0.1])]
    assert Fipo(**wide, safety=13.0)(lp, rows)[1]["influence"][0].tolist() == [2, 2, 1]
    positive = replace(rows, advantages=-rows.advantages)
    assert Fipo(**wide)(lp, positive)[1]["influence"][0].tolist() == [2, 2, 1]
    # A risky token whose weight is low is held at 0.8.
    low, held = rows_with([[12, 1e-4]], [[-1, -1]], [[1, 1]])
    assert Fipo(**wide)(low, held)[1]["influence"][0].tolist() == pytest.approx([0.8, 0.1])


@pytest.mark.parametrize("low", [1.0, 0.8])
def test_the_numbers_that_others_agree_on(low):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    expected = {1.0: (-0.17086458, 0.10161439), 0.8: (-0.19445433, 0.09343802)}[low]
    assert value_and_norm(Fipo(influence_low=low, safety=4.0), lp, rows) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("first_update", [True, False])
def test_the_degenerate_cases_are_the_clipped_surrogate(first_update):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    loss = Fipo()
    if first_update:
        rows = replace(rows, logprobs=lp.detach())
    else:
        loss = Fipo(influence_low=1.0, influence_high=1.0)
    plain, expected = ClippedSurrogate(clip_low=0.2, clip_high=0.28)(lp, rows)
    per_token, metrics = loss(lp, rows)
    assert torch.equal(per_token, plain)
    assert all(torch.equal(metrics[name], value) for name, value in expected.items())
    assert (metrics["influence"] == 1).all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 33])
def test_the_discounted_sum_is_that_of_a_loop(length):
    values = torch.randn(3, length, generator=torch.Generator().manual_seed(length)).double()
    expected, total = torch.zeros_like(values), torch.zeros(3).double()
    for t in reversed(range(length)):
        total = values[:, t] + 0.9 * total
        expected[:, t] = total
    torch.testing.assert_close(discounted_sum(values, 0.9), expected)


def test_a_token_is_weighed_by_later_ones_only_and_padding_changes_nothing():
    ratios, ones = [1.1, 0.9, 1.2], [1, 1, 1]
    lp, rows = rows_with([ratios], [ones], [ones])
    loss = Fipo(influence_low=0.1, influence_high=9.0)
    whole = loss(lp, rows)[1]["influence"][0]
    early, _ = rows_with([[1.5, 0.9, 1.2]], [ones], [ones])
    assert torch.equal(loss(early, rows)[1]["influence"][0, 1:], whole[1:])
    late, _ = rows_with([[1.1, 0.9, 1.25]], [ones], [ones])
    assert (loss(late, rows)[1]["influence"][0] > whole).all()
    padded, wider = rows_with([[*ratios, 9, 9]], [[*ones, 0, 0]], [[*ones, 0, 0]])
    torch.testing.assert_close(loss(padded, wider)[1]["influence"][0, :3], whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"clip_low": 0.0}, "loss.clip_low must be above 0 and at most 1, got 0.0"),
        ({"clip_high": -1.0}, "loss.clip_high must be above 0, got -1.0"),
        ({"half_life": 0.0}, "loss.half_life must be above 0 and finite, in tokens, got 0.0"),
        ({"influence_low": 0.0}, "loss.influence_low must be above 0 and at most 1"),
        ({"influence_low": 1.1}, "got 1.1 and 1.2"),
        ({"influence_high": 0.9}, "loss.influence_high at least 1 and finite"),
        ({"safety": 0.5}, "loss.safety must be at least 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Fipo(**fields)
