from dataclasses import replace

import pytest
import torch

from rlmod.shaper.leave_one_out import LeaveOneOut
from rlmod.shaper.uniform import Uniform
from tests.rollouts import group_of_four, ragged


def test_by_hand():
    # 1 - (0 + 0.5 + 0)/3, 0 - 1.5/3, 0.5 - 1/3, 0 - 1.5/3
    a = LeaveOneOut()(group_of_four([1, 0, 0.5, 0]))
    torch.testing.assert_close(a[:, 0], torch.tensor([5 / 6, -0.5, 1 / 6, -0.5]))
    assert torch.equal(a[:, 0], a[:, 1])


@pytest.mark.parametrize("value", [0.1, 0.35])
@pytest.mark.parametrize("rows", [1, 4])
def test_equal_rewards_and_a_single_row_give_exactly_zero(value, rows):
    assert (LeaveOneOut()(group_of_four([value] * 4).rows(slice(0, rows))) == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_centred_reward_times_g_over_g_minus_1(seed):
    rows = ragged(seed, g=6, binary=False)
    a = LeaveOneOut()(rows)
    torch.testing.assert_close(a, Uniform(divide_by_std=False)(rows) * 6 / 5)
    torch.testing.assert_close(LeaveOneOut()(replace(rows, rewards=rows.rewards + 3)), a)
    assert (a[~rows.mask] == 0).all()


def test_a_row_masked_out_whole_is_nobodys_other():
    rows = group_of_four([1, 0, 0, 100])
    mask = rows.mask.clone()
    mask[3] = False
    a = LeaveOneOut()(replace(rows, mask=mask))
    torch.testing.assert_close(a[:, 0], torch.tensor([1, -0.5, -0.5, 0]))
