"""KL-Cov, second half: a penalty on the change of the tokens that the correction kl_cov has selected."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts, require


@dataclass(frozen=True, kw_only=True)
class KLCov:
    """weight * |log pi_theta - log pi_old| on the tokens selected by ``correction=[kl_cov]``, else 0

    Source: KL-Cov, arXiv:2505.22617, eq. 14, which writes KL(pi_old || pi_theta); the absolute log-ratio is verl's and SkyRL's. weight 1.
    Degenerate: in the first update the value is 0, and so is PyTorch's gradient of |x| at 0.
    Reads: extra["kl_cov"], logprobs, mask.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"extra", "logprobs", "mask"})

    weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"regularizer.kl_cov.weight must be finite and not negative, got {self.weight}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        if "kl_cov" not in rollouts.extra:
            raise ValueError("regularizer.kl_cov finds no selected tokens: select them with correction=[kl_cov]")
        distance = log_ratio(logprobs, require(rollouts.logprobs, "logprobs"), rollouts.mask).abs()
        selected = torch.where(rollouts.extra["kl_cov"], distance, 0)
        return self.weight * selected, {"kl_cov": torch.where(rollouts.extra["kl_cov"], distance.detach(), torch.nan)}
