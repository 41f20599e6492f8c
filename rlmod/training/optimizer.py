"""The optimizer and its schedule. They follow the config, even if a run resumes from a checkpoint with another config."""

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import nn

from rlmod.interfaces import Optimizer, Schedule

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
