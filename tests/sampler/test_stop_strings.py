"""Stop strings: where a completion ends, and what is kept of it."""

from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models

from rlmod import ops
from rlmod.data.arithmetic import Arithmetic
from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import HFPolicy, attach_tokenizer, completion_texts
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler._sampling import VLLMSamplingParameters
from rlmod.sampler._stop_strings import StopStrings
from rlmod.sampler.hf import HF
from rlmod.types import build_rollouts
from tests.command_line import SHORT, refused
from tests.model.wild import SIZES, byte_tokenizer, random_model


@pytest.fixture(scope="module")
def tiny():
    specification = HFPolicy(path="tiny")
    tokenizer = specification.tokenizer()
    prompts = PromptEncoder().encode(Arithmetic(split="held_out", size=24)(), tokenizer).batch(range(24))
    return specification.model(tokenizer).eval(), tokenizer, prompts


@pytest.mark.parametrize("stop", [["="], [";4", "#1"], [":"], [f":{digit}" for digit in "-0123456789"]])
def test_a_completion_ends_at_the_first_token_that_completes_a_stop_string(tiny, stop):
    policy, tokenizer, prompts = tiny
    rollouts = HF(completions_per_prompt=3, max_new_tokens=40, stop=stop)(policy, prompts, 0)
    stopped = 0
    for ids, mask, truncated in zip(rollouts.completion_ids, rollouts.mask, rollouts.truncated, strict=True):
        row = ids[mask].tolist()
        before, whole = (tokenizer.decode(each) for each in (row[:-1], row))
        assert not any(text in before for text in stop)
        stopped += (by_stop := any(text in whole for text in stop))
        assert bool(truncated) != (by_stop or row[-1] == tokenizer.eos_token_id)
    assert (stopped > 0) == (stop[0][0] != ":")  # prompts end in a colon, which does not count
    with torch.no_grad():
        logprobs = ops.token_logprobs(completion_logits(policy, rollouts), rollouts.completion_ids)
    torch.testing.assert_close(rollouts.logprobs, logprobs * rollouts.mask, atol=1e-4, rtol=0)


def test_a_stop_string_at_the_token_limit_is_no_truncation(tiny):
    policy, tokenizer, prompts = tiny
    rollouts = HF(completions_per_prompt=2, max_new_tokens=2, stop=["1", "2", "3", "-", "="])(policy, prompts, 0)
    texts = [tokenizer.decode(ids[mask]) for ids, mask in zip(rollouts.completion_ids, rollouts.mask, strict=True)]
    assert [not any(text in row for text in "123-=") for row in texts] == rollouts.truncated.tolist()
    assert any(len(row) == 2 and row[-1] in "123-=" for row in texts)


def found(tokenizer: Any, stop: list[str], *rows: list[int]) -> list[bool]:
    return [bool(StopStrings(tokenizer, stop).completed(torch.tensor([row]), torch.tensor([True]))) for row in rows]


def test_a_character_of_several_tokens_counts_once_it_is_complete():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("4。é", add_special_tokens=False)
    assert found(tokenizer, ["。"], *(ids[:n] for n in range(1, 7))) == [False, False, False, True, False, True]
    assert not StopStrings(tokenizer, ["。"]).completed(torch.tensor([ids[:4]]), torch.tensor([False])).any()


def test_special_tokens_and_ids_beyond_the_tokenizer():
    tokenizer = byte_tokenizer("</answer>")
    ids = tokenizer.encode("4</answer>", add_special_tokens=False)
    assert found(tokenizer, ["4</answer>"], ids, ids[:1], ids[1:], [*ids[:1], 10_000]) == [True, False, False, False]


def test_a_space_that_a_token_brings_along():
    tokenizer = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<unk>": 3, "<eos>": 4}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    assert found(fast, ["c "], [2, 1], [1, 2], [2, 2]) == [True, False, False]


def test_a_special_token_that_completes_a_stop_string_reaches_the_reward():
    tokenizer = byte_tokenizer("</answer>")
    ids = torch.tensor([tokenizer.encode("4</answer>", add_special_tokens=False)])
    rollouts = build_rollouts(completion_ids=ids, truncated=torch.tensor([False]))
    assert completion_texts(tokenizer, rollouts) == ["4"]
    assert completion_texts(tokenizer, rollouts, stop=["</answer>"]) == ["4</answer>"]


def test_a_policy_of_ones_own_needs_its_tokenizer():
    tokenizer = byte_tokenizer()
    model = random_model(
        tf.Qwen2Config(**SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    )
    problems = Arithmetic(split="held_out", size=2)()
    prompts = PromptEncoder().encode(problems, tokenizer).batch(range(2))
    sampler = HF(completions_per_prompt=2, max_new_tokens=3, stop=["4"])
    with pytest.raises(ValueError, match=r"sampler\.stop needs the tokenizer .*attach_tokenizer"):
        sampler(model, prompts, 0)
    attach_tokenizer(model, tokenizer)
    assert len(sampler(model, prompts, 0)) == 4


def test_requests_to_an_engine_keep_the_stop_string_and_special_tokens(tiny):
    policy, _, prompts = tiny
    parameters = VLLMSamplingParameters(stop=["</answer>"]).build_requests(policy, prompts, 0)[0][1]
    assert parameters["stop"] == ["</answer>"]
    assert parameters["include_stop_str_in_output"]
    assert parameters["skip_special_tokens"] is False
    assert "stop" not in VLLMSamplingParameters().build_requests(policy, prompts, 0)[0][1]


@pytest.mark.parametrize("stop", ['"</answer>"', '[""]', "[3]"])
def test_stop_is_a_list_of_texts(stop, tmp_path, monkeypatch):
    assert "sampler.stop must be a list" in refused(monkeypatch, tmp_path, *SHORT, f"sampler.stop={stop}")
