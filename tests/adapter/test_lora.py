"""LoRA on the shipped policy: what is trained, what is saved, and the base under it."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlmod.adapter.lora import LoRA
from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import HFPolicy
from rlmod.model.saving import save_policy
from rlmod.reference.base import Base
from rlmod.types import Rollouts, build_rollouts


@pytest.fixture
def rows() -> Rollouts:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (2, 9), generator=draw)
    mask = torch.ones(2, 4, dtype=torch.bool)
    return build_rollouts(
        prompt_ids=ids[:, :4], prompt_mask=mask, completion_ids=ids[:, 4:], mask=torch.ones(2, 5, dtype=torch.bool)
    )


def changed(policy) -> None:
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))


def test_only_the_adapter_is_trained_and_at_first_it_changes_nothing(rows):
    plain = HFPolicy(path="tiny")
    base = plain.model(plain.tokenizer()).eval()
    policy = HFPolicy(path="tiny", adapter=LoRA(rank=4)).model(plain.tokenizer()).eval()
    assert all(("lora_" in name) == p.requires_grad for name, p in policy.named_parameters())
    torch.testing.assert_close(completion_logits(policy, rows), completion_logits(base, rows))
    changed(policy)
    assert (completion_logits(policy, rows) - completion_logits(base, rows)).abs().max() > 1e-3
    # The base under it is the reference, for no more than a forward pass.
    reference = Base()(policy, rows, 1.0)
    expected = completion_logits(base, rows).log_softmax(-1).gather(-1, rows.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(reference, expected)
    assert (completion_logits(policy, rows) - completion_logits(base, rows)).abs().max() > 1e-3


def test_rank_and_alpha_by_hand():
    """One row of one layer: W x + (alpha / rank) B A x."""
    policy = HFPolicy(path="tiny", adapter=LoRA(rank=2, alpha=6.0, targets=["q_proj"])).model(
        HFPolicy(path="tiny").tokenizer()
    )
    changed(policy)
    layer: Any = next(module for name, module in policy.named_modules() if name.endswith("layers.0.self_attn.q_proj"))
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(1))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (2, 96)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * x @ a.T @ b.T)


def test_what_is_saved_is_the_adapter_and_it_loads(rows, tmp_path):
    specification = HFPolicy(path="tiny", adapter=LoRA(rank=4))
    policy = specification.model(specification.tokenizer()).eval()
    changed(policy)
    save_policy(policy, specification.tokenizer(), tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    torch.testing.assert_close(completion_logits(loaded, rows), completion_logits(policy, rows))
    again = HFPolicy(path=str(tmp_path / "policy"))
    torch.testing.assert_close(
        completion_logits(again.model(again.tokenizer()).eval(), rows), completion_logits(policy, rows)
    )
    assert not (tmp_path / "policy" / "model.safetensors").exists()


def test_gradients_reach_the_adapter_through_checkpointed_layers(rows):
    policy = HFPolicy(path="tiny", gradient_checkpointing=True, adapter=LoRA(rank=2)).model(
        HFPolicy(path="tiny").tokenizer()
    )
    changed(policy)
    completion_logits(policy, rows).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize(("field", "value"), [("rank", 0), ("alpha", 0.0), ("dropout", 1.0)])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"policy\.adapter\.{field}"):
        LoRA(**{field: value})


def test_unknown_targets_are_named():
    with pytest.raises(ValueError, match=r"policy\.adapter\.targets=\['nowhere'\]"):
        HFPolicy(path="tiny", adapter=LoRA(targets=["nowhere"])).model(HFPolicy(path="tiny").tokenizer())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_layer_that_shares_its_weight_is_refused(target, tmp_path):
    specification = HFPolicy(path="tiny", adapter=LoRA(rank=4, targets=["q_proj", target]))
    with pytest.raises(ValueError, match=rf"policy\.adapter\.targets .* includes {target}, .* are one weight"):
        specification.model(specification.tokenizer())
    model = AutoModelForCausalLM.from_pretrained(specification.location)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[target]))
    adapted.save_pretrained(str(tmp_path / "adapter"))  # by another program
    specification.tokenizer().save_pretrained(tmp_path / "adapter")
    saved = HFPolicy(path=str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=rf"includes {target}"):
        saved.model(saved.tokenizer())


def test_a_head_of_its_own_may_be_adapted_and_merges_exactly(rows, tmp_path):
    untied = AutoModelForCausalLM.from_pretrained(HFPolicy(path="tiny").location, tie_word_embeddings=False)
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    save_policy(untied, HFPolicy(path="tiny").tokenizer(), tmp_path / "untied")
    specification = HFPolicy(path=str(tmp_path / "untied"), adapter=LoRA(rank=4, targets=["q_proj", "lm_head"]))
    policy: Any = specification.model(specification.tokenizer()).eval()
    changed(policy)
    before = completion_logits(policy, rows)
    save_policy(policy.merge_and_unload(), specification.tokenizer(), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(completion_logits(merged, rows), before, atol=1e-4, rtol=1e-4)


def test_a_saved_adapter_goes_on_being_trained(rows, tmp_path):
    specification = HFPolicy(path="tiny", adapter=LoRA(rank=4))
    policy = specification.model(specification.tokenizer()).eval()
    changed(policy)
    save_policy(policy, specification.tokenizer(), tmp_path / "policy")
    again = HFPolicy(path=str(tmp_path / "policy"))
    assert again.is_adapter
    loaded = again.model(again.tokenizer()).eval()
    torch.testing.assert_close(completion_logits(loaded, rows), completion_logits(policy, rows))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {
        name for name, p in policy.named_parameters() if p.requires_grad
    }
    assert not any(p.requires_grad for p in again.frozen().parameters())
    with pytest.raises(ValueError, match=r"policy\.path=.* is an adapter already"):
        HFPolicy(path=str(tmp_path / "policy"), adapter=LoRA(rank=4))
