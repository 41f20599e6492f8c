"""Corrections: they change the shaped rollouts before the aggregation."""

from dataclasses import replace

import pytest
import torch

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.aggregation.token_mean import TokenMean
from rlmod.correction.forking_tokens import ForkingTokens
from rlmod.correction.overlong_filtering import OverlongFiltering
from rlmod.correction.truncated_importance import TruncatedImportance
from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts, build_rollouts
from tests.rollouts import ragged


def shaped(seed: int = 0) -> Rollouts:
    rows = ragged(seed)
    return replace(rows, advantages=Uniform()(rows))


def test_a_truncated_row_leaves_numerator_and_normaliser():
    rows = shaped()
    truncated = torch.zeros(len(rows), dtype=torch.bool)
    truncated[[1, 5]] = True
    out = OverlongFiltering()(replace(rows, truncated=truncated))
    assert not out.mask[truncated].any()
    assert (out.advantages[truncated] == 0).all()
    # The others keep the advantages that the whole group gave them, and share the weight among themselves.
    assert torch.equal(out.advantages[~truncated], rows.advantages[~truncated])
    for aggregation in (TokenMean(), RolloutMean()):
        weights = aggregation(out)
        assert weights.sum().item() == pytest.approx(1, abs=1e-6)
        assert (weights[truncated] == 0).all()
    nothing = OverlongFiltering()(replace(rows, truncated=torch.zeros_like(truncated)))
    assert torch.equal(nothing.mask, rows.mask)
    assert torch.equal(nothing.advantages, rows.advantages)


def test_the_top_fifth_of_the_tokens_by_hand():
    entropy = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8, 99.0]])
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    rows = build_rollouts(mask=mask, entropy=entropy, advantages=torch.where(mask, 2.0, 0.0))
    out = ForkingTokens(share=0.2)(rows)  # 1.8 of 9 tokens, rounded up: 0.9 and 0.8
    assert out.advantages.nonzero().tolist() == [[0, 1], [1, 3]]
    assert (out.advantages[out.advantages != 0] == 2).all()
    assert torch.equal(out.mask, mask)  # the normaliser is of all tokens


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_forks_are_the_share_of_the_tokens_and_those_of_highest_entropy(share):
    rows = shaped(1)
    kept = (ForkingTokens(share=share)(replace(rows, advantages=rows.mask.double())).advantages != 0) & rows.mask
    n = int(rows.mask.sum())
    assert int(kept.sum()) == -(-share * n // 1)
    if share < 1:
        assert rows.entropy[kept].min() > rows.entropy[rows.mask & ~kept].max()
    else:
        assert torch.equal(ForkingTokens(share=1.0)(rows).advantages, rows.advantages)


def test_equal_entropies_are_all_forks_and_nothing_counted_is_no_fork():
    rows = shaped()
    equal = replace(rows, entropy=torch.full_like(rows.entropy, 0.3))
    assert torch.equal(ForkingTokens()(equal).advantages, rows.advantages)
    nothing = replace(rows, mask=torch.zeros_like(rows.mask), advantages=torch.zeros_like(rows.advantages))
    assert (ForkingTokens()(nothing).advantages == 0).all()


def test_truncated_importance_by_hand():
    # pi_old / pi_sampler: 1/2, 1, 4 (held at 2)
    sampler = torch.tensor([[-1.0, -1.0, -1.0, torch.nan]])
    old = sampler + torch.tensor([[0.5, 1.0, 4.0, 1.0]]).log()
    mask = torch.tensor([[True, True, True, False]])
    rows = build_rollouts(
        mask=mask, logprobs=old, sampler_logprobs=sampler, advantages=torch.tensor([[3.0, -3.0, 3.0, 0.0]])
    )
    assert TruncatedImportance()(rows).advantages[0].tolist() == pytest.approx([1.5, -3, 6, 0])
    same = replace(rows, sampler_logprobs=old)
    assert torch.equal(TruncatedImportance()(same).advantages, rows.advantages)
    with pytest.raises(ValueError, match="sampler's log-probabilities"):
        TruncatedImportance()(replace(rows, sampler_logprobs=None))


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_bad_share(share):
    with pytest.raises(ValueError, match=r"correction\.forking_tokens\.share"):
        ForkingTokens(share=share)


def test_bad_cap():
    with pytest.raises(ValueError, match=r"correction\.truncated_importance\.cap"):
        TruncatedImportance(cap=0.0)


@pytest.mark.parametrize("share", [0.07, 0.14, 0.29, 0.57])
def test_a_share_of_a_hundred_tokens_is_that_many(share):
    """0.07 * 100 is 7.000000000000001."""
    rows = build_rollouts(
        mask=torch.ones(10, 10).bool(), entropy=torch.randperm(100).view(10, 10).float(), advantages=torch.ones(10, 10)
    )
    assert (ForkingTokens(share=share)(rows).advantages != 0).sum() == round(100 * share)


def test_sequence_level_truncated_importance_by_hand():
    """Products of the tokens' ratios: 0.5 x 3 = 1.5 and 4 x 1 = 4, held at 2."""
    sampler = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
    old = sampler + torch.tensor([[0.5, 3.0], [4.0, 1.0]]).log()
    rows = build_rollouts(
        mask=torch.ones(2, 2).bool(),
        logprobs=old,
        sampler_logprobs=sampler,
        advantages=torch.tensor([[1.0, 1.0], [-1.0, -1.0]]),
    )
    out = TruncatedImportance(level="sequence")(rows).advantages
    torch.testing.assert_close(out, torch.tensor([[1.5, 1.5], [-2.0, -2.0]]))
    assert TruncatedImportance().granularity == "token"
    assert TruncatedImportance(level="sequence").granularity == "sequence"
