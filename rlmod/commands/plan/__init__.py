"""Estimate memory, traffic and time of a run: ``rlmod-plan policy.path=Qwen/Qwen2.5-7B strategy=fsdp2 trainer.devices=64``.

config of a run -> its sizes (read, run, shape) -> bytes by part and phase (memory, activations), bytes over the network (traffic),
seconds by stage (duration, hardware) -> suggested changes (advice) -> text (table)

A plan loads no weights, reads no data and needs no GPU.
"""

from omegaconf import DictConfig

from rlmod.config import cli


def plan(cfg: DictConfig) -> None:
    """Print the plan of the run that the config describes."""
    from rlmod.commands.plan.read import run_from_config
    from rlmod.commands.plan.table import format_plan

    print(format_plan(run_from_config(cfg)))


def main() -> None:
    cli.run(plan, "plan")
