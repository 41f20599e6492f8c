"""GRPO-S by hand, against plain loops, and its degenerate cases."""

import math
from dataclasses import replace
from statistics import stdev

import pytest
import torch

from rlmod.shaper.sequence_entropy import SequenceEntropy
from rlmod.shaper.uniform import Uniform
from rlmod.types import concatenate
from tests.rollouts import NORMALIZATIONS, SEEDS, one_group, ragged


def test_by_hand():
    # Correct: Hbar 3 and 1, mean 2. Wrong: Hbar 4 and 1, so 1/Hbar 1/4 and 1, mean 5/8.
    rows = one_group([1, 1, 0, 0], [[2, 4], [1, 1], [3, 5], [1, 1]])
    plus, minus, _ = SequenceEntropy().shape_rewards(rows)
    assert plus[:, 0].tolist() == pytest.approx([1.15, 1.05, 0, 0])
    assert minus[:, 0].tolist() == pytest.approx([0, 0, -1.04, -1.16])
    # Geometric: Hbar sqrt(8) and 1, their mean 8^(1/4).
    plus, _, _ = SequenceEntropy(mean="geometric").shape_rewards(rows)
    assert plus[0, 0].item() == pytest.approx(1 + 0.1 * 8**0.5 / 8**0.25)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_equals_the_equations_in_plain_loops(seed, normalization, mean):
    rows = ragged(seed)
    shaper = SequenceEntropy(normalization=normalization, mean=mean, beta1=0.9, beta2=0.2)
    result = shaper(rows)
    for g in rows.group.unique():
        members = [int(i) for i in (rows.group == g).nonzero()]
        right = {i: float(rows.rewards[i]) > 0.5 for i in members}
        of_row = {}
        for i in members:
            h = rows.entropy[i][rows.mask[i]].tolist()
            of_row[i] = sum(h) / len(h) if mean == "arithmetic" else math.prod(h) ** (1 / len(h))
        plus, minus = {}, {}
        for i in members:
            x = {k: of_row[k] if right[i] else 1 / of_row[k] for k in members if right[k] == right[i]}
            average = sum(x.values()) / len(x) if mean == "arithmetic" else math.prod(x.values()) ** (1 / len(x))
            plus[i] = 0.9 * float(rows.rewards[i]) + 0.2 * x[i] / average if right[i] else 0.0
            minus[i] = 0.0 if right[i] else -0.9 - 0.2 * x[i] / average
        for i in members:
            values = (
                {k: plus[k] + minus[k] for k in members} if normalization == "joint" else (plus, minus)[not right[i]]
            )
            pool = [values[k] for k in members if normalization != "own_class" or right[k] == right[i]]
            expected = 0.0
            if max(pool) > min(pool):
                expected = (values[i] - sum(pool) / len(pool)) / (stdev(pool) + 1e-6)
            assert result[i, 0].item() == pytest.approx(expected, abs=1e-9)
    assert torch.equal(result, result[:, :1] * rows.mask)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalization", ["zero_inclusive", "joint"])
def test_without_entropy_it_is_grpo(seed, normalization):
    rows = ragged(seed)
    a = SequenceEntropy(beta2=0.0, normalization=normalization)(rows)
    torch.testing.assert_close(a, Uniform()(rows), atol=1e-5, rtol=0)


def test_a_group_of_one_class_gets_zero():
    rows = ragged(3)
    rewards = rows.rewards.clone()
    rewards[rows.group == 2] = 1.0
    a = SequenceEntropy()(replace(rows, rewards=rewards))
    assert (a[rows.group == 2] == 0).all()
    assert (a[rows.group != 2][rows.mask[rows.group != 2]] != 0).all()


def test_a_row_masked_out_whole_changes_nothing_for_others():
    rows = ragged(4)
    extra = replace(
        rows.rows(slice(0, 1)), mask=torch.zeros(1, rows.mask.shape[1], dtype=torch.bool), group=torch.tensor([0])
    )
    joined = concatenate([rows, extra])
    a = SequenceEntropy()(joined)
    torch.testing.assert_close(a[:-1], SequenceEntropy()(rows))
    assert (a[-1] == 0).all()


@pytest.mark.parametrize("field", ["beta1", "beta2"])
def test_bad_fields_are_named(field):
    with pytest.raises(ValueError, match=rf"shaper\.{field}"):
        SequenceEntropy(**{field: -1.0})
