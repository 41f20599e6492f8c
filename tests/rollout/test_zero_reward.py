"""The guide within a rollout batch, with scripted completions: who joins whom, what is filtered, rescued and counted."""

from dataclasses import dataclass, replace

import pytest
import torch

from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.filter.keep_all import KeepAll
from rlmod.rollout.collect import RolloutBatch, Stages, collect
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.types import Problem, Prompts, Rollouts, build_rollouts
from tests.rollout.scripted import exact

G = 3


def rows_of(prompts: Prompts, number: int, right: list[int], logprob: float) -> Rollouts:
    """The first ``right[i]`` of prompt i's rows say 1, the others 0."""
    group = torch.arange(len(prompts)).repeat_interleave(number)
    place = torch.arange(number).repeat(len(prompts))
    ids = (place < torch.tensor(right)[group]).long()[:, None].repeat(1, 2)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return build_rollouts(
        prompt_ids=prompts.ids[group], prompt_mask=prompts.mask[group], completion_ids=ids, mask=mask, group=group,
        logprobs=torch.full((len(ids), 2), logprob), sampler_logprobs=torch.full((len(ids), 2), logprob),
        truncated=torch.zeros(len(ids), dtype=torch.bool),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """A prompt ``2/1`` has 2 right on-policy completions, and 1 right one by the guide."""

    completions_per_prompt: int = G
    temperature: float = 1.0

    def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
        right = [int(str(problem.prompt).split("/")[0]) for problem in prompts.problems]
        rows = rows_of(prompts, G, right, -1.0)
        return replace(rows, entropy=torch.ones(len(rows), 2))


@dataclass(frozen=True, kw_only=True)
class ScriptedGuide:
    completions_per_prompt: int = 2

    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
        right = [int(str(problem.prompt).split("/")[1]) for problem in prompts.problems]
        return rows_of(prompts, completions_per_prompt, right, -2.0)


def scored(rollouts: Rollouts) -> Rollouts:
    if rollouts.logprobs is not None and rollouts.entropy is not None:
        return rollouts
    filled = torch.full(rollouts.mask.shape, 0.5)
    return replace(rollouts, entropy=filled, logprobs=-filled)


def run(
    kinds: list[str],
    prompts: int,
    guide=None,
    zero_reward=None,
    sampler=None,
    max_groups: int | None = None,
    dynamic_sampling=False,
    reward=exact,
    filter=None,
    **settings,
) -> RolloutBatch:
    seen_so_far = 0

    def next_prompts(n: int) -> Prompts:
        nonlocal seen_so_far
        chosen = [kinds[(seen_so_far + i) % len(kinds)] for i in range(n)]
        seen_so_far += n
        problems = tuple(Problem(prompt=kind, answer="1", source=kind) for kind in chosen)
        ones = torch.ones(n, 1)
        return Prompts(ids=ones.long(), mask=ones.bool(), problems=problems)

    stages = Stages(
        policy=torch.nn.Identity(), decode=lambda rows: [str(int(row[0])) for row in rows.completion_ids],
        logprob_pass=scored, next_prompts=next_prompts, sampler=sampler or Scripted(), guide=guide,
        reward=reward,
        filter=DynamicSampling(**settings) if dynamic_sampling else filter or KeepAll(),
        zero_reward=zero_reward or ZeroReward(), seed=lambda *place: hash(place),
    )  # fmt: skip
    return collect(stages, num_groups=prompts, max_guided_groups=prompts if max_groups is None else max_groups)


def test_the_guides_rows_join_each_prompts_own():
    rows = run(["1/2", "0/1"], 2, ScriptedGuide()).rollouts
    assert rows.group.tolist() == [0] * 5 + [1] * 5
    assert rows.from_guide.tolist() == [False, False, False, True, True] * 2
    assert rows.rewards.tolist() == [1, 0, 0, 1, 1, 0, 0, 0, 1, 0]
    assert rows.logprobs[:, 0].tolist() == [-1, -1, -1, -2, -2] * 2  # the guide's stay its own
    assert rows.entropy[:, 0].tolist() == [1, 1, 1, 0.5, 0.5] * 2  # the policy's, everywhere


class Bare(Scripted):
    """A sampler that records neither log-probabilities nor entropies."""

    def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
        return replace(super().__call__(policy, prompts, seed), logprobs=None, entropy=None)


def test_the_guides_rows_join_those_of_a_sampler_that_records_nothing():
    rows = run(["1/2"], 1, ScriptedGuide(), sampler=Bare()).rollouts
    assert rows.logprobs[:, 0].tolist() == [-0.5, -0.5, -0.5, -2, -2]
    assert rows.entropy[:, 0].tolist() == [0.5] * 5


def with_terms(texts):
    """The exact reward, None for the completions of prompt 2/2, and a term that is 0."""
    values = [None if p.prompt == "2/2" else v for p, v in zip(texts.problems, exact(texts), strict=True)]
    return {"exact": values, "none": [0.0] * len(values)}


def test_metrics_without_guide_in_their_name_cover_scored_on_policy_completions_only():
    metrics = run(["1/2", "2/2"], 2, ScriptedGuide(), reward=with_terms).metrics
    assert metrics["reward/exact"] == metrics["reward/mean"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("over", "trained"), [("union", ["1/2", "0/1", "3/0"]), ("own", ["1/2"])])
def test_what_the_filter_looks_at(over, trained):
    """The union has signal in three of 1/2, 0/1, 3/0, 0/0, 3/2, the on-policy completions in one."""
    collected = run(["1/2", "0/1", "3/0", "0/0", "3/2"], 5, ScriptedGuide(), dynamic_sampling=True, over=over,
                    max_generation_batches=1)  # fmt: skip
    counted = {p.prompt for p, m in zip(collected.texts.problems, collected.rollouts.mask, strict=True) if m.any()}
    assert counted == set(trained)
    # What is said of the prompts is said of the policy's on-policy completions.
    shares = [collected.metrics[f"prompts/{kind}"] for kind in ("all_correct", "mixed", "all_incorrect")]
    assert shares == pytest.approx([0.4, 0.2, 0.4])
    assert collected.metrics["reward/mean"] == pytest.approx(7 / 15)
    assert collected.metrics["guide/reward"] == pytest.approx(5 / 10)
    assert collected.metrics["guide/tokens"] == 20


def test_a_prompt_that_the_joining_guide_gave_signal_is_not_in_both_batches():
    guide, zero = ScriptedGuide(), ZeroReward(weight=1.0, completions_per_prompt=2, keep_if_guide_fails=True)
    collected = run(["1/2", "0/1", "0/0"], 3, guide, zero, dynamic_sampling=True, max_generation_batches=1)
    rows, prompts = collected.rollouts, [problem.prompt for problem in collected.texts.problems]
    trained = [(p, bool(z)) for p, z, m in zip(prompts, rows.sub_batch.bool(), rows.mask, strict=True) if m.any()]
    assert set(trained) == {("1/2", False), ("0/1", False), ("0/0", True)}
    assert collected.metrics["zero_reward/prompts"] == 1


KINDS = ["1/2", "0/1", "3/2", "0/0"]


def test_failed_prompts_become_a_batch_of_their_own():
    zero = ZeroReward(weight=1.0, completions_per_prompt=2)
    collected = run(
        KINDS, 4, ScriptedGuide(completions_per_prompt=0), zero, dynamic_sampling=True, max_generation_batches=1
    )
    rows = collected.rollouts
    main, extra = rows.rows(~rows.sub_batch.bool()), rows.rows(rows.sub_batch.bool())
    assert len(main) == 12
    assert [p.prompt for p, m in zip(collected.texts.problems[:12], main.mask, strict=True) if m.any()] == ["1/2"] * 3
    # 0/1: three own ones and two of the guide; 0/0, where the guide fails too, stays dropped, and so does 3/2.
    assert [p.prompt for p in collected.texts.problems[12:]] == ["0/1"] * 5
    assert extra.rewards.tolist() == [0, 0, 0, 1, 0]
    assert extra.from_guide.tolist() == [False, False, False, True, True]
    assert extra.logprobs[:, 0].tolist() == [-1, -1, -1, -2, -2]
    assert not set(extra.group.tolist()) & set(main.group.tolist())
    assert {name: collected.metrics[name] for name in ("prompts/rescued", "prompts/dropped", "zero_reward/prompts")} == {
        "prompts/rescued": 0.25, "prompts/dropped": 0.5, "zero_reward/prompts": 2.0,
    }  # fmt: skip
    assert collected.metrics["zero_reward/guide_failed"] == 0.5
    assert collected.metrics["guide/tokens"] == 8


def test_weight_0_asks_nothing_and_leaves_the_rollout_batch_as_it_was():
    class Asked(ScriptedGuide):
        def __call__(self, *_):
            pytest.fail("the guide was asked")

    plain = run(KINDS, 4, None, dynamic_sampling=True)
    off = run(KINDS, 4, Asked(completions_per_prompt=0), ZeroReward(weight=0.0), dynamic_sampling=True)
    assert off.metrics == plain.metrics
    assert off.rollouts.sub_batch is None
    assert torch.equal(off.rollouts.completion_ids, plain.rollouts.completion_ids)


def test_a_guide_that_fails_everywhere_is_counted_and_the_rest_goes_on():
    zero = ZeroReward(weight=1.0)
    settings = {"dynamic_sampling": True, "max_generation_batches": 1}
    collected = run(["1/0", "0/0"], 4, ScriptedGuide(completions_per_prompt=0), zero, **settings)
    assert not collected.rollouts.sub_batch.bool().any()
    assert collected.rollouts.mask.any()
    assert collected.metrics["zero_reward/guide_failed"] == 1
    assert collected.metrics["prompts/rescued"] == 0
    kept = run(
        ["1/0", "0/0"], 4, ScriptedGuide(completions_per_prompt=0), replace(zero, keep_if_guide_fails=True), **settings
    )
    assert kept.rollouts.sub_batch.bool().sum() == 2 * 5


def test_no_more_than_max_groups():
    collected = run(["0/1"], 6, ScriptedGuide(completions_per_prompt=0), ZeroReward(weight=1.0), max_groups=2,
                    dynamic_sampling=True, max_generation_batches=2)  # fmt: skip
    assert collected.rollouts.sub_batch.bool().sum() == 2 * 5
    assert collected.metrics["prompts/rescued"] == pytest.approx(2 / 12)
    assert not collected.rollouts.rows(~collected.rollouts.sub_batch.bool()).mask.any()


def test_with_no_prompt_failed_the_batch_is_empty():
    collected = run(["1/0"], 2, ScriptedGuide(completions_per_prompt=0), ZeroReward(weight=1.0), dynamic_sampling=True)
    assert not collected.rollouts.sub_batch.bool().any()
    assert collected.metrics["zero_reward/prompts"] == 0


@pytest.mark.parametrize(("field", "value"), [("weight", -1.0), ("completions_per_prompt", 0), ("prompts", 0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"zero_reward\.{field}"):
        ZeroReward(**{field: value})


def test_max_groups_is_shared_among_ranks():
    assert ZeroReward().max_groups(8, 2) == 0
    assert ZeroReward(weight=1.0).max_groups(8, 2) == 8
    assert [ZeroReward(weight=1.0, prompts=5).max_groups(8, 2, rank) for rank in (0, 1)] == [3, 2]


def test_the_policy_and_the_guide_never_sample_with_the_same_seed():
    """A guide that is much like the policy would repeat the policy's completions if it had the same seed."""
    seeds: list[int] = []

    class Noting(ScriptedGuide):
        def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:
            seeds.append(seed)
            return super().__call__(prompts, completions_per_prompt, seed)

    class NotingSampler(Scripted):
        def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
            seeds.append(seed)
            return super().__call__(policy, prompts, seed)

    zero = ZeroReward(weight=1.0)
    settings = {"dynamic_sampling": True, "max_generation_batches": 3, "over": "own"}
    run(["0/1"], 4, Noting(), zero, NotingSampler(), max_groups=12, **settings)
    assert len(seeds) == 9  # three batches, each with its guide, and three batches of failed prompts
    assert len(set(seeds)) == 9


def test_the_guides_log_probabilities_survive_a_sampler_that_hands_over_none():
    zero = ZeroReward(weight=1.0)
    settings = {"dynamic_sampling": True, "max_generation_batches": 1}
    rows = run(["1/0", "0/1"], 2, ScriptedGuide(completions_per_prompt=0), zero, Bare(), **settings).rollouts
    assert rows.logprobs[:, 0].tolist() == [-0.5] * 9 + [-2.0] * 2


def abstaining_from(*completions: int):
    """The exact reward, None for these completions of every prompt; on-policy ones come first."""

    def reward(texts):
        seen: dict[int, int] = {}
        places = [seen.update({g: seen.get(g, -1) + 1}) or seen[g] for g in texts.group]
        return [None if p in completions else value for p, value in zip(places, exact(texts), strict=True)]

    return reward


def test_a_group_is_classified_by_its_scored_on_policy_completions():
    # 3/0 without the third: all correct. 1/2 without the first: all incorrect.
    for prompt, missing, kind in (("3/0", 2, "all_correct"), ("1/2", 0, "all_incorrect")):
        metrics = run([prompt], 1, ScriptedGuide(), reward=abstaining_from(missing)).metrics
        assert metrics[f"prompts/{kind}"] == 1


def test_the_zero_reward_batch_leaves_out_what_the_reward_abstains_from():
    """The first of the guide's completions, which is the correct one, has no reward: the guide rescued nothing."""
    settings = {"dynamic_sampling": True, "max_generation_batches": 1}
    guide = ScriptedGuide(completions_per_prompt=0)
    collected = run(["0/1", "1/0"], 2, guide, ZeroReward(weight=1.0), reward=abstaining_from(3), **settings)
    assert collected.metrics["prompts/rescued"] == 0
    collected = run(["0/2", "1/0"], 2, guide, ZeroReward(weight=1.0), reward=abstaining_from(1, 3), **settings)
    extra = collected.rollouts.rows(collected.rollouts.sub_batch == 1)
    assert extra.abstained.tolist() == [False, True, False, True, False]
    assert extra.mask.any(1).tolist() == [True, False, True, False, True]
    assert collected.metrics["failures/abstained"] == 2  # one of each sampled group


def test_a_group_that_the_filter_keeps_is_not_in_the_zero_reward_batch():
    def keep_first(rollouts):
        return torch.arange(int(rollouts.group.max()) + 1) == 0

    zero = ZeroReward(weight=1.0, keep_if_guide_fails=True)
    collected = run(["0/1", "0/0"], 2, ScriptedGuide(completions_per_prompt=0), zero, filter=keep_first)
    extra = collected.rollouts.sub_batch == 1
    assert {p.prompt for p, e in zip(collected.texts.problems, extra.tolist(), strict=True) if e} == {"0/0"}
