"""Clip-Cov and KL-Cov: tokens of high covariance of advantage and log-probability."""

from dataclasses import replace

import pytest
import torch

from rlmod.config import compatibility
from rlmod.config.build import Components
from rlmod.correction._covariance import covariance
from rlmod.correction.clip_cov import ClipCov
from rlmod.correction.kl_cov import KLCov
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.regularizer.kl_cov import KLCov as KLCovPenalty
from rlmod.shaper.uniform import Uniform
from rlmod.types import build_rollouts, require
from tests.agreed import agreed, value_and_norm
from tests.config.composing import composed
from tests.ranks import on_ranks
from tests.rollouts import SEEDS, ragged


def by_hand():
    """A = 1, 1, -1, -1 and p = 0.8, 0.2, 0.5, 0.2."""
    return build_rollouts(
        mask=torch.tensor([[True, True], [True, True]]),
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).double(),
        logprobs=torch.tensor([[0.8, 0.2], [0.5, 0.2]]).double().log(),
    )


def shaped(seed):
    rows = ragged(seed)
    return replace(rows, advantages=Uniform()(rows))


def test_the_covariance_by_hand():
    rows = by_hand()
    expected = torch.tensor([[0.810648, -0.575646], [-0.340644, 0.575646]]).double()
    torch.testing.assert_close(covariance(rows.advantages, rows.logprobs, rows.mask), expected, atol=1e-6, rtol=0)


def test_clip_cov_by_hand():
    left_out = ClipCov(share=0.25, low=0.6, high=5)(by_hand())
    assert left_out.advantages.tolist() == [[0, 1], [-1, -1]]
    # Two candidates, of which one is drawn; share 1e-9 of four tokens is still one.
    found = {tuple(ClipCov(share=1e-9, low=0.5)(by_hand()).advantages.flatten().tolist()) for _ in range(50)}
    assert found == {(0, 1, -1, -1), (1, 1, -1, 0)}
    # The bounds are open: the token at 0.810648 is no candidate above itself.
    cov = float(covariance(by_hand().advantages, by_hand().logprobs, by_hand().mask)[0, 0])
    assert torch.equal(ClipCov(share=1, low=cov)(by_hand()).advantages, by_hand().advantages)
    assert torch.equal(ClipCov(share=1, low=0.6, high=cov)(by_hand()).advantages, by_hand().advantages)


def test_kl_cov_by_hand():
    selected = KLCov(share=0.5)(by_hand()).extra["kl_cov"]
    assert selected.tolist() == [[True, False], [False, True]]
    assert KLCov(share=1e-9)(by_hand()).extra["kl_cov"].tolist() == [[True, False], [False, False]]
    assert KLCov(share=1)(by_hand()).extra["kl_cov"].all()
    # The penalty is |log w|: at w = 1.5 and 0.5 on the selected tokens 0.405465 and 0.693147.
    rows = KLCov(share=0.5)(by_hand())
    logprobs = (rows.logprobs + torch.tensor([[1.5, 1.5], [0.5, 0.5]]).log()).requires_grad_()
    per_token, metrics = KLCovPenalty(weight=2)(logprobs, rows)
    expected = torch.tensor([[0.405465, 0], [0, 0.693147]]).double()
    torch.testing.assert_close(per_token, 2 * expected, atol=1e-6, rtol=0)
    assert torch.nanmean(metrics["kl_cov"]).item() == pytest.approx((0.405465 + 0.693147) / 2, abs=1e-6)
    per_token.sum().backward()
    assert logprobs.grad.tolist() == [[2, 0], [0, -2]]


def test_the_step_with_clip_cov_on_the_shared_data():
    lp, rows = agreed()
    advantages = Uniform()(rows)
    rows = replace(rows, advantages=advantages)
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.28)
    found = value_and_norm(loss, lp, replace(rows, advantages=ClipCov(share=1)(rows).advantages))
    assert found == pytest.approx((-0.13402415, 0.07508848), abs=1e-8)
    # verl and SkyRL read the current policy's log-probabilities. Tokens that the ratio's clip leaves without a gradient keep their value.
    left_out = ClipCov(share=1)(replace(rows, logprobs=lp.detach())).advantages
    clipped = loss(lp, rows)[1]["clip_fraction"].bool()
    theirs = replace(rows, advantages=torch.where(clipped, advantages, require(left_out, "advantages")))
    assert value_and_norm(loss, lp, theirs) == pytest.approx((-0.10997364, 0.08717165), abs=1e-8)


@pytest.mark.parametrize(
    ("of", "share", "expected"),
    [("current", 0.1, (-0.17798203, 0.12729526)), ("old", 0.05, (-0.18673769, 0.13154556))],
)
def test_the_step_with_kl_cov_on_the_shared_data(of, share, expected):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    read = replace(rows, logprobs=lp.detach()) if of == "current" else rows
    rows = replace(rows, extra=KLCov(share=share)(read).extra)
    surrogate, penalty = ClippedSurrogate(clip_low=1, clip_high=torch.inf), KLCovPenalty()

    def both(logprobs, rollouts):
        return surrogate(logprobs, rollouts)[0] + penalty(logprobs, rollouts)[0], {}

    assert value_and_norm(both, lp, rows) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_constant_added_to_the_advantages_or_the_logprobs_changes_no_covariance(seed):
    rows = shaped(seed)
    expected = covariance(rows.advantages, rows.logprobs, rows.mask)
    torch.testing.assert_close(covariance(rows.advantages + 3, rows.logprobs - 2, rows.mask), expected)
    assert (expected[~rows.mask] == 0).all()
    equal = replace(rows, advantages=rows.mask.double())
    assert torch.equal(ClipCov(share=1)(equal).advantages, equal.advantages)
    assert torch.equal(KLCov()(equal).extra["kl_cov"], rows.mask)  # all tie


@pytest.mark.parametrize("seed", SEEDS)
def test_a_guides_tokens_are_neither_drawn_nor_selected_nor_counted(seed):
    rows = shaped(seed)
    from_guide = torch.arange(len(rows)) % 3 == 0
    guided = replace(rows, from_guide=from_guide)
    selected = KLCov(share=0.1)(guided).extra["kl_cov"]
    assert not selected[from_guide].any()
    assert torch.equal(selected[~from_guide], KLCov(share=0.1)(rows.rows(~from_guide)).extra["kl_cov"])
    candidates = {"share": 1, "low": 0.1}
    left_out = ClipCov(**candidates)(guided).advantages
    assert torch.equal(left_out[from_guide], rows.advantages[from_guide])
    assert torch.equal(left_out[~from_guide], ClipCov(**candidates)(rows.rows(~from_guide)).advantages)


def test_two_ranks_equal_one():
    rows = shaped(3)

    def part(rank):
        half = rows.rows((rows.group >= 2) == bool(rank))
        torch.manual_seed(rank)
        drawn = ClipCov(share=0.02, low=0.1)(half)
        found = KLCov(share=0.1)(half).extra["kl_cov"], ClipCov(share=1, low=0.1)(half).advantages, drawn.advantages
        return [each.tolist() for each in found]

    first, second = on_ranks(part)
    selected, left_out, advantages = (torch.tensor([*a, *b]) for a, b in zip(first, second, strict=True))
    assert torch.equal(selected, KLCov(share=0.1)(rows).extra["kl_cov"])
    torch.testing.assert_close(left_out.double(), ClipCov(share=1, low=0.1)(rows).advantages)
    drawn = (advantages == 0) & (rows.advantages != 0)
    assert int(drawn.sum()) == int(0.02 * rows.mask.sum())


def test_ranks_with_equal_generators_leave_out_no_more_than_the_share():
    rows = shaped(3)

    def part(rank):
        torch.manual_seed(0)
        half = rows.rows((rows.group >= 2) == bool(rank))
        return [ClipCov(share=0.05, low=0.1)(half).advantages.tolist() for _ in range(5)]

    first, second = on_ranks(part)
    drawn = [(torch.tensor([*a, *b]) == 0) & (rows.advantages != 0) for a, b in zip(first, second, strict=True)]
    assert [int(each.sum()) for each in drawn] == [int(0.05 * rows.mask.sum())] * 5
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 1


def test_the_penalty_needs_the_selection_and_says_so_before_weights_load():
    alone = Components.from_config(composed("regularizer=[kl_cov]", "output=unused"))
    with pytest.raises(ValueError, match=r"regularizer\.kl_cov .*correction=\[kl_cov\]"):
        compatibility.check(alone)
    with pytest.raises(ValueError, match=r"correction=\[kl_cov\]"):
        KLCovPenalty()(by_hand().logprobs, by_hand())
    unused = Components.from_config(composed("correction=[kl_cov]", "output=unused"))
    with pytest.raises(ValueError, match=r"correction\.kl_cov .*regularizer=\[kl_cov\]"):
        compatibility.check(unused)
    compatibility.check(Components.from_config(composed("experiment=kl_cov", "output=unused")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, r"correction\.clip_cov\.share must be above 0 and at most 1, got 0"),
        ({"share": 1.1}, r"correction\.clip_cov\.share"),
        ({"low": 5.0}, r"correction\.clip_cov\.low=5\.0 must be below correction\.clip_cov\.high=5\.0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ClipCov(**settings)
    with pytest.raises(ValueError, match=r"correction\.kl_cov\.share"):
        KLCov(share=2)
    with pytest.raises(ValueError, match=r"regularizer\.kl_cov\.weight"):
        KLCovPenalty(weight=-1)
