"""Accuracy over several completions of each problem.

``counted`` is False for completions from which the reward abstained; without it all count.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric

Z = 1.959964  # standard normal quantile of a 95 % interval


class PassAtK(Metric):
    """pass@k: the chance that at least one of k completions is correct, estimated from n >= k completions per problem.

    Unbiased: the mean over problems of 1 - C(n - c, k) / C(n, k), with c of n correct. A problem with fewer than k counted completions is
    left out.

    Source: Chen et al., arXiv:2107.03374, eq. 1.
    """

    passed: Tensor
    problems: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        self.add_state("passed", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Bool[Tensor, "problems n"], counted: Bool[Tensor, "problems n"] | None = None) -> None:
        passed = pass_at_k(correct, self.k, counted)
        self.passed = self.passed + passed.nansum()
        self.problems = self.problems + (~passed.isnan()).sum()

    def compute(self) -> Tensor:
        return (self.passed / self.problems).float()


def mean_at_k(
    correct: Bool[Tensor, "problems k"], counted: Bool[Tensor, "problems k"] | None = None
) -> Float[Tensor, " problems"]:
    """Return the share of correct completions of each problem, float64; NaN for a problem without a counted completion."""
    counted = torch.ones_like(correct) if counted is None else counted
    return (correct & counted).sum(1, dtype=torch.float64) / counted.sum(1)


def pass_at_k(correct: Bool[Tensor, "problems n"], k: int, counted: Bool[Tensor, "problems n"] | None = None) -> Tensor:
    """1 - C(n - c, k) / C(n, k) per problem, computed as 1 - prod_{i<k} (n - c - i) / (n - i), which is 1 if n - c < k.

    Shape [problems], float64; NaN for a problem with fewer than k counted completions. ValueError unless 1 <= k <= n.
    """
    _check_k("pass", k, correct.shape[1])
    counted = torch.ones_like(correct) if counted is None else counted
    n = counted.sum(1, dtype=torch.float64)[:, None]
    incorrect = n - (correct & counted).sum(1, dtype=torch.float64)[:, None]
    i = torch.arange(k, dtype=torch.float64, device=correct.device)
    return torch.where(n[:, 0] >= k, 1 - ((incorrect - i).clamp(min=0) / (n - i)).prod(1), torch.nan)


class ProblemMean(Metric):
    """The mean of a number per problem, over batches and ranks. A problem whose number is NaN is left out."""

    total: Tensor
    squares: Tensor
    problems: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("total", "squares"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Float[Tensor, " problems"]) -> None:
        self.total = self.total + values.nansum()
        self.squares = self.squares + values.square().nansum()
        self.problems = self.problems + (~values.isnan()).sum()

    def compute(self) -> Tensor:
        return (self.total / self.problems).float()


class MeanAtK(ProblemMean):
    """mean@k: the share of correct completions of a problem, averaged over problems. It estimates the accuracy of a single sample.

    A problem without a counted completion is left out.
    """

    def update(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, correct: Bool[Tensor, "problems k"], counted: Bool[Tensor, "problems k"] | None = None
    ) -> None:
        super().update(mean_at_k(correct, counted))


class MeanInterval(MeanAtK):
    """The 95 % interval [low, high] of mean@k; NaN without problems. The units are problems."""

    def compute(self) -> Tensor:
        problems, total, squares = (state.item() for state in (self.problems, self.total, self.squares))
        return torch.tensor(wilson_interval(problems, total, squares) if problems else (math.nan, math.nan))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval for the mean of one value per problem: ``wilson_interval`` if all lie in [0, 1].

    If a value lies outside, as best@k of other rewards may, it is the normal one: mean +- z std / sqrt(n). The units are problems, because
    completions of one problem are not independent.
    """
    total = sum(values)
    if min(values) >= 0 and max(values) <= 1:
        return wilson_interval(len(values), total, sum(value**2 for value in values))
    mean = total / len(values)
    half = Z * math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1) / len(values))
    return mean - half, mean + half


def wilson_interval(n: float, total: float, squares: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval for the mean p of n values in [0, 1], from their sum and the sum of their squares.

    n values of 0 and 1, as with one completion per problem, count as n. Other values vary less and count as more:
    (n + 4) q (1 - q) / variance - 4. Here the mean q and the variance include two additional problems at 0 and two at 1 (Agresti and
    Coull), because near 0 and 1 almost all values are equal and the variance alone is too small. Thus the interval of 0 of 30 is wider
    than 0, and a mean just below 1 has no narrower interval than 1.
    """
    p, q = total / n, (total + 2) / (n + 4)
    effective = q * (1 - q) / ((squares + 2) / (n + 4) - q**2) * (n + 4) - 4
    middle = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * math.sqrt(max(p * (1 - p), 0) / effective + Z**2 / (4 * effective**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def majority_at_k(
    correct: Bool[Tensor, "problems n"],
    answers: Sequence[str | None],
    k: int,
    counted: Bool[Tensor, "problems n"] | None = None,
) -> Float[Tensor, " problems"]:
    """maj@k: the chance that the most frequent final answer among k completions of a problem is correct, from n >= k completions.

    Exact: the mean over all subsets of k of the n completions, as in pass@k. ``answers`` has one entry per completion, in the order of
    the rows. A completion without an answer (None) does not vote; among tied answers each counts alike. An answer is correct if its
    completions are. In the unusual case that only some of them are, it counts by their share.

    Shape [problems], float64; NaN for a problem with fewer than k counted completions. With k = 1 it is the share of correct completions.

    Source: self-consistency, Wang et al., arXiv:2203.11171; maj1@k of Minerva, Lewkowycz et al., arXiv:2206.14858.
    Differs: neither says how ties or k < n are treated. [D] Both are expectations, so the order of the completions does not matter.
    """
    problems, n = correct.shape
    _check_k("maj", k, n)
    counted = torch.ones_like(correct) if counted is None else counted
    values = []
    for problem, (right, counts) in enumerate(zip(correct.tolist(), counted.tolist(), strict=True)):
        votes: dict[str, list[int]] = {}
        silent = 0
        for answer, is_right, counts_too in zip(answers[problem * n : (problem + 1) * n], right, counts, strict=True):
            if not counts_too:
                continue
            if answer is None:
                silent += 1
                continue
            vote = votes.setdefault(answer, [0, 0])
            vote[0] += 1
            vote[1] += is_right
        values.append(_majority(list(votes.values()), silent, k) if sum(counts) >= k else math.nan)
    return torch.tensor(values, dtype=torch.float64, device=correct.device).view(problems)


def _majority(votes: list[list[int]], silent: int, k: int) -> float:
    """Return the chance that the winner of k of the votes is correct. ``votes`` holds each answer's completions and correct completions.

    For each answer that may be correct and each number t of its votes in the subset, count the subsets in which no other answer has more
    than t votes, by the number of answers that tie with it.
    """
    number = silent + sum(count for count, _ in votes)
    # Beyond a thousand completions the numbers of subsets no longer fit a float.
    kind, total = (object, Fraction(0)) if number > 1000 else (float, 0.0)
    for index, (size, right) in enumerate(votes):
        others = [count for i, (count, _) in enumerate(votes) if i != index]
        for t in range(1, min(size, k) + 1) if right else ():
            rest = k - t
            # Completions that cannot tie: without an answer, or of an answer with fewer than t completions.
            free = silent + sum(count for count in others if count < t)
            ways = np.zeros((rest // t + 1, rest + 1), dtype=kind)  # by ties, by completions drawn
            ways[0] = [math.comb(free, drawn) for drawn in range(rest + 1)]
            for count in (count for count in others if count >= t):
                after = np.zeros_like(ways)
                for drawn in range(min(t - 1, rest) + 1):
                    after[:, drawn:] += math.comb(count, drawn) * ways[:, : rest + 1 - drawn]
                after[1:, t:] += math.comb(count, t) * ways[:-1, : max(rest + 1 - t, 0)]
                ways = after
            divide = Fraction if kind is object else operator.truediv
            wins = sum(divide(ways[ties, rest], ties + 1) for ties in range(len(ways)))
            total += divide(wins * math.comb(size, t) * right, size)
    return float(total / math.comb(number, k))


def best_at_k(
    rewards: Float[Tensor, "problems n"], k: int, counted: Bool[Tensor, "problems n"] | None = None
) -> Float[Tensor, " problems"]:
    """best@k: the expected highest reward among k completions of a problem, estimated from n >= k completions.

    Unbiased: the mean over all subsets of k, sum_i r_(i) C(i - 1, k - 1) / C(n, k) with the rewards r_(1) <= ... <= r_(n). With rewards of
    0 and 1 it is pass@k. Shape [problems], float64; NaN for a problem with fewer than k counted completions.

    Source: max_g@k of Walder and Karkhanis, arXiv:2505.15201.
    """
    _check_k("best", k, rewards.shape[1])
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    values = []
    for row, counts in zip(rewards.double().tolist(), counted.tolist(), strict=True):
        ordered = sorted(reward for reward, counts_too in zip(row, counts, strict=True) if counts_too)
        subsets = math.comb(len(ordered), k)
        weighted = (reward * (math.comb(i, k - 1) / subsets) for i, reward in enumerate(ordered) if i >= k - 1)
        values.append(sum(weighted) if len(ordered) >= k else math.nan)
    return torch.tensor(values, dtype=torch.float64, device=rewards.device)


def _check_k(name: str, k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(
            f"{name}@{k} needs at least {k} completions per problem, got {n}: raise completions_per_prompt"
        )
