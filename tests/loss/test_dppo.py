import re
from dataclasses import replace

import pytest
import torch

from rlmod.config import compatibility
from rlmod.config.build import Components
from rlmod.loss.cispo import Cispo
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.dppo import Dppo
from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts, build_rollouts
from tests.agreed import agreed, value_and_norm
from tests.command_line import SHORT
from tests.config.composing import composed
from tests.rollouts import measured, rows_with


def moved(p: list[float], q: list[float], advantages: list[float]) -> tuple[torch.Tensor, Rollouts]:
    """Return one row whose tokens have the probability p now and had q at the anchor, pi_old; the last one is masked."""
    lp = torch.tensor([[*p, 0.5]]).double().log().requires_grad_()
    mask = torch.ones_like(lp, dtype=torch.bool)
    mask[0, -1] = False
    old = torch.tensor([[*q, 0.5]]).double().log().masked_fill(~mask, torch.nan)
    return lp, build_rollouts(mask=mask, logprobs=old, advantages=torch.tensor([[*advantages, 0.0]]).double())


@pytest.mark.parametrize(
    ("loss", "distances"),
    [(Dppo(), [0.2, 0, 0.2, 0]), (Dppo(divergence="kl"), [0.081093, 0, 0.104650, 0])],
    ids=["tv", "kl"],
)
def test_by_hand(loss, distances):
    # q = 0.4, ratios 1.5 and 1 with A = 1, 0.5 and 1 with A = -1: the tokens that moved are masked, log 0.4 = -0.916291.
    lp, rows = moved([0.6, 0.4, 0.2, 0.4], [0.4] * 4, [1, 1, -1, -1])
    per_token, metrics = loss(lp, rows)
    assert per_token[0].tolist() == pytest.approx([0, 0.916291, 0, -0.916291, 0], abs=1e-6)
    per_token.sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([0, -1, 0, 1, 0])
    assert measured(metrics["divergence"], rows.mask).tolist() == pytest.approx(distances, abs=1e-6)
    assert measured(metrics["clip_fraction"], rows.mask).tolist() == [1, 0, 1, 0]
    assert measured(metrics["ratio"], rows.mask).tolist() == pytest.approx([1.5, 1, 0.5, 1])


def test_a_token_that_the_advantage_pulls_back_is_not_masked():
    lp, rows = moved([0.6, 0.2], [0.4, 0.4], [-1, 1])
    per_token, metrics = Dppo()(lp, rows)
    per_token.sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([1.5, -0.5, 0])
    assert measured(metrics["clip_fraction"], rows.mask).tolist() == [0, 0]


def test_each_bound_belongs_to_a_sign_of_the_advantage():
    lp, rows = moved([0.6, 0.2], [0.4, 0.4], [1, -1])
    for low, high, masked in ((0.1, 0.3, [0, 1]), (0.3, 0.1, [1, 0]), (0.3, 0.3, [0, 0])):
        metrics = Dppo(delta_low=low, delta_high=high)(lp, rows)[1]
        assert measured(metrics["clip_fraction"], rows.mask).tolist() == masked


@pytest.mark.parametrize(
    ("divergence", "value", "norm"), [("tv", 0.16206138, 0.11161471), ("kl", 0.12833804, 0.10680206)]
)
def test_the_numbers_that_others_agree_on(divergence, value, norm):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    loss = Dppo(divergence=divergence, anchor="pi_old")
    assert value_and_norm(loss, lp, rows) == pytest.approx((value, norm), abs=1e-8)
    # The sampler as the anchor: the same formula with its log-probabilities in the place of pi_old's.
    swapped = replace(rows, logprobs=rows.sampler_logprobs)
    assert value_and_norm(Dppo(divergence=divergence), lp, rows) == value_and_norm(loss, lp, swapped)
    silent = replace(rows, sampler_logprobs=None)
    assert value_and_norm(Dppo(divergence=divergence), lp, silent) == value_and_norm(loss, lp, rows)


def test_bounds_that_are_never_reached_give_cispo():
    lp, rows = moved([0.9, 0.05, 0.3, 0.9], [0.1, 0.5, 0.3, 0.02], [1, -1, 2, 1])
    found, expected = Dppo(delta_low=1.0, delta_high=1.0, cap=5.0)(lp, rows)[0], Cispo(clip_high=4.0)(lp, rows)[0]
    torch.testing.assert_close(found, expected)
    assert (found[0, :4] != 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_at_an_anchor_of_probability_1_total_variation_is_the_clip(advantage):
    """|p - q| = |w - 1| there."""
    gradients = []
    for loss in (Dppo(delta_low=0.2), ClippedSurrogate()):
        lp, rows = moved([0.9, 0.81, 0.79, 0.5], [1.0] * 4, [advantage] * 4)
        (loss(lp, rows)[0] * rows.mask).sum().backward()
        gradients.append(lp.grad[0])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[0][2:4] == 0).all() == (advantage < 0)


def test_total_variation_masks_the_same_token_if_policy_and_anchor_and_the_sign_are_swapped():
    p, q, a = [0.6, 0.2, 0.5, 0.3], [0.4, 0.4, 0.4, 0.9], [1.0, -1.0, 1.0, 1.0]
    one = Dppo()(*moved(p, q, a))[1]["clip_fraction"]
    other = Dppo()(*moved(q, p, [-each for each in a]))[1]["clip_fraction"]
    assert one[0].tolist() == other[0].tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_probabilities_that_round_to_1_have_a_finite_divergence(divergence):
    lp = torch.tensor([[0.0, -1e-7, 0.0]], requires_grad=True)
    rows = build_rollouts(logprobs=torch.tensor([[-1e-7, 0.0, 0.0]]), advantages=torch.ones(1, 3))
    metrics = Dppo(divergence=divergence)(lp, rows)[1]
    assert metrics["divergence"].abs().max() < 1e-5
    assert metrics["clip_fraction"].sum() == 0


def test_the_weight_is_capped():
    lp, rows = rows_with([[30.0, 2.0]], [[-1, -1]], [[1, 1]])
    Dppo()(lp, rows)[0].sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([20, 2])


def test_an_importance_correction_on_top_is_refused():
    def check(*overrides: str) -> None:
        compatibility.check(Components.from_config(composed(*SHORT, "output=unused", *overrides)))

    message = "loss Dppo with correction.truncated_importance: both read sampler_logprobs"
    with pytest.raises(ValueError, match=re.escape(message) + ".*or set loss.anchor=pi_old"):
        check("loss=dppo", "correction=[overlong_filtering,truncated_importance]")
    check("loss=dppo", "correction=[truncated_importance]", "loss.anchor=pi_old")
    check("loss=dppo", "correction=[overlong_filtering,forking_tokens]")
    check("loss=sapo", "correction=[truncated_importance]")
    assert Dppo(anchor="pi_old").reads == Dppo().reads - {"sampler_logprobs"}


def test_an_own_correction_is_refused_if_it_declares_that_it_reads_the_sampler():
    components = Components.from_config(composed(*SHORT, "output=unused", "loss=dppo"))

    def mine(rollouts: Rollouts) -> Rollouts:
        return rollouts

    # Without `reads` it counts as reading everything, which is no reason to refuse it.
    compatibility.check(replace(components, correction={"mine": mine}))
    vars(mine)["reads"] = frozenset({"sampler_logprobs", "advantages"})
    with pytest.raises(ValueError, match=r"loss Dppo with correction\.mine"):
        compatibility.check(replace(components, correction={"mine": mine}))
    # Another loss does not read the sampler's log-probabilities.
    compatibility.check(replace(components, loss=Cispo(), correction={"mine": mine}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"delta_low": 0.0}, "loss.delta_low must be null (by the divergence), or above 0, got 0.0"),
        ({"delta_high": -1.0}, "loss.delta_high must be null"),
        ({"cap": 0.5}, "loss.cap must be at least 1"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Dppo(**fields)
