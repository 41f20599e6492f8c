import math

import pytest
import torch

from rlmod import ops


def test_logprobs_and_entropy_by_hand():
    logits = torch.tensor([[[math.log(1.0), math.log(3.0)]]])
    assert ops.token_logprobs(logits, torch.tensor([[1]])).item() == pytest.approx(math.log(0.75))
    expected = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert ops.entropy(logits).item() == pytest.approx(expected)
    # Temperature 1/2 squares the odds: 1 to 9.
    assert ops.token_logprobs(logits, torch.tensor([[1]]), 0.5).item() == pytest.approx(math.log(0.9))
    assert ops.entropy(logits, 0.5).item() == pytest.approx(-0.1 * math.log(0.1) - 0.9 * math.log(0.9))


def test_entropy_of_the_uniform_and_of_the_certain():
    assert ops.entropy(torch.zeros(5, 7)).tolist() == pytest.approx([math.log(7)] * 5)
    assert ops.entropy(torch.tensor([[0.0, -torch.inf]])).item() == 0
    assert ops.entropy(torch.tensor([[1e4, 0.0]])).item() == pytest.approx(0)


def test_they_do_not_change_with_a_shift_and_agree_with_torch():
    logits = 5 * torch.randn(3, 4, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 11, (3, 4), generator=torch.Generator().manual_seed(1))
    plain = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(ops.token_logprobs(logits, ids), plain.log_prob(ids))
    torch.testing.assert_close(ops.entropy(logits), plain.entropy())
    torch.testing.assert_close(ops.entropy(logits + 100), ops.entropy(logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_those_of_sampling_are_the_same_numbers_in_fewer_passes(temperature):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)).double()
    logits[:, 0] += torch.tensor([0.0, 5.0, 15.0, 25.0, 30.0, 1e4])  # to where 1e-12 is left for all the others
    logits[1, 7] = -torch.inf
    given, ids = logits.clone(), torch.tensor([3, 0, 9, 0, 49, 0])
    logprobs, entropy = ops.sampled_logprobs_and_entropy(given, ids, temperature)
    torch.testing.assert_close(logprobs, ops.token_logprobs(logits[None], ids[None], temperature)[0])
    torch.testing.assert_close(entropy, ops.entropy(logits, temperature), atol=1e-14, rtol=1e-6)
    assert torch.equal(given, logits)  # transformers samples from them next


def test_bfloat16_logits_are_widened():
    logits = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert ops.token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long)).dtype == torch.float32


def test_masked_mean_reads_nothing_under_a_false():
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert ops.masked_mean(values, mask).item() == 3
    assert ops.masked_mean(values, mask, dim=1).tolist() == [1, 4]
    assert ops.masked_mean(values, torch.zeros_like(mask)).item() == 0


def test_has_signal():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.6, 0.5])
    index = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert ops.has_signal(rewards, index, 4, 0.5).tolist() == [True, False, False, True]
    rows = torch.tensor([True, False] + [True] * 6)
    assert ops.has_signal(rewards, index, 4, 0.5, rows=rows).tolist() == [False, False, False, True]


def test_group_index_closes_gaps():
    index, groups = ops.group_index(torch.tensor([7, 7, 3, 9]))
    assert index.tolist() == [1, 1, 0, 2]
    assert groups == 3


@pytest.mark.parametrize("value", [0.1, 0.35, 1 / 3])
def test_standardize_leaves_no_residue_of_equal_values(value):
    values = torch.full((6, 7), value)
    counted = torch.ones(6, 7, dtype=torch.bool)
    assert (ops.standardize(values, counted, torch.zeros(6, dtype=torch.long), 1, eps=1e-6) == 0).all()


def test_a_ratio_to_the_next_to_impossible_stays_finite():
    old = torch.tensor([[-1.0, -9999.0, 0.0, -1.0]])
    new = torch.tensor([[-1.5, -1.0, -9999.0, -2.0]], requires_grad=True)
    ratio = ops.log_ratio(new, old, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(ratio.detach(), torch.tensor([[-0.5, 20.0, -20.0, 0.0]]))
    # LogitTransform a clip an infinite ratio would be multiplied by a gradient of 0.
    ratio.exp().clamp(max=1.2).sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([[0.6065307, 0.0, 0.0, 0.0]]))
