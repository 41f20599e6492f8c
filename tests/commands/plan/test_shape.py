"""Weights counted from a config.json alone are those of the model that transformers builds from it."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlmod.adapter.lora import LoRA
from rlmod.commands.plan.shape import SHAPES, read_shape
from rlmod.model.policy import SHIPPED

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}
CONFIGS = {
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2, head of its own": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "llama, biases": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_with_a_config_alone_is_enough(name, tmp_path):
    config = AutoConfig.for_model(name.partition(",")[0], **SMALL, **CONFIGS[name])
    config.save_pretrained(tmp_path)
    model = on_meta(config)
    shape = read_shape(str(tmp_path), "policy.path")
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer == sum(p.numel() for p in model.model.layers[0].parameters())
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".safetensors"] == []


@pytest.mark.parametrize("file", sorted(SHAPES.glob("*.json")), ids=lambda file: file.stem)
def test_the_shapes_that_come_with_rlmod_are_those_models(file):
    settings = json.loads(file.read_text())
    model = on_meta(AutoConfig.for_model(settings.pop("model_type"), **settings))
    for name in (f"Qwen/{file.stem}", f"Qwen/{file.stem}-Instruct", file.stem):
        assert read_shape(name, "policy.path").parameters == sum(p.numel() for p in model.parameters())
    billions = float(file.stem.removeprefix("Qwen2.5-").removesuffix("B"))
    assert read_shape(file.stem, "").parameters == pytest.approx(1e9 * billions, rel=0.1)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_an_adapter_has_as_many_weights_as_peft_gives_it(targets):
    folder = SHIPPED / "tiny"
    model = LoRA(rank=3, targets=targets)(AutoModelForCausalLM.from_pretrained(folder))
    shape = read_shape(str(folder), "policy.path")
    named = list(shape.linears) if targets == "all-linear" else targets
    assert shape.lora(3, named) == sum(p.numel() for p in model.parameters() if p.requires_grad)
