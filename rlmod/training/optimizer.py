"""The optimizer and its schedule. They follow the config, even if a run resumes from a checkpoint with another config."""

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlmod.interfaces import Optimizer, Schedule
from rlmod.model.policy import HFPolicy

if TYPE_CHECKING:
    import lightning as L


def build_optimizer(
    optimizer: Optimizer, schedule: Schedule | None, weights: Sequence[nn.Parameter], steps: int
) -> tuple[Any, Any | None]:
    """Build the optimizer of these weights, and its schedule for a run of ``steps`` optimizer steps."""
    built: Any = optimizer(weights)
    if schedule is None:
        return built, None
    takes_steps = "num_training_steps" in signature(schedule).parameters
    return built, schedule(built, **({"num_training_steps": steps} if takes_steps else {}))


LARGE_POLICY = 50_000_000
LARGE_RATE = 1e-5


def check_learning_rate(optimizer: Any, policy: nn.Module) -> None:
    """Raise ValueError for a learning rate that suits a toy, in full fine-tuning of a policy of more than 50 M weights."""
    weights = list(policy.parameters())
    number = sum(weight.numel() for weight in weights)
    rate = _highest_rate(optimizer)
    if all(weight.requires_grad for weight in weights) and number > LARGE_POLICY and rate > LARGE_RATE:
        raise ValueError(
            f"optimizer.lr={rate:g} for full fine-tuning of {number / 1e6:,.0f} M weights: above {LARGE_RATE:g} such a policy forgets what "
            "it knew; give size=gsm8k or optimizer.lr=1e-6, train an adapter (adapter=lora), or force it with guard.large_lr=true"
        )


def check_rate_before_loading(optimizer: Optimizer, policy: HFPolicy) -> None:
    """Raise ValueError as ``check_learning_rate`` does, from the policy's config alone: its weights take time to load."""
    built: Any = optimizer([nn.Parameter(torch.zeros(1))])
    if policy.adapter is None and not policy.is_adapter and _highest_rate(built) > LARGE_RATE:
        check_learning_rate(built, policy.skeleton())


def _highest_rate(optimizer: Any) -> float:
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


def apply_new_hyperparameters(trainer: "L.Trainer", fresh: Any, schedule: Any | None) -> None:
    """Apply the settings of ``fresh`` and ``schedule``, advanced to the Trainer's global step, to the restored optimizer and schedule.

    A checkpoint holds the learning rate, weight decay and so on of its run beside the moments, and loading it restores all of them.
    ``fresh`` must have the same number of parameter groups; the weights in them do not matter.
    """
    if schedule is not None:
        fresh.step()  # changes nothing without a gradient; PyTorch warns if the schedule steps before the optimizer
        for _ in range(trainer.global_step):
            schedule.step()
    for group, new in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in new.items() if name != "params"})
    for restored in trainer.lr_scheduler_configs:  # one entry if there is a schedule, otherwise none
        assert schedule is not None
        restored.scheduler.load_state_dict(schedule.state_dict())
