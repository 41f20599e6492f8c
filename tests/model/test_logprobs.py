"""RewardResult from hidden states: the numbers and gradients of whole logits, whatever the chunk. Their memory is tools/bench/head.py's."""

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from rlmod import ops
from rlmod.model import logprobs as head
from rlmod.model.logprobs import chunked_logprobs_and_entropy, completion_logits, logprobs_and_entropy
from rlmod.model.policy import HFPolicy
from rlmod.types import Rollouts, build_rollouts

N, D, V = 13, 8, 31


def inputs(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(D, V, bias=bias, dtype=dtype)
    return linear, torch.randn(N, D, dtype=dtype, requires_grad=True), torch.randint(V, (N,))


def gradients(of: torch.Tensor, linear: nn.Linear, hidden: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(of, [hidden, *linear.parameters()]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entries_per_chunk", [1, 5 * V, N * V], ids=["a token", "five tokens", "all"])
def test_values_and_gradients_are_those_of_whole_logits(entries_per_chunk, temperature, cap, bias):
    linear, hidden, ids = inputs(torch.float64, bias)
    upstream = torch.randn(2, N, dtype=torch.float64)
    logits = linear(hidden) if cap is None else cap * (linear(hidden) / cap).tanh()
    expected = ops.token_logprobs(logits[None], ids[None], temperature)[0], ops.entropy(logits, temperature)
    found = chunked_logprobs_and_entropy(
        hidden, linear, ids, temperature, softcap=cap, entries_per_chunk=entries_per_chunk
    )
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain)
    for weights in ((1, 0), (0, 1), (1, 1)):  # of the log-probabilities, of the entropies, of both
        total: list[torch.Tensor] = [
            sum((w * (u * x).sum() for w, u, x in zip(weights, upstream, pair, strict=True)), torch.tensor(0.0))
            for pair in (found, expected)
        ]
        mine = torch.autograd.grad(total[0], [hidden, *linear.parameters()], retain_graph=True)
        plain = torch.autograd.grad(total[1], [hidden, *linear.parameters()], retain_graph=True)
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b)


def test_without_the_entropy_the_log_probabilities_are_the_same():
    linear, hidden, ids = inputs(torch.float32, False)
    alone, none = chunked_logprobs_and_entropy(hidden, linear, ids, entropy=False, entries_per_chunk=4 * V)
    both, _ = chunked_logprobs_and_entropy(hidden, linear, ids, entries_per_chunk=4 * V)
    assert none is None
    assert torch.equal(alone, both)
    for a, b in zip(gradients(alone.sum(), linear, hidden), gradients(both.sum(), linear, hidden), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_autograd_agrees_with_differences(cap):
    linear, hidden, ids = inputs(torch.float64, True)
    assert torch.autograd.gradcheck(
        lambda h, w, b: head._ChunkedHead.apply(h, w, b, ids, 0.7, cap, True, 4), (hidden, linear.weight, linear.bias)
    )


def test_a_certain_token_and_a_frozen_head():
    linear, hidden, ids = inputs(torch.float32, True)
    with torch.no_grad():
        linear.bias.fill_(-torch.inf)
        linear.bias[3] = 0.0
    linear.requires_grad_(False)
    ids[:] = 3
    logprobs, entropy = chunked_logprobs_and_entropy(hidden, linear, ids)
    assert (logprobs == 0).all()
    assert (entropy == 0).all()
    (gradient,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), hidden)
    assert (gradient == 0).all()


def test_a_cap_by_hand():
    linear = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        linear.weight[:, 0] = torch.tensor([0.0, 1.0])
    hidden = torch.full((1, 1), 2.0, requires_grad=True)
    scores, _ = chunked_logprobs_and_entropy(hidden, linear, torch.tensor([1]), softcap=2.0)
    # z = 2 tanh(2 / 2) = 1.523188, log p = -log(1 + exp(-1.523188)), d log p / d h = (1 - p) (1 - tanh^2 1)
    torch.testing.assert_close(scores, torch.tensor([-0.197223]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(scores, hidden)
    torch.testing.assert_close(gradient, torch.tensor([[0.178991 * 0.419974]]), atol=1e-6, rtol=0)


def test_autocast_takes_the_products_in_its_precision_and_no_token_is_no_error():
    linear, hidden, ids = inputs(torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = chunked_logprobs_and_entropy(hidden, linear, ids, entries_per_chunk=4 * V)
        expected = ops.token_logprobs(linear(hidden)[None], ids[None])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert all(g.dtype == torch.float32 for g in gradients(found.sum(), linear, hidden))
    empty, _ = chunked_logprobs_and_entropy(hidden[:0], linear, ids[:0])
    assert gradients(empty.sum(), linear, hidden)[1].abs().sum() == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_many_chunks_round_no_more_than_one(autocast):
    torch.manual_seed(0)
    hidden, ids, upstream = torch.randn(2048, 16) + 0.5, torch.randint(V, (2048,)), torch.randn(2048) + 1
    exact = nn.Linear(16, V, dtype=torch.float64)
    with torch.no_grad():
        for value in exact.parameters():
            value.copy_(value.bfloat16())

    def gradient_of(dtype: torch.dtype, entries_per_chunk: int) -> torch.Tensor:
        linear = nn.Linear(16, V, dtype=dtype)
        linear.load_state_dict(exact.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == torch.float32):
            scores, _ = chunked_logprobs_and_entropy(
                hidden.bfloat16().to(dtype), linear, ids, entries_per_chunk=entries_per_chunk
            )
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
    return build_rollouts(
        prompt_ids=ids[:, :4], prompt_mask=torch.ones(3, 4).bool(), completion_ids=ids[:, 4:], mask=mask
    )


def test_a_policys_scores_are_those_of_its_logits_where_tokens_count_and_0_elsewhere(monkeypatch):
    tiny = HFPolicy(path="tiny")
    model = tiny.model(tiny.tokenizer()).eval()
    logits = completion_logits(model, rows())
    monkeypatch.setattr(head, "completion_logits", lambda *_: pytest.fail("whole logits were asked for"))
    logprobs, entropy = logprobs_and_entropy(model, rows(), 0.8)
    expected = ops.token_logprobs(logits, rows().completion_ids, 0.8)
    torch.testing.assert_close(logprobs, expected * rows().mask)
    torch.testing.assert_close(entropy, ops.entropy(logits, 0.8) * rows().mask)
    assert "forward" not in vars(model.lm_head)
    mine = torch.autograd.grad(logprobs.sum(), list(model.parameters()))
    plain = torch.autograd.grad((expected * rows().mask).sum(), list(model.parameters()))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def model_of(architecture: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    if architecture == "cohere":
        return CohereForCausalLM(CohereConfig(**SMALL, **settings))
    if architecture == "granite":
        return GraniteForCausalLM(GraniteConfig(**SMALL, **settings))
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=16, **settings))


@pytest.mark.parametrize(
    ("architecture", "settings", "behind"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5}, head.LogitTransform(softcap=0.5)),
        ("gemma2", {"final_logit_softcapping": None}, head.LogitTransform()),
        ("cohere", {"logit_scale": 0.3}, head.LogitTransform(scale=0.3)),
        ("granite", {"logits_scaling": 13.0}, head.LogitTransform(scale=1 / 13)),
    ],
)
def test_what_a_model_does_to_its_logits_behind_the_head_is_found_out_and_done(
    monkeypatch, architecture, settings, behind
):
    model = model_of(architecture, **settings).eval()
    logits = completion_logits(model, rows())
    expected = torch.stack([ops.token_logprobs(logits, rows().completion_ids, 0.8), ops.entropy(logits, 0.8)])
    monkeypatch.setattr(head, "completion_logits", lambda *_: pytest.fail("whole logits were asked for"))
    found = torch.empty(0)
    for _ in range(2):  # found out the first time, known the second
        found = torch.stack(logprobs_and_entropy(model, rows(), 0.8))
        torch.testing.assert_close(found, expected * rows().mask)
    mine, plain = [
        torch.autograd.grad((of * rows().mask).sum(), list(model.parameters()), retain_graph=True)
        for of in (found, expected)
    ]
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    known = head.find_logit_transform(model)
    assert known is not None
    assert (known.scale, known.softcap) == (pytest.approx(behind.scale, rel=1e-6), behind.softcap)
    assert torch.equal(completion_logits(model, rows()), logits)  # and its own forward pass is as it was


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_it_is_found_out_as_well_where_weights_have_16_bits(scale):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as trainer.precision=bf16-true does while training
    try:
        known = head.find_logit_transform(model_of("cohere", logit_scale=scale))
    finally:
        torch.set_default_dtype(before)
    assert known is not None
    assert known.scale == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("caps", [None, 0.5])
def test_finding_out_draws_nothing(caps):
    """A run that goes on finds out once more than one that was never interrupted, and dropout goes on where it was."""
    model = model_of("gemma2", final_logit_softcapping=caps, attention_dropout=0.5, attn_implementation="eager").train()
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(logprobs_and_entropy(model, rows(), 1.0)[0])
    assert torch.equal(*found)
    assert not torch.equal(found[1], logprobs_and_entropy(model, rows(), 1.0)[0])  # there is something to draw


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


def behind(change):
    """Something else behind the head than a scale or a cap."""

    def changed(model):
        whole = model.forward

        def forward(**settings):
            out = whole(**settings)
            out.logits = change(out.logits)
            return out

        model.forward = forward

    return changed


@pytest.mark.parametrize(
    "change",
    [
        cosine,
        hooked,
        unused,
        behind(lambda z: z + torch.arange(z.shape[-1]) / 9),
        behind(lambda z: z[..., :-1]),
        behind(lambda z: -z),
        behind(lambda z: z.clamp(max=0.1)),
        behind(lambda z: z * torch.arange(1, z.shape[1] + 1)[:, None]),
    ],
    ids=["cosine", "hooked", "unused", "a bias", "fewer", "negative", "clamped", "by token"],
)
def test_a_head_that_is_not_the_plain_one_is_asked_for_logits_too(change):
    specification = HFPolicy(path="tiny")
    model = specification.model(specification.tokenizer()).eval()
    change(model)
    forward = vars(model.lm_head).get("forward")
    expected = ops.token_logprobs(completion_logits(model, rows()), rows().completion_ids) * rows().mask
    for _ in range(2):
        torch.testing.assert_close(logprobs_and_entropy(model, rows(), 1.0)[0], expected)
    assert vars(model.lm_head).get("forward") is forward


def test_what_is_tried_first_leaves_no_cast_weights_without_gradients_behind():
    specification = HFPolicy(path="tiny")
    model = specification.model(specification.tokenizer())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs_and_entropy(model, rows(), 1.0)[0].sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "proj" in name)
