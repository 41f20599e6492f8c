"""Shared code of GTPO's two entropy shapers: classes, shaped rewards, and the three ways to normalize them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlmod.ops import all_max, all_sum, group_index, group_sum, has_signal, standardize

Normalization = Literal["zero_inclusive", "joint", "own_class"]
Mean = Literal["arithmetic", "geometric"]
EntropyScope = Literal["group", "batch", "row", "matrix"]

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
    outcomes: Float[Tensor, " R"],
    entropy: Float[Tensor, "R T"],
    classes: Classes,
    *,
    base: float,
    bonus: float,
    mean: Mean,
    scope: EntropyScope,
) -> tuple[Float[Tensor, "R T"], Float[Tensor, "R T"]]:
    """r+ = base r + bonus H / mean H on correct entries, r- = base (p - 1) - bonus (1/H) / mean (1/H) on incorrect ones, else 0.

    p = reward - outcome is the completion's penalty; r holds it already.
    """
    up = _divide_by_class_mean(entropy, classes.correct, classes, mean, scope)
    down = _divide_by_class_mean(1 / entropy, classes.incorrect, classes, mean, scope)
    positive = torch.where(classes.correct, base * rewards[:, None] + bonus * up, 0)
    negative = torch.where(classes.incorrect, base * (rewards - outcomes - 1)[:, None] - bonus * down, 0)
    return positive, negative


def _divide_by_class_mean(
    values: Float[Tensor, "R T"], members: Bool[Tensor, "R T"], classes: Classes, mean: Mean, scope: EntropyScope
) -> Float[Tensor, "R T"]:
    """x_{i,t} / mean x over the cells C(i, t), which hold only members of the class of i.

    The arithmetic mean is the sum over the cells divided by their number, so the paper's d_t x / sum x is written here as x / mean x.
    The geometric mean (App. C) is (prod x)^(1 / d_t).
    """
    member_values = torch.where(members, values, 1)
    summed = member_values * members if mean == "arithmetic" else member_values.log()
    count = _sum_over_cells(members.to(values.dtype), classes, scope).clamp(min=1)
    average = _sum_over_cells(summed, classes, scope) / count
    return member_values / (average if mean == "arithmetic" else average.exp())


def _sum_over_cells(values: Float[Tensor, "R T"], classes: Classes, scope: EntropyScope) -> Float[Tensor, "..."]:
    """Sum over C(i, t), in a shape that broadcasts to [R T]. C(i, t) holds

    group     position t of all completions of the group
    batch     position t of all completions of the batch, over all ranks
    row       all tokens of completion i
    matrix    all tokens of the group
    """
    if scope == "row":
        return values.sum(1, keepdim=True)
    if scope == "batch":
        return _sum_over_batch(values)
    per_row = values if scope == "group" else values.sum(1, keepdim=True)
    return group_sum(per_row, classes.rows, classes.groups)[classes.rows]


def _sum_over_batch(values: Float[Tensor, "R T"]) -> Float[Tensor, "1 T"]:
    """Sum over the rows of all ranks, whose completions may be of different lengths."""
    length = values.shape[1]
    longest = int(all_max(torch.tensor(length, device=values.device)))
    return all_sum(torch.nn.functional.pad(values.sum(0), (0, longest - length)))[None, :length]


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


def check_scope(scope: str, choices: Sequence[str]) -> None:
    if scope not in choices:
        raise ValueError(f"shaper.entropy_scope must be one of {', '.join(choices)}, got {scope!r}")
