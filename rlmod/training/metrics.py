"""Accuracy over several completions of each problem."""

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

    def update(self, correct: Bool[Tensor, "problems k"]) -> None:
        self.correct = self.correct + correct.sum()
        self.completions = self.completions + correct.numel()

    def compute(self) -> Tensor:
        return self.correct / self.completions


class PassAtK(Metric):
    """pass@k: the chance that at least one of k completions is correct, estimated from n >= k completions per problem.

    Unbiased: the mean over problems of 1 - C(n - c, k) / C(n, k), with c of n correct.

    Source: Chen et al., arXiv:2107.03374, eq. 1.
    """

    passed: Tensor
    problems: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        self.add_state("passed", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("problems", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: Bool[Tensor, "problems n"]) -> None:
        self.passed = self.passed + pass_at_k(correct, self.k).sum()
        self.problems = self.problems + len(correct)

    def compute(self) -> Tensor:
        return (self.passed / self.problems).float()


def pass_at_k(correct: Bool[Tensor, "problems n"], k: int) -> Tensor:
    """1 - C(n - c, k) / C(n, k) per problem, computed as 1 - prod_{i<k} (n - c - i) / (n - i), which is 1 if n - c < k.

    Shape [problems], float64. ValueError unless 1 <= k <= n.
    """
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} completions per problem, got {n}: raise completions_per_prompt")
    incorrect = n - correct.sum(1, dtype=torch.float64)
    i = torch.arange(k, dtype=torch.float64, device=correct.device)
    return 1 - ((incorrect[:, None] - i).clamp(min=0) / (n - i)).prod(1)
