"""Values by hand, and the gradient against the exact KL divergence of a small vocabulary."""

import math

import pytest
import torch

from rlmod.regularizer.kl import KL
from rlmod.types import Rollouts, build_rollouts
from tests.rollouts import measured


def rows(d: list[list[float]], old: float = 0.0) -> tuple[torch.Tensor, Rollouts]:
    lp = torch.tensor(d).double() - 1
    mask = torch.ones_like(lp, dtype=torch.bool)
    record = build_rollouts(mask=mask, reference_logprobs=torch.full_like(lp, -1.0), logprobs=lp - old)
    return lp.requires_grad_(), record


@pytest.mark.parametrize(
    ("value", "expected"), [("k1", [0.5, -0.5]), ("k2", [0.125, 0.125]), ("k3", [0.1065307, 0.1487213])]
)
def test_values_by_hand(value, expected):
    # k3: exp(-0.5) - 1 + 0.5 and exp(0.5) - 1 - 0.5
    lp, record = rows([[0.5, -0.5]])
    added, metrics = KL(weight=2.0, value=value)(lp, record)
    assert added[0].tolist() == pytest.approx([2 * x for x in expected], abs=1e-6)
    assert measured(metrics["kl"], record.mask).mean().item() == pytest.approx(sum(expected) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("gradient", "expected"), [("k1", [1, 1]), ("k2", [0.5, -0.5]), ("k3", [1 - 0.6065307, 1 - 1.6487213])]
)
@pytest.mark.parametrize("value", ["k1", "k2", "k3"])
def test_the_gradient_is_the_named_estimators_whatever_the_value(gradient, expected, value):
    lp, record = rows([[0.5, -0.5]])
    KL(weight=1.0, value=value, gradient=gradient)(lp, record)[0].sum().backward()
    assert lp.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def exact(logits: torch.Tensor, reference: torch.Tensor, direction: str) -> torch.Tensor:
    p, q = logits.log_softmax(-1), reference.log_softmax(-1)
    return (p.exp() * (p - q)).sum() if direction == "to reference" else (q.exp() * (q - p)).sum()


@pytest.mark.parametrize(("gradient", "direction"), [("k2", "to reference"), ("k3", "from reference"), ("k1", None)])
def test_in_expectation_the_gradient_is_the_exact_kls(gradient, direction):
    """Every token of a vocabulary of five, each with its probability: the expectation without sampling."""
    draw = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(5, generator=draw).double() for _ in range(2))
    logits.requires_grad_()
    log_p = logits.log_softmax(-1)
    record = build_rollouts(
        mask=torch.ones(5, 1, dtype=torch.bool), reference_logprobs=reference.log_softmax(-1)[:, None]
    )
    per_token, metrics = KL(weight=1.0, gradient=gradient)(log_p[:, None], record)
    (expected,) = torch.autograd.grad((log_p.exp().detach() * per_token[:, 0]).sum(), logits, retain_graph=True)
    if direction is None:  # k1's has none in expectation
        assert expected.abs().max().item() < 1e-12
    else:
        (true,) = torch.autograd.grad(exact(logits, reference, direction), logits)
        torch.testing.assert_close(expected, true)
    assert measured(metrics["kl"], record.mask).mean().item() >= 0


@pytest.mark.parametrize("value", ["k1", "k3"])
def test_in_expectation_k1_and_k3_are_the_exact_kl(value):
    draw = torch.Generator().manual_seed(1)
    logits, reference = (torch.randn(5, generator=draw).double() for _ in range(2))
    log_p = logits.log_softmax(-1)
    record = build_rollouts(
        mask=torch.ones(5, 1, dtype=torch.bool), reference_logprobs=reference.log_softmax(-1)[:, None]
    )
    per_token, _ = KL(weight=1.0, value=value)(log_p[:, None], record)
    torch.testing.assert_close((log_p.exp() * per_token[:, 0]).sum(), exact(logits, reference, "to reference"))


def test_importance_weighs_by_the_ratio_without_its_gradient():
    lp, record = rows([[0.5, -0.5]], old=torch.log(torch.tensor(2.0)).item())
    added, _ = KL(weight=1.0, value="k2", importance=True)(lp, record)
    assert added[0].tolist() == pytest.approx([0.25, 0.25])
    added.sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([1.0, -1.0])


def test_at_the_reference_nothing_is_paid_and_padding_is_never_read():
    lp, record = rows([[0.0, 0.0], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False]])
    reference = torch.full_like(record.reference_logprobs, -1.0).masked_fill(~mask, torch.nan)
    added, metrics = KL(weight=1.0)(lp, build_rollouts(mask=mask, reference_logprobs=reference))
    assert (added == 0).all()
    assert (measured(metrics["kl"], mask) == 0).all()
    added.sum().backward()
    assert (lp.grad == 0).all()


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"regularizer\.kl\.weight"):
        KL(weight=-1.0)


def test_a_token_that_the_policy_gave_up_costs_a_finite_price():
    rows = build_rollouts(mask=torch.ones(1, 1).bool(), reference_logprobs=torch.tensor([[-0.5]]))
    for weight in (0.0, 0.1):
        logprobs = torch.tensor([[-115.5]], requires_grad=True)
        KL(weight=weight)(logprobs, rows)[0].sum().backward()
        assert logprobs.grad.item() == pytest.approx(weight * -115)
        assert KL(weight=weight)(logprobs, rows)[0].item() == pytest.approx(weight * (math.exp(20) - 1 - 115))
