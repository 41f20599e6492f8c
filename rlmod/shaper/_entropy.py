"""Shared code of GTPO's two entropy shapers: classes, shaped rewards, and the three ways to normalize them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.ops import group_index, group_sum, has_signal, standardize

Normalization = Literal["zero_inclusive", "joint", "own_class"]
Mean = Literal["arithmetic", "geometric"]

FLOOR = 1e-6
"""Lower bound of entropies, so that nothing is divided by zero and zeros count as equal entropies."""


class Classes(NamedTuple):
    """The entries of correct and of incorrect completions, and the groups of the rows. Groups without signal have no entries."""

    correct: Bool[Tensor, "R T"]
    incorrect: Bool[Tensor, "R T"]
    rows: Int[Tensor, " R"]
    """Index of each row's group, from 0 without gaps."""
    groups: int

    @classmethod
    def from_outcomes(
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

    def pool_groups(self) -> "Classes":
        """Return the classes with all groups merged into one."""
        return self._replace(rows=torch.zeros_like(self.rows), groups=1)


def clip_entropy(entropy: Float[Tensor, "R T"], bounds: Sequence[float] | None) -> Float[Tensor, "R T"]:
    low, high = bounds or (FLOOR, torch.inf)
    return entropy.clamp(max(low, FLOOR), high)


def shape_rewards(
    rewards: Float[Tensor, " R"],
    entropy: Float[Tensor, "R T"],
    classes: Classes,
    *,
    base: float,
    bonus: float,
    mean: Mean,
) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"]]:
    """r+ = base r + bonus H / mean H on correct entries, r- = -base - bonus (1/H) / mean (1/H) on incorrect ones, else 0."""
    up = _divide_by_class_mean(entropy, classes.correct, classes, mean)
    down = _divide_by_class_mean(1 / entropy, classes.incorrect, classes, mean)
    positive = torch.where(classes.correct, base * rewards[:, None] + bonus * up, 0)
    negative = torch.where(classes.incorrect, -base - bonus * down, 0)
    return positive, negative


def _divide_by_class_mean(
    values: Float[Tensor, "R T"], members: Bool[Tensor, "R T"], classes: Classes, mean: Mean
) -> Float[Tensor, "R T"]:
    """x_{i,t} / mean_k x_{k,t} over the class members k of the row's group at the same position t.

    The arithmetic mean is the sum over the members divided by their number d_t, so the paper's d_t x / sum x is written here as
    x / mean x. The geometric mean (App. C) is (prod_k x_{k,t})^(1 / d_t).
    """
    count = group_sum(members.to(values.dtype), classes.rows, classes.groups).clamp(min=1)
    member_values = torch.where(members, values, 1)
    if mean == "arithmetic":
        average = group_sum(member_values * members, classes.rows, classes.groups) / count
    else:
        average = (group_sum(member_values.log(), classes.rows, classes.groups) / count).exp()
    return member_values / average[classes.rows]


def normalize_shaped_rewards(
    positive: Float[Tensor, "R T"],
    negative: Float[Tensor, "R T"],
    classes: Classes,
    *,
    normalization: Normalization,
    eps: float,
    over_ranks: bool = False,
) -> Float[Tensor, "R T"]:
    """(r - mean) / (std + eps) of the shaped reward of each entry's class; 0 for entries of neither class."""
    counted = classes.correct | classes.incorrect

    def normalize(values: Tensor, counted: Tensor) -> Tensor:
        return standardize(values, counted, classes.rows, classes.groups, eps=eps, over_ranks=over_ranks)

    if normalization == "joint":
        return normalize(positive + negative, counted)
    own = normalization == "own_class"
    plus = normalize(positive, classes.correct if own else counted)
    minus = normalize(negative, classes.incorrect if own else counted)
    return torch.where(classes.correct, plus, 0) + torch.where(classes.incorrect, minus, 0)


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
