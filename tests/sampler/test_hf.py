"""The sampler with the shipped tiny policy: real generation, checked against a plain forward pass."""

import copy

import pytest
import torch

from rlmod import ops
from rlmod.data.arithmetic import Arithmetic
from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import HFPolicy, completion_texts
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler._recorder import LastLogits, Recorder
from rlmod.sampler.hf import HF


@pytest.fixture(scope="module")
def tiny():
    specification = HFPolicy(path="tiny")
    tokenizer = specification.tokenizer()
    problems = Arithmetic(split="held_out", size=24)()
    prompts = PromptEncoder().encode(problems, tokenizer).batch(range(24))
    return specification.model(tokenizer).eval(), tokenizer, prompts


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_policy(tiny, temperature):
    policy, _, prompts = tiny
    rollouts = HF(completions_per_prompt=3, temperature=temperature, max_new_tokens=48)(policy, prompts, 0)
    assert rollouts.mask.sum(1).unique().numel() > 3  # ragged, so the batch was compacted
    with torch.no_grad():
        logits = completion_logits(policy, rollouts)
    logprobs = ops.token_logprobs(logits, rollouts.completion_ids, temperature)
    torch.testing.assert_close(rollouts.logprobs, logprobs * rollouts.mask, atol=1e-4, rtol=0)
    entropy = ops.entropy(logits, temperature)
    torch.testing.assert_close(rollouts.entropy, entropy * rollouts.mask, atol=1e-4, rtol=0)


def test_masks_padding_and_groups(tiny):
    policy, tokenizer, prompts = tiny
    rollouts = HF(completions_per_prompt=3, max_new_tokens=48)(policy, prompts, 0)
    assert rollouts.group.tolist() == [i for i in range(24) for _ in range(3)]
    assert torch.equal(rollouts.prompt_ids, prompts.ids[rollouts.group])
    for ids, mask, truncated in zip(rollouts.completion_ids, rollouts.mask, rollouts.truncated, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (ids[:length] == tokenizer.eos_token_id).sum() == (0 if truncated else 1)
        assert truncated or ids[length - 1] == tokenizer.eos_token_id
        assert (ids[length:] == tokenizer.pad_token_id).all()


def test_the_seed_alone_decides(tiny):
    policy, _, prompts = tiny
    sampler = HF(completions_per_prompt=2, max_new_tokens=48)
    first = sampler(policy, prompts, 5)
    torch.rand(3)
    again = sampler(policy, prompts, 5)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.completion_ids[:, :8], sampler(policy, prompts, 6).completion_ids[:, :8])


def test_the_random_state_outside_is_left_alone(tiny):
    policy, _, prompts = tiny
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    HF(completions_per_prompt=1, max_new_tokens=4)(policy, prompts, 0)
    assert torch.equal(torch.rand(2), expected)


def test_greedy_equals_transformers_own_greedy_on_each_prompt_alone(tiny):
    policy, _, prompts = tiny
    rollouts = HF(completions_per_prompt=1, greedy=True, max_new_tokens=48)(policy, prompts, 0)
    for row in range(6):
        ids = prompts.ids[row][prompts.mask[row]][None]
        alone = policy.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=48)
        assert rollouts.completion_ids[row][rollouts.mask[row]].tolist() == alone[0, ids.shape[1] :].tolist()


def test_truncated_rows_are_marked(tiny):
    policy, _, prompts = tiny
    rollouts = HF(completions_per_prompt=2, max_new_tokens=3)(policy, prompts, 0)
    assert rollouts.completion_ids.shape[1] <= 3
    ended = ((rollouts.completion_ids == policy.generation_config.eos_token_id[0]) & rollouts.mask).any(1)
    assert torch.equal(rollouts.truncated, ~ended)
    assert rollouts.truncated.any()


def test_splitting_the_rows_keeps_them_all(tiny):
    policy, _, prompts = tiny
    rollouts = HF(completions_per_prompt=3, max_new_tokens=48, rows_per_batch=7)(policy, prompts, 0)
    assert rollouts.group.tolist() == [i for i in range(24) for _ in range(3)]
    with torch.no_grad():
        logits = completion_logits(policy, rollouts)
    logprobs = ops.token_logprobs(logits, rollouts.completion_ids)
    torch.testing.assert_close(rollouts.logprobs, logprobs * rollouts.mask, atol=1e-4, rtol=0)


def test_top_k_cuts_the_sampling_but_not_the_policy(tiny):
    policy, _, prompts = tiny
    rollouts = HF(completions_per_prompt=2, max_new_tokens=48, top_k=1)(policy, prompts, 0)
    greedy = HF(completions_per_prompt=2, max_new_tokens=48, greedy=True)(policy, prompts, 0)
    assert torch.equal(rollouts.completion_ids, greedy.completion_ids)
    assert (rollouts.logprobs[rollouts.mask] < 0).any()
    assert rollouts.entropy[rollouts.mask].max() > 0.1


def test_rows_that_have_ended_are_computed_no_longer(tiny):
    """Rows of the forward passes, counted: less than rows x the longest completion."""
    policy, _, prompts = tiny
    computed = 0

    def count(module, arguments, keywords, output):
        nonlocal computed
        computed += output.logits.shape[0]

    hook = policy.register_forward_hook(count, with_kwargs=True)
    rollouts = HF(completions_per_prompt=8, max_new_tokens=48)(policy, prompts, 0)
    hook.remove()
    lengths = rollouts.mask.sum(1)
    assert computed < 0.7 * len(rollouts) * int(lengths.max())
    assert computed >= int(lengths.sum())


def test_generation_is_interrupted_when_a_quarter_of_the_rows_have_ended():
    last = LastLogits()
    recorder = Recorder(last, 1.0, torch.tensor([1]))
    stops = []
    for ended in ([], [2], [], [7], [0]):  # rows whose EOS, token 1, comes now; none comes twice
        ids = torch.full((8, 1), 5)
        ids[ended] = 1
        last(ids, torch.zeros(8, 9))
        stops.append(recorder(ids, None).tolist())
    assert stops == [[False] * 8] * 3 + [[True] * 8] * 2


def test_texts_leave_special_tokens_out(tiny):
    policy, tokenizer, prompts = tiny
    rollouts = HF(completions_per_prompt=1, max_new_tokens=48)(policy, prompts, 0)
    for text in completion_texts(tokenizer, rollouts):
        assert "<" not in text
        assert "#" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [("completions_per_prompt", 0), ("temperature", 0.0), ("top_p", 0.0), ("top_k", -1), ("max_new_tokens", 0)],
)
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"sampler\.{field}"):
        HF(**{field: value})


def test_a_models_own_generation_settings_do_not_change_what_is_sampled(tiny):
    """Some models ship a repetition penalty; completions would then be draws from another policy than is noted."""
    policy, _, prompts = tiny
    sampler = HF(completions_per_prompt=2, max_new_tokens=24)
    plain = sampler(policy, prompts, 0)
    own = policy.generation_config
    policy.generation_config = copy.deepcopy(own)
    policy.generation_config.update(
        repetition_penalty=1.5, min_p=0.4, no_repeat_ngram_size=2, min_new_tokens=20, num_beams=2, use_cache=False
    )
    try:
        again = sampler(policy, prompts, 0)
        assert policy.generation_config.repetition_penalty == 1.5  # what is saved with the policy is its own
    finally:
        policy.generation_config = own
    assert torch.equal(again.completion_ids, plain.completion_ids)
    assert torch.equal(again.logprobs, plain.logprobs)


def test_a_recurrent_model_is_refused(tiny):
    policy, _, prompts = tiny

    class Recurrent(type(policy)):
        _is_stateful = True

    with pytest.raises(ValueError, match="Recurrent keeps a recurrent state"):
        HF(max_new_tokens=2)(Recurrent(policy.config), prompts, 0)
