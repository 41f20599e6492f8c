"""verl's answers, in an environment of its own: ``python verl_side.py inputs.pt outputs.pt``."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo import core_algos as verl
from verl.workers.config import ActorConfig

WIDE = 1e9
"""verl's dual clip is on by default; this bound is never reached."""


def config(low: float = 0.2, high: float = 0.28, cap: float = WIDE) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2,
        clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=cap,
    )  # fmt: skip


def covariance_config(**numbers: float) -> ActorConfig:
    """A config with these numbers for Clip-Cov or KL-Cov, and no clip of the ratio."""
    made = config(1.0, WIDE)
    for name, value in numbers.items():
        object.__setattr__(made.policy_loss, name, value)
    return made


def policy_loss(name: str, mode: str, **more: Any) -> Callable[..., torch.Tensor]:
    def loss(case: dict[str, torch.Tensor], logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = (case["old"] - case["sampler"]).exp().clamp(max=2.0) if more.get("importance") else None
        return verl.get_policy_loss_fn(name)(
            old_log_prob=case["old"],
            log_prob=logprobs,
            advantages=case["advantages"][:, None].expand_as(logprobs),
            response_mask=mask.double(),
            loss_agg_mode=mode,
            config=more.get("config", config()),
            rollout_is_weights=weights,
        )[0]

    return loss


def with_kl(kind: str) -> Callable[..., torch.Tensor]:
    def loss(case: dict[str, torch.Tensor], logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        plain = policy_loss("vanilla", "seq-mean-token-mean")(case, logprobs, mask)
        kl = verl.kl_penalty(logprobs, case["reference"], kind)
        return plain + 0.1 * verl.agg_loss(kl, mask.double(), "seq-mean-token-mean")

    return loss


LOSSES = {
    "clipped, token mean": policy_loss("vanilla", "token-mean"),
    "clipped, rollout mean": policy_loss("vanilla", "seq-mean-token-mean"),
    "clipped, constant": policy_loss("vanilla", "seq-mean-token-sum-norm"),
    "sequence ratio, geometric": policy_loss("gspo", "seq-mean-token-mean"),
    "cispo, both bounds": policy_loss("cispo", "token-mean"),
    "sapo": policy_loss("sapo", "seq-mean-token-mean"),
    "dppo, total variation": policy_loss("dppo_tv", "token-mean", config=config(0.15, 0.15, cap=1.5)),
    "dppo, kl": policy_loss("dppo_kl", "token-mean", config=config(0.05, 0.05, cap=1.5)),
    "gmpo": policy_loss("geo_mean", "seq-mean-token-mean", config=config(0.4, 0.4)),
    "clip-cov, all candidates": policy_loss(
        "clip_cov", "token-mean", config=covariance_config(clip_cov_ratio=1.0, clip_cov_lb=0.2, clip_cov_ub=5.0)
    ),
    "kl-cov": policy_loss("kl_cov", "token-mean", config=covariance_config(kl_cov_ratio=0.1, ppo_kl_coef=1.0)),
    "kl penalty, k1": with_kl("k1"),
    "kl penalty, k2": with_kl("k2"),
    "kl penalty, k3": with_kl("k3"),
    "kl penalty, value k3, gradient k2": with_kl("k3+"),
    "truncated importance": policy_loss("vanilla", "token-mean", importance=True),
    "a fully masked row, rollout mean": policy_loss("vanilla", "seq-mean-token-mean"),
}


def loss_of(name: str, case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = case["mask"].clone()
    if "masked row" in name:
        mask[0] = False
    logprobs = case["logprobs"].clone().requires_grad_()
    value = LOSSES[name](case, logprobs, mask)
    value.backward()
    assert logprobs.grad is not None
    return {"value": value.detach(), "gradient": logprobs.grad}


def advantages_of(case: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    mask = case["mask"].double()
    rewards = torch.zeros_like(mask)
    rewards[:, 0] = case["rewards"]
    index = case["group"].numpy().astype(str).astype(np.object_)

    def of(function: Callable[..., Any], **more: Any) -> dict[str, torch.Tensor]:
        return {"value": function(rewards.clone(), mask, index, **more)[0]}

    return {
        "uniform": of(verl.compute_grpo_outcome_advantage),
        "uniform, no std": of(verl.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        "leave one out": of(verl.compute_rloo_outcome_advantage),
        "group baseline": of(verl.compute_reinforce_plus_plus_baseline_outcome_advantage),
    }


def main() -> None:
    source, target = sys.argv[1:]
    cases = torch.load(source)
    torch.save({"cases": [{n: loss_of(n, case) for n in LOSSES} | advantages_of(case) for case in cases]}, target)


if __name__ == "__main__":
    main()
