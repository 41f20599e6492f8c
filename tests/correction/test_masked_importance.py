"""Masked importance sampling: by hand, on the numbers that verl and TRL agree on, and where it changes nothing."""

from dataclasses import replace

import pytest
import torch

from rlmod.correction.masked_importance import MaskedImportance
from rlmod.correction.truncated_importance import TruncatedImportance
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts, build_rollouts
from tests.agreed import agreed, value_and_norm
from tests.rollouts import ragged


def with_ratios(rho: list[list[float]], advantages: list[list[float]] | None = None) -> Rollouts:
    ratios = torch.tensor(rho).double()
    sampler = torch.full_like(ratios, -1.0)
    given = torch.ones_like(ratios) if advantages is None else torch.tensor(advantages).double()
    return build_rollouts(logprobs=sampler + ratios.log(), sampler_logprobs=sampler, advantages=given)


def corrected(rows: Rollouts, **settings) -> list[list[float]]:
    advantages = MaskedImportance(**settings)(rows).advantages
    assert advantages is not None
    return advantages.tolist()


def test_tokens_by_hand():
    rows = with_ratios([[2, 0.5], [1.1, 1]])
    assert corrected(rows, low=0.6, high=1.5) == [pytest.approx([0, 0]), pytest.approx([1.1, 1])]
    assert corrected(rows, low=None, high=1.5) == [pytest.approx([0, 0.5]), pytest.approx([1.1, 1])]
    assert corrected(rows, low=0.6, high=None) == [pytest.approx([2, 0]), pytest.approx([1.1, 1])]
    assert corrected(rows, low=None, high=None) == [pytest.approx([2, 0.5]), pytest.approx([1.1, 1])]


def test_completions_by_hand():
    rows = with_ratios([[2, 0.5], [1.1, 1]])  # products 1 and 1.1
    assert corrected(rows, level="sequence", low=None, high=1.05) == [pytest.approx([1, 1]), [0, 0]]
    negative = with_ratios([[2, 1.5]], [[-1, -1]])
    assert corrected(negative, level="sequence", high=3.5) == [pytest.approx([-3, -3])]


@pytest.mark.parametrize(
    ("settings", "value", "norm"),
    [
        ({"level": "token", "low": 0.9, "high": 1.1}, -0.15478092, 0.07800304),
        ({"level": "sequence", "low": None, "high": 1.2}, 0.04695377, 0.08572961),
    ],
)
def test_the_numbers_that_others_agree_on(settings, value, norm):
    lp, rows = agreed()
    rows = MaskedImportance(**settings)(replace(rows, advantages=Uniform()(rows)))
    found = value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows)
    assert found == pytest.approx((value, norm), abs=1e-8)


@pytest.mark.parametrize(
    ("level", "value", "norm"), [("token", -0.12923457, 0.09366255), ("sequence", -0.15993430, 0.09242716)]
)
def test_the_numbers_of_truncation(level, value, norm):
    lp, rows = agreed()
    rows = TruncatedImportance(cap=1.05, level=level)(replace(rows, advantages=Uniform()(rows)))
    found = value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows)
    assert found == pytest.approx((value, norm), abs=1e-8)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_where_engine_and_trainer_agree_nothing_changes(level):
    rows = ragged()
    rows = replace(rows, advantages=Uniform()(rows), sampler_logprobs=rows.logprobs)
    out = MaskedImportance(level=level, low=1.0, high=1.0)(rows)
    assert torch.equal(out.advantages, rows.advantages)
    assert out.mask is rows.mask


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_is_never_read_and_rows_do_not_matter_to_each_other(level):
    rows = ragged(1)
    noise = 0.2 * torch.randn(rows.mask.shape, generator=torch.Generator().manual_seed(0)).double()
    rows = replace(rows, advantages=Uniform()(rows), sampler_logprobs=rows.logprobs + noise)
    correct = MaskedImportance(level=level, low=0.9, high=1.2)
    whole = correct(rows).advantages
    assert whole.isfinite().all()
    assert (whole[~rows.mask] == 0).all()
    assert (whole == 0).sum() > (rows.advantages == 0).sum()
    assert torch.equal(correct(rows.rows(slice(3, 9))).advantages, whole[3:9])


def test_a_ratio_beyond_measure_is_left_out_and_not_infinite():
    rows = with_ratios([[1, 1]])
    rows = replace(rows, sampler_logprobs=torch.tensor([[-1.0, -5000.0]]).double())
    assert corrected(rows) == [[1, 0]]
    assert MaskedImportance(high=None)(rows).advantages.isfinite().all()


def test_the_sampler_must_report_log_probabilities():
    rows = replace(with_ratios([[1.0]]), sampler_logprobs=None)
    with pytest.raises(ValueError, match=r"correction\.masked_importance needs the sampler's log-probabilities"):
        MaskedImportance()(rows)


def test_the_level_is_the_granularity():
    assert MaskedImportance().granularity == "token"
    assert MaskedImportance(level="sequence").granularity == "sequence"


@pytest.mark.parametrize(("field", "value"), [("low", -0.1), ("low", 1.1), ("high", 0.9), ("high", -1.0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"correction\.masked_importance\.{field} must be null .* got {value}"):
        MaskedImportance(**{field: value})
