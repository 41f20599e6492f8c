from dataclasses import replace

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.gdpo import Gdpo
from rlmod.shaper.uniform import Uniform
from rlmod.types import build_rollouts
from tests.agreed import agreed, value_and_norm
from tests.config.composing import composed
from tests.ranks import on_ranks
from tests.rollouts import SEEDS, ragged


def of_terms(terms, group=None, mask=None):
    values = {name: torch.tensor(each).double() for name, each in terms.items()}
    rewards = torch.stack(list(values.values())).sum(0)
    group = torch.zeros(len(rewards), dtype=torch.long) if group is None else torch.tensor(group)
    mask = torch.ones(len(rewards), 2, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return build_rollouts(mask=mask, group=group, rewards=rewards, terms=values)


def test_by_hand():
    # Terms [1, 0] and [0, 1]: z = +-1/sqrt(2) and the opposite; with weights 1 and 0.5 the sum is +-0.353553. Its std over the two rows is
    # 0.5, so the batch step gives +-0.353553 / 0.5 = +-0.707107.
    rows = of_terms({"answer": [1, 0], "format": [0, 1]})
    advantages = Gdpo(weights={"format": 0.5})(rows)
    torch.testing.assert_close(advantages[:, 0], torch.tensor([0.707107, -0.707107]).double(), atol=1e-5, rtol=0)
    # Two groups tell the group step from the batch step: sums +-0.353553 and +-1.060660 have the std sqrt(2.5 / 3) = 0.912871.
    rows = of_terms({"answer": [1, 0, 1, 0], "format": [0, 1, 1, 0]}, group=[0, 0, 1, 1])
    expected = torch.tensor([0.353553, -0.353553, 1.060660, -1.060660]).double() / 0.912871
    torch.testing.assert_close(Gdpo(weights={"format": 0.5})(rows)[:, 1], expected, atol=1e-5, rtol=0)


def test_the_step_on_the_shared_data():
    lp, rows = agreed()
    second = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0]).double()
    rows = replace(rows, terms={"answer": rows.rewards, "second": second})
    found = value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, replace(rows, advantages=Gdpo()(rows)))
    assert found == pytest.approx((-0.03722475, 0.10451478), abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_term_is_grpo_normalized_over_the_completions_of_the_batch(seed):
    rows = ragged(seed, binary=False)
    grpo = Uniform()(rows)[:, 0]
    expected = ((grpo - grpo.mean()) / (grpo.std() + 1e-6))[:, None] * rows.mask
    torch.testing.assert_close(Gdpo()(rows), expected)
    torch.testing.assert_close(Gdpo()(replace(rows, terms={"all": rows.rewards})), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_a_term_changes_nothing_and_a_constant_one_contributes_exactly_0(seed):
    rows = ragged(seed)
    other = ragged(seed + 100, binary=False).rewards
    terms = {"answer": rows.rewards, "other": other}
    found = Gdpo()(replace(rows, terms=terms))
    scaled = Gdpo()(replace(rows, terms={**terms, "other": 7 * other}))
    torch.testing.assert_close(scaled, found, atol=1e-4, rtol=0)  # eps is added to the std
    constant = Gdpo()(replace(rows, terms={**terms, "third": torch.full_like(other, 0.35)}))
    assert torch.equal(constant, found)
    # The sign of a term's weight is in its values already.
    torch.testing.assert_close(
        Gdpo(weights={"other": -1})(replace(rows, terms={**terms, "other": -other})),
        Gdpo()(replace(rows, terms={**terms, "other": -other})),
    )


def test_a_masked_row_counts_nowhere_and_an_inner_term_has_its_parents_weight():
    rows = of_terms({"a": [1, 0, 9], "a/grop": [0, 1, 9]}, mask=[[True, True], [True, True], [False, False]])
    found = Gdpo(weights={"a": 2})(rows)
    assert torch.equal(found[:2], Gdpo(weights={"a": 2})(rows.rows(slice(0, 2))))
    assert found.abs().sum() == 0  # both terms have the weight 2, so the two rows are equal
    assert (Gdpo(weights={"a": 2, "a/grop": 1})(rows)[:2, 0] * torch.tensor([1, -1]) > 0).all()


def test_the_weights_are_those_of_the_reward_by_default():
    cfg = composed("experiment=gdpo")
    assert cfg.shaper.weights == {name: term.weight for name, term in cfg.reward.terms.items()}
    assert composed("experiment=gdpo", "reward=exact_match").shaper.weights == {}


def test_a_weight_of_no_term_is_refused():
    with pytest.raises(
        ValueError, match=r"shaper\.weights names 'formt', which is no term of the reward; the terms are answer, format"
    ):
        Gdpo(weights={"formt": 2})(of_terms({"answer": [1, 0], "format": [0, 1]}))


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), True])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(ValueError, match=r"shaper\.weights\.format must be a finite number"):
        Gdpo(weights={"format": weight})


def test_two_ranks_equal_one():
    whole = replace(ragged(5, groups=4), terms={"a": ragged(5).rewards, "b": ragged(6, binary=False).rewards})
    first, second = on_ranks(lambda rank: Gdpo()(whole.rows((whole.group >= 2) == bool(rank))).tolist())
    torch.testing.assert_close(torch.tensor([*first, *second]).double(), Gdpo()(whole), atol=1e-6, rtol=0)
