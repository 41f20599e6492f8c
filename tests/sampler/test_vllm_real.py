"""vLLM on the CPU with a real pretrained policy, against sampler=hf."""

import time
from importlib.util import find_spec

import pytest
import torch

from rlmod.data.sums import Sums
from rlmod.model.logprob_pass import logprob_pass
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from tests.real_policy import needs_real_policy, smollm2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.real,
    needs_real_policy,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm, which make test-vllm installs"),
]


def test_vllm_samples_from_the_policy():
    """Its log-probabilities are the policy's, and its greedy completions those of transformers."""
    from rlmod.sampler.vllm import VLLM

    tokenizer = smollm2().tokenizer()
    policy = smollm2().model(tokenizer).eval()
    prompts = PromptEncoder(chat=False).encode(Sums(split="train")()[:16], tokenizer).batch(range(16))
    settings = {"completions_per_prompt": 4, "max_new_tokens": 16}
    engine = VLLM(**settings, max_model_len=256)
    engine.sync(policy)
    spent, rollouts = {}, {}
    for name, sampler in (("vllm", engine), ("hf", HF(**settings))):
        began = time.process_time()
        rollouts[name] = sampler(policy, prompts, 0)
        spent[name] = round(int(rollouts[name].mask.sum()) / (time.process_time() - began))
    with torch.no_grad():
        again = logprob_pass(policy, rollouts["vllm"], 1.0, rows=64)
    difference = (again.sampler_logprobs - again.logprobs).abs()[again.mask]
    print(f"tokens per CPU second: {spent}; mean difference {difference.mean():.1e}, largest {difference.max():.1e}")
    assert difference.mean() < 1e-3
    assert difference.max() < 1e-2
    greedy = {"completions_per_prompt": 1, "max_new_tokens": 8, "greedy": True}
    ours, theirs = VLLM(**greedy, max_model_len=256), HF(**greedy)
    ours.sync(policy)
    ours, theirs = ours(policy, prompts, 0), theirs(policy, prompts, 0)
    same = (ours.completion_ids * ours.mask == theirs.completion_ids * theirs.mask).all(1)
    assert same.sum() >= 15  # two logits that are almost equal may be rounded either way
