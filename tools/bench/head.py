"""Time and memory of log-probabilities and entropies from hidden states, compared with whole logits, as the vocabulary grows.

Forward and backward to hidden states and head, in turn. Memory is without the head's own gradient, which both hand over.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlmod import ops
from rlmod.model.logprobs import chunked_logprobs_and_entropy
from tools.bench import peak

Way = Callable[[Tensor], Tensor]
SIZES = ((4_096, 896, 2_048), (32_768, 896, 2_048), (151_936, 896, 2_048))
"""Vocabulary, hidden size, tokens."""


def measured(way: Way, hidden: Tensor, upstream: Tensor) -> tuple[float, int, Tensor]:
    """CPU seconds, peak bytes, and the values."""
    hidden = hidden.clone().requires_grad_()
    resident, started = peak.start(), time.process_time()
    values = way(hidden)
    (values * upstream).sum().backward()
    return time.process_time() - started, peak.since(resident), values.detach()


def row(vocabulary: int, width: int, tokens: int, repetitions: int, *, entropy: bool) -> str:
    torch.manual_seed(0)
    head, hidden = nn.Linear(width, vocabulary, bias=False), torch.randn(tokens, width)
    ids, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(1 + entropy, tokens)

    def in_chunks(h: Tensor) -> Tensor:
        return torch.stack([s for s in chunked_logprobs_and_entropy(h, head, ids, entropy=entropy) if s is not None])

    def whole(h: Tensor) -> Tensor:
        logits = head(h)[None]
        logprobs = ops.token_logprobs(logits, ids[None])
        return torch.cat([logprobs, ops.entropy(logits)]) if entropy else logprobs

    ways: tuple[Way, Way] = (in_chunks, whole)
    seconds: tuple[list[float], list[float]] = [], []
    held, values = [0, 0], [torch.empty(0)] * 2
    for _ in range(repetitions):
        for i, way in enumerate(ways):
            head.weight.grad = None
            taken, held[i], values[i] = measured(way, hidden, upstream)
            seconds[i].append(taken)
    mebibytes = [(bytes - vocabulary * width * 4) / 2**20 for bytes in held]
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    what = "log-probabilities, entropies" if entropy else "log-probabilities"
    return (
        f"| {vocabulary:,} | {what} | {statistics.median(seconds[0]):.2f} | {statistics.median(seconds[1]):.2f} "
        f"| **{statistics.median(ratios):.2f}** | {min(ratios):.2f} to {max(ratios):.2f} | {mebibytes[0]:.0f} | {mebibytes[1]:.0f} "
        f"| **{mebibytes[0] / mebibytes[1]:.3f}** | {float((values[0] - values[1]).abs().max()):.0e} |"
    )


def table(repetitions: int, sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[str]:
    lines = [
        "| vocabulary | what | in chunks, s | whole logits, s | ratio, median | range | in chunks, MiB | whole, MiB | ratio "
        "| values apart |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    peak.own_pages()
    # The largest takes most of the time: a few pairs of it must do.
    for entropy in (False, True):
        for vocabulary, width, tokens in sizes:
            pairs = repetitions if vocabulary < 100_000 else min(repetitions, 3)
            lines.append(row(vocabulary, width, tokens, pairs, entropy=entropy))
    peak.recycled_pages()
    _, width, tokens = sizes[0]
    return [
        *lines,
        "",
        f"Hidden size {width}, {tokens:,} tokens, float32, forward and backward. Aims: time at most 1.35, memory at most 0.125.",
    ]
