"""hydra/launcher=slurm, as far as it can be tried without SLURM: by submitit's launcher on this machine."""

import csv
import json
import os
import signal
import subprocess

import pytest
from hydra import compose, initialize_config_dir

from rlmod.config import cli
from tests.command_line import SHORT
from tests.processes import ended, kill, started, wait_until

pytest.importorskip("submitit")


def test_a_job_has_a_task_for_each_rank_and_is_told_before_its_end():
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "trainer.devices=8", "trainer.num_nodes=2"]
        launcher = compose("train", overrides=overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith(".SlurmLauncher")
    assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
    assert launcher.signal_delay_s == 300


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False).stdout
    return [int(line) for line in found.split()]


@pytest.mark.slow
def test_a_run_that_submitit_interrupts_writes_a_checkpoint_and_is_gone_on_with(tmp_path):
    """SLURM sends SIGUSR2 shortly before a job's time is over, and starts the job again."""
    sweep = tmp_path / "sweep"
    process = started(
        "-m", *SHORT, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60", f"hydra.sweep.dir={sweep}",
        "trainer.max_epochs=60", "trainer.check_val_every_n_epoch=60", "callbacks.checkpoints.every=1000",
        "callbacks.progress_bar.lines=60", "seed=5",
    )  # fmt: skip
    try:
        file = sweep / "0" / "metrics.csv"
        wait_until(lambda: file.exists() and "reward/mean" in file.read_text(), process)
        (controller,) = children(process.pid)
        (task,) = children(controller)
        os.kill(task, signal.SIGUSR2)
        ended(process)
    finally:
        kill(process)
    assert "SIGUSR2: finishing this iteration" in (sweep / "0" / "train.log").read_text()
    assert "resuming from" in (sweep / "0" / "train.log").read_text()
    result = json.loads((sweep / "0" / "result.json").read_text())
    assert result["completed"]
    assert result["steps"] == 60
    with file.open() as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream) if row["reward/mean"]] == list(range(60))
    with (sweep / "results.csv").open() as stream:
        assert float(next(csv.DictReader(stream))["objective"]) == pytest.approx(result["held_out"]["after"])
