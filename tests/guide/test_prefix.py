"""POPE's guide: the beginning of a known solution in the prompt, for problems that the policy fails on."""

import json
import logging
from dataclasses import dataclass, replace

import pytest
import torch

from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.guide.prefix import Prefix
from rlmod.model.policy import HFPolicy
from rlmod.rollout.collect import Stages, collect
from rlmod.rollout.prompts import PromptEncoder
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.types import Problem, Prompts, Rollouts, build_rollouts
from tests.command_line import SHORT, refused
from tests.rollout.scripted import exact
from tests.runs import finished, metrics

TOKENIZER = HFPolicy(path="tiny").tokenizer()
PLAIN = "{prompt}{prefix}"
SOLVED = Problem(
    prompt="3+5*2:", answer="6", source="a", extra={"solution": "3+5=8,8*2=6#6", "nested": {"deep": "3+5=8#8"}}
)


def guide(**settings) -> Prefix:
    given = {"encoder": PromptEncoder(), "field": "solution", "template": PLAIN, **settings}
    made = Prefix(**given)
    made.prepare([SOLVED], TOKENIZER)
    return made


def encoded(*problems: Problem) -> Prompts:
    return PromptEncoder().encode(problems, TOKENIZER).batch(range(len(problems)))


def text_of(prompts: Prompts) -> list[str]:
    return [str(TOKENIZER.decode(row[kept])) for row, kept in zip(prompts.ids, prompts.mask, strict=True)]


def test_the_prompt_holds_the_first_tokens_of_the_solution_by_hand():
    # 13 characters, one token each: 1/4, 1/2 and 3/4 of them, rounded down, are 3, 6 and 9.
    found = [text_of(guide().guided_prompts(encoded(SOLVED), attempt)) for attempt in range(3)]
    assert found == [["3+5*2:3+5"], ["3+5*2:3+5=8,"], ["3+5*2:3+5=8,8*2"]]
    assert text_of(guide(field="nested.deep").guided_prompts(encoded(SOLVED), 2)) == ["3+5*2:3+5=8"]
    # At least one token, and never the whole solution.
    assert text_of(guide(lengths=[0.001, 0.999]).guided_prompts(encoded(SOLVED), 0)) == ["3+5*2:3"]
    assert text_of(guide(lengths=[0.001, 0.999]).guided_prompts(encoded(SOLVED), 1)) == ["3+5*2:3+5=8,8*2=6#"]


def test_the_template_puts_it_into_the_last_message_of_a_chat():
    chat = replace(SOLVED, prompt=({"role": "system", "content": "s"}, {"role": "user", "content": "{3}+5"}))
    made = guide(template="{prompt} -> {prefix}{")
    assert made._guided(chat, 0.25).prompt[1]["content"] == "{3}+5 -> 3+5{"
    assert made._guided(chat, 0.25).prompt[0]["content"] == "s"


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text, add_special_tokens):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def test_a_prefix_ends_with_a_whole_character():
    made = guide()
    made.tokenizer[:] = [Bytes()]  # pyright: ignore[reportArgumentType, reportCallIssue]
    root = replace(SOLVED, extra={"solution": "x=√2+1"})  # 8 bytes, of which √ has three
    assert [made._guided(root, share).prompt for share in (0.25, 0.4, 0.5, 0.65)] == [
        "3+5*2:x=", "3+5*2:x=", "3+5*2:x=", "3+5*2:x=√",
    ]  # fmt: skip
    assert made._guided(replace(SOLVED, extra={"solution": "√2"}), 0.25).prompt == "3+5*2:√"


def test_solutions_may_come_from_a_file(tmp_path, caplog):
    path = tmp_path / "solutions.jsonl"
    path.write_text(json.dumps({"prompt": "3+5*2:", "completion": "3+5=8#8"}) + "\n", encoding="utf-8")
    made = Prefix(encoder=PromptEncoder(), path=str(path), template=PLAIN)
    other = replace(SOLVED, prompt="1+1:", extra={})
    with caplog.at_level(logging.WARNING):
        made.prepare([SOLVED, other], TOKENIZER)
    assert "no solution for 1 of 2 problems" in caplog.text
    assert (made.can_guide(SOLVED), made.can_guide(other)) == (True, False)
    assert text_of(made.guided_prompts(encoded(SOLVED), 2)) == ["3+5*2:3+5=8"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": [0.5, 1.5]}, r"guide\.lengths=.*1\.5 is no share .* a prefix cannot be longer than the solution"),
        ({"lengths": [0.0]}, r"guide\.lengths=.*0\.0 is no share of the solution above 0 and below 1$"),
        ({"lengths": []}, r"guide\.lengths=\[\] must be at least one share"),
        ({"lengths": [0.5, 0.25]}, r"each above the one before it"),
        ({"path": "x.jsonl"}, r"guide\.path or guide\.field: give the one"),
        ({"field": None}, r"guide\.path or guide\.field: give the one"),
        ({"field": None, "path": "missing.jsonl"}, r"guide\.path=missing\.jsonl: there is no such file"),
        ({"template": "{prompt}"}, r"guide\.template must contain \{prefix\} once"),
        ({"template": "{prompt} {prefix} {prompt}"}, r"guide\.template must contain \{prompt\} once"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Prefix(**{"encoder": PromptEncoder(), "field": "solution", **settings})


def test_bad_solutions(tmp_path):
    made = Prefix(encoder=PromptEncoder(), field="solution")
    with pytest.raises(ValueError, match=r"a: the solution '6' is a single token, and the prefix must be shorter"):
        made.prepare([replace(SOLVED, extra={"solution": "6"})], TOKENIZER)
    with pytest.raises(ValueError, match=r"a: guide\.field=solution must be text, got int"):
        made.prepare([replace(SOLVED, extra={"solution": 6})], TOKENIZER)
    with pytest.raises(ValueError, match=r"guide\.field=solution holds no solution for any of the 1 problems"):
        made.prepare([replace(SOLVED, extra={})], TOKENIZER)
    path = tmp_path / "solutions.jsonl"
    path.write_text('{"prompt": "1:", "completion": 3}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"solutions\.jsonl:1: completion must be the text of a solution, got 3"):
        Prefix(encoder=PromptEncoder(), path=str(path)).prepare([SOLVED], TOKENIZER)


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """A plain prompt is always failed; a guided one is solved once if its prefix is at least as long as the answer says."""

    completions_per_prompt: int = 4
    temperature: float = 1.0

    def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
        lengths = prompts.mask.sum(1)
        rows = len(prompts) * 4
        group = torch.arange(len(prompts)).repeat_interleave(4)
        needed = torch.tensor([int(str(problem.extra["needed"])) for problem in prompts.problems])
        right = (torch.arange(rows) % 4 == 0) & (lengths >= needed)[group]
        return build_rollouts(
            prompt_ids=prompts.ids[group], prompt_mask=prompts.mask[group], completion_ids=right.long()[:, None].repeat(1, 2),
            mask=torch.ones(rows, 2, dtype=torch.bool), group=group, logprobs=torch.full((rows, 2), -1.0),
            entropy=torch.ones(rows, 2), truncated=torch.zeros(rows, dtype=torch.bool),
        )  # fmt: skip


def gather(*needed: int, keep: int | None = None):
    """One rollout batch of failed problems whose guided prompt must have so many tokens; the plain prompts have 6, the guided 9, 12, 15."""
    problems = [replace(SOLVED, answer="1", source=f"p{n}", extra={**SOLVED.extra, "needed": n}) for n in needed]
    stages = Stages(
        policy=torch.nn.Identity(), decode=lambda rows: [str(int(row[0])) for row in rows.completion_ids],
        logprob_pass=lambda rows: rows, next_prompts=lambda n: encoded(*problems), sampler=Scripted(), guide=guide(),
        reward=exact, filter=DynamicSampling(max_generation_batches=1), zero_reward=ZeroReward(weight=1.0),
        seed=lambda *place: sum(place),
    )  # fmt: skip
    return collect(stages, num_groups=len(needed), max_guided_groups=len(needed) if keep is None else keep)


def test_the_shortest_prefix_that_solves_a_problem_trains_in_a_group_of_its_own():
    batch = gather(9, 15, 99)  # solved with 1/4, with 3/4, and never
    rows = batch.rollouts.rows(batch.rollouts.sub_batch == 1)
    assert len(rows) == 8
    assert rows.prompt_mask.sum(1).tolist() == [9] * 4 + [15] * 4
    assert len(set(rows.group.tolist())) == 2
    assert not set(rows.group.tolist()) & set(batch.rollouts.group[batch.rollouts.sub_batch == 0].tolist())
    assert rows.rewards.tolist() == [1, 0, 0, 0] * 2
    # The completions are the policy's own: no loss on the prefix, and the denominator of the ratio is pi_old.
    assert not rows.from_guide.any()
    assert (rows.logprobs == -1).all()
    assert rows.completion_ids.shape[1] == 2
    found = {
        name: batch.metrics[name] for name in ("zero_reward/prompts", "prompts/rescued", "zero_reward/guide_failed")
    }
    assert found == pytest.approx(
        {"zero_reward/prompts": 3, "prompts/rescued": 2 / 3, "zero_reward/guide_failed": 1 / 3}
    )
    # 3 + 2 + 2 guided prompts of 4 completions of 2 tokens were sampled.
    assert batch.metrics["guide/tokens"] == 7 * 4 * 2


def test_a_guided_prompt_that_the_engine_would_cut_is_not_sampled(monkeypatch):
    """The plain prompts have 6 tokens, and the guided ones 9, 12 and 15; this engine has room for 12 and a completion."""
    monkeypatch.setattr(Scripted, "max_model_len", 14, raising=False)
    monkeypatch.setattr(Scripted, "max_new_tokens", 2, raising=False)
    batch = gather(12, 15)
    assert batch.rollouts.rows(batch.rollouts.sub_batch == 1).prompt_mask.sum(1).tolist() == [12] * 4
    assert batch.metrics["zero_reward/guide_failed"] == 0.5
    assert batch.metrics["guide/tokens"] == 4 * 4 * 2


def test_no_more_prompts_are_guided_than_the_limit():
    assert gather(9, 9, 9, keep=2).metrics["zero_reward/prompts"] == 2
    assert gather(99, keep=1).rollouts.sub_batch.sum() == 0


def test_a_run_trains_on_guided_prompts(tmp_path):
    run = finished(
        tmp_path / "run", "experiment=pope", *SHORT, "trainer.max_epochs=2", "filter.max_generation_batches=1"
    )
    seen = [row for row in metrics(run) if row.get("zero_reward/prompts")]
    assert any(float(row["zero_reward/prompts"]) > 0 for row in seen)


def test_it_is_for_the_zero_reward_batch(monkeypatch, tmp_path):
    said = refused(monkeypatch, tmp_path, "experiment=pope", "zero_reward.keep_if_guide_fails=true")
    assert "zero_reward.keep_if_guide_fails=true with guide Prefix" in said
    assert "guide.path or guide.field" in refused(monkeypatch, tmp_path, "experiment=pope", "guide=prefix")
