import math

import pytest
import torch

from rlmod import ops
from rlmod.regularizer.entropy_bonus import EntropyBonus
from rlmod.types import build_rollouts


def bonus(logits: torch.Tensor, weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    entropy = ops.entropy(logits)
    record = build_rollouts(mask=torch.tensor([[True, False]]), policy_entropy=entropy)
    return EntropyBonus(weight=weight)(torch.zeros_like(entropy), record)


def test_by_hand():
    # Two tokens, probabilities 1/4 and 3/4: H = 0.5623 nats; dH/dz_v = -p_v (log p_v + H)
    logits = torch.tensor([[[0.0, math.log(3)], [5.0, 5.0]]], requires_grad=True)
    per_token, metrics = bonus(logits, 0.1)
    assert per_token[0].tolist() == pytest.approx([-0.05623351, 0], abs=1e-7)
    assert metrics["policy_entropy"][0, 0].item() == pytest.approx(0.5623351)
    per_token.sum().backward()
    slope = 0.25 * (math.log(0.25) + 0.5623351)
    assert logits.grad[0, 0].tolist() == pytest.approx([0.1 * slope, -0.1 * slope], abs=1e-6)
    assert (logits.grad[0, 1] == 0).all()


def test_a_uniform_policy_is_left_alone():
    logits = torch.zeros(1, 2, 4, requires_grad=True)
    bonus(logits, 1.0)[0].sum().backward()
    assert logits.grad.abs().max().item() < 1e-7


def test_the_weight_must_be_finite():
    with pytest.raises(ValueError, match=r"regularizer\.entropy_bonus\.weight"):
        EntropyBonus(weight=math.inf)
