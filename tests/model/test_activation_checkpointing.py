"""policy.gradient_checkpointing: less is kept for the backward pass, and every number stays the same."""

import pytest
import torch

from rlmod.adapter.lora import LoRA
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.model.policy import HFPolicy
from rlmod.types import Rollouts, build_rollouts

DROPOUT = LoRA(rank=4, dropout=0.2)


@pytest.fixture(scope="module")
def rows() -> Rollouts:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 99, (8, 64), generator=draw)
    mask = torch.arange(56) < torch.randint(1, 57, (8, 1), generator=draw)
    prompt = torch.ones(8, 8, dtype=torch.bool)
    return build_rollouts(prompt_ids=ids[:, :8], prompt_mask=prompt, completion_ids=ids[:, 8:], mask=mask)


def gradients(rows: Rollouts, checkpointed: bool, adapter: LoRA | None) -> tuple[dict[str, torch.Tensor], int]:
    """Return the gradients of a loss on log-probabilities and entropies, and the bytes kept for the backward pass, without weights."""
    torch.manual_seed(0)
    specification = HFPolicy(path="tiny", gradient_checkpointing=checkpointed, adapter=adapter)
    policy = specification.model(specification.tokenizer())
    policy.config.attention_dropout = 0.1
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, entropy = logprobs_and_entropy(policy, rows, 0.7)
        loss = (logprobs * torch.linspace(-1, 1, 8)[:, None]).sum() + 0.1 * entropy.sum()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("adapter", [None, DROPOUT], ids=["weights", "adapter with dropout"])
def test_the_gradients_are_the_same_and_less_is_kept(rows, adapter):
    plain, all_kept = gradients(rows, False, adapter)
    checkpointed, few_kept = gradients(rows, True, adapter)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in plain.values()) > 0.1
    assert few_kept < all_kept / 3, (few_kept, all_kept)


def test_dropout_is_drawn(rows):
    """Or the test above would show nothing about random states."""
    with_dropout, _ = gradients(rows, False, DROPOUT)
    without, _ = gradients(rows, False, LoRA(rank=4))
    name = next(name for name in without if "lora_B" in name)
    assert (with_dropout[name] - without[name]).abs().max() > 1e-3
