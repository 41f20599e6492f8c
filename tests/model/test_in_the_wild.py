"""Models and tokenizers as they are published: what they bring along is trained with, or refused in a sentence."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import AddedToken, processors

from rlmod.adapter.lora import LoRA
from rlmod.config.build import build_reward, check_completion_prefix
from rlmod.guide.demonstrations import Demonstrations
from rlmod.model import noise
from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import SHIPPED, HFPolicy, completion_texts, embedding_rows, turn_end_ids
from rlmod.model.saving import save_policy
from rlmod.reward._compute import compute_rewards
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from rlmod.types import Problem, Prompts, Texts, build_rollouts
from tests.config.composing import composed
from tests.model.wild import SIZES, byte_tokenizer, random_model


def sampled(model, tokens: int = 14):
    prompts = Prompts(
        ids=torch.tensor([[5, 9, 30, 7, 12], [0, 0, 8, 3, 40]]),
        mask=torch.tensor([[True] * 5, [False] * 2 + [True] * 3]),
        problems=tuple(Problem(prompt="x", answer="1", source=str(i)) for i in range(2)),
    )
    return HF(completions_per_prompt=4, max_new_tokens=tokens)(model, prompts, 7)


def saved(config, tokenizer, folder) -> str:
    random_model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


NOISY = {
    "GPT-2's dropout": tf.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=512, eos_token_id=1, bos_token_id=2),
    "attention dropout": tf.Qwen2Config(**SIZES, attention_dropout=0.3),
    "a router's jitter": tf.MixtralConfig(**SIZES, num_local_experts=4, router_jitter_noise=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_the_ratios_of_the_first_update_are_1_without_a_models_own_noise(name):
    model = random_model(NOISY[name])
    rollouts = sampled(model)
    model.train()
    assert noise.rates(model)

    def difference() -> float:
        with torch.no_grad():
            return ((completion_logprobs(model, rollouts, 1.0) - rollouts.logprobs) * rollouts.mask).abs().max().item()

    assert difference() > 1e-2
    noise.switch_off(model)
    assert difference() < 1e-4
    assert not noise.rates(model)


def test_a_policys_own_dropout_is_off_unless_it_is_wanted(tmp_path):
    tokenizer = byte_tokenizer()
    config = tf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, eos_token_id=tokenizer.eos_token_id
    )
    path = saved(config, tokenizer, tmp_path / "gpt2")
    off, on = (HFPolicy(path=path, dropout=wanted).model(tokenizer) for wanted in (False, True))
    assert off.training
    assert on.training
    assert not noise.rates(off)
    assert noise.rates(on)["transformer.drop.p"] == 0.1


def test_the_dropout_of_an_adapter_stays(tmp_path):
    fresh = HFPolicy(path="tiny", adapter=LoRA(rank=2, dropout=0.1))
    tokenizer = fresh.tokenizer()
    save_policy(fresh.model(tokenizer), tokenizer, tmp_path / "adapter")
    for specification in (fresh, HFPolicy(path=str(tmp_path / "adapter"))):
        assert {rate for name, rate in noise.rates(specification.model(tokenizer)).items() if "lora" in name} == {0.1}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_change_with_the_length_are_refused_beyond_the_context(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0, **factors}
    settings: dict[str, Any] = SIZES | {"max_position_embeddings": 64, "rope_parameters": rope}
    if kind == "longrope":
        settings["original_max_position_embeddings"] = 16
    model = random_model((tf.Phi3Config if kind == "longrope" else tf.LlamaConfig)(**settings))
    with pytest.raises(ValueError, match=rf"\({kind}\) changes beyond 16 tokens, and .* may have 19"):
        sampled(model)
    rollouts = sampled(model, tokens=11)
    with torch.no_grad():
        again = completion_logprobs(model, rollouts, 1.0)
    torch.testing.assert_close(again, rollouts.logprobs, atol=1e-4, rtol=0)


def test_a_hybrid_model_is_refused_as_a_recurrent_one_is():
    model = random_model(tf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]))
    with pytest.raises(ValueError, match=r"Lfm2ForCausalLM keeps a recurrent state .* or sampler=vllm"):
        sampled(model)


def test_only_a_token_that_occurs_needs_an_embedding(tmp_path):
    tokenizer = byte_tokenizer()
    config = tf.Qwen2Config(**SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    specification = HFPolicy(path=saved(config, tokenizer, tmp_path / "m"))
    rows = embedding_rows(specification.model(tokenizer))
    assert rows == len(tokenizer) - 1
    problems = [Problem(prompt=prompt, answer="1", source=f"a:{i}") for i, prompt in enumerate(("hi", "<image>"), 1)]
    PromptEncoder().encode(problems[:1], tokenizer).check_token_ids(rows)
    with pytest.raises(ValueError, match=rf"a:2: the prompt has the token id {rows}, but the policy has only {rows}"):
        PromptEncoder().encode(problems, tokenizer).check_token_ids(rows)
    tokenizer.eos_token = "<image>"
    with pytest.raises(ValueError, match=f"only {rows} embeddings, and none for '<image>'"):
        specification.model(tokenizer)


def test_rewards_see_special_tokens_except_bos_eos_padding_and_unknown():
    tokenizer = byte_tokenizer("<think>", "</think>", "<end_of_turn>")
    texts = ("<think>x</think>4<|eos|>", "<|bos|>4<|pad|><end_of_turn>", "<think>x</think>", "")
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    width = max(map(len, rows))
    rollouts = build_rollouts(
        completion_ids=torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        truncated=torch.tensor([False, False, True, True]),
    )
    assert completion_texts(tokenizer, rollouts) == ["<think>x</think>4", "4", "<think>x</think>", ""]


def test_a_demonstration_may_end_with_the_token_that_ends_a_turn(tmp_path):
    tokenizer: Any = byte_tokenizer("<end_of_turn>", "<think>")
    end, think = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<think>"])
    assert turn_end_ids(tokenizer) == {tokenizer.eos_token_id}
    tokenizer.chat_template = "{% for m in messages %}[{{m.role}}]{{m.content}}<end_of_turn>{% endfor %}"
    assert turn_end_ids(tokenizer) == {tokenizer.eos_token_id, end}
    answer = tokenizer.encode("4", add_special_tokens=False)
    thought = tokenizer.encode("<think>4", add_special_tokens=False)
    records = [
        {"prompt": "q", "completion": "4", "completion_ids": [*answer, end]},
        {"prompt": "q", "completion": "<think>4", "completion_ids": [*thought, end]},
        {"prompt": "q", "completion": "4<think>", "completion_ids": [*answer, think]},
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    guide = Demonstrations(path=str(path), completions_per_prompt=1, ratio="one")
    guide.prepare([Problem(prompt="q", answer="4", source="a")], tokenizer)
    assert [d.truncated for d in guide.recorded["q"]] == [False, False, True]


def test_a_prompt_keeps_the_one_bos_that_it_brings():
    tokenizer = byte_tokenizer()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    problems = [Problem(prompt=prompt, answer="1", source="a:1") for prompt in ("<|bos|>hi", "hi")]
    one, other = PromptEncoder().encode(problems, tokenizer).ids
    assert one == other
    assert one.count(bos) == 1


OPENING = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"


def test_a_format_reward_sees_the_tag_that_the_chat_template_opens(caplog):
    tokenizer = byte_tokenizer("<|user|>", "<|assistant|>", "<think>", "</think>")
    tokenizer.chat_template = OPENING
    problems = [Problem(prompt=prompt, answer="1", source=f"a:{i}") for i, prompt in enumerate(("hi", "ho"), 1)]
    encoded = PromptEncoder(chat=True).encode(problems, tokenizer)
    blind = build_reward(composed("reward=format").reward)
    texts = Texts(completions=["1\n</think>\n<answer>2</answer>", "<answer>2</answer>"], answers=["", ""])
    assert list(blind(texts)) == [0.0, 0.0]
    check_completion_prefix(blind, encoded, tokenizer)
    assert "the prompts end in <think>" in caplog.text
    caplog.clear()
    reward = build_reward(composed("reward=format", 'reward.completion_prefix="<think>"').reward)
    assert compute_rewards(reward, texts).rewards.tolist() == [1.0, 0.0]
    check_completion_prefix(reward, encoded, tokenizer)
    assert not caplog.records
    plain = PromptEncoder(chat=False).encode(problems, tokenizer)
    with pytest.raises(ValueError, match=r"reward\.completion_prefix='<think>' .* that of a:1 ends in 'hi'"):
        check_completion_prefix(reward, plain, tokenizer)


def test_the_prefix_of_one_term_is_for_that_term_alone():
    own: dict[str, Any] = {
        "_target_": "rlmod.reward.format.Format",
        "pattern": "<think>.*",
        "completion_prefix": "<think>",
    }
    rewards = {
        "format": own,
        "math": {"_target_": "rlmod.reward.math_verify.MathVerify", "completion_prefix": "=5 "},
        "equal": {"_target_": "rlmod.reward.format.Format", "pattern": "2"},
    }
    terms = {name: {"weight": 1.0, "reward": each} for name, each in rewards.items()}
    reward = build_reward({"_target_": "rlmod.reward.weighted.Weighted", "terms": terms})
    found = compute_rewards(reward, Texts(completions=["2", ""], answers=["2", "5"])).terms
    assert {name: values.tolist() for name, values in found.items()} == {
        "format": [1, 1],
        "math": [1, 1],
        "equal": [1, 0],
    }
    own["skip_special_tokens"] = True
    with pytest.raises(ValueError, match=r"reward\.terms\.format\.reward\.skip_special_tokens=true has no effect"):
        build_reward({"_target_": "rlmod.reward.weighted.Weighted", "terms": terms})


def copied(folder, file: str, change):
    shutil.copytree(SHIPPED / "tiny", folder)
    path = folder / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return HFPolicy(path=str(folder))


def test_a_generation_config_without_do_sample_is_saved(tmp_path):
    policy = copied(
        tmp_path / "m",
        "generation_config.json",
        lambda c: c | {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    )
    tokenizer = policy.tokenizer()
    save_policy(policy.model(tokenizer), tokenizer, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_a_generation_config_that_cannot_be_saved_is_refused_before_training(tmp_path):
    policy = copied(tmp_path / "m", "generation_config.json", lambda c: c | {"length_penalty": 2.0})
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be saved .* correct or remove it"):
        policy.model(policy.tokenizer())


@pytest.mark.parametrize(
    ("kind", "written", "kept"),
    [
        (tf.LlamaConfig, "PreTrainedTokenizerFast", "PreTrainedTokenizerFast"),
        (tf.LlamaConfig, "TokenizersBackend", "TokenizersBackend"),
        (tf.Qwen2Config, "PreTrainedTokenizerFast", "Qwen2Tokenizer"),
        (tf.Qwen2Config, "Qwen2Tokenizer", "Qwen2Tokenizer"),
    ],
)
def test_a_saved_tokenizer_has_the_names_of_its_source_that_older_readers_know(kind, written, kept, tmp_path):
    tokenizer = byte_tokenizer("<think>")
    config = kind(**SIZES | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    specification = HFPolicy(path=saved(config, tokenizer, tmp_path / "source"))
    file = tmp_path / "source" / "tokenizer_config.json"
    given = {"tokenizer_class": written, "extra_special_tokens": ["<think>"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | given))
    source: Any = specification.tokenizer()
    save_policy(random_model(config), source, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["tokenizer_class"] == kept
    assert found["additional_special_tokens"] == ["<think>"]
    assert "extra_special_tokens" not in found
    again: Any = HFPolicy(path=str(tmp_path / "out")).tokenizer()
    assert (type(again), again.all_special_tokens) == (type(source), source.all_special_tokens)
    assert again.backend_tokenizer.to_str() == source.backend_tokenizer.to_str()


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_a_saved_policy_keeps_its_rotary_base_where_older_readers_look(tmp_path, scaling):
    def change(config):
        config.pop("rope_parameters", None)
        return config | {"rope_theta": 1e6, **({"rope_scaling": scaling} if scaling else {})}

    policy = copied(tmp_path / "m", "config.json", change)
    tokenizer = policy.tokenizer()
    model = policy.model(tokenizer)
    save_policy(model, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config.get("rope_scaling") == scaling
    again = replace(policy, path=str(tmp_path / "out")).model(tokenizer)
    assert again.config.rope_parameters == model.config.rope_parameters
