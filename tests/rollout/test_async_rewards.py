"""Asynchronous rewards: a thread computes the numbers that a call after sampling computes, for finished completions only."""

import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from rlmod.interfaces import OnFinished
from rlmod.model.policy import HFPolicy, completion_texts
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward._supervised import Supervised
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.grop import Grop
from rlmod.reward.weighted import Weighted
from rlmod.rollout.async_rewards import AsyncRewards, supports_async_rewards
from rlmod.sampler.hf import HF
from rlmod.types import Problem, Prompts, Rollouts, Texts, build_rollouts
from tests.rollout.scripted import G, Scripted, run


def rollouts(groups: int = 4, g: int = 2) -> Rollouts:
    """Row r is r + 1 tokens long."""
    rows = torch.arange(groups * g)
    return build_rollouts(
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        completion_ids=rows[:, None].repeat(1, len(rows)),
        mask=torch.arange(len(rows)) <= rows[:, None],
        group=rows // g,
        truncated=torch.zeros(len(rows), dtype=torch.bool),
    )


def pointwise(reward: Any) -> Any:
    reward.pointwise = True
    return reward


PROBLEMS = [Problem(prompt="", answer=str(i), source=f"p{i}") for i in range(4)]


def decode(rows: Rollouts) -> list[str]:
    assert rows.completion_ids is not None
    return [str(int(row[0])) for row in rows.completion_ids]


def texts(rows: Rollouts) -> Texts:
    from rlmod.rollout.groups import texts_for_reward

    return texts_for_reward(rows, PROBLEMS, decode)


@dataclass
class Lengths:
    """Terms by which a mixed-up row would show; notes which thread asked for what."""

    pointwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.asked: list[tuple[bool, list[str]]] = []

    def __call__(self, texts: Texts) -> dict[str, list[float]]:
        assert texts.lengths is not None
        self.asked.append((threading.current_thread() is threading.main_thread(), list(texts.completions)))
        return {
            "length": [float(n) for n in texts.lengths],
            "answer": [10.0 * int(p.answer) for p in texts.problems or ()],
        }


def test_the_rewards_are_those_of_all_rows_at_once_whoever_is_done_first():
    reward, rows = Lengths(), rollouts()
    early = AsyncRewards(reward, PROBLEMS, decode)
    for places in (torch.tensor([5, 2]), torch.tensor([0, 7, 6])):
        early.submit(rows.rows(places), places)
    found = early.result(rows, texts(rows))
    early.close()
    assert reward.asked == [(False, ["5", "2"]), (False, ["0", "7", "6"]), (True, ["1", "3", "4"])]
    assert found.rewards.tolist() == [1, 2, 13, 14, 25, 26, 37, 38]
    expected = compute_rewards(Lengths(), texts(rows))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_thread_computes_rewards_without_gradients():
    enabled: list[bool] = []

    def noting(texts: Texts) -> list[float]:
        enabled.append(torch.is_grad_enabled())
        return [0.0] * len(texts)

    rows = rollouts()
    early = AsyncRewards(noting, PROBLEMS, decode)
    with torch.enable_grad():
        early.submit(rows, torch.arange(len(rows)))
        early.result(rows, texts(rows))
    early.close()
    assert enabled == [False]


def test_a_guides_rows_stand_between_those_that_were_sampled():
    reward, whole = Lengths(), rollouts(groups=2, g=3)  # of each three rows the last is the guide's
    whole = replace(whole, from_guide=torch.tensor([False, False, True] * 2))
    own = whole.rows(~whole.from_guide)
    early = AsyncRewards(reward, PROBLEMS, decode)
    early.submit(own.rows(torch.tensor([2, 1])), torch.tensor([2, 1]))
    found = early.result(whole, texts(whole))
    early.close()
    assert reward.asked == [(False, ["3", "1"]), (True, ["0", "2", "4", "5"])]
    assert found.rewards.tolist() == [1, 2, 3, 14, 15, 16]


def test_with_nothing_submitted_all_is_computed_at_the_end():
    rows = rollouts()
    early = AsyncRewards(reward := Lengths(), PROBLEMS, decode)
    torch.testing.assert_close(early.result(rows, texts(rows)), compute_rewards(Lengths(), texts(rows)))
    assert len(reward.asked) == 1


def test_what_a_reward_raises_in_its_thread_ends_the_rollout_batch():
    def broken(texts: Texts) -> list[float]:
        raise KeyError("judge")

    rows = rollouts()
    early = AsyncRewards(broken, PROBLEMS, decode)
    early.submit(rows, rows.group)
    with pytest.raises(RewardError, match="broken raised KeyError: 'judge'"):
        early.result(rows, texts(rows))


def test_where_sampling_fails_nothing_more_is_computed():
    begun, go_on = threading.Event(), threading.Event()

    def slow(texts: Texts) -> list[float]:
        begun.set()
        go_on.wait()
        return [0.0] * len(texts)

    rows = rollouts()
    early = AsyncRewards(slow, PROBLEMS, decode)
    for places in (torch.tensor([0, 1]), torch.tensor([2])):
        early.submit(rows.rows(places), places)
    begun.wait()
    early.close()
    go_on.set()
    (_, first), (_, second) = early.submitted
    assert first.result().rewards.tolist() == [0, 0]
    assert second.cancelled()


def test_terms_that_come_and_go_are_refused():
    def moody(texts: Texts) -> dict[str, list[float]]:
        return {"long" if len(texts) > 2 else "short": [1.0] * len(texts)}

    rows = rollouts()
    early = AsyncRewards(moody, PROBLEMS, decode)
    early.submit(rows.rows(slice(0, 2)), torch.tensor([0, 1]))
    with pytest.raises(RewardError, match="different terms for different completions"):
        early.result(rows, texts(rows))


class Telling(Scripted):
    def __call__(self, policy: object, prompts: Prompts, seed: int, on_finished: OnFinished | None = None):
        rows = super().__call__(policy, prompts, seed)
        assert on_finished is not None
        for place in reversed(range(1, len(rows))):  # the last first, and of the first nothing
            on_finished(rows.rows(torch.tensor([place])), torch.tensor([place]))
        return rows


class Hint:
    """One row a prompt, which is always right."""

    completions_per_prompt = 1

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        rows = Scripted()(None, prompts, seed).rows(slice(None, None, G))
        assert rows.completion_ids is not None
        return replace(rows, completion_ids=torch.ones_like(rows.completion_ids))


@pytest.mark.parametrize("guide", [None, Hint()], ids=["alone", "guide"])
@pytest.mark.parametrize("dynamic_sampling", [False, True])
def test_a_rollout_batch_is_the_same_as_with_rewards_afterwards(dynamic_sampling, guide):
    @pointwise
    def longer(texts: Texts) -> list[float]:
        """The number depends on the prompt, too."""
        threads.append(threading.current_thread() is threading.main_thread())
        return [
            float(c == a) + 0.01 * int(p.prompt)
            for c, a, p in zip(texts.completions, texts.answers, texts.problems, strict=True)
        ]

    found, threads = [], []
    for sampler in (Scripted(), Telling()):
        settings = {"reward": longer, "guide": guide, "dynamic_sampling": dynamic_sampling}
        found.append(run([0, 1, 3, 2, 1], 3, sampler=sampler, **settings)[0])
    assert threads[0]
    assert not all(threads)
    afterwards, early = found
    assert early.metrics == afterwards.metrics
    assert early.texts == afterwards.texts
    assert torch.equal(early.rollouts.rewards, afterwards.rollouts.rewards)
    assert (early.rollouts.from_guide is None) == (guide is None)
    assert torch.equal(early.rollouts.mask, afterwards.rollouts.mask)


class Silent:
    completions_per_prompt = 1
    temperature = 1.0

    def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
        return build_rollouts()


def plain(texts: Texts) -> list[float]:
    return [0.0] * len(texts)


def declared(texts: Texts, by: float = 1.0) -> list[float]:
    return [by] * len(texts)


pointwise(declared)


@pytest.mark.parametrize(
    ("reward", "may"),
    [
        (ExactMatch(), True),
        (plain, False),
        (partial(declared, by=2.0), True),
        (Grop(reward=ExactMatch(), max_tokens=64, buffer=8), True),
        (Grop(reward=plain, max_tokens=64, buffer=8), False),
        (Weighted(terms={"a": {"weight": 1, "reward": ExactMatch()}, "b": {"weight": 1, "reward": declared}}), True),
        (Weighted(terms={"a": {"weight": 1, "reward": ExactMatch()}, "b": {"weight": 1, "reward": plain}}), False),
    ],
)
def test_who_may(reward, may):
    assert supports_async_rewards(HF(), reward) is may
    assert not supports_async_rewards(Silent(), reward)


@pytest.mark.parametrize("rows_per_batch", [None, 10], ids=["all at once", "a prompt is split"])
def test_the_sampler_tells_of_each_row_once_and_as_it_stays(rows_per_batch):
    tiny = HFPolicy(path="tiny")
    tokenizer = tiny.tokenizer()
    policy = tiny.model(tokenizer).eval()
    problems = tuple(Problem(prompt="", answer="", source="") for _ in range(6))
    ids = torch.tensor([tokenizer(f"{i}+{i + 1}=")["input_ids"] for i in range(6)])
    prompts = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), problems=problems)
    sampler = HF(completions_per_prompt=4, max_new_tokens=30, rows_per_batch=rows_per_batch, temperature=1.5)
    reported: list[tuple[Rollouts, torch.Tensor]] = []
    whole = sampler(policy, prompts, 3, on_finished=lambda *rows: reported.append(rows))
    again = sampler(policy, prompts, 3)
    assert torch.equal(whole.completion_ids, again.completion_ids)
    assert sorted(torch.cat([places for _, places in reported]).tolist()) == list(range(24))
    assert len(reported) > 1
    assert 0 < whole.truncated.sum() < 24
    for rows, places in reported:
        expected = whole.rows(places)
        assert torch.equal(rows.group, expected.group)
        assert completion_texts(tokenizer, rows) == completion_texts(tokenizer, expected)
        assert torch.equal(rows.truncated, expected.truncated)
        assert torch.equal(rows.mask.sum(1), expected.mask.sum(1))


def test_a_computation_that_failed_has_no_terms_and_disturbs_nothing():
    """Completions 5 and 2 fail, each group of them by itself; the others have two terms."""

    def terms(texts: Texts) -> dict[str, list[float]]:
        if {"5", "2"} & set(texts.completions):
            raise ConnectionError("503")
        return {"a": [float(text) for text in texts.completions], "b": [0.5] * len(texts)}

    rows = rollouts()
    early = AsyncRewards(Supervised(supervised=pointwise(terms), on_error="zero"), PROBLEMS, decode)
    for places in (torch.tensor([5]), torch.tensor([0, 7, 6]), torch.tensor([2])):
        early.submit(rows.rows(places), places)
    with pytest.warns(UserWarning, match="503"):
        found = early.result(rows, texts(rows))
    early.close()
    failed = [place in (2, 5) for place in range(8)]
    assert found.failed[""].errors.tolist() == failed
    assert found.rewards.tolist() == [0.0 if bad else place + 0.5 for place, bad in enumerate(failed)]
    assert found.terms["b"].tolist() == [0.0 if bad else 0.5 for bad in failed]


def test_terms_that_differ_between_completions_are_an_error():
    def terms(texts: Texts) -> dict[str, list[float]]:
        return {f"of_{len(texts)}": [1.0] * len(texts)}

    rows = rollouts()
    early = AsyncRewards(pointwise(terms), PROBLEMS, decode)
    early.submit(rows.rows(torch.tensor([5, 2])), torch.tensor([5, 2]))
    with pytest.raises(RewardError, match="different terms for different completions"):
        early.result(rows, texts(rows))
    early.close()
