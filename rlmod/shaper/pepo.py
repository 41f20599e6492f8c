"""PEPO: the advantage of a correct completion, distributed over its tokens by their entropy relative to their neighbours'.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.shaper.uniform import Uniform
from rlmod.types import Rollouts


@dataclass(frozen=True, kw_only=True)
class Pepo:
    """A_{i,t} c_{i,t} on correct completions (correctness score > threshold), A_{i,t} on incorrect ones, A as in Uniform:

        e_t = exp H_t / sum_{|k - t| <= window / 2} exp H_k        over the completion's own tokens
        c_t = |o| e_t / sum_k e_k

    Source: PEPO, arXiv:2609.39402, eq. 6 to 8; window 101. The paper trains with the token mean, clip-higher and G = 8.
    Differs: nothing.
    Degenerate: c sums to |o|, so a completion's total does not change. Adding a constant to its entropies changes nothing. With a window
    of 2 |o| - 2 and more, c = |o| softmax(H), and equal entropies give 1. On longer completions they do not: windows are cut at the ends,
    whose tokens then weigh more.
    Reads: rewards, outcomes, group, mask, entropy.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"rewards", "outcomes", "group", "mask", "entropy"})
    min_group_size: ClassVar[int] = 2
    granularity: ClassVar[Literal["token", "sequence"]] = "token"

    window: int = 101
    """In tokens; half of it on each side."""
    threshold: float = 0.5
    """A completion is correct if its correctness score is above this."""
    eps: float = 1e-6
    """Added to the std; in units of reward."""

    def __post_init__(self) -> None:
        Uniform(eps=self.eps)
        if self.window < 1:
            raise ValueError(f"shaper.window must be at least 1, got {self.window}")

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        advantages = Uniform(eps=self.eps)(rollouts)
        correct = (rollouts.correctness_score > self.threshold)[:, None]
        return torch.where(correct, advantages * self.weigh_tokens(rollouts), advantages)

    def weigh_tokens(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        """Return c; 0 where the mask is False."""
        assert rollouts.entropy is not None
        mask, half = rollouts.mask, self.window // 2
        entropy = torch.where(mask, rollouts.entropy, -torch.inf)
        # In float64, because a window's sum is a difference of two sums over the completion, each of which may be far larger.
        raised = (entropy - entropy.amax(1, keepdim=True).clamp(min=0)).double().exp()
        until = torch.nn.functional.pad(raised.cumsum(1), (1, 0))
        places = torch.arange(mask.shape[1], device=mask.device)
        last, first = (places + half + 1).clamp(max=mask.shape[1]), (places - half).clamp(min=0)
        share = torch.where(mask, raised / (until[:, last] - until[:, first]), 0)
        total = share.sum(1, keepdim=True)
        return (share * mask.sum(1, keepdim=True) / torch.where(total > 0, total, 1)).to(rollouts.entropy.dtype)
