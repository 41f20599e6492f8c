"""A real pretrained policy from its tokenizer to its export: what a policy of 0.3 M parameters cannot show."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlmod.commands.export import main as export
from rlmod.data.sums import Sums
from rlmod.model.logprob_pass import logprob_pass
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from rlmod.types import Problem
from tests.command_line import run_train
from tests.real_policy import needs_real_policy, smollm2
from tests.runs import metrics

pytestmark = [pytest.mark.real, needs_real_policy]

SENTENCE = "The capital of France is Paris. It is the largest city in the country and is known for the Eiffel Tower."
SMALL = (
    "experiment=real", "trainer.max_epochs=2", "batch.prompts=4", "batch.micro_batch=16", "data.validation.largest=6",
    "filter=keep_all",
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2().tokenizer()


@pytest.fixture(scope="module")
def policy(tokenizer):
    return smollm2().model(tokenizer).eval()


def test_it_is_the_real_one(policy, tokenizer):
    """A random or a misread model would give about ln 49152 = 10.8 nats, and no answer."""
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        assert float(policy(ids, labels=ids).loss) == pytest.approx(1.598, abs=0.002)
    question = Problem(prompt="What is 7 + 7?", answer="14", source="here")
    asked = PromptEncoder().encode([question], tokenizer).batch(range(1))
    rollouts = HF(completions_per_prompt=1, max_new_tokens=20, greedy=True)(policy, asked, 0)
    assert tokenizer.decode(rollouts.completion_ids[0][rollouts.mask[0]]) == "The answer is 14.<|im_end|>"
    assert not rollouts.truncated.any()
    assert tokenizer.decode(asked.ids[0]).endswith("user\nWhat is 7 + 7?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "text", ["17 + 20 = 37\n", "naïve café, 3,14 · 10⁻⁷\t½", "\\boxed{\\frac{1}{2}}", "  two  spaces ", "日本語🙂"]
)
def test_the_tokenizer_gives_the_text_back(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(("dtype", "most", "mean"), [("float32", 1e-4, 1e-5), ("bfloat16", 0.1, 0.01)])
def test_the_samplers_log_probabilities_are_the_policys(dtype, most, mean, tokenizer):
    policy = smollm2().model(tokenizer).eval().to(getattr(torch, dtype))
    prompts = PromptEncoder(chat=False).encode(Sums(split="train")()[:4], tokenizer).batch(range(4))
    rollouts = HF(completions_per_prompt=4, max_new_tokens=6, stop=["\n"])(policy, prompts, 0)
    assert rollouts.mask.sum() > 40
    sampled = rollouts.logprobs
    with torch.no_grad():
        computed = logprob_pass(policy, rollouts, 1.0, rows=16).logprobs
    difference = (sampled - computed).abs()[rollouts.mask]
    assert difference.max() < most
    assert difference.mean() < mean


def test_two_iterations_an_export_and_its_logits(tmp_path, monkeypatch, capsys):
    run_train(monkeypatch, *SMALL, f"output={tmp_path / 'a'}")
    trained = [row for row in metrics(tmp_path / "a") if row["reward/mean"]]
    assert [float(row["train/ratio"]) for row in trained] == pytest.approx([1, 1], abs=1e-4)
    assert float(trained[0]["train/grad_norm"]) > 0.1
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["completed"]
    assert result["held_out"]["metric"] == "val/mean@4"
    assert "95 % intervals: 0." in capsys.readouterr().out
    export([str(tmp_path / "a"), str(tmp_path / "out")])
    ids = torch.arange(100, 120)[None]
    (saved,) = (tmp_path / "a" / "checkpoints").glob("step-000002/policy")
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tmp_path / "out", saved, smollm2().location)
        ]
    assert torch.equal(logits[0], logits[1])
    assert (logits[0] - logits[2]).abs().max() > 1e-3  # it was trained


def test_an_adapter_trains_and_loads_again(tmp_path, monkeypatch, tokenizer):
    run_train(monkeypatch, *SMALL, "adapter=lora", "optimizer.lr=1e-3", f"output={tmp_path / 'a'}")
    (saved,) = (tmp_path / "a" / "checkpoints").glob("step-000002/policy")
    assert sum(file.stat().st_size for file in saved.glob("*.safetensors")) < 30 * 2**20
    export([str(tmp_path / "a"), str(tmp_path / "merged"), "--merge"])
    from rlmod.model.policy import HFPolicy

    adapted, merged = (HFPolicy(path=str(path)).model(tokenizer).eval() for path in (saved, tmp_path / "merged"))
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        assert (adapted(ids).logits - merged(ids).logits).abs().max() < 1e-3
