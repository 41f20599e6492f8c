"""Truncated completions are excluded from the loss.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class OverlongFiltering:
    """mask_{i,t} = False and A_{i,t} = 0 for every token of a completion that hit the token limit

    The completion is removed from both the numerator and the normaliser. Its reward still counts in the group's statistics.

    Source: DAPO, arXiv:2503.14476, sec. 3.4 ("overlong filtering"), which masks the loss of truncated samples.
    Differs: nothing. [D] The group's mean and std still count the completion, as in TRL.
    Degenerate: without truncated completions nothing changes. If all are truncated the step is skipped, with the sampler's warning.
    Reads: truncated, mask, advantages.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"truncated", "mask", "advantages"})

    def __call__(self, rollouts: Rollouts) -> Rollouts:
        assert rollouts.advantages is not None
        mask = rollouts.mask & ~rollouts.truncated[:, None]
        return replace(rollouts, mask=mask, advantages=torch.where(mask, rollouts.advantages, 0))
