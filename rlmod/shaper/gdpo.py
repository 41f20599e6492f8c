"""GDPO: each term of the reward is normalized over its group by itself, so that no term dominates.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import group_index, standardize
from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class Gdpo:
    """z_{k,i} = (r_{k,i} - mean(r_k)) / (std(r_k) + eps) for each term k, over the group of row i;   a_i = sum_k |w_k| z_{k,i};

        A_{i,t} = (a_i - mean(a)) / (std(a) + eps) over the completions of the batch, on all ranks

    The sum of several rewards has few distinct values, and normalizing the sum gives different combinations of them the same advantage.

    Source: GDPO, arXiv:2601.05242.
    Differs: the stds have ddof 1 and eps 1e-6 (TRL 1e-4, ms-swift 1e-8). verl normalizes over the tokens of the batch, so that long
    completions count more. [D] The absolute weight is used: the record's terms already have the sign of theirs.
    Degenerate: a term that is constant in its group contributes exactly 0. With one term it is GRPO, normalized over the batch. Scaling a
    term changes nothing.
    Reads: terms, group, mask; rewards, if the reward has no terms.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"terms", "rewards", "group", "mask"})
    min_group_size: ClassVar[int] = 2

    weights: Mapping[str, float] = field(default_factory=dict)
    """w_k of each term by name; 1 for a term that is not named. A term ``a/b`` inside a weighted reward has the weight of ``a``."""
    eps: float = 1e-6
    """Added to each std; in units of reward."""

    def __post_init__(self) -> None:
        if self.eps <= 0:
            raise ValueError(f"shaper.eps must be positive, got {self.eps}")
        if not isinstance(self.weights, Mapping):
            raise ValueError(f"shaper.weights must be a number for each term by name, got {self.weights!r}")
        for name, weight in self.weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
                raise ValueError(f"shaper.weights.{name} must be a finite number, got {weight!r}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        rewards = require(rollouts.rewards, "rewards")
        terms = rollouts.terms or {"reward": rewards}
        if rollouts.terms and (unknown := [name for name in self.weights if not self._names_a_term(name, terms)]):
            raise ValueError(
                f"shaper.weights names {unknown[0]!r}, which is no term of the reward; the terms are {', '.join(terms)}"
            )
        index, groups = group_index(rollouts.group)
        counted = rollouts.mask.any(1, keepdim=True)
        total = torch.zeros_like(rewards)[:, None]
        for name, values in terms.items():
            total = total + self._weight(name) * standardize(
                values.to(rewards.dtype)[:, None], counted, index, groups, eps=self.eps
            )
        batch = standardize(total, counted, torch.zeros_like(index), 1, eps=self.eps, over_ranks=True)
        return batch * rollouts.mask

    @staticmethod
    def _names_a_term(name: str, terms: Iterable[str]) -> bool:
        return any(term == name or term.split("/")[0] == name for term in terms)

    def _weight(self, name: str) -> float:
        return abs(self.weights.get(name, self.weights.get(name.split("/")[0], 1.0)))
