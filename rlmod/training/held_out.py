"""The metrics of one validation set: mean@n, pass@k, maj@k and best@k."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from rlmod.config.sizes import Validation
from rlmod.rollout.validation import GradedBatch
from rlmod.training.accuracy import MeanAtK, MeanInterval, PassAtK, ProblemMean, best_at_k, majority_at_k


class SetMetrics(nn.Module):
    """The metrics of one validation set, accumulated over the batches of all ranks. ``compute`` must be called on every rank."""

    def __init__(self, settings: Validation) -> None:
        super().__init__()
        self.settings = settings
        self.problems = 0
        """Problems of this rank so far, without padding."""
        self.mean, self.interval = MeanAtK(), MeanInterval()
        self.passed = nn.ModuleList(PassAtK(k) for k in settings.pass_at)
        self.majority = nn.ModuleList(ProblemMean() for _ in settings.maj_at)
        self.best = nn.ModuleList(ProblemMean() for _ in settings.best_at)

    def update(self, graded: GradedBatch, padding: bool = False) -> None:
        """Add a batch of graded completions. A batch of padding counts for nothing."""
        n = self.settings.sampler.completions_per_prompt
        counted = (torch.zeros_like(graded.abstained) if padding else ~graded.abstained).view(-1, n)
        correct, rewards = graded.correct.view(-1, n), graded.rewards.to(counted.device).view(-1, n)
        self.problems += 0 if padding else len(correct)
        self.mean.update(correct, counted=counted)
        self.interval.update(correct, counted=counted)
        for metric in self.passed:
            metric.update(correct, counted=counted)  # pyright: ignore[reportCallIssue]
        for metric, k in zip(self.majority, self.settings.maj_at, strict=True):
            metric.update(majority_at_k(correct, graded.answers, k, counted))  # pyright: ignore[reportCallIssue]
        for metric, k in zip(self.best, self.settings.best_at, strict=True):
            metric.update(best_at_k(rewards, k, counted))  # pyright: ignore[reportCallIssue]

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics by their logged names."""
        return {name: metric.compute() for name, metric in self._named()}

    def compute_interval(self) -> list[float]:
        """Return the 95 % interval [low, high] of mean@n; its units are problems. It must be called on every rank."""
        return self.interval.compute().tolist()

    def reset(self) -> None:
        """Forget all batches."""
        self.problems = 0
        self.interval.reset()
        for _, metric in self._named():
            metric.reset()

    def _named(self) -> Iterator[tuple[str, Metric]]:
        settings = self.settings
        yield settings.objective, self.mean
        for name, numbers, metrics in (
            ("pass", settings.pass_at, self.passed),
            ("maj", settings.maj_at, self.majority),
            ("best", settings.best_at, self.best),
        ):
            for k, metric in zip(numbers, metrics, strict=True):
                yield settings.metric(name, k), metric  # pyright: ignore[reportReturnType]
