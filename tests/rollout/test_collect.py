"""Dynamic sampling with a scripted policy: the prompts that are requested, kept and dropped, and the metrics."""

import pytest

from rlmod.filter.dynamic_sampling import DynamicSampling
from tests.rollout.scripted import G, Scripted, exact, run


def test_a_penalty_does_not_make_a_right_answer_wrong():
    """Right answers are worth 1 - 0.5 here: exactly the threshold, as GROP's largest penalty makes them."""

    class Punished:
        excluded_terms = ("long",)

        def __call__(self, texts):
            return {"right": exact(texts), "long": [-0.5] * len(texts)}

    collected, _ = run([0, 3, 1, 2], 4, reward=Punished())
    assert collected.rollouts.rewards.view(4, G).sum(1).tolist() == [-1.5, 1.5, -0.5, 0.5]
    assert collected.rollouts.outcomes.view(4, G).sum(1).tolist() == [0, 3, 1, 2]
    shares = [collected.metrics[f"prompts/{kind}"] for kind in ("all_correct", "mixed", "all_incorrect")]
    assert shares == [0.25, 0.5, 0.25]


def test_an_outcome_at_the_threshold_is_wrong():
    collected, _ = run([3, 0], 2, reward=lambda texts: [0.5] * len(texts))
    assert [collected.metrics[f"prompts/{kind}"] for kind in ("all_correct", "mixed", "all_incorrect")] == [0, 0, 1]


def test_without_dynamic_sampling_every_group_stays_and_one_batch_is_requested():
    collected, requested = run([0, 3, 1, 2], 4)
    assert requested == [4]
    assert collected.rollouts.mask.all()
    assert collected.rollouts.rewards.view(4, G).sum(1).tolist() == [0, 3, 1, 2]
    m = collected.metrics
    assert (m["prompts/all_correct"], m["prompts/mixed"], m["prompts/all_incorrect"]) == (0.25, 0.5, 0.25)
    assert m["prompts/dropped"] == 0
    assert m["reward/mean"] == 0.5


def test_groups_without_signal_are_replaced_until_the_rollout_batch_is_full():
    # Of the first 4 prompts two have signal; the share suggests 2 / 0.5 = 4 more.
    collected, requested = run([0, 3, 1, 2, 2, 2, 3, 3], 4, dynamic_sampling=True)
    assert requested == [4, 4]
    rollouts = collected.rollouts
    assert rollouts.rewards.view(4, G).sum(1).tolist() == [1, 2, 2, 2]
    assert rollouts.mask.all()
    assert rollouts.group.view(4, G).tolist() == [[i] * G for i in (2, 3, 4, 5)]
    assert [problem.source for problem in collected.texts.problems][::G] == ["p2", "p3", "p4", "p5"]
    m = collected.metrics
    assert m["prompts/seen"] == 8
    assert m["prompts/dropped"] == 0.5
    assert m["prompts/unfilled"] == 0
    assert m["prompts/generation_batches"] == 2
    # Of everything sampled, the dropped included: (0+3+1+2+2+2+3+3) / 24
    assert m["reward/mean"] == pytest.approx(16 / 24)


def test_surplus_groups_with_signal_are_dropped_and_counted():
    collected, requested = run([0, 1, 1, 1], 2, dynamic_sampling=True)
    assert requested == [2, 2]
    assert collected.rollouts.group.view(2, G).tolist() == [[1] * G, [2] * G]
    assert collected.metrics["prompts/dropped"] == 0.5


def test_the_cap_leaves_groups_masked_out_whole_and_says_so(caplog):
    collected, requested = run([1, 0, 0, 0, 0, 0, 0, 0], 3, dynamic_sampling=True, max_generation_batches=2)
    assert len(requested) == 2
    rollouts = collected.rollouts
    assert len(rollouts) == 3 * G
    assert rollouts.mask.any(1).view(3, G).all(1).tolist() == [True, False, False]
    assert rollouts.mask.any(1).view(3, G).any(1).tolist() == [True, False, False]
    assert collected.metrics["prompts/unfilled"] == 2
    assert "2 of 3 groups are still missing" in caplog.text


@pytest.mark.parametrize("dynamic", [True, False])
def test_no_group_with_signal_is_said(dynamic, caplog):
    collected, _ = run([0, 3], 2, dynamic_sampling=dynamic, max_generation_batches=3)
    assert "None of the" in caplog.text
    assert "50 % all correct, 50 % all incorrect" in caplog.text
    assert bool(collected.rollouts.mask.any()) == (not dynamic)


def test_every_completion_truncated_is_loud(caplog):
    run([1, 2], 2, sampler=Scripted(truncated=True))
    assert "100 % of the 6 completions" in caplog.text


def test_the_cap_must_be_positive():
    with pytest.raises(ValueError, match=r"filter\.max_generation_batches"):
        DynamicSampling(max_generation_batches=0)
