"""Activations that the training forward pass saves for the backward pass, counted tensor by tensor. No constant is fitted.

Symbols: R rows of L tokens, N = R L tokens; D hidden size, F intermediate size, A width of all queries, K width of all keys, d width of a
head, V vocabulary. Bytes per number: c in the outputs of matrix products, s in the residual stream, w = max(s, 4) inside norms.

    per layer                                                      bytes
    2 norms: the input in float32, its rms, and the normalised     2 N D w + 2 N 4 + 2 N D s
    input if the norm's weight is trained
    inputs of q, k, v and of gate, up                              2 N D c          (5 N D c if autocast copies each)
    attention: q, k, v, output, the log-sum-exp of every head      4 N A c + 4 N heads   (flash_attention_2: 2 N (A + K) c + ...)
      sdpa: the padding mask, as numbers                           R L L c
      eager: the softmax in float32, and in c                      R heads L L (4 [+ c])
    MLP: gate, its activation, up, their product                   4 N F c
    outside the layers
    cosines and sines, the last norm, ids                          2 N d s + N D (w + s) + 4 N + 8 N
    hidden states of the T completion tokens for the head          R T D c

k and v count as wide as q: with a padding mask, transformers repeats them for every query head. With checkpointing a layer saves only its
input, N D s, and the backward pass recomputes one layer at a time. With an adapter, norms save no normalised input. Each adapted linear
layer then saves its input separately if the adapter computes in another precision, plus N rank numbers.
"""

from rlmod.commands.plan.run import Run


def saved_bytes(run: Run) -> int:
    """Return the bytes saved by one micro-batch at the end of its forward pass, without the head's logits."""
    s, n = run.shape, run.rows * run.length
    per_layer = n * s.hidden * run.residual_width if run.checkpointing else layer_bytes(run)
    last_norm = n * s.hidden * (_norm_width(run) + (run.residual_width if run.adapter is None else 0)) + 4 * n
    mask = run.rows * run.length**2 if run.attention != "flash_attention_2" else 0  # booleans, saved once
    return (
        s.layers * per_layer
        + last_norm
        + 2 * n * s.head_dim * run.residual_width
        + 8 * n
        + mask
        + _head_input_bytes(run)
    )


def layer_bytes(run: Run) -> int:
    """Return the bytes saved by one layer."""
    s, n = run.shape, run.rows * run.length
    trained = run.residual_width if run.adapter is None else 0
    norms = 2 * (n * s.hidden * (_norm_width(run) + trained) + 4 * n)
    if s.head_norms:
        normed = run.compute_width if run.adapter is None else 0
        norms += n * (s.queries + s.keys) * (_norm_width(run) + normed) + 4 * n * (s.heads + s.kv_heads)
    mlp = 3 * n * s.intermediate * run.compute_width
    return norms + _linear_input_bytes(run) + _attention_bytes(run) + mlp


def _linear_input_bytes(run: Run) -> int:
    """Return the bytes of the inputs of linear layers with trained weights or adapters."""
    s, n = run.shape, run.rows * run.length
    if run.adapter is None:
        copies = 5 if run.casts_weights else 2
        return n * run.compute_width * (copies * s.hidden + s.intermediate)
    targets = run.adapter.targets
    width = 2 if run.autocast else 4
    adapters = width * n * run.adapter.rank * len(targets)
    if run.autocast or run.compute_width != 4:
        return adapters + width * n * sum(s.linears[name][0] for name in targets)
    sources = {"q_proj": "first", "k_proj": "first", "v_proj": "first", "gate_proj": "second", "up_proj": "second"}
    shared = len({sources[name] for name in targets if name in sources})
    return adapters + n * run.compute_width * (shared * s.hidden + ("down_proj" in targets) * s.intermediate)


def _attention_bytes(run: Run) -> int:
    s, n, c = run.shape, run.rows * run.length, run.compute_width
    square = run.rows * run.length**2
    if run.attention == "eager":
        return 4 * n * s.queries * c + square * s.heads * (4 + (c if c < 4 else 0))
    if run.attention == "flash_attention_2":
        return 2 * n * (s.queries + s.keys) * c + 4 * n * s.heads
    return 4 * n * s.queries * c + 4 * n * s.heads + square * c


def backward_bytes(run: Run) -> int:
    """Return the peak bytes of temporary gradients while one layer runs backward, without saved activations and weight gradients.

    MLP: gradients of the product and of both factors, N F each, after the product itself is freed, and two gradients of the residual
    stream. Eager attention: gradients of the softmax, in c and twice in float32, after the MLP is done.
    """
    s, n, c = run.shape, run.rows * run.length, run.compute_width
    stream = 2 * n * s.hidden * run.residual_width
    mlp = 2 * n * s.intermediate * c
    if run.attention != "eager":
        return stream + mlp
    return stream + max(mlp, run.rows * run.length**2 * s.heads * (8 + c) - 4 * n * s.intermediate * c)


def _norm_width(run: Run) -> int:
    return max(run.residual_width, 4)


def _head_input_bytes(run: Run) -> int:
    return run.rows * run.completion * run.shape.hidden * run.compute_width
