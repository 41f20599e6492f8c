"""The ratio between the trainer's and the sampling engine's probabilities, which two corrections share."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts, require

Level = Literal["token", "sequence"]


def sampler_ratio(rollouts: Rollouts, level: Level, key: str) -> Float[Tensor, "R _"]:
    """rho = pi_old / pi_sampler of each token, or the product over each completion's tokens; log rho is clamped to [-20, 20].

    ValueError that names the correction's config key if the sampler reports no log-probabilities.
    """
    if rollouts.sampler_logprobs is None:
        raise ValueError(
            f"{key} needs the sampler's log-probabilities, but this sampler returns none; use "
            "sampler.top_p=1, top_k=0 and greedy=false with vLLM, or remove the correction"
        )
    log_rho = log_ratio(require(rollouts.logprobs, "logprobs"), rollouts.sampler_logprobs, rollouts.mask)
    if level == "sequence":
        log_rho = log_rho.sum(1, keepdim=True).clamp(-20, 20)
    return log_rho.exp()
