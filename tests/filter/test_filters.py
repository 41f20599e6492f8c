"""Which groups train: by hand, degenerate cases, and a filter of one's own."""

from functools import partial

import pytest
import torch

from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.filter.keep_all import KeepAll
from rlmod.interfaces import Filter, declared
from rlmod.types import build_rollouts


def groups(*rewards: list[float], from_guide: list[bool] | None = None):
    sizes = [len(each) for each in rewards]
    return build_rollouts(
        rewards=torch.tensor([float(value) for each in rewards for value in each]),
        group=torch.repeat_interleave(torch.arange(len(rewards)), torch.tensor(sizes)),
        from_guide=None if from_guide is None else torch.tensor(from_guide * len(rewards)),
    )


def test_dynamic_sampling_keeps_groups_with_correct_and_incorrect_completions():
    assert DynamicSampling()(groups([1, 0], [1, 1], [0, 0], [0.6, 0.5])).tolist() == [True, False, False, True]


def test_outcomes_decide_if_there_are_any():
    rollouts = groups([1, 0], [1, 0])
    rollouts = build_rollouts(
        rewards=rollouts.rewards, group=rollouts.group, outcomes=torch.tensor([1.0, 1.0, 1.0, 0.0])
    )
    assert DynamicSampling()(rollouts).tolist() == [False, True]


def test_over_own_looks_at_on_policy_completions_alone():
    rollouts = groups([0, 0, 1], [0, 1, 1], from_guide=[False, False, True])
    assert DynamicSampling()(rollouts).tolist() == [True, True]
    assert DynamicSampling(over="own")(rollouts).tolist() == [False, True]


def test_shifting_and_scaling_rewards_with_the_threshold_changes_nothing():
    rollouts = groups([1, 0], [1, 1], [0.4, 0.6])
    moved = build_rollouts(rewards=3 * rollouts.rewards + 2, group=rollouts.group)
    assert torch.equal(DynamicSampling()(rollouts), DynamicSampling(threshold=3.5)(moved))


def test_keep_all_keeps_all_and_asks_once():
    assert KeepAll()(groups([1, 1], [0, 0])).tolist() == [True, True]
    assert declared(KeepAll(), "max_generation_batches") == 1


def spread(rollouts, least: float):
    """A filter of one's own: a plain function."""
    by_group = rollouts.rewards.view(-1, 2)
    return (by_group.amax(1) - by_group.amin(1)) >= least


def test_a_plain_function_is_a_filter():
    keep = partial(spread, least=0.3)
    assert isinstance(keep, Filter)
    assert keep(groups([1, 0], [0.6, 0.5])).tolist() == [True, False]
    assert declared(keep, "max_generation_batches") == 1


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match=r"filter\.max_generation_batches"):
        DynamicSampling(max_generation_batches=0)
