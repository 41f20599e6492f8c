"""Truncated completions teach nothing: they are left out of the loss.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class OverlongFiltering:
    """mask_{i,t} = False and A_{i,t} = 0 for every token of a completion that hit the token limit

    The row leaves the numerator and the normaliser alike. Its reward has had its say in the group's statistics before.

    Source: DAPO, arXiv:2503.14476, sec. 3.4 ("overlong filtering"), which masks the loss of truncated samples.
    Differs: [D] in nothing stated; that the group's mean and std still count the row is TRL's reading too.
    Degenerate: no truncated row: nothing changes. Every row truncated: the step is left out, with the sampler's warning.
    Reads: truncated, mask, advantages.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"truncated", "mask", "advantages"})

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        assert rollouts.advantages is not None
        mask = rollouts.mask & ~rollouts.truncated[:, None]
        return replace(rollouts, mask=mask, advantages=torch.where(mask, rollouts.advantages, 0))
