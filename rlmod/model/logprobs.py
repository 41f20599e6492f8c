"""Log-probabilities and entropies computed from hidden states, without the logits of the whole batch in memory.

A batch of 2,048 tokens with a vocabulary of 151,936 has 1.2 GB of logits in float32; the softmax and its gradient come on top. Here
logits exist for one chunk of tokens at a time, and the backward pass recomputes them. That takes four matrix products instead of three,
and memory does not grow with the batch.

Some models transform the output of their LM head: Cohere and Granite scale it, Gemma caps it. A probe with two tokens detects the
transform (``find_logit_transform``).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlmod import ops
from rlmod.model import shared_prompts
from rlmod.types import Rollouts

ENTRIES_PER_CHUNK = 2**25
"""Logits per chunk: 128 MiB in float32. A batch that fits in one chunk keeps its logits for the backward pass and recomputes nothing."""


def chunked_logprobs_and_entropy(
    hidden: Float[Tensor, "N D"],
    head: nn.Linear,
    ids: Int[Tensor, " N"],
    temperature: float = 1.0,
    *,
    softcap: float | None = None,
    entropy: bool = True,
    entries_per_chunk: int = ENTRIES_PER_CHUNK,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """log softmax(z / temperature) at ``ids``, and the entropy of that softmax if ``entropy`` is True, both in nats.

    z = W h + b, or softcap tanh((W h + b) / softcap).

    The results equal those from full logits. They are in float32 or wider and have gradients in h, W and b. Under autocast the matrix
    products use its dtype, as the head itself would.
    """
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk = max(entries_per_chunk // weight.shape[0], 1)
    return cast(Any, _ChunkedHead.apply(hidden, weight, bias, ids, temperature, softcap, entropy, chunk))


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (as torch documents it)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        softcap: float | None,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor | None]:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = hidden.new_empty(len(hidden), dtype=wide)
        entropies = torch.empty_like(logprobs) if entropy else None
        normaliser = torch.empty_like(logprobs)
        saved_logits = None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = _logits(hidden[rows], weight, bias, temperature, softcap, wide)
            chosen = z.gather(-1, ids[rows, None])[:, 0]
            normaliser[rows] = z.logsumexp(-1)
            logprobs[rows] = chosen - normaliser[rows]
            if entropies is not None:
                log_p = z - normaliser[rows, None]
                p = log_p.exp()
                # logsumexp - sum p z would cancel if the entropy is small. The clamp avoids 0 * -inf, which is NaN.
                entropies[rows] = -p.mul_(log_p.clamp_(min=torch.finfo(wide).min)).sum(-1)
            if len(hidden) <= chunk:
                saved_logits = z
        ctx.save_for_backward(hidden, weight, bias, ids, normaliser, entropies, saved_logits)
        ctx.temperature, ctx.softcap, ctx.chunk, ctx.wide = temperature, softcap, chunk, wide
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_logprobs, d_entropies = gradients
        hidden, weight, bias, ids, normaliser, entropies, saved_logits = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Accumulated over the chunks in float32: in 16 bits every addition would round.
        d_weight = torch.zeros_like(weight, dtype=ctx.wide) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=ctx.wide) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            arguments = (hidden[rows], weight, bias, ctx.temperature, ctx.softcap, ctx.wide)
            z = _logits(*arguments) if saved_logits is None else saved_logits.clone()
            # d cap tanh(y / cap) / d y = 1 - tanh^2
            slope = None if ctx.softcap is None else (z * (ctx.temperature / ctx.softcap)).square_().neg_().add_(1.0)
            log_p = z.sub_(normaliser[rows, None])
            g = torch.zeros_like(normaliser[rows]) if d_logprobs is None else d_logprobs[rows]
            if d_entropies is None:
                d_z = log_p.exp_().mul_(-g[:, None])
            else:  # d H / d z = -p (log p + H)
                log_p.clamp_(min=torch.finfo(ctx.wide).min)
                p = log_p.exp()
                bracket = log_p.add_(entropies[rows, None]).mul_(d_entropies[rows, None]).add_(g[:, None])
                d_z = p.mul_(bracket).neg_()
            d_z.scatter_add_(1, ids[rows, None], g[:, None])
            if slope is not None:
                d_z.mul_(slope)
            d_z = d_z.div_(ctx.temperature).to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_z, weight, out=d_hidden[rows])
            if d_weight is not None:
                if d_weight.dtype == d_z.dtype:
                    d_weight.addmm_(d_z.T, hidden[rows])
                else:
                    d_weight += d_z.T @ hidden[rows]
            if d_bias is not None:
                d_bias += d_z.sum(0, dtype=ctx.wide)
        return d_hidden, _to_dtype_of(d_weight, weight), _to_dtype_of(d_bias, bias), None, None, None, None, None


def _to_dtype_of(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, softcap: float | None, wide: torch.dtype
) -> Tensor:
    z = nn.functional.linear(hidden, weight, bias).to(wide)
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z if temperature == 1.0 else z.div_(temperature)


def completion_logprobs(policy: nn.Module, rollouts: Rollouts, temperature: float) -> Float[Tensor, "R T"]:
    """log pi(o_{i,t} | q, o_{i,<t}) in nats, of softmax(logits / temperature); 0 where ``rollouts.mask`` is False."""
    return logprobs_and_entropy(policy, rollouts, temperature, entropy=False)[0]


def logprobs_and_entropy(
    policy: nn.Module, rollouts: Rollouts, temperature: float, *, entropy: bool = True
) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"] | None]:
    """log pi(o_{i,t} | q, o_{i,<t}) of softmax(logits / temperature) and, if ``entropy`` is True, the entropy of that softmax.

    Both are in nats, and 0 where ``rollouts.mask`` is False.

    Only tokens under the mask are computed. The LM head is replaced during the forward pass by one that returns the results instead of
    logits, so full logits never exist. For models whose transform ``find_logit_transform`` does not know, full logits are used.
    """
    mask = rollouts.mask
    if (transform := find_logit_transform(policy)) is None:
        logits = completion_logits(policy, rollouts)
        logprobs = ops.token_logprobs(logits, rollouts.completion_ids, temperature) * mask
        return logprobs, ops.entropy(logits, temperature) * mask if entropy else None
    head = cast(Any, policy).get_output_embeddings()
    ids = rollouts.completion_ids[mask]

    def replacement_head(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 1:  # the pass over the shared prompts, whose logits are unused
            return hidden
        counted, scaled = hidden[:, :-1][mask], temperature / transform.scale
        results = chunked_logprobs_and_entropy(counted, head, ids, scaled, softcap=transform.softcap, entropy=entropy)
        padded = torch.stack([r.new_zeros(mask.shape).masked_scatter(mask, r) for r in results if r is not None])
        return (
            padded if transform.scale == 1.0 else padded / transform.scale
        )  # the model multiplies its output by scale

    # Computed inside the policy's forward pass, while a sharded head is gathered, and returned as the policy's output, so that FSDP's hooks
    # on the output gather the head again for the backward pass.
    with patched_lm_head(policy, replacement_head):
        results = shared_prompts.logits(policy, rollouts)
    return results[0], results[1] if entropy else None


def completion_logits(policy: nn.Module, rollouts: Rollouts) -> Float[Tensor, "R T V"]:
    """Return the logits of the distribution of each completion token, before division by the temperature."""
    return shared_prompts.logits(policy, rollouts)[:, :-1]


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The function that a model applies to its LM head's output z: scale * z, or softcap * tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def find_logit_transform(policy: nn.Module) -> LogitTransform | None:
    """Return the transform of the policy's logits, or None if the head cannot be replaced.

    The head cannot be replaced if it is not a plain linear layer, or if its output goes through another function than ``LogitTransform``
    describes.

    The first call for a policy runs it on two tokens; later calls use that result. A resumed run repeats the probe, so the probe restores
    the random generators that dropout draws from. With sharded weights all ranks must make the first call at the same point, because the
    forward pass gathers weights.
    """
    if policy not in _TRANSFORMS:
        _TRANSFORMS[policy] = _probe_logit_transform(policy)
    return _TRANSFORMS[policy]


_TRANSFORMS: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


@contextmanager
def patched_lm_head(policy: nn.Module, head: Callable[[Tensor], Tensor], *, capped: bool = False) -> Iterator[None]:
    """Replace the policy's LM head by ``head``, and switch off its soft cap unless ``capped``, while the context is open."""
    lm_head, config = cast(Any, policy).get_output_embeddings(), getattr(policy, "config", None)
    cap = getattr(config, _CAP, None)
    lm_head.forward = head
    if cap is not None and not capped:
        setattr(config, _CAP, None)
    try:
        yield
    finally:
        del lm_head.forward
        if cap is not None:
            setattr(config, _CAP, cap)


_CAP = "final_logit_softcapping"
"""The name of the soft cap in transformers' configs. None means no cap."""


def _probe_logit_transform(policy: nn.Module) -> LogitTransform | None:
    head, cap = cast(Any, policy).get_output_embeddings(), getattr(getattr(policy, "config", None), _CAP, None)
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    if not linear or not head.weight.is_floating_point():
        return None
    z = torch.linspace(-4.0, 4.0, head.out_features, dtype=torch.float32, device=head.weight.device)
    uncapped = _logits_for_head_output(policy, z, capped=False)
    if uncapped is None:
        return None
    scale = float(uncapped[-1] / z[-1])
    if not scale > 0 or not torch.allclose(uncapped, scale * z):
        return None
    if cap is None:
        return LogitTransform(scale=scale)
    capped = _logits_for_head_output(policy, z, capped=True)
    is_softcap = scale == 1.0 and capped is not None and torch.allclose(capped, cap * (z / cap).tanh())
    return LogitTransform(softcap=cap) if is_softcap else None


def _logits_for_head_output(policy: nn.Module, z: Float[Tensor, " V"], *, capped: bool) -> Float[Tensor, " V"] | None:
    """Return the policy's logits when its head returns z for every token; None if they depend on the token or have another shape."""
    token = torch.zeros(1, 1, dtype=torch.long, device=z.device)
    mask = token == 0
    row = Rollouts(
        prompt_ids=token, prompt_mask=mask, completion_ids=token, mask=mask, group=token[0], truncated=~mask[0]
    )
    same_random_state = torch.random.fork_rng([z.device] if z.device.type == "cuda" else [])
    replaced = patched_lm_head(policy, lambda hidden: z.repeat(*hidden.shape[:-1], 1), capped=capped)
    with torch.no_grad(), same_random_state, shared_prompts.uncompiled(policy), replaced:
        logits = shared_prompts.logits(policy, row)
    return logits[0, 0].float() if logits.shape == (1, 2, len(z)) and torch.equal(*logits[0]) else None
