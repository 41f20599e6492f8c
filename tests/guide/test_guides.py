"""The two guides, with the shipped policies: what they hand over, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlmod import ops
from rlmod.data.arithmetic import Arithmetic
from rlmod.guide.demonstrations import Demonstrations
from rlmod.guide.policy import Policy
from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import HFPolicy, completion_texts
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF

STRONG = HFPolicy(path="strong")
SETTINGS = {"policy": STRONG, "sampler": HF(temperature=0.7, max_new_tokens=48)}


@pytest.fixture(scope="module")
def tokenizer():
    return STRONG.tokenizer()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    problems = Arithmetic(split="train", size=4)()
    return PromptEncoder().encode(problems, tokenizer).batch(range(4))


def test_a_policy_guide_samples_and_scores_by_itself(prompts, tokenizer):
    guide = Policy(**SETTINGS)
    guide.prepare(prompts.problems, tokenizer)
    rows = guide(prompts, 3, seed=1)
    assert rows.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    texts = completion_texts(tokenizer, rows)
    right = [
        text.endswith("#" + prompts.problems[g].answer) for text, g in zip(texts, rows.group.tolist(), strict=True)
    ]
    assert sum(right) >= 10  # the strong policy nearly always is
    # log pi_phi at its own temperature, as a forward pass of it says
    logits = completion_logits(STRONG.frozen(), rows)
    again = ops.token_logprobs(logits, rows.completion_ids, 0.7)
    torch.testing.assert_close(rows.logprobs, again * rows.mask, atol=1e-4, rtol=0)
    assert torch.equal(guide(prompts, 3, seed=1).completion_ids, rows.completion_ids)
    one = replace(guide, ratio="one")(prompts, 3, seed=1)
    assert (one.logprobs == 0).all()
    assert (one.sampler_logprobs == 0).all()  # or truncated importance sampling would find a difference
    assert torch.equal(one.completion_ids, rows.completion_ids)


def test_a_guide_with_another_vocabulary_is_refused(prompts, tokenizer):
    other = STRONG.tokenizer()
    other.add_tokens(["<think>"])
    with pytest.raises(ValueError, match=r"guide\.policy\.path=strong.*1 of 100 tokens differ, for example '<think>'"):
        Policy(**SETTINGS).prepare(prompts.problems, other)


def test_a_guide_is_frozen():
    assert not any(parameter.requires_grad for parameter in Policy(**SETTINGS).model.parameters())
    assert not Policy(**SETTINGS).model.training


def recorded(tmp_path: Path, rows, prompts, tokenizer, **changes) -> Path:
    """The rows as a file of demonstrations."""
    path = tmp_path / "demonstrations.jsonl"
    lengths = rows.mask.sum(1).tolist()
    with path.open("w") as file:
        for row, text in enumerate(completion_texts(tokenizer, rows)):
            n = lengths[row]
            record = {
                "prompt": prompts.problems[int(rows.group[row])].prompt,
                "completion": text,
                "completion_ids": rows.completion_ids[row, :n].tolist(),
                "logprobs": rows.logprobs[row, :n].tolist(),
                "truncated": bool(rows.truncated[row]),
            }
            file.write(
                json.dumps({key: value for key, value in {**record, **changes}.items() if value != "drop"}) + "\n"
            )
    return path


@pytest.fixture
def sampled(prompts, tokenizer):
    guide = Policy(**SETTINGS)
    return guide(prompts, 2, seed=0)


def test_recorded_completions_are_what_was_sampled(sampled, prompts, tokenizer, tmp_path):
    guide = Demonstrations(path=str(recorded(tmp_path, sampled, prompts, tokenizer)))
    guide.prepare(prompts.problems, tokenizer)
    rows = guide(prompts, 2, seed=5)
    for name in ("mask", "group", "truncated", "prompt_ids", "prompt_mask"):
        assert torch.equal(getattr(rows, name), getattr(sampled, name)), name
    assert torch.equal(rows.completion_ids * rows.mask, sampled.completion_ids * rows.mask)
    torch.testing.assert_close(rows.logprobs, sampled.logprobs)


def test_texts_alone_are_tokenized_and_ended(sampled, prompts, tokenizer, tmp_path):
    path = recorded(tmp_path, sampled, prompts, tokenizer, completion_ids="drop", logprobs="drop")
    guide = Demonstrations(path=str(path), ratio="one")
    guide.prepare(prompts.problems, tokenizer)
    rows = guide(prompts, 2, seed=0)
    assert torch.equal(rows.completion_ids * rows.mask, sampled.completion_ids * rows.mask)
    assert torch.equal(rows.mask, sampled.mask)
    assert (rows.logprobs == 0).all()


def test_an_end_is_written_once_and_without_one_a_completion_counts_as_truncated(sampled, prompts, tokenizer, tmp_path):
    bare = {"completion_ids": "drop", "logprobs": "drop"}
    guide = Demonstrations(
        path=str(recorded(tmp_path, sampled, prompts, tokenizer, **bare, completion="#7<eos>")), ratio="one"
    )
    guide.prepare(prompts.problems, tokenizer)
    assert guide(prompts, 1, 0).completion_ids[0].tolist() == [*tokenizer("#7")["input_ids"], tokenizer.eos_token_id]
    unended = {
        "completion_ids": tokenizer("#7")["input_ids"],
        "completion": "#7",
        "logprobs": "drop",
        "truncated": "drop",
    }
    guide = Demonstrations(path=str(recorded(tmp_path, sampled, prompts, tokenizer, **unended)), ratio="one")
    guide.prepare(prompts.problems, tokenizer)
    assert guide(prompts, 1, 0).truncated.all()


def test_of_more_than_are_needed_some_are_chosen_by_the_seed(sampled, prompts, tokenizer, tmp_path):
    several = Policy(policy=STRONG, sampler=HF(temperature=2.0, max_new_tokens=48))(prompts, 5, 0)
    guide = Demonstrations(path=str(recorded(tmp_path, several, prompts, tokenizer)))
    guide.prepare(prompts.problems, tokenizer)
    chosen = {tuple(guide(prompts, 2, seed).completion_ids.flatten().tolist()) for seed in (0, 1, 2, 0)}
    assert 1 < len(chosen) <= 3
    more = guide(prompts, 7, 0)  # as the zero-reward batch may ask: they come round again
    assert len(more) == 28


def test_longer_ones_are_cut_and_count_as_truncated(sampled, prompts, tokenizer, tmp_path):
    guide = Demonstrations(path=str(recorded(tmp_path, sampled, prompts, tokenizer)), max_tokens=6)
    guide.prepare(prompts.problems, tokenizer)
    rows = guide(prompts, 2, 0)
    assert rows.mask.sum(1).max() == 6
    assert torch.equal(rows.truncated, sampled.mask.sum(1) > 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "9+9:"}, r"demonstrations\.jsonl:1: no problem of data\.train has this prompt, or .*: '9\+9:'"),
        ({"prompt": 3}, r":1: prompt must be text"),
        ({"logprobs": [0.0]}, r":1: logprobs must be one number per token: \d+ tokens \(EOS included\), got 1"),
        (
            {"logprobs": [-(10**400)] * 3, "completion_ids": [5, 6, 1], "completion": "drop"},
            r":1: a log-probability is a finite",
        ),
        ({"logprobs": "drop"}, r":1: no logprobs.*guide\.ratio=one"),
        ({"completion_ids": [1, 5, 1]}, r":1: completion_ids has an EOS \(1\) at index 0 and tokens after it"),
        ({"completion_ids": [True, True]}, r":1: completion_ids must be token ids"),
        ({"completion": "#99"}, r":1: completion and completion_ids differ: '#99', but the tokens decode to '"),
        ({"completion_ids": [500]}, r":1: completion_ids must be token ids from 0 to 98"),
        ({"completion_ids": []}, r":1: completion_ids"),
        ({"completion_ids": "drop", "completion": 4}, r":1: completion must be text"),
    ],
)
def test_a_bad_line_is_named(changes, message, sampled, prompts, tokenizer, tmp_path):
    path = recorded(tmp_path, sampled, prompts, tokenizer, **changes)
    with pytest.raises(ValueError, match=message):
        Demonstrations(path=str(path)).prepare(prompts.problems, tokenizer)


@pytest.mark.parametrize("added", [3, float("-inf")])
def test_a_log_probability_above_0_or_infinite_is_named(added, sampled, prompts, tokenizer, tmp_path):
    wrong = replace(sampled, logprobs=sampled.logprobs + added)
    with pytest.raises(ValueError, match=r":1: a log-probability is a finite number of at most 0, got (\d|-inf)"):
        Demonstrations(path=str(recorded(tmp_path, wrong, prompts, tokenizer))).prepare(prompts.problems, tokenizer)


def test_a_problem_without_demonstrations_is_named(sampled, prompts, tokenizer, tmp_path):
    guide = Demonstrations(path=str(recorded(tmp_path, sampled.rows(slice(0, 7)), prompts, tokenizer)))
    with pytest.raises(ValueError, match=r"1 of the 2 demonstrations that the prompt of arithmetic:.* 1 of 4 problems"):
        guide.prepare(prompts.problems, tokenizer)


def test_broken_lines_and_missing_files_are_named(prompts, tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not a JSON object"):
        Demonstrations(path=str(file)).prepare(prompts.problems, tokenizer)
    file.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not UTF-8"):
        Demonstrations(path=str(file)).prepare(prompts.problems, tokenizer)
    with pytest.raises(ValueError, match=r"guide\.path=/nowhere: there is no such file"):
        Demonstrations(path="/nowhere")


@pytest.mark.parametrize("guide", [Policy, Demonstrations])
def test_a_negative_number_of_completions_is_refused(guide, tmp_path):
    (tmp_path / "a.jsonl").touch()
    settings = SETTINGS if guide is Policy else {"path": str(tmp_path / "a.jsonl")}
    with pytest.raises(ValueError, match=r"guide\.completions_per_prompt must be 0"):
        guide(**settings, completions_per_prompt=-1)


def test_any_sampler_will_do_for_a_guide(prompts, tokenizer):
    """One that is no dataclass, and hands over no log-probabilities: the guide scores them itself."""

    class Plain:
        completions_per_prompt, temperature = 1, 0.7

        def __call__(self, policy, prompts, seed):
            inner = HF(completions_per_prompt=self.completions_per_prompt, temperature=0.7, max_new_tokens=48)
            return replace(inner(policy, prompts, seed), logprobs=None, entropy=None, sampler_logprobs=None)

    expected = Policy(policy=STRONG, sampler=HF(temperature=0.7, max_new_tokens=48))(prompts, 3, seed=1)
    found = Policy(policy=STRONG, sampler=Plain())(prompts, 3, seed=1)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, atol=1e-4, rtol=0)
