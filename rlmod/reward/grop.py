"""GROP: a length penalty relative to the lengths in the completion's group.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.interfaces import Reward, SupportsPrepare, declared
from rlmod.reward._compute import add_terms, compute_rewards
from rlmod.reward._failures import RewardResult
from rlmod.reward.overlong import Overlong
from rlmod.types import Problem, Texts


@dataclass(frozen=True, kw_only=True)
class Grop:
    """reward_i = base_i + penalty_i. With n of a group's G completions correct (base_i > threshold), g1 = easy, g2 = 1 - g1:

        easy, n/G >= g1     for correct completions, with L = max((min + max) / 2, mean) of the correct lengths:
                            penalty_i = -(|o_i| - L) / (2 L)  for L <= |o_i| < 2 L,   -1/2 for 2 L <= |o_i|,   else 0
        hard, n/G <= g2     none, or DAPO's overlong penalty (``hard: dapo``)
        otherwise           the same piecewise penalty with L of all G lengths: for the correct completions if they are the majority,
                            else for the incorrect ones

    Source: GTPO, arXiv:2508.04349, App. D.
    Differs: [D] g1 is 0.75 (not stated there). [D] The penalty is added before any shaping. [D] If neither class is the majority, the
    incorrect completions are penalized. The penalty does not count for correctness: a correct completion stays correct, even if its
    reward is exactly 1 - 1/2.
    Degenerate: equal lengths are never penalized; neither is a group of one correct completion.
    Reads: lengths, group, and the fields that the base reward reads.
    """

    reward: Reward
    """The base reward, which decides whether a completion is correct."""
    easy: float = 0.75
    threshold: float = 0.5
    hard: Literal["none", "dapo"] = "none"
    max_tokens: int
    """Token limit for ``hard: dapo``, as in reward=overlong."""
    buffer: int
    """Buffer for ``hard: dapo``."""

    def __post_init__(self) -> None:
        if not 0.5 < self.easy <= 1:
            raise ValueError(f"reward.easy must be above 0.5 and at most 1, got {self.easy}")
        if self.hard == "dapo":
            Overlong(max_tokens=self.max_tokens, buffer=self.buffer)

    @property
    def pointwise(self) -> bool:
        return bool(declared(self.reward, "pointwise"))

    @property
    def excluded_terms(self) -> tuple[str, ...]:
        return ("grop", *getattr(self.reward, "excluded_terms", ()))

    def prepare(self, problems: Sequence[Problem], tokenizer: Any) -> None:
        if isinstance(self.reward, SupportsPrepare):
            self.reward.prepare(problems, tokenizer)

    def __call__(self, texts: Texts) -> RewardResult:
        if texts.lengths is None or texts.group is None:
            raise ValueError(
                "the reward Grop compares the lengths of a group's completions in tokens, but recorded completions have neither: "
                "evaluate them with its base reward"
            )
        base = compute_rewards(self.reward, texts)
        correct = base.outcomes > self.threshold
        lengths, group = torch.tensor(texts.lengths, dtype=torch.float32), torch.tensor(texts.group)
        penalty = torch.zeros_like(base.rewards)
        for g in group.unique():
            rows = (group == g) & ~base.abstained
            if rows.any():
                penalty[rows] = self._group_penalty(lengths[rows], correct[rows])
        terms = {**(base.terms or {"base": base.rewards}), "grop": penalty}
        return add_terms(terms, self, texts, base.abstained, base.failed)

    def _group_penalty(self, lengths: Float[Tensor, " G"], correct: Tensor) -> Float[Tensor, " G"]:
        n, size = int(correct.sum()), len(correct)
        easy = self.easy * size - 1e-6  # so that 0.9 of 10 is 9 despite rounding
        if n >= easy:
            return torch.where(correct, _piecewise_penalty(lengths, lengths[correct]), 0)
        if size - n >= easy:
            if self.hard == "none":
                return torch.zeros_like(lengths)
            overlong = Overlong(max_tokens=self.max_tokens, buffer=self.buffer)
            empty = [""] * len(lengths)
            penalty = overlong(Texts(completions=empty, answers=empty, lengths=lengths.int().tolist()))
            return torch.tensor(penalty, dtype=torch.float32)
        return torch.where(correct if 2 * n > size else ~correct, _piecewise_penalty(lengths, lengths), 0)


def _piecewise_penalty(lengths: Float[Tensor, " G"], among: Float[Tensor, " n"]) -> Float[Tensor, " G"]:
    bound = torch.maximum((among.min() + among.max()) / 2, among.mean())
    return -((lengths - bound) / (2 * bound)).clamp(0, 0.5)
