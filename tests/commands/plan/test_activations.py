"""The activations that the plan counts for the backward pass are those that autograd keeps."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlmod.adapter.lora import LoRA
from rlmod.commands.plan import activations
from rlmod.commands.plan.run import Adapter, Run
from rlmod.commands.plan.shape import shape_from_config
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.types import build_rollouts
from tests.commands.plan.runs import RUN

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 300,
}
QWEN3 = {"model_type": "qwen3", "head_dim": 16}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "float32": {},
    "bfloat16": {"weight_width": 2},
    "autocast": {"autocast": True},
    "bfloat16 under autocast": {"weight_width": 2, "autocast": True},
    "eager": {"attention": "eager"},
    "eager, bfloat16": {"attention": "eager", "weight_width": 2},
    "checkpointing": {"checkpointing": True},
    "norms of heads": {"model_type": "qwen3"},
    "norms of heads, bfloat16": {"model_type": "qwen3", "weight_width": 2},
    "adapter": {"adapter": Adapter(rank=4, targets=ALL)},
    "adapter of two": {"adapter": Adapter(rank=4, targets=("q_proj", "v_proj"))},
    "adapter, bfloat16": {"adapter": Adapter(rank=4, targets=ALL), "weight_width": 2},
    "adapter under autocast": {"adapter": Adapter(rank=4, targets=ALL), "autocast": True},
    "adapter, bfloat16 under autocast": {"adapter": Adapter(rank=4, targets=ALL), "weight_width": 2, "autocast": True},
}


def autograd_keeps(config, run: Run) -> tuple[int, int]:
    """Bytes of activations, and of 16-bit copies of weights; without parameters and what the head keeps of its logits."""
    torch.manual_seed(0)
    config._attn_implementation = run.attention
    model = (
        AutoModelForCausalLM.from_config(config).to(torch.float32 if run.weight_width == 4 else torch.bfloat16).train()
    )
    if run.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if run.adapter is not None:
        model = LoRA(rank=run.adapter.rank, targets=list(run.adapter.targets))(model)
    prompt_mask = torch.ones(run.rows, run.prompt, dtype=torch.bool)
    prompt_mask[0, :2] = False
    rollouts = build_rollouts(
        prompt_ids=torch.randint(0, 99, (run.rows, run.prompt)),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(0, 99, (run.rows, run.completion)),
        mask=torch.ones(run.rows, run.completion, dtype=torch.bool),
    )
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and config.vocab_size != tensor.shape[-1]:
            found[storage.data_ptr()] = (storage.nbytes(), tuple(tensor.shape), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=run.autocast),
    ):
        logprobs_and_entropy(model, rollouts, 1.0, entropy=False)
    copies = sum(size for size, shape, _ in found.values() if shape in shapes)
    return sum(size for size, _, _ in found.values()) - copies, copies


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_is_counted(name):
    given = dict(CASES[name])
    kind = given.pop("model_type", "qwen2")
    extra = {"head_dim": 16} if kind == "qwen3" else {}
    config = AutoConfig.for_model(kind, **SIZES, **extra, num_key_value_heads=2, tie_word_embeddings=True)
    run = replace(RUN, shape=shape_from_config(config.to_dict()), prompt=5, completion=27, micro_batch=3, **given)
    kept, copies = autograd_keeps(config, run)
    # The padding mask is no saved tensor; the checkpointed layers hold it, and cosines and sines, as arguments.
    mask = run.rows * run.length**2
    rotation = 2 * run.rows * run.length * run.shape.head_dim * run.residual_width if run.checkpointing else 0
    assert activations.saved_bytes(run) - mask - rotation == pytest.approx(kept, rel=0.025)
    if run.casts_weights:
        from rlmod.commands.plan.memory import _autocast_copies

        assert _autocast_copies(run) == pytest.approx(copies, rel=0.12)
    else:
        assert copies <= 0.03 * kept
