"""Values by hand, the numbers that other implementations agree on, degenerate cases."""

from dataclasses import replace

import pytest
import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.loss.sequence_surrogate import SequenceSurrogate
from rlmod.shaper.uniform import Uniform
from tests.agreed import agreed, value_and_norm
from tests.rollouts import measured, rows_with

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


@pytest.mark.parametrize(
    ("loss", "aggregation", "value", "norm"),
    [
        (ClippedSurrogate(**CLIP), TokenMean(), -0.12679430, 0.09469501),
        (ClippedSurrogate(**CLIP), RolloutMean(), 0.02001147, 0.12781295),
        (SequenceSurrogate(ratio="geometric", **CLIP), RolloutMean(), -0.02321232, 0.14586430),
    ],
    ids=["token-mean", "rollout-mean", "gspo"],
)
def test_the_numbers_that_others_agree_on(loss, aggregation, value, norm):
    lp, rows = agreed()
    rows = replace(rows, advantages=Uniform()(rows))
    assert value_and_norm(loss, lp, rows, aggregation) == pytest.approx((value, norm), abs=1e-8)


def test_clipped_surrogate_by_hand():
    # (ratio, A): 1.5 with A > 0 is held at 1.28; 1.5 with A < 0 is not; 0.5 with A < 0 at 0.8; 0.5 with A > 0 is not.
    lp, rows = rows_with([[1.5, 1.5, 0.5, 0.5]], [[2, -2, -2, 2]], [[1, 1, 1, 1]])
    per_token, metrics = ClippedSurrogate(**CLIP)(lp, rows)
    assert per_token.tolist()[0] == pytest.approx([-2.56, 3.0, 1.6, -1.0])
    assert measured(metrics["clip_fraction"], rows.mask).mean().item() == pytest.approx(0.5)
    assert measured(metrics["ratio"], rows.mask).mean().item() == pytest.approx(1.0)
    per_token.sum().backward()
    assert lp.grad.tolist()[0] == pytest.approx([0, 3.0, 0, -1.0])


def test_sequence_surrogate_by_hand():
    # Ratios 2 and 1/2: arithmetic mean 1.25, geometric 1.
    lp, rows = rows_with([[2, 0.5, 9.0]], [[3, 3, 0]], [[1, 1, 0]])
    arithmetic, metrics = SequenceSurrogate(clip_low=0.2, clip_high=0.2)(lp, rows)
    assert arithmetic[0, :2].tolist() == pytest.approx([-3.6, -3.6])  # 1.25 held at 1.2
    assert measured(metrics["clip_fraction"], rows.mask).mean().item() == 1
    geometric, _ = SequenceSurrogate(ratio="geometric")(lp, rows)
    assert geometric[0, :2].tolist() == pytest.approx([-3, -3])
    (gradient,) = torch.autograd.grad((geometric * torch.tensor([[0.5, 0.5, 0]])).sum(), lp)
    # d exp(mean log w) / d log w_t = 1/2 each
    assert gradient.tolist()[0] == pytest.approx([-1.5, -1.5, 0])
    wide, _ = SequenceSurrogate(clip_low=0.9, clip_high=9.0)(lp, rows)
    (gradient,) = torch.autograd.grad((wide * torch.tensor([[0.5, 0.5, 0]])).sum(), lp)
    # d mean w / d log w_t = w_t / 2
    assert gradient.tolist()[0] == pytest.approx([-3.0, -0.75, 0])


@pytest.mark.parametrize("loss", [ClippedSurrogate(), SequenceSurrogate(), SequenceSurrogate(ratio="geometric")])
def test_on_policy_the_value_is_minus_the_advantage_and_padding_is_never_read(loss):
    lp, rows = rows_with([[1, 1, 1], [1, 1, 1]], [[2, 2, 0], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]])
    per_token, metrics = loss(lp, rows)
    torch.testing.assert_close(per_token * rows.mask, -rows.advantages)
    assert measured(metrics["ratio"], rows.mask).mean().item() == 1
    assert measured(metrics["clip_fraction"], rows.mask).mean().item() == 0
    (per_token * rows.mask).sum().backward()
    assert lp.grad.isfinite().all()
    assert (lp.grad[1] == 0).all()


def test_one_token_completions_make_the_sequence_loss_the_token_loss():
    lp, rows = rows_with([[1.5], [0.5], [1.1]], [[1], [-1], [2]], [[1], [1], [1]])
    for ratio in ("arithmetic", "geometric"):
        bounds = {"clip_low": 0.4, "clip_high": 0.2}
        sequence, token = SequenceSurrogate(ratio=ratio, **bounds), ClippedSurrogate(**bounds)
        torch.testing.assert_close(sequence(lp, rows)[0], token(lp, rows)[0])


@pytest.mark.parametrize("loss", [ClippedSurrogate, SequenceSurrogate])
@pytest.mark.parametrize(("field", "value"), [("clip_low", -1.0), ("clip_low", 1.5), ("clip_high", 0.0)])
def test_bad_fields_are_named(loss, field, value):
    with pytest.raises(ValueError, match=rf"loss\.{field}"):
        loss(**{field: value})
