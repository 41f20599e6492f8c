"""Packing of rows into micro-batches: rows that train, sorted by length, within a budget of rows and tokens."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlmod.types import Rollouts


def rows_that_train(rollouts: Rollouts, *, every_row: bool) -> Bool[Tensor, " R"]:
    """Return True for each row that can change the policy: some token has a weight and, unless ``every_row``, an advantage other than 0.

    A loss that is proportional to the advantage has no gradient where the advantage is 0, as in groups that are all correct or all
    incorrect. Dropping these rows from the forward pass saves time and does not change the result.
    """
    assert rollouts.weights is not None and rollouts.advantages is not None
    matters = rollouts.weights if every_row else rollouts.weights * rollouts.advantages
    return (matters != 0).any(1)


def pack_by_length(rollouts: Rollouts, rows: int, tokens: int | None = None) -> Iterator[Int[Tensor, " n"]]:
    """Yield the row indices of packs of at most ``rows`` rows and ``tokens`` tokens, padding included; longest first.

    Rows are sorted by length, so that packs have little padding. A row longer than ``tokens`` forms a pack alone.
    """
    places = torch.arange(1, rollouts.mask.shape[1] + 1, device=rollouts.mask.device)
    prompts, completions = rollouts.prompt_mask.sum(1), (rollouts.mask * places).amax(1)
    order = (prompts + completions).argsort(descending=True, stable=True)
    sizes = torch.stack([prompts, completions], 1)[order].tolist()
    start, longest = 0, (0, 0)
    for stop, (prompt, completion) in enumerate(sizes):
        grown = (max(longest[0], prompt), max(longest[1], completion))
        full = stop - start == rows or (tokens is not None and (stop - start + 1) * sum(grown) > tokens)
        if stop > start and full:
            yield order[start:stop]
            start, grown = stop, (prompt, completion)
        longest = grown
    if start < len(sizes):
        yield order[start:]
