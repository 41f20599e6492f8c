"""A random reward model of one output: what a batch of texts scores is what each scores alone."""

import logging

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification

from rlmod.model.policy import HFPolicy
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward.classifier import Classifier
from rlmod.types import Problem, Texts

CHAT = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def saved(folder, outputs: int = 1, chat: str | None = None) -> str:
    tokenizer = HFPolicy(path="tiny").tokenizer()
    tokenizer.chat_template = chat
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_labels=outputs, pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue]
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def texts() -> Texts:
    completions = ["4", "3+1=4,soitis4", "five", "", "2+2=4#4"]
    problem = Problem(prompt="2+2?", answer="4", source="a:1")
    return Texts(completions=completions, answers=["4"] * 5, problems=[problem] * 5)


def directly(reward: Classifier, rows: list[str]) -> list[float]:
    encoded = [reward.tokenizer(row, return_tensors="pt") for row in rows]
    return [reward.model(**row).logits.item() for row in encoded]


def test_a_batch_scores_what_each_row_scores_alone(tmp_path):
    path = saved(tmp_path)
    reward = Classifier(path=path)
    rewards = compute_rewards(reward, texts()).rewards
    expected = directly(reward, ["2+2?" + completion for completion in texts().completions])
    assert rewards.tolist() == pytest.approx(expected, abs=1e-5)
    assert len({round(x, 6) for x in expected}) == 5
    for size in (1, 2, 3):
        assert compute_rewards(Classifier(path=path, batch_size=size), texts()).rewards.tolist() == pytest.approx(
            expected, abs=1e-5
        )
    assert compute_rewards(Classifier(path=path, scale=-2.0), texts()).rewards.tolist() == pytest.approx(
        [-2 * x for x in expected], abs=1e-5
    )


def test_its_own_chat_template_is_used_where_it_has_one(tmp_path):
    path = saved(tmp_path, chat=CHAT)
    reward = Classifier(path=path)
    chats = [f"[user]2+2?[assistant]{completion}" for completion in texts().completions]
    assert compute_rewards(reward, texts()).rewards.tolist() == pytest.approx(directly(reward, chats), abs=1e-5)
    plain = Classifier(path=path, chat=False)
    rows = ["2+2?" + completion for completion in texts().completions]
    assert compute_rewards(plain, texts()).rewards.tolist() == pytest.approx(directly(reward, rows), abs=1e-5)
    with pytest.raises(ValueError, match=r"reward\.chat=true, but the tokenizer .* has no chat template"):
        Classifier(path=saved(tmp_path / "plain"), chat=True).prepare([], None)


def test_long_texts_lose_their_beginning_and_are_counted(tmp_path, caplog):
    reward = Classifier(path=saved(tmp_path), max_tokens=5)
    with caplog.at_level(logging.WARNING):
        rewards = compute_rewards(reward, texts()).rewards
    assert "3 of 5 texts are longer than reward.max_tokens=5 (the longest: 17)" in caplog.text
    assert rewards[1].item() == pytest.approx(directly(reward, ["itis4"])[0], abs=1e-5)


def test_a_head_with_two_outputs_is_no_reward_model(tmp_path):
    with pytest.raises(ValueError, match=r"reward\.path=.*the head has 2 outputs, a reward model has one"):
        Classifier(path=saved(tmp_path, outputs=2)).prepare([], None)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"reward\.path=/nowhere"):
        Classifier(path="/nowhere").prepare([], None)
    with pytest.raises(RewardError, match="recorded completions have none"):
        compute_rewards(Classifier(path="unused"), Texts(completions=["4"], answers=["4"]))


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("max_tokens", 0), ("dtype", "int8")])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"reward\.{field}"):
        Classifier(path="unused", **{field: value})
