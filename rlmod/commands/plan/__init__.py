"""``rlmod-plan experiment=gtpo policy.path=Qwen/Qwen2.5-7B strategy=fsdp2 trainer.devices=64``: will it fit?

the config of a run -> its sizes (read, run, shape) -> bytes by part and phase (memory, activations), bytes over the wire (traffic),
seconds by stage (duration, hardware) -> what to change (advice) -> text (table)

No weights are loaded, no data read, no GPU needed.
"""

from omegaconf import DictConfig

from rlmod.config import cli


def plan(cfg: DictConfig) -> None:
    """Prints the plan of the run that the config describes."""
    from rlmod.commands.plan.read import run_of
    from rlmod.commands.plan.table import report

    print(report(run_of(cfg)))


def main() -> None:
    cli.run(plan, "plan")
