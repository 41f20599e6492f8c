"""Shared by GTPO's two entropy shapers: classes, shaped rewards, and the three ways to normalize them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.ops import group_index, group_sum, has_signal, standardize

Normalization = Literal["zero_inclusive", "joint", "own_class"]
Mean = Literal["arithmetic", "geometric"]

FLOOR = 1e-6
"""Entropies below this count as this, so that nothing is divided by zero and zeros count as equal entropies."""


class Classes(NamedTuple):
    """Which entries belong to correct and to wrong completions, and to which group; no entry of a group without signal."""

    correct: Bool[Tensor, "R T"]
    wrong: Bool[Tensor, "R T"]
    rows: Int[Tensor, " R"]
    """Index of the row's group, from 0 without gaps."""
    groups: int

    @classmethod
    def of(
        cls,
        outcomes: Float[Tensor, " R"],
        group: Int[Tensor, " R"],
        counted: Bool[Tensor, "R T"],
        threshold: float,
    ) -> "Classes":
        index, groups = group_index(group)
        signal = has_signal(outcomes, index, groups, threshold, rows=counted.any(1))[index]
        correct = (outcomes > threshold)[:, None]
        counted = counted & signal[:, None]
        return cls(counted & correct, counted & ~correct, index, groups)

    def pooled(self) -> "Classes":
        """All groups as one."""
        return self._replace(rows=torch.zeros_like(self.rows), groups=1)


def clipped(entropy: Float[Tensor, "R T"], bounds: Sequence[float] | None) -> Float[Tensor, "R T"]:
    low, high = bounds or (FLOOR, torch.inf)
    return entropy.clamp(max(low, FLOOR), high)


def shaped_rewards(
    rewards: Float[Tensor, " R"],
    entropy: Float[Tensor, "R T"],
    classes: Classes,
    *,
    base: float,
    bonus: float,
    mean: Mean,
) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"]]:
    """r+ = base r + bonus H / mean H on correct entries, r- = -base - bonus (1/H) / mean (1/H) on wrong ones, else 0."""
    up = _relative_to_class(entropy, classes.correct, classes, mean)
    down = _relative_to_class(1 / entropy, classes.wrong, classes, mean)
    positive = torch.where(classes.correct, base * rewards[:, None] + bonus * up, 0)
    negative = torch.where(classes.wrong, -base - bonus * down, 0)
    return positive, negative


def _relative_to_class(
    values: Float[Tensor, "R T"], members: Bool[Tensor, "R T"], classes: Classes, mean: Mean
) -> Float[Tensor, "R T"]:
    """x_{i,t} / mean_k x_{k,t} over the class members k of the row's group at the same position t.

    The arithmetic mean is the sum over the members divided by their number d_t, so that the paper's d_t x / sum x stands
    here as x / mean x; the geometric one (App. C) is (prod_k x_{k,t})^(1 / d_t).
    """
    count = group_sum(members.to(values.dtype), classes.rows, classes.groups).clamp(min=1)
    of_members = torch.where(members, values, 1)
    if mean == "arithmetic":
        average = group_sum(of_members * members, classes.rows, classes.groups) / count
    else:
        average = (group_sum(of_members.log(), classes.rows, classes.groups) / count).exp()
    return of_members / average[classes.rows]


def advantages(
    positive: Float[Tensor, "R T"],
    negative: Float[Tensor, "R T"],
    classes: Classes,
    *,
    normalization: Normalization,
    eps: float,
    over_ranks: bool = False,
) -> Float[Tensor, "R T"]:
    """(r - mean) / (std + eps) of each entry's own class's shaped reward; 0 for entries of neither class."""
    counted = classes.correct | classes.wrong

    def scores(values: Tensor, among: Tensor) -> Tensor:
        return standardize(values, among, classes.rows, classes.groups, eps=eps, over_ranks=over_ranks)

    if normalization == "joint":
        return scores(positive + negative, counted)
    own = normalization == "own_class"
    plus = scores(positive, classes.correct if own else counted)
    minus = scores(negative, classes.wrong if own else counted)
    return torch.where(classes.correct, plus, 0) + torch.where(classes.wrong, minus, 0)


def check_fields(
    base: tuple[str, float],
    bonus: tuple[str, float],
    normalization: str,
    mean: str,
    entropy_clip: Sequence[float] | None,
    eps: float,
) -> None:
    for name, value in (base, bonus):
        if value < 0:
            raise ValueError(f"shaper.{name} must not be negative, got {value}")
    if base[1] == bonus[1] == 0:
        raise ValueError(f"shaper.{base[0]} and shaper.{bonus[0]} must not both be 0: every reward would be 0")
    for name, value, choices in (("normalization", normalization, Normalization), ("mean", mean, Mean)):
        if value not in get_args(choices):
            raise ValueError(f"shaper.{name} must be one of {', '.join(get_args(choices))}, got {value!r}")
    if entropy_clip is not None and not (len(entropy_clip) == 2 and 0 <= entropy_clip[0] < entropy_clip[1]):
        raise ValueError(f"shaper.entropy_clip must be null or [low, high] with 0 <= low < high, got {entropy_clip}")
    if eps <= 0:
        raise ValueError(f"shaper.eps must be positive, got {eps}")
