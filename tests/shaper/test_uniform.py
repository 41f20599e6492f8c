from dataclasses import replace

import pytest
import torch

from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts, build_rollouts
from tests.rollouts import group_of_four, ragged


def test_by_hand():
    # mean 1/4, std with ddof 1: sqrt((9/16 + 3/16) / 3) = 1/2
    a = Uniform()(group_of_four([1, 0, 0, 0]))
    torch.testing.assert_close(a[:, 0], torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0)
    a = Uniform(divide_by_std=False)(group_of_four([1, 0, 0, 0]))
    torch.testing.assert_close(a[:, 1], torch.tensor([0.75, -0.25, -0.25, -0.25]))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("g", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(value, g):
    rows = build_rollouts(
        mask=torch.ones(g, 2, dtype=torch.bool),
        group=torch.zeros(g, dtype=torch.long),
        rewards=torch.full((g,), value),
    )
    for shaper in (Uniform(), Uniform(divide_by_std=False), Uniform(pool="own")):
        assert (shaper(rows) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_invariances(seed):
    rows = ragged(seed, binary=False)
    a = Uniform(eps=1e-12)(rows)
    assert (a[~rows.mask] == 0).all()
    assert torch.equal(a != 0, rows.mask)
    shifted = Uniform(eps=1e-12)(replace(rows, rewards=3 * rows.rewards + 5))
    torch.testing.assert_close(a, shifted)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(Uniform()(rows.rows(order)), Uniform()(rows)[order])


def test_a_row_masked_out_whole_is_in_nobodys_statistics():
    rows = group_of_four([1, 0, 0, 100])
    mask = rows.mask.clone()
    mask[3] = False
    a = Uniform()(replace(rows, mask=mask))
    torch.testing.assert_close(a[:3], Uniform()(rows.rows(slice(0, 3))))
    assert (a[3] == 0).all()


def guided(rewards: list[float], from_guide: list[bool]) -> Rollouts:
    return replace(group_of_four(rewards), from_guide=torch.tensor(from_guide))


def test_with_the_pool_own_the_guide_is_normalized_by_the_policys_own_rewards():
    # own: 1, 0 and 0.5, mean 1/2, std 1/2; the guide's 2 is 3 of them above
    a = Uniform(pool="own")(guided([1, 0, 0.5, 2], [False, False, False, True]))
    torch.testing.assert_close(a[:, 0], torch.tensor([1.0, -1.0, 0.0, 3.0]), atol=1e-5, rtol=0)
    union = Uniform()(guided([1, 0, 0.5, 2], [False, False, False, True]))
    torch.testing.assert_close(union, Uniform()(group_of_four([1, 0, 0.5, 2])))
    nobody = guided([1, 0, 0.5, 2], [False] * 4)
    assert torch.equal(Uniform(pool="own")(nobody), Uniform()(nobody))


def test_where_the_own_rewards_are_all_equal_the_guides_are_not_divided_by_nothing():
    a = Uniform(pool="own")(guided([0.1, 0.1, 0.1, 1], [False, False, False, True]))
    torch.testing.assert_close(a[:, 0], torch.tensor([0, 0, 0, 0.9]))


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match=r"shaper\.eps"):
        Uniform(eps=0.0)
