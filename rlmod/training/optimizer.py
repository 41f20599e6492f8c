"""The optimizer and its schedule: as the config says, also where a run resumes from a checkpoint that was made with another config."""

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
    """Both for these weights and a run of so many optimizer steps."""
    made: Any = optimizer(weights)
    if schedule is None:
        return made, None
    takes_steps = "num_training_steps" in signature(schedule).parameters
    return made, schedule(made, **({"num_training_steps": steps} if takes_steps else {}))


def apply_new_hyperparameters(trainer: "L.Trainer", fresh: Any, schedule: Any | None) -> None:
    """Gives what the Trainer has restored from a checkpoint the settings of these, as they are after as many steps.

    A checkpoint holds its run's learning rate, weight decay and so on beside the moments, and loading it brings all of them back.
    ``fresh`` has as many groups of weights; what weights these are does not matter.
    """
    if schedule is not None:
        fresh.step()  # without a gradient nothing moves; a schedule warns if it goes first
        for _ in range(trainer.global_step):
            schedule.step()
    for group, new in zip(trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
        group.update({name: value for name, value in new.items() if name != "params"})
    for restored in trainer.lr_scheduler_configs:  # one, where there is a schedule
        assert schedule is not None
        restored.scheduler.load_state_dict(schedule.state_dict())
