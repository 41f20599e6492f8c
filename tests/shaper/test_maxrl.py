from dataclasses import replace

import pytest
import torch

from rlmod.config import compatibility
from rlmod.config.build import Components
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.maxrl import Maxrl
from tests.agreed import agreed, value_and_norm
from tests.config.composing import composed
from tests.rollouts import SEEDS, group_of_four, ragged


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [([1, 0, 0, 0], [3, -1, -1, -1]), ([1, 1, 0, 0], [1, 1, -1, -1]), ([0] * 4, [0] * 4), ([0.35] * 4, [0] * 4)],
)
def test_by_hand(rewards, expected):
    advantages = Maxrl()(group_of_four(rewards))
    torch.testing.assert_close(advantages, torch.tensor(expected).float()[:, None].expand(4, 2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_group_sums_to_zero_and_masked_rows_do_not_count(seed):
    rows = ragged(seed)
    first = Maxrl()(rows)[:, 0]
    for group in rows.group.unique():
        assert first[rows.group == group].sum().item() == pytest.approx(0, abs=1e-9)
    mask = rows.mask.clone()
    mask[1] = False
    without = Maxrl()(replace(rows, mask=mask))
    expected = Maxrl()(rows.rows(torch.arange(len(rows)) != 1))
    torch.testing.assert_close(without[torch.arange(len(rows)) != 1], expected)
    assert (without[1] == 0).all()


def test_the_step_on_the_shared_data():
    lp, rows = agreed()
    rows = replace(rows, advantages=Maxrl()(rows))
    found = value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows)
    assert found == pytest.approx((-0.16012177, 0.10258902), abs=1e-8)


def test_a_reward_with_a_penalty_is_refused_before_weights_load():
    for reward in ("weighted", "grop"):
        components = Components.from_config(composed("experiment=maxrl", f"reward={reward}", "output=unused"))
        with pytest.raises(ValueError, match=r"shaper Maxrl with a reward that holds a penalty \((overlong|grop)\)"):
            compatibility.check(components)


def test_rewards_that_are_no_success_rate_are_refused():
    with pytest.raises(ValueError, match=r"rewards from 0 to 1, and one is -1"):
        Maxrl()(group_of_four([1, -1, -1, -1]))
    rows = group_of_four([1, 0, 0, 0])
    with pytest.raises(ValueError, match="holds a penalty"):
        Maxrl()(replace(rows, outcomes=rows.rewards, rewards=rows.rewards - 0.25))
