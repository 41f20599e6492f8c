"""Every token has the same weight, which does not depend on the completions' lengths."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import all_sum
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Constant:
    """w_{i,t} = 1 / (R ``length``), over the R completions of the optimizer step and all ranks.

    The loss favours neither short correct completions nor long incorrect ones, and does not depend on the other completions' lengths.
    The weights sum to mean |o| / length, which is at most 1 if ``length`` is the sampler's limit.

    Source: Dr. GRPO, arXiv:2503.20783, sec. 3.2.
    Differs: a fully masked completion does not count in R.
    Degenerate: a step without a counted token has all weights 0.
    Reads: mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"mask"})

    length: int
    """Number of tokens; usually ${sampler.max_new_tokens}."""

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"aggregation.length must be at least 1 token, got {self.length}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        rows = all_sum(rollouts.mask.any(1).sum())
        return rollouts.mask / (torch.clamp(rows, min=1) * self.length)
