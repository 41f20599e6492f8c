"""A frozen reference stays, a moving one follows; both give log pi_ref at the sampling temperature."""

import pytest
import torch

from rlmod.model.logprobs import completion_logits
from rlmod.model.policy import HFPolicy
from rlmod.reference.ema import EMA
from rlmod.reference.frozen import Frozen
from rlmod.types import Rollouts, build_rollouts

TINY = HFPolicy(path="tiny")


@pytest.fixture
def policy():
    return TINY.model(TINY.tokenizer())


def rows() -> Rollouts:
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
    return build_rollouts(
        prompt_ids=ids[:, :4], prompt_mask=torch.ones(2, 4, dtype=torch.bool), completion_ids=ids[:, 4:]
    )


def moved(policy, by: float) -> None:
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(by)


@pytest.mark.parametrize("reference", [Frozen(policy=TINY), EMA(policy=TINY)])
def test_at_first_it_is_the_policy_at_the_temperature(reference, policy):
    found = reference(policy, rows(), 0.5)
    logits = completion_logits(policy.eval(), rows()) / 0.5
    expected = logits.log_softmax(-1).gather(-1, rows().completion_ids[..., None])[..., 0]
    torch.testing.assert_close(found, expected.detach())
    assert not found.requires_grad
    moved(policy, 0.1)
    torch.testing.assert_close(reference(policy, rows(), 0.5), found)


def test_a_moving_reference_by_hand(policy):
    reference = EMA(policy=TINY, decay=0.75)
    before = [parameter.clone() for parameter in reference.model.parameters()]
    moved(policy, 1.0)
    reference.update(policy)  # a quarter of the way
    for start, now in zip(before, reference.model.parameters(), strict=True):
        torch.testing.assert_close(now, start + 0.25)
    reference.update(policy)  # and a quarter of what is left
    for start, now in zip(before, reference.model.parameters(), strict=True):
        torch.testing.assert_close(now, start + 0.4375)


def test_it_moves_under_a_policy_in_bfloat16_too(policy):
    """A hundredth of a small difference is below bfloat16's resolution: 300 such steps would come to nothing."""
    policy.bfloat16()
    reference = EMA(policy=HFPolicy(path="tiny", dtype="bfloat16"), decay=0.99)
    before = [parameter.clone() for parameter in reference.model.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.0625)
    for _ in range(300):
        reference.update(policy)
    for start, target, now in zip(before, policy.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(now, target.float() + 0.99**300 * (start - target.float()), rtol=1e-3, atol=1e-4)


def test_its_ends(policy):
    moved(policy, 1.0)
    still, follows = EMA(policy=TINY, decay=1.0), EMA(policy=TINY, decay=0.0)
    for reference in (still, follows):
        reference.update(policy)
    for start, a, b, now in zip(
        Frozen(policy=TINY).model.parameters(), still.model.parameters(), follows.model.parameters(), policy.parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, start)
        torch.testing.assert_close(b, now.detach())


def test_its_weights_come_back(policy):
    one, other = EMA(policy=TINY), EMA(policy=TINY)
    moved(policy, 1.0)
    one.update(policy)
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_references_share_no_weights(policy):
    one, other = EMA(policy=TINY), EMA(policy=TINY)
    moved(policy, 1.0)
    one.update(policy)
    assert not torch.equal(next(one.model.parameters()), next(other.model.parameters()))
