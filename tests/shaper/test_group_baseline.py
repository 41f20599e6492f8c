from dataclasses import replace

import pytest
import torch

from rlmod.shaper.group_baseline import GroupBaseline
from rlmod.types import build_rollouts
from tests.rollouts import ragged


def test_by_hand():
    # Two groups, centred: 0.5, -0.5 and 0.25, -0.25; the first row has two tokens, so the tokens are .5, .5, -.5, .25, -.25:
    # mean 0.1, squared deviations .16, .16, .36, .0225, .1225 over 4 -> variance 0.20625
    rows = build_rollouts(
        mask=torch.tensor([[True, True], [True, False], [True, False], [True, False]]),
        group=torch.tensor([0, 0, 1, 1]),
        rewards=torch.tensor([1.0, 0.0, 0.75, 0.25]).double(),
    )
    a = GroupBaseline()(rows)
    std = 0.20625**0.5
    expected = torch.tensor([0.4, -0.6, 0.15, -0.35]).double() / std
    torch.testing.assert_close(a[:, 0], expected, atol=1e-5, rtol=0)
    assert a[:, 1].tolist() == pytest.approx([0.4 / std, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.35])
def test_groups_of_equal_rewards_give_exactly_zero(value):
    rows = ragged(1)
    assert (GroupBaseline()(replace(rows, rewards=torch.full_like(rows.rewards, value))) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_invariances(seed):
    rows = ragged(seed, binary=False)
    a = GroupBaseline(eps=1e-12)(rows)
    assert (a[~rows.mask] == 0).all()
    counted = a[rows.mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-9)
    assert counted.std().item() == pytest.approx(1, abs=1e-9)
    # A group's own offset goes with its baseline; one scale for all goes with the std.
    shifted = replace(rows, rewards=2 * rows.rewards + rows.group)
    torch.testing.assert_close(GroupBaseline(eps=1e-12)(shifted), a)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(GroupBaseline()(rows.rows(order)), GroupBaseline()(rows)[order])


def test_rows_masked_out_whole_count_nowhere():
    rows = ragged(2)
    mask = rows.mask.clone()
    mask[-6:] = False
    part = rows.rows(slice(0, len(rows) - 6))
    torch.testing.assert_close(GroupBaseline()(replace(rows, mask=mask))[:-6], GroupBaseline()(part))


def test_eps_must_be_positive():
    with pytest.raises(ValueError, match=r"shaper\.eps"):
        GroupBaseline(eps=-1.0)
