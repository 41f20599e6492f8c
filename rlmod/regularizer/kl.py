"""A KL penalty towards the reference policy.

[S] stated by the source, [D] our decision, [R] our reconstruction.
"""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.ops import log_ratio
from rlmod.types import Rollouts

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class KL:
    """weight * k(d) per token, with d = log pi_theta - log pi_ref at the sampled token:

        k1 = d                  unbiased for KL(pi_theta || pi_ref), may be negative
        k2 = d^2 / 2            biased, never negative
        k3 = exp(-d) - 1 + d    unbiased, never negative

    An estimator's value and its gradient estimate different things. On tokens sampled from pi_theta,
    grad KL(pi_theta || pi_ref) = E[d grad log pi_theta], which is the expectation of grad k2. grad k1 has expectation 0. The expectation
    of grad k3 = (1 - exp(-d)) grad log pi_theta is the gradient of the other direction, KL(pi_ref || pi_theta). Therefore ``value``
    selects the estimator that is logged and added to the loss, and ``gradient`` the one whose gradient is used.

    ``importance`` multiplies both by pi_theta / pi_old, without a gradient, for the later updates on a rollout batch, whose tokens were
    sampled from pi_old. For a guide's tokens pi_old is the policy that the guide's ``logprobs`` belong to.

    Source: the estimators: J. Schulman, "Approximating KL divergence" (2020); as a loss: GRPO, arXiv:2402.03300, eq. 4 (k3 for both).
    Differs: [D] the gradient is k2's. GRPO, TRL and verl (``low_var_kl``) use k3's, which is gradient=k3 here. TRL 1.16
    multiplies by the ratio with its gradient.
    Degenerate: pi_theta = pi_ref gives value and gradient 0 (k1: gradient grad log pi_theta). weight 0 logs the KL and changes nothing.
    Reads: reference_logprobs, mask; logprobs, with ``importance``.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"reference_logprobs", "logprobs", "mask"})

    weight: float = 0.001
    value: Estimator = "k3"
    gradient: Estimator = "k2"
    importance: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.weight < inf:
            raise ValueError(f"regularizer.kl.weight must be finite and not negative, got {self.weight}")

    def __call__(
        self, logprobs: Float[Tensor, "R T"], rollouts: Rollouts
    ) -> tuple[Float[Tensor, "R T"], dict[str, Float[Tensor, "R T"]]]:
        assert rollouts.reference_logprobs is not None
        d = torch.where(rollouts.mask, logprobs - rollouts.reference_logprobs, 0)
        value, differentiable = estimate(d.detach(), self.value), estimate(d, self.gradient)
        # The value of one estimator with the gradient of the other.
        kl = value + differentiable - differentiable.detach()
        if self.importance:
            assert rollouts.logprobs is not None
            kl = kl * log_ratio(logprobs.detach(), rollouts.logprobs, rollouts.mask).exp()
        return self.weight * kl, {"kl": value}


def estimate(d: Float[Tensor, "R T"], estimator: Estimator) -> Float[Tensor, "R T"]:
    """Return the estimator's value per token. k3's exponent is clamped to 20: at a token of nearly 0 probability it would overflow."""
    if estimator == "k1":
        return d
    return d.square() / 2 if estimator == "k2" else torch.expm1((-d).clamp(max=20)) + d
