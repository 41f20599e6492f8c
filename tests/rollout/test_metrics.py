"""The metrics of a rollout batch: each term of the reward, and all ranks together."""

import math

import pytest
import torch

from rlmod.rollout.metrics import merge_ranks
from tests.rollout.scripted import exact, run


def with_terms(abstains=()):
    def reward(texts):
        # Four completions: the answer 1 0 0 1, the length 0, -1, -2, -3.
        answer = [None if row in abstains else value for row, value in enumerate(exact(texts))]
        return {"answer": answer, "length": [-float(row) for row in range(len(texts))]}

    return reward


def test_each_term_is_shown_with_its_std_minimum_and_maximum():
    metrics = run([1, 2], 2, reward=with_terms())[0].metrics
    length = [-float(row) for row in range(int(metrics["completions/scored"]))]
    assert metrics["reward/length"] == pytest.approx(sum(length) / len(length))
    assert metrics["reward/length/std"] == pytest.approx(float(torch.tensor(length).std(correction=0)))
    assert (metrics["reward/length/min"], metrics["reward/length/max"]) == (min(length), 0)
    assert metrics["reward/answer/max"] == 1


def test_completions_without_a_reward_count_in_no_term():
    metrics = run([1, 2], 2, reward=with_terms(abstains=(5,)))[0].metrics
    assert metrics["reward/length/min"] == -4
    assert metrics["completions/scored"] == 5


def test_a_batch_without_a_single_reward_shows_nan():
    metrics = run([1, 2], 2, reward=lambda texts: [None] * len(texts))[0].metrics
    assert math.isnan(metrics["reward/mean"])
    assert metrics["completions/scored"] == 0


def rank(rewards: list[float], prompts: int = 2) -> dict[str, float]:
    values = torch.tensor(rewards or [float("nan")])
    found = {
        "reward/mean": float(values.mean()),
        "completions/scored": float(len(rewards)),
        "prompts/seen": float(prompts),
    }
    if rewards:
        spread = {"std": values.std(correction=0), "min": values.min(), "max": values.max()}
        found |= {
            "reward/a": float(values.mean()),
            **{f"reward/a/{name}": float(value) for name, value in spread.items()},
        }
    return found


def test_ranks_together_are_one_rank_with_all_completions():
    first, second = [1.0, 0.0, 2.0], [5.0]
    assert merge_ranks([rank(first), rank(second)]) == pytest.approx({**rank(first + second), "prompts/seen": 4})


def test_a_terms_name_does_not_decide_how_it_is_averaged():
    ranks = [{"reward/score_max": value, "completions/scored": 2.0, "prompts/seen": 1.0} for value in (0.2, 0.8)]
    assert merge_ranks(ranks)["reward/score_max"] == pytest.approx(0.5)
    ranks = [{"sampler/difference_max": value, "prompts/seen": 1.0} for value in (0.2, 0.8)]
    assert merge_ranks(ranks)["sampler/difference_max"] == 0.8


@pytest.mark.parametrize("name", ["mean", "std", "min", "max", "inner/std"])
def test_a_term_may_not_have_the_name_of_a_statistic(name):
    with pytest.raises(ValueError, match=rf"a term named '{name}'.*give it another name"):
        run([1, 2], 2, reward=lambda texts: {"answer": exact(texts), name: exact(texts)})


def test_guided_prompts_weigh_the_metrics_of_the_zero_reward_batch():
    ranks = [
        {
            "prompts/seen": 4.0,
            "zero_reward/prompts": 9.0,
            "zero_reward/guide_failed": 1.0,
            "zero_reward/guide_tokens": 90.0,
        },
        {
            "prompts/seen": 4.0,
            "zero_reward/prompts": 1.0,
            "zero_reward/guide_failed": 0.0,
            "zero_reward/guide_tokens": 10.0,
        },
        {"prompts/seen": 4.0, "zero_reward/prompts": 0.0, "zero_reward/guide_failed": 0.0},
    ]
    merged = merge_ranks(ranks)
    assert merged["zero_reward/guide_failed"] == pytest.approx(0.9)
    assert merged["zero_reward/guide_tokens"] == 100


def test_a_rank_whose_whole_batch_has_no_reward_does_not_hide_the_others():
    merged = merge_ranks([rank([]), rank([1.0, 0.0])])
    assert merged == pytest.approx({**rank([1.0, 0.0]), "prompts/seen": 4})
    assert math.isnan(merge_ranks([rank([]), rank([])])["reward/mean"])
