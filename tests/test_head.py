"""Scores from hidden states: the numbers and gradients of whole logits, whatever the chunk. Their memory is tools/bench/head.py's."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from rlmod import head, ops, policy
from rlmod.policy import HFPolicy, completion_logits, completion_scores
from rlmod.types import Rollouts

N, D, V = 13, 8, 31


def inputs(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias=bias, dtype=dtype)
    return linear, torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(V, (N,))


def gradients(of: torch.Tensor, linear: nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(of, [hidden, *linear.parameters()]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("at_once", [1, 5 * V, N * V], ids=["a token", "five tokens", "all"])
def test_values_and_gradients_are_those_of_whole_logits(at_once, temperature, bias):
    linear, hidden, ids = inputs(torch.float64, bias)
    upstream = torch.randn(2, N, dtype=torch.float64)
    logits = linear(hidden)
    expected = ops.token_logprobs(logits[None], ids[None], temperature)[0], ops.entropy(logits, temperature)
    found = head.logprobs_and_entropy(hidden, linear, ids, temperature, at_once=at_once)
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain)
    for weights in ((1, 0), (0, 1), (1, 1)):  # of the log-probabilities, of the entropies, of both
        total = [
            sum(w * (u * x).sum() for w, u, x in zip(weights, upstream, pair, strict=True))
            for pair in (found, expected)
        ]
        mine = torch.autograd.grad(total[0], [hidden, *linear.parameters()], retain_graph=True)
        plain = torch.autograd.grad(total[1], [hidden, *linear.parameters()], retain_graph=True)
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_without_the_entropy_the_log_probabilities_are_the_same():
    linear, hidden, ids = inputs(torch.float32, False)
    alone, none = head.logprobs_and_entropy(hidden, linear, ids, entropy=False, at_once=4 * V)
    both, _ = head.logprobs_and_entropy(hidden, linear, ids, at_once=4 * V)
    assert none is None
    assert torch.equal(alone, both)
    for a, b in zip(gradients(alone.sum(), linear, hidden), gradients(both.sum(), linear, hidden), strict=True):
        torch.testing.assert_close(a, b)


def test_autograd_agrees_with_differences():
    linear, hidden, ids = inputs(torch.float64, True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: head._Head.apply(h, w, b, ids, 0.7, True, 4), (hidden, linear.weight, linear.bias)
    )


def test_a_certain_token_and_a_frozen_head():
    linear, hidden, ids = inputs(torch.float32, True)
    with torch.no_grad():
        linear.bias.fill_(-torch.inf)
        linear.bias[3] = 0.0
    linear.requires_grad_(False)
    ids[:] = 3
    logprobs, entropy = head.logprobs_and_entropy(hidden, linear, ids)
    assert (logprobs == 0).all()
    assert (entropy == 0).all()
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    assert (gradient == 0).all()


def test_autocast_takes_the_products_in_its_precision_and_no_token_is_no_error():
    linear, hidden, ids = inputs(torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = head.logprobs_and_entropy(hidden, linear, ids, at_once=4 * V)
        expected = ops.token_logprobs(linear(hidden)[None], ids[None])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert all(g.dtype == torch.float32 for g in gradients(found.sum(), linear, hidden))
    empty, _ = head.logprobs_and_entropy(hidden[:0], linear, ids[:0])
    assert gradients(empty.sum(), linear, hidden)[1].abs().sum() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_many_chunks_round_no_more_than_one(autocast):
    torch.manual_seed(0)
    hidden, ids, upstream = torch.randn(2048, 16) + 0.5, torch.randint(V, (2048,)), torch.randn(2048) + 1
    exact = nn.Linear(16, V, dtype=torch.float64)
    with torch.no_grad():
        for value in exact.parameters():
            value.copy_(value.bfloat16())

    def gradient_of(dtype: torch.dtype, at_once: int) -> torch.Tensor:
        linear = nn.Linear(16, V, dtype=dtype)
        linear.load_state_dict(exact.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            scores, _ = head.logprobs_and_entropy(hidden.bfloat16().to(dtype), linear, ids, at_once=at_once)
        (scores * upstream).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in linear.parameters() if p.grad is not None])

    whole = gradient_of(torch.float64, 2048 * V)
    dtype = torch.float32 if autocast else torch.bfloat16
    errors = [float((gradient_of(dtype, n * V) - whole).norm() / whole.norm()) for n in (2048, 8)]
    assert 1e-4 < errors[0] < 5e-3  # bfloat16 has 8 bits
    assert errors[1] < 1.5 * errors[0]


def rows() -> Rollouts:
    ids = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    return Rollouts(prompt_ids=ids[:, :4], prompt_mask=torch.ones(3, 4).bool(), completion_ids=ids[:, 4:], mask=mask)


def test_a_policys_scores_are_those_of_its_logits_where_tokens_count_and_0_elsewhere(monkeypatch):
    tiny = HFPolicy(path="tiny")
    model = tiny.model(tiny.tokenizer()).eval()
    logits = completion_logits(model, rows())
    monkeypatch.setattr(policy, "completion_logits", lambda *_: pytest.fail("whole logits were asked for"))
    logprobs, entropy = completion_scores(model, rows(), 0.8)
    expected = ops.token_logprobs(logits, rows().completion_ids, 0.8)
    torch.testing.assert_close(logprobs, expected * rows().mask)
    torch.testing.assert_close(entropy, ops.entropy(logits, 0.8) * rows().mask)
    assert "forward" not in vars(model.lm_head)
    mine = torch.autograd.grad(logprobs.sum(), list(model.parameters()))
    plain = torch.autograd.grad((expected * rows().mask).sum(), list(model.parameters()))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_model_that_caps_its_logits_is_asked_for_them():
    """Gemma 2 bends its logits behind the head: scores from the head alone would be wrong."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5,
        )
    ).eval()  # fmt: skip
    logits = completion_logits(model, rows())
    for _ in range(2):  # found out the first time, known the second
        logprobs, entropy = completion_scores(model, rows(), 1.0)
        torch.testing.assert_close(logprobs, ops.token_logprobs(logits, rows().completion_ids) * rows().mask)
        torch.testing.assert_close(entropy, ops.entropy(logits) * rows().mask)
    assert not policy._HANDS_OVER_HIDDEN[model]


@pytest.mark.parametrize("caps", [None, 0.5])
def test_finding_out_draws_nothing(caps):
    """A run that goes on finds out once more than one that was never interrupted, and dropout goes on where it was."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, final_logit_softcapping=caps, attention_dropout=0.5, attn_implementation="eager",
        )
    ).train()  # fmt: skip
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(completion_scores(model, rows(), 1.0)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[1], completion_scores(model, rows(), 1.0)[0])  # there is something to draw


class Cosine(nn.Linear):
    """A head that is more than its matrix."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.normalize(input, dim=-1))


def cosine(model):
    head = Cosine(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.set_output_embeddings(head)


def hooked(model):
    plain = model.lm_head.forward
    model.lm_head.forward = lambda hidden: plain(2 * hidden)


def unused(model):
    whole = model.forward

    def forward(input_ids, **settings):
        out = whole(input_ids=input_ids, **settings, output_hidden_states=True)
        out.logits = out.hidden_states[-1][:, -settings["logits_to_keep"] :] @ model.lm_head.weight.T
        return out

    model.forward = forward


@pytest.mark.parametrize("change", [cosine, hooked, unused])
def test_a_head_that_is_not_the_plain_one_is_asked_for_logits_too(change):
    specification = HFPolicy(path="tiny")
    model = specification.model(specification.tokenizer()).eval()
    change(model)
    forward = vars(model.lm_head).get("forward")
    expected = ops.token_logprobs(completion_logits(model, rows()), rows().completion_ids) * rows().mask
    for _ in range(2):
        torch.testing.assert_close(completion_scores(model, rows(), 1.0)[0], expected)
    assert vars(model.lm_head).get("forward") is forward


def test_what_is_tried_first_leaves_no_cast_weights_without_gradients_behind():
    specification = HFPolicy(path="tiny")
    model = specification.model(specification.tokenizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        completion_scores(model, rows(), 1.0)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "proj" in name)
