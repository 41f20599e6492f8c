"""Log-probabilities and entropies straight from hidden states: the logits of a whole batch never exist at once.

A batch of 2,048 tokens with a vocabulary of 151,936 has 1.2 GB of logits in float32, and a softmax and its gradient besides. Here they
exist for a chunk of tokens at a time, and the backward pass makes them again: four matrix products for three, and memory that does not
grow with the batch.

Some models do something to their logits behind the head: Cohere and Granite scale them, Gemma caps them. What it is is found out by trying.
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
"""Entries: 128 MiB in float32. What fits in one chunk is kept for the backward pass instead of being made again."""


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
    """log softmax(z / temperature) at ``ids``, and the entropy of that softmax if it is asked for, in nats.

    z = W h + b, or cap tanh((W h + b) / cap).

    The same numbers as from whole logits, in float32 or wider, with gradients in h, W and b. Under autocast the products are taken in
    its precision, as the head itself would.
    """
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk = max(entries_per_chunk // weight.shape[0], 1)
    return cast(Any, _Head.apply(hidden, weight, bias, ids, temperature, softcap, entropy, chunk))


class _Head(torch.autograd.Function):
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
        kept = None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            z = _logits(hidden[rows], weight, bias, temperature, softcap, wide)
            chosen = z.gather(-1, ids[rows, None])[:, 0]
            normaliser[rows] = z.logsumexp(-1)
            logprobs[rows] = chosen - normaliser[rows]
            if entropies is not None:
                log_p = z - normaliser[rows, None]
                p = log_p.exp()
                # Not logsumexp - sum p z, which cancels where the entropy is small; 0 * -inf would be NaN.
                entropies[rows] = -p.mul_(log_p.clamp_(min=torch.finfo(wide).min)).sum(-1)
            if len(hidden) <= chunk:
                kept = z
        ctx.save_for_backward(hidden, weight, bias, ids, normaliser, entropies, kept)
        ctx.temperature, ctx.softcap, ctx.chunk, ctx.wide = temperature, softcap, chunk, wide
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        of_logprobs, of_entropies = gradients
        hidden, weight, bias, ids, normaliser, entropies, kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Added up over the chunks in float32: in 16 bits each sum would be rounded anew.
        d_weight = torch.zeros_like(weight, dtype=ctx.wide) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=ctx.wide) if wants_bias else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            of_chunk = (hidden[rows], weight, bias, ctx.temperature, ctx.softcap, ctx.wide)
            z = _logits(*of_chunk) if kept is None else kept.clone()
            # d cap tanh(y / cap) / d y = 1 - tanh^2
            slope = None if ctx.softcap is None else (z * (ctx.temperature / ctx.softcap)).square_().neg_().add_(1.0)
            log_p = z.sub_(normaliser[rows, None])
            g = torch.zeros_like(normaliser[rows]) if of_logprobs is None else of_logprobs[rows]
            if of_entropies is None:
                d_z = log_p.exp_().mul_(-g[:, None])
            else:  # d H / d z = -p (log p + H)
                log_p.clamp_(min=torch.finfo(ctx.wide).min)
                p = log_p.exp()
                bracket = log_p.add_(entropies[rows, None]).mul_(of_entropies[rows, None]).add_(g[:, None])
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
        return d_hidden, _as(d_weight, weight), _as(d_bias, bias), None, None, None, None, None


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
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
    """The log-probability of each completion token, and the entropy of the distribution it is drawn from; 0 off the mask.

    Only counted tokens are looked at, and their logits are never whole: the policy's head is made to hand over what becomes of them. Of a
    model that does more behind its head than ``find_logit_transform`` knows they are whole.
    """
    mask = rollouts.mask
    if (transform := find_logit_transform(policy)) is None:
        logits = completion_logits(policy, rollouts)
        logprobs = ops.token_logprobs(logits, rollouts.completion_ids, temperature) * mask
        return logprobs, ops.entropy(logits, temperature) * mask if entropy else None
    head = cast(Any, policy).get_output_embeddings()
    ids = rollouts.completion_ids[mask]

    def through_head(hidden: Tensor) -> Tensor:
        if hidden.shape[1] == 1:  # of prompts alone
            return hidden
        counted, of_scaled = hidden[:, :-1][mask], temperature / transform.scale
        scores = chunked_logprobs_and_entropy(counted, head, ids, of_scaled, softcap=transform.softcap, entropy=entropy)
        whole = torch.stack([s.new_zeros(mask.shape).masked_scatter(mask, s) for s in scores if s is not None])
        return whole if transform.scale == 1.0 else whole / transform.scale  # it goes through the policy's scaling

    # Inside the policy's forward, where a sharded head is whole, and out by way of its output, by which the backward pass knows as much.
    with patched_lm_head(policy, through_head):
        scores = shared_prompts.logits(policy, rollouts)
    return scores[0], scores[1] if entropy else None


def completion_logits(policy: nn.Module, rollouts: Rollouts) -> Float[Tensor, "R T V"]:
    """The logits from which each completion token was, or would be, drawn."""
    return shared_prompts.logits(policy, rollouts)[:, :-1]


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """The function a model applies to z, its head's output: scale * z, or softcap * tanh(z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None


def find_logit_transform(policy: nn.Module) -> LogitTransform | None:
    """None where scores cannot be taken in the head's place: it is not a plain linear layer, or neither of the above follows it.

    Found out once, with two tokens; a run that goes on finds it out again, so dropout's draws are given back. Where a layer's weights are
    fetched from other ranks as it computes, all of them have to find it out at the same place.
    """
    if policy not in _TRANSFORMS:
        _TRANSFORMS[policy] = _tried(policy)
    return _TRANSFORMS[policy]


_TRANSFORMS: WeakKeyDictionary[nn.Module, LogitTransform | None] = WeakKeyDictionary()


@contextmanager
def patched_lm_head(policy: nn.Module, by: Callable[[Tensor], Tensor], *, capped: bool = False) -> Iterator[None]:
    """The policy's forward pass with ``by`` for its head, and without the cap behind it unless that is asked for."""
    head, config = cast(Any, policy).get_output_embeddings(), getattr(policy, "config", None)
    cap = getattr(config, _CAP, None)
    head.forward = by
    if cap is not None and not capped:
        setattr(config, _CAP, None)
    try:
        yield
    finally:
        del head.forward
        if cap is not None:
            setattr(config, _CAP, cap)


_CAP = "final_logit_softcapping"
"""The name of the soft cap in transformers' configs; null means none."""


def _tried(policy: nn.Module) -> LogitTransform | None:
    head, cap = cast(Any, policy).get_output_embeddings(), getattr(getattr(policy, "config", None), _CAP, None)
    linear = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward and "forward" not in vars(head)
    if not linear or not head.weight.is_floating_point():
        return None
    z = torch.linspace(-4.0, 4.0, head.out_features, dtype=torch.float32, device=head.weight.device)
    without = _returned(policy, z, capped=False)
    if without is None:
        return None
    scale = float(without[-1] / z[-1])
    if not scale > 0 or not torch.allclose(without, scale * z):
        return None
    if cap is None:
        return LogitTransform(scale=scale)
    capped = _returned(policy, z, capped=True)
    as_known = scale == 1.0 and capped is not None and torch.allclose(capped, cap * (z / cap).tanh())
    return LogitTransform(softcap=cap) if as_known else None


def _returned(policy: nn.Module, z: Float[Tensor, " V"], *, capped: bool) -> Float[Tensor, " V"] | None:
    """Return the policy's logits if its head returns z for every token; None if they depend on the token, or have another shape."""
    token = torch.zeros(1, 1, dtype=torch.long, device=z.device)
    mask = token == 0
    row = Rollouts(
        prompt_ids=token, prompt_mask=mask, completion_ids=token, mask=mask, group=token[0], truncated=~mask[0]
    )
    dropout_kept = torch.random.fork_rng([z.device] if z.device.type == "cuda" else [])
    replaced = patched_lm_head(policy, lambda hidden: z.repeat(*hidden.shape[:-1], 1), capped=capped)
    with torch.no_grad(), dropout_kept, shared_prompts.uncompiled(policy), replaced:
        logits = shared_prompts.logits(policy, row)
    return logits[0, 0].float() if logits.shape == (1, 2, len(z)) and torch.equal(*logits[0]) else None
