"""DAPO's soft overlong penalty for completions near the token limit."""

from dataclasses import dataclass
from typing import ClassVar

from rlmod.types import Texts


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """reward_i, with start = max_tokens - buffer:

        reward_i = 0                                           for |o_i| <= start
                   scale * (start - |o_i|) / buffer            for start < |o_i| <= max_tokens
                   -scale                                      beyond

    Source: DAPO, arXiv:2503.14476, eq. 13, with max_tokens = L_max and buffer = L_cache.
    Differs: ``scale`` (there 1). The penalty does not count for correctness: a correct completion near the limit stays correct when
    groups are filtered.
    Degenerate: buffer = max_tokens penalizes every token from the first; scale = 0 turns the penalty off.
    Reads: lengths.
    """

    pointwise: ClassVar[bool] = True
    counts_for_correctness: ClassVar[bool] = False

    max_tokens: int
    """Number of tokens from which the penalty is ``scale``: the sampler's limit."""
    buffer: int
    """Number of tokens before ``max_tokens`` at which the penalty begins."""
    scale: float = 1.0
    """The maximum penalty, in units of reward."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"reward.max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 < self.buffer <= self.max_tokens:
            raise ValueError(
                f"reward.buffer must be above 0 and at most reward.max_tokens ({self.max_tokens}), got {self.buffer}"
            )
        if self.scale < 0:
            raise ValueError(f"reward.scale must be 0 or more (it is subtracted), got {self.scale}")

    def __call__(self, texts: Texts) -> list[float]:
        if texts.lengths is None:
            raise ValueError(
                "the reward Overlong needs the lengths of the completions in tokens, but recorded completions have none: "
                "remove this term"
            )
        start = self.max_tokens - self.buffer
        return [self.scale * min(0.0, max(-1.0, (start - length) / self.buffer)) for length in texts.lengths]
