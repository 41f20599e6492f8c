"""GTPO: ALGORITHMS' numbers and properties, and an independent version in plain loops."""

import math
from dataclasses import replace
from statistics import stdev

import pytest
import torch

from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.types import Rollouts, build_rollouts
from tests.rollouts import NORMALIZATIONS, SEEDS, one_group, ragged


def by_loops(r: Rollouts, s: TokenEntropy) -> list[list[float]]:
    """Equations 3, 5 and 6 as they stand, one token at a time."""
    rows, length = r.mask.shape
    low, high = s.entropy_clip or (1e-6, math.inf)

    def entropy(i: int, t: int) -> float:
        return min(max(float(r.entropy[i, t]), low), high)

    right = [float(x) > s.threshold for x in r.rewards]
    plus, minus = {}, {}
    for i in range(rows):
        mates = [k for k in range(rows) if r.group[k] == r.group[i]]
        if len({right[k] for k in mates}) == 1:
            continue
        for t in range(length):
            if not r.mask[i, t]:
                continue
            members = [k for k in mates if right[k] == right[i] and r.mask[k, t]]
            x = {k: entropy(k, t) if right[i] else 1 / entropy(k, t) for k in members}
            if s.mean == "arithmetic":
                share = len(members) * x[i] / sum(x.values())
            else:
                share = x[i] / math.prod(x.values()) ** (1 / len(members))
            plus[i, t] = s.alpha1 * float(r.rewards[i]) + s.alpha2 * share if right[i] else 0.0
            minus[i, t] = 0.0 if right[i] else -s.alpha1 - s.alpha2 * share

    def score(values: dict, at: tuple[int, int], among: list[tuple[int, int]]) -> float:
        if s.scope == "group":
            among = [p for p in among if r.group[p[0]] == r.group[at[0]]]
        pool = [values[p] for p in among]
        if max(pool) == min(pool):
            return 0.0
        return (values[at] - sum(pool) / len(pool)) / (stdev(pool) + s.eps)

    out = [[0.0] * length for _ in range(rows)]
    everything = list(plus)
    both = {p: plus[p] + minus[p] for p in everything}
    for i, t in everything:
        own = [p for p in everything if right[p[0]] == right[i]]
        values, among = (plus if right[i] else minus), everything
        if s.normalization == "joint":
            values = both
        elif s.normalization == "own_class":
            among = own
        out[i][t] = score(values, (i, t), among)
    return out


def test_the_numbers_of_the_paper_by_hand():
    # Correct: H at t = 0 is 3 and 1, mean 2: shares 1.5 and 0.5. Wrong: 1/H is 1/4 and 1, mean 5/8: shares 0.4 and 1.6.
    rows = one_group([1, 1, 0, 0], [[3, 1], [1, 3], [4, 1], [1, 4]])
    plus, minus, _ = TokenEntropy().shape_rewards(rows)
    torch.testing.assert_close(plus[:2], torch.tensor([[1.15, 1.05], [1.05, 1.15]]).double(), atol=1e-7, rtol=0)
    torch.testing.assert_close(minus[2:], torch.tensor([[-1.04, -1.16], [-1.16, -1.04]]).double(), atol=1e-7, rtol=0)
    assert (plus[2:] == 0).all()
    assert (minus[:2] == 0).all()
    # Geometric: sqrt(3) and 1/sqrt(3); of 1/4 and 1 the mean is 1/2: shares 1/2 and 2.
    plus, minus, _ = TokenEntropy(mean="geometric").shape_rewards(rows)
    assert plus[0, 0].item() == pytest.approx(1 + 0.1 * 3**0.5)
    assert minus[2].tolist() == pytest.approx([-1.05, -1.2])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_equals_the_equations_in_plain_loops(seed, normalization, scope, mean):
    rows = ragged(seed)
    rows = replace(rows, rewards=rows.rewards * 0.9)
    shaper = TokenEntropy(normalization=normalization, scope=scope, mean=mean, alpha1=0.8, alpha2=0.3)
    torch.testing.assert_close(shaper(rows), torch.tensor(by_loops(rows, shaper)).double())


@pytest.mark.parametrize("seed", SEEDS)
def test_shaped_rewards_sum_to_the_number_of_members(seed):
    # Proposition 2.2, for a1 + a2 = 1
    rows = ragged(seed)
    plus, minus, classes = TokenEntropy(alpha1=0.7, alpha2=0.3).shape_rewards(rows)
    for g in rows.group.unique():
        own = rows.group == g
        torch.testing.assert_close(plus[own].sum(0), classes.correct[own].sum(0).double())
        torch.testing.assert_close(minus[own].sum(0), -classes.incorrect[own].sum(0).double())


@pytest.mark.parametrize("value", [0.0, 0.3, 2.0])
def test_equal_entropies_shape_uniformly(value):
    rows = ragged(1)
    rows = replace(rows, entropy=torch.full_like(rows.entropy, value))
    plus, minus, classes = TokenEntropy().shape_rewards(rows)
    torch.testing.assert_close(plus[classes.correct], torch.full_like(plus[classes.correct], 1.1))
    torch.testing.assert_close(minus[classes.incorrect], torch.full_like(minus[classes.incorrect], -1.1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("normalization", ["zero_inclusive", "joint"])
def test_without_entropy_it_is_token_mean_grpo(seed, normalization):
    # Proposition 2.3: the baseline is sum |o| r / sum |o|
    rows = ragged(seed)
    a = TokenEntropy(alpha2=0.0, normalization=normalization)(rows)
    of_token = rows.rewards[:, None].expand_as(rows.mask)[rows.mask]
    lengths = rows.mask.sum(1)
    baseline = (lengths * rows.rewards).sum() / lengths.sum()
    expected = (of_token - baseline) / of_token.std()
    torch.testing.assert_close(a[rows.mask], expected, atol=1e-5, rtol=0)


def test_own_class_without_entropy_has_no_signal():
    assert (TokenEntropy(alpha2=0.0, normalization="own_class")(ragged(0)) == 0).all()


def test_one_member_left_has_a1_plus_a2_whatever_its_entropy():
    rows = one_group([1, 1, 0], [[3, 0.2], [1, 9.0], [1, 1]])
    rows = replace(rows, mask=torch.tensor([[True, True], [True, False], [True, True]]))
    plus, minus, _ = TokenEntropy().shape_rewards(rows)
    assert plus[0, 1].item() == pytest.approx(1.1)
    assert minus[2].tolist() == pytest.approx([-1.1, -1.1])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.35, 1.0])
def test_a_group_of_one_class_gets_zero_and_changes_nothing_for_others(normalization, reward):
    rows = ragged(2)
    rewards = rows.rewards.clone()
    rewards[rows.group == 1] = reward
    a = TokenEntropy(normalization=normalization)(replace(rows, rewards=rewards))
    assert (a[rows.group == 1] == 0).all()
    others = replace(rows, rewards=rewards).rows(rows.group != 1)
    torch.testing.assert_close(a[rows.group != 1], TokenEntropy(normalization=normalization)(others))


@pytest.mark.parametrize("seed", SEEDS)
def test_symmetries(seed):
    rows = ragged(seed)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    a = TokenEntropy()(rows)
    torch.testing.assert_close(TokenEntropy()(rows.rows(order)), a[order])
    torch.testing.assert_close(TokenEntropy()(replace(rows, entropy=7 * rows.entropy)), a)
    assert (a[~rows.mask] == 0).all()
    assert a.isfinite().all()


def test_entropy_clip_clips_before_the_shares():
    rows = one_group([1, 1, 0], [[3.0], [0.1], [1.0]])
    plus, _, _ = TokenEntropy(entropy_clip=(0.2, 0.28)).shape_rewards(rows)
    assert plus[:2, 0].tolist() == pytest.approx([1 + 0.1 * 0.28 / 0.24, 1 + 0.1 * 0.2 / 0.24])


def test_an_entropy_of_exactly_0_is_divisible_whatever_the_clip():
    """Two wrong completions, one certain: 1 / H is 1e6 and 1, so all of the class's blame is the certain one's."""
    rows = build_rollouts(
        mask=torch.ones(3, 1, dtype=torch.bool),
        group=torch.zeros(3, dtype=torch.long),
        rewards=torch.tensor([1.0, 0.0, 0.0]),
        entropy=torch.tensor([[0.5], [0.0], [1.0]]),
    )
    for clip in (None, (0.0, 2.0)):
        _, minus, _ = TokenEntropy(entropy_clip=clip).shape_rewards(rows)
        assert minus[:, 0].tolist() == pytest.approx([0, -1.2, -1.0], abs=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("alpha1", -1.0), ("alpha2", -0.1), ("eps", 0.0), ("entropy_clip", [0.3, 0.2]), ("entropy_clip", [1.0])],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"shaper\.{field}"):
        TokenEntropy(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("normalization", "x"), ("scope", "rank"), ("mean", "harmonic")])
def test_bad_choices_are_refused(field, value):
    with pytest.raises(Exception, match=rf"{field}"):
        TokenEntropy(**{field: value})
