"""Accuracy over several completions of each problem.

``counted`` is False for completions from which the reward abstained; without it all count.
"""

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torchmetrics import Metric


class MeanAtK(Metric):
    """mean@k: the share of correct completions, with k completions per problem. It estimates the accuracy of a single sample."""

    correct: Tensor
    completions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("completions", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Bool[Tensor, "problems k"], counted: Bool[Tensor, "problems k"] | None = None) -> None:
        counted = torch.ones_like(correct) if counted is None else counted
        self.correct = self.correct + (correct & counted).sum()
        self.completions = self.completions + counted.sum()

    def compute(self) -> Tensor:
        return self.correct / self.completions


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


def pass_at_k(correct: Bool[Tensor, "problems n"], k: int, counted: Bool[Tensor, "problems n"] | None = None) -> Tensor:
    """1 - C(n - c, k) / C(n, k) per problem, computed as 1 - prod_{i<k} (n - c - i) / (n - i), which is 1 if n - c < k.

    Shape [problems], float64; NaN for a problem with fewer than k counted completions. ValueError unless 1 <= k <= n.
    """
    if not 1 <= k <= correct.shape[1]:
        raise ValueError(
            f"pass@{k} needs at least {k} completions per problem, got {correct.shape[1]}: raise completions_per_prompt"
        )
    counted = torch.ones_like(correct) if counted is None else counted
    n = counted.sum(1, dtype=torch.float64)[:, None]
    incorrect = n - (correct & counted).sum(1, dtype=torch.float64)[:, None]
    i = torch.arange(k, dtype=torch.float64, device=correct.device)
    return torch.where(n[:, 0] >= k, 1 - ((incorrect - i).clamp(min=0) / (n - i)).prod(1), torch.nan)
