"""Train on groups that hold both correct and incorrect completions, and sample new prompts for the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from rlmod.ops import group_index, has_signal
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """keep_g = 0 < #correct_g < G, where correct means correctness score > threshold

    Dropped groups are replaced by new prompts until the rollout batch is full or ``max_generation_batches`` is reached. What is still
    missing is filled with dropped groups whose mask is False everywhere, so that a rollout batch always has the same number of rows.

    Source: DAPO, arXiv:2503.14476, sec. 3.2, eq. 11.
    Differs: a refill samples as many prompts as the share of kept groups suggests are needed, not a whole batch.
    Degenerate: no group is kept in the whole rollout batch: its optimizer steps are skipped, with a warning.
    Reads: rewards, outcomes, group, mask, from_guide.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "outcomes", "group", "mask", "from_guide"})

    max_generation_batches: int = 10
    over: Literal["union", "own"] = "union"
    """Whose completions decide if a guide supplies some: all of them, or only the on-policy ones."""
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.max_generation_batches < 1:
            raise ValueError(f"filter.max_generation_batches must be at least 1, got {self.max_generation_batches}")
        if self.over not in ("union", "own"):
            raise ValueError(f"filter.over must be union or own, got {self.over!r}")

    def __call__(self, rollouts: Rollouts) -> Bool[Tensor, " groups"]:
        index, groups = group_index(rollouts.group)
        rows = rollouts.mask.any(1)  # a reward may abstain from a completion
        if rollouts.from_guide is not None and self.over == "own":
            rows = rows & ~rollouts.from_guide
        return has_signal(rollouts.correctness_score, index, groups, self.threshold, rows=rows)
