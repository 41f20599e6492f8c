"""Log-probabilities and entropies straight from hidden states: the logits of a whole batch never exist at once.

A batch of 2,048 tokens with a vocabulary of 151,936 has 1.2 GB of logits in float32, and a softmax and its gradient besides. Here they
exist for a chunk of tokens at a time, and the backward pass makes them again: four matrix products for three, and memory that does not
grow with the batch.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LOGITS_AT_ONCE = 2**25
"""Entries: 128 MiB in float32. What fits in one chunk is kept for the backward pass instead of being made again."""


def logprobs_and_entropy(
    hidden: Float[Tensor, "N D"],
    head: nn.Linear,
    ids: Int[Tensor, " N"],
    temperature: float = 1.0,
    *,
    entropy: bool = True,
    at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """log softmax(z / temperature) at ``ids``, and the entropy of that softmax if it is asked for; z = W h + b, in nats.

    The same numbers as from whole logits, in float32 or wider, with gradients in h, W and b. Under autocast the products are taken in
    its precision, as the head itself would.
    """
    weight, bias = head.weight, head.bias
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk = max(at_once // weight.shape[0], 1)
    return cast(Any, _Head.apply(hidden, weight, bias, ids, temperature, entropy, chunk))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (as torch documents it)
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
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
            z = _logits(hidden[rows], weight, bias, temperature, wide)
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
        ctx.temperature, ctx.chunk, ctx.wide = temperature, chunk, wide
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
            z = _logits(hidden[rows], weight, bias, ctx.temperature, ctx.wide) if kept is None else kept.clone()
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
        return d_hidden, _as(d_weight, weight), _as(d_bias, bias), None, None, None, None


def _as(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, wide: torch.dtype) -> Tensor:
    z = nn.functional.linear(hidden, weight, bias).to(wide)
    return z if temperature == 1.0 else z.div_(temperature)
