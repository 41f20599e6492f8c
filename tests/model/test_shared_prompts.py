"""The prompt gone through once for all rows of a group: the same numbers, the same gradient."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from rlmod.model import shared_prompts
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.model.packing import pack_by_length
from rlmod.types import Rollouts, build_rollouts


def policy(kind=Qwen2Config, attention="sdpa", dtype=torch.float64, **settings):
    torch.manual_seed(0)
    config = kind(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)


def ragged(groups=3, g=4, prompt=11, length=6) -> Rollouts:
    """Prompts of different lengths, padded on the left; their rows not next to each other."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([prompt, prompt - 4, 2])[:groups]
    mask = torch.arange(prompt) >= prompt - lengths[:, None]
    ids = torch.randint(3, 50, (groups, prompt), generator=draw) * mask
    group = torch.arange(groups).repeat(g)
    own = torch.arange(length) < torch.randint(1, length + 1, (groups * g, 1), generator=draw)
    return build_rollouts(
        prompt_ids=ids[group], prompt_mask=mask[group], group=group + 7, mask=own,
        completion_ids=torch.randint(3, 50, (groups * g, length), generator=draw),
    )  # fmt: skip


def scores_and_gradients(model, rollouts):
    model.zero_grad()
    logprobs, entropy = logprobs_and_entropy(model, rollouts, 0.7)
    (logprobs.sin() + entropy.cos()).sum().backward()
    return [logprobs.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "eager", "dtype": torch.float32}, {"kind": LlamaConfig}, {"tie_word_embeddings": True}],
    ids=["qwen2", "eager", "llama", "tied"],
)
@pytest.mark.parametrize("training", [True, False])
def test_shared_or_not_the_numbers_are_the_same(settings, training, monkeypatch):
    model, rollouts = policy(**settings).train(training), ragged()
    assert shared_prompts.find_shared_prompts(model, rollouts) is not None
    shared = scores_and_gradients(model, rollouts)
    monkeypatch.setattr(shared_prompts, "MIN_SHARE_SAVED", torch.inf)
    assert shared_prompts.find_shared_prompts(model, rollouts) is None
    for one, other in zip(shared, scores_and_gradients(model, rollouts), strict=True):
        torch.testing.assert_close(
            one, other, atol=5e-6, rtol=1e-5
        )  # transformers normalises, and eager attention weighs, in float32


def test_a_prompt_is_gone_through_once(monkeypatch):
    model, rollouts = policy(), ragged()
    logprobs_and_entropy(
        model, rollouts.rows(slice(0, 1)), 1.0
    )  # the first time it is tried out whether scores may leave by the head
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    logprobs_and_entropy(model, rollouts, 1.0)
    assert sizes == [(3, 10), (12, 7)]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model, rows: (model.gradient_checkpointing_enable(), rows)[1], "no cache is kept"),
        (lambda model, rows: (setattr(model.config, "attention_dropout", 0.1), rows)[1], "one draw for all rows"),
        (lambda model, rows: (setattr(model.config, "layer_types", ["full_attention", "sliding_attention"]), rows)[1], "forgets"),
        (lambda model, rows: (vars(model.config).update(layer_types=None, sliding_window=4), rows)[1], "forgets as well"),
        (lambda model, rows: (setattr(model.config, "_attn_implementation", "flash_attention_2"), rows)[1], "untried"),
        (lambda model, rows: rows.rows(torch.arange(3)), "one row a prompt"),
        (lambda model, rows: ragged(prompt=11, length=60), "the prompt is next to nothing"),
        (lambda model, rows: build_rollouts(**{**vars(rows), "group": torch.arange(len(rows))}), "each has a prompt of its own"),
    ],
)  # fmt: skip
def test_where_it_is_not_shared(change, why):
    model = policy().train()
    assert shared_prompts.find_shared_prompts(model, change(model, ragged())) is None, why


def test_packs_of_any_rows_share(monkeypatch):
    """Rows are packed by their length, and a pack may hold some of a group's rows only."""
    model, rollouts = policy().eval(), ragged(g=8)
    whole, _ = logprobs_and_entropy(model, rollouts, 1.0)
    for rows in pack_by_length(rollouts, 5):
        part = rollouts.rows(rows).trimmed()
        found, _ = logprobs_and_entropy(model, part, 1.0)
        torch.testing.assert_close(found, whole[rows][:, : found.shape[1]], atol=1e-6, rtol=0)
