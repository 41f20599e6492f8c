"""Which rows go through a model together: those that matter, the long with the long, within a budget."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlmod.types import Rollouts


def rows_that_train(rollouts: Rollouts, *, every_row: bool) -> Bool[Tensor, " R"]:
    """Rows that can change the policy: some token has a weight, and an advantage unless ``every_row`` counts without one.

    A loss that is proportional to the advantage has no gradient where it is 0, as in groups that are all correct or all incorrect, so
    leaving these rows out changes nothing but the time it takes.
    """
    assert rollouts.weights is not None and rollouts.advantages is not None
    matters = rollouts.weights if every_row else rollouts.weights * rollouts.advantages
    return (matters != 0).any(1)


def pack_by_length(rollouts: Rollouts, rows: int, tokens: int | None = None) -> Iterator[Int[Tensor, " n"]]:
    """The indices of the rows in packs of at most ``rows`` rows and ``tokens`` tokens, padding included; longest first.

    Sorted by length there is little padding in a pack. A row that is longer than ``tokens`` by itself is a pack of its own.
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
