"""Activations that the training forward pass keeps for the backward pass, counted tensor by tensor; nothing is fitted.

Symbols: R rows of L tokens, N = R L of them; D hidden, F intermediate, A the width of all queries, K that of all keys, d that of a head,
V vocabulary; c the width in bytes of what products give, s of the residual stream, w = max(s, 4) of what norms compute in.

    a layer keeps                                                  bytes
    2 norms: the input in float32, its rms, and, with a weight     2 N D w + 2 N 4 + 2 N D s
    that is trained, the normalised input
    inputs of q, k, v and of gate, up                              2 N D c          (5 N D c where autocast copies each)
    attention: q, k, v and output, the log-sum-exp of every head   4 N A c + 4 N heads   (flash_attention_2: 2 N (A + K) c + ...)
      sdpa: the padding mask, as numbers                           R L L c
      eager: the softmax in float32, and in c                      R heads L L (4 [+ c])
    MLP: gate, its activation, up, their product                   4 N F c
    beside the layers
    cosines and sines, the last norm, ids                          2 N d s + N D (w + s) + 4 N + 8 N
    hidden states of the T completion tokens for the head          R T D c

k and v are counted as wide as q: behind a padding mask transformers repeats them for every query head. With checkpointing a layer keeps
its input, N D s, and one layer at a time is whole again in the backward pass. An adapter's norms keep no normalised input; each linear
layer that it changes keeps its own input where its width is not that of the adapter, and N rank numbers besides.
"""

from rlmod.commands.plan.run import Run


def kept(run: Run) -> int:
    """Return the bytes one micro-batch keeps at the end of its forward pass, without the logits that the head keeps."""
    s, n = run.shape, run.rows * run.length
    one = n * s.hidden * run.residual if run.checkpointing else of_layer(run)
    last_norm = n * s.hidden * (_wide(run) + (run.residual if run.adapter is None else 0)) + 4 * n
    mask = run.rows * run.length**2 if run.attention != "flash_attention_2" else 0  # of truth values, once
    return s.layers * one + last_norm + 2 * n * s.head_dim * run.residual + 8 * n + mask + _for_head(run)


def of_layer(run: Run) -> int:
    """Return the bytes one layer keeps."""
    s, n = run.shape, run.rows * run.length
    trained = run.residual if run.adapter is None else 0
    norms = 2 * (n * s.hidden * (_wide(run) + trained) + 4 * n)
    if s.head_norms:
        normed = run.compute if run.adapter is None else 0
        norms += n * (s.queries + s.keys) * (_wide(run) + normed) + 4 * n * (s.heads + s.kv_heads)
    mlp = 3 * n * s.intermediate * run.compute
    return norms + _inputs(run) + _attention(run) + mlp


def _inputs(run: Run) -> int:
    """Return the inputs of the linear layers whose weights, or adapters, are trained."""
    s, n = run.shape, run.rows * run.length
    if run.adapter is None:
        copies = 5 if run.casts else 2
        return n * run.compute * (copies * s.hidden + s.intermediate)
    targets = run.adapter.targets
    width = 2 if run.autocast else 4
    adapters = width * n * run.adapter.rank * len(targets)
    if run.autocast or run.compute != 4:
        return adapters + width * n * sum(s.linears[name][0] for name in targets)
    sources = {"q_proj": "first", "k_proj": "first", "v_proj": "first", "gate_proj": "second", "up_proj": "second"}
    shared = len({sources[name] for name in targets if name in sources})
    return adapters + n * run.compute * (shared * s.hidden + ("down_proj" in targets) * s.intermediate)


def _attention(run: Run) -> int:
    s, n, c = run.shape, run.rows * run.length, run.compute
    square = run.rows * run.length**2
    if run.attention == "eager":
        return 4 * n * s.queries * c + square * s.heads * (4 + (c if c < 4 else 0))
    if run.attention == "flash_attention_2":
        return 2 * n * (s.queries + s.keys) * c + 4 * n * s.heads
    return 4 * n * s.queries * c + 4 * n * s.heads + square * c


def of_backward(run: Run) -> int:
    """At the most while one layer's gradients are taken, beside what is kept and beside gradients of weights.

    In the MLP: gradients of the product and of both its factors, N F each, when the product itself is gone; and two of the residual
    stream. Eager attention: gradients of the softmax, in c and twice in float32, when the MLP is done.
    """
    s, n, c = run.shape, run.rows * run.length, run.compute
    stream = 2 * n * s.hidden * run.residual
    mlp = 2 * n * s.intermediate * c
    if run.attention != "eager":
        return stream + mlp
    return stream + max(mlp, run.rows * run.length**2 * s.heads * (8 + c) - 4 * n * s.intermediate * c)


def _wide(run: Run) -> int:
    return max(run.residual, 4)


def _for_head(run: Run) -> int:
    return run.rows * run.completion * run.shape.hidden * run.compute
