"""Both entropy shapers with penalties and with every scope of the entropy sums: ALGORITHMS' numbers, an independent version in loops."""

import math
from dataclasses import replace

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.sequence_entropy import SequenceEntropy
from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.types import Rollouts, build_rollouts, require
from tests.agreed import agreed, value_and_norm
from tests.ranks import on_ranks
from tests.rollouts import SEEDS, one_group, ragged

SCOPES = ["group", "batch", "row", "matrix"]


def penalized(rows: Rollouts, penalties: list[float]) -> Rollouts:
    outcomes = rows.rewards
    return replace(rows, outcomes=outcomes, rewards=outcomes + torch.tensor(penalties, dtype=torch.float64))


def with_penalty() -> Rollouts:
    """Two correct completions and two incorrect ones, the last of which has a penalty of 1/2."""
    return penalized(one_group([1, 1, 0, 0], [[3, 1], [1, 1], [4, 1], [1, 1]]), [0, 0, 0, -0.5])


def two_groups() -> Rollouts:
    """Group 1 has two correct completions, group 2 one; each has the incorrect ones that it needs, with one entropy."""
    entropy = [[3, 1], [1, 1], [1, 1], [4, 1], [1, 1]]
    return build_rollouts(
        mask=torch.ones(5, 2, dtype=torch.bool), group=torch.tensor([0, 0, 0, 1, 1]),
        rewards=torch.tensor([1, 1, 0, 1, 0]).double(), entropy=torch.tensor(entropy).double(),
    )  # fmt: skip


def assert_near(values: torch.Tensor, expected: list, tolerance: float = 6e-7) -> None:
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def test_a_penalty_reaches_incorrect_completions_by_hand():
    plus, minus, _ = TokenEntropy().shape_rewards(with_penalty())
    assert_near(plus[:2], [[1.15, 1.05 + 0.05], [1.05, 1.10]])
    assert_near(minus[2:], [[-1.04, -1.10], [-1.66, -1.60]])
    assert_near(
        TokenEntropy()(with_penalty()),
        [[1.019398, 0.934448], [0.849498, 0.934448], [-0.485147, -0.564897], [-1.309232, -1.229481]],
    )
    plus, minus, _ = SequenceEntropy().shape_rewards(with_penalty())
    assert_near(plus[:2, 0], [17 / 15, 16 / 15])
    assert_near(minus[2:, 0], [-37 / 35, -23 / 14])
    assert_near(SequenceEntropy()(with_penalty())[:, 0], [0.917668, 0.812792, -0.468727, -1.187150])


@pytest.mark.parametrize("shaper", [TokenEntropy(alpha1=0.7), SequenceEntropy(beta1=0.7)])
def test_without_a_penalty_every_bit_is_as_it_was(shaper):
    rows = ragged(3)
    assert torch.equal(shaper(rows), shaper(replace(rows, outcomes=rows.rewards)))


@pytest.mark.parametrize("seed", SEEDS)
def test_what_penalties_of_incorrect_completions_add_up_to(seed):
    """The sum of r- at t is -h_t (a1 + a2) + a1 sum_j p_j."""
    rows = ragged(seed)
    penalties = (-torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)).double()).tolist()
    rows = penalized(rows, penalties)
    _, minus, classes = TokenEntropy(alpha1=0.7, alpha2=0.2).shape_rewards(rows)
    for group in rows.group.unique():
        counted = (classes.incorrect & (rows.group == group)[:, None]).double()
        expected = -0.9 * counted.sum(0) + 0.7 * (counted * torch.tensor(penalties, dtype=torch.float64)[:, None]).sum(
            0
        )
        torch.testing.assert_close((minus * counted).sum(0), expected)


def test_a_higher_penalty_lowers_the_advantage_and_changes_no_class():
    rows = with_penalty()
    means = [
        TokenEntropy()(penalized(replace(rows, rewards=rows.outcomes), [0, 0, 0, p]))[3].mean() for p in (0, -0.5, -1)
    ]
    assert means[0] > means[1] > means[2]
    wrong = penalized(one_group([0, 0, 0], [[1, 2]] * 3), [0, -0.5, -1])  # without signal
    assert (TokenEntropy()(wrong) == 0).all()
    part = penalized(one_group([1, 0.5, 0], [[1, 1]] * 3), [0, 0, 0])  # 0.5 is at the threshold
    assert (TokenEntropy().shape_rewards(part)[1][1] == -1.1).all()


def test_every_scope_by_hand():
    r_plus = {
        "group": [[1.15, 1.10], [1.05, 1.10], [1.10, 1.10]],
        "batch": [[1.1125, 1.10], [1.0375, 1.10], [1.15, 1.10]],
        "row": [[1.15, 1.05], [1.10, 1.10], [1.16, 1.04]],
        "matrix": [[1.20, 1.066667], [1.066667, 1.066667], [1.16, 1.04]],
    }
    for scope, expected in r_plus.items():
        plus, _, classes = TokenEntropy(entropy_scope=scope).shape_rewards(two_groups())
        assert_near(plus[classes.correct[:, 0]], expected)
    wrong = one_group([1, 0, 0], [[1, 1], [4, 1], [1, 1]])
    r_minus = {"row": [[-1.04, -1.16], [-1.10, -1.10]], "matrix": [[-1.030769, -1.123077], [-1.123077, -1.123077]]}
    for scope, expected in r_minus.items():
        assert_near(TokenEntropy(entropy_scope=scope).shape_rewards(wrong)[1][1:], expected)


def by_loops(rows: Rollouts, scope: str, mean: str) -> list[list[float]]:
    """r+ + r- with a1 = 1, a2 = 0.1, one token at a time."""
    correct = [float(outcome) > 0.5 for outcome in rows.outcomes]
    signal = [len({correct[k] for k in range(len(rows)) if rows.group[k] == group}) == 2 for group in rows.group]
    tokens = [(i, t) for i in range(len(rows)) for t in range(rows.mask.shape[1]) if rows.mask[i, t] and signal[i]]

    def x(i: int, t: int) -> float:
        return float(rows.entropy[i, t]) if correct[i] else 1 / float(rows.entropy[i, t])

    result = [[0.0] * rows.mask.shape[1] for _ in range(len(rows))]
    for i, t in tokens:
        mates = [(k, s) for k, s in tokens if correct[k] == correct[i]]
        same_group = [(k, s) for k, s in mates if rows.group[k] == rows.group[i]]
        cells = {
            "group": [each for each in same_group if each[1] == t],
            "batch": [each for each in mates if each[1] == t],
            "row": [each for each in mates if each[0] == i],
            "matrix": same_group,
        }[scope]
        found = [x(*cell) for cell in cells]
        average = sum(found) / len(found) if mean == "arithmetic" else math.prod(found) ** (1 / len(found))
        reward, outcome = float(rows.rewards[i]), float(rows.outcomes[i])
        result[i][t] = (
            reward + 0.1 * x(i, t) / average if correct[i] else reward - outcome - 1 - 0.1 * x(i, t) / average
        )
    return result


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_every_scope_equals_the_equations_in_plain_loops(scope, mean):
    rows = ragged(2, groups=3, g=4, length=5)
    lost = rows.group == 1  # a group without signal
    rows = penalized(
        replace(rows, rewards=require(rows.rewards, "rewards").masked_fill(lost, 0.0)),
        [-0.1 * (i % 4) for i in range(len(rows))],
    )
    plus, minus, _ = TokenEntropy(entropy_scope=scope, mean=mean).shape_rewards(rows)
    assert_near(plus + minus, by_loops(rows, scope, mean), 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_scopes_hand_out_the_same_bonus(seed):
    """In every scope the bonuses over C sum to a2 |C|, so the sum of r+ over the batch is the same."""
    rows = ragged(seed)
    totals = [TokenEntropy(entropy_scope=scope).shape_rewards(rows)[0].sum() for scope in SCOPES]
    for total in totals[1:]:
        torch.testing.assert_close(total, totals[0])
    equal = replace(rows, entropy=torch.full_like(rows.entropy, 0.7))
    shaped = [TokenEntropy(entropy_scope=scope)(equal) for scope in SCOPES]
    for values in shaped[1:]:
        torch.testing.assert_close(values, shaped[0])


def test_what_a_scope_leaves_alone():
    rows = ragged(1)
    entropy = rows.entropy.clone()
    entropy[3] *= 2
    changed = replace(rows, entropy=entropy)
    others = torch.arange(len(rows)) != 3
    for scope, unchanged in (("row", True), ("group", False)):
        before, after = (TokenEntropy(entropy_scope=scope).shape_rewards(each)[0] for each in (rows, changed))
        assert torch.equal(before[others], after[others]) == unchanged
    one = ragged(1, groups=1)
    for shaper in (TokenEntropy, SequenceEntropy):
        assert torch.equal(shaper(entropy_scope="batch")(one), shaper()(one))
    alone = one_group([1, 0], [[3, 1], [2, 5]])
    for scope in ("group", "batch"):  # a cell alone gets a2
        assert_near(TokenEntropy(entropy_scope=scope).shape_rewards(alone)[0][0], [1.1, 1.1])


def test_two_ranks_have_the_sums_of_one():
    """The second rank's completions are shorter, so its columns end earlier."""
    rows = ragged(4, groups=4, g=4, length=9)
    rows = penalized(rows, [-0.1 * (i % 3) for i in range(len(rows))])
    last = rows.group == 3
    rows = replace(rows, mask=rows.mask & ~(last[:, None] & (torch.arange(9) >= 3)))
    halves = [rows.rows(rows.group < 3), rows.rows(last).trimmed()]
    assert [half.mask.shape[1] for half in halves] == [9, 3]
    for shaper in (TokenEntropy(entropy_scope="batch"), SequenceEntropy(entropy_scope="batch")):
        whole = shaper(rows)
        parts = on_ranks(lambda rank, shaper=shaper: shaper(halves[rank]).tolist())
        assert_near(whole[~last], parts[0], 1e-9)
        assert_near(whole[last][:, :3], parts[1], 1e-9)


@pytest.mark.parametrize(
    ("settings", "penalties", "value", "norm"),
    [
        ({}, None, 0.02972338, 0.11870949),
        ({"entropy_scope": "row"}, None, 0.03024974, 0.12475882),
        ({}, [0, -0.25, -0.5, 0, 0, 0, -0.1, -0.3], 0.01277663, 0.11673942),
    ],
    ids=["group", "row", "penalties"],
)
def test_the_step_on_the_shared_data(settings, penalties, value, norm):
    lp, rows = agreed()
    rows = rows if penalties is None else penalized(rows, penalties)
    rows = replace(rows, advantages=TokenEntropy(**settings)(rows))
    assert value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows) == pytest.approx(
        (value, norm), abs=1e-8
    )
