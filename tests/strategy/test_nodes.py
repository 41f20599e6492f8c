"""Two nodes: two torchrun groups on one machine, and two tasks as srun would start them."""

import csv
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.processes import TRAIN, ended, kill, started, wait_until
from tests.strategy.scripted import SETTINGS, assert_same_steps, folder_of_runs

pytestmark = pytest.mark.slow

NODES = (*SETTINGS, "trainer.num_nodes=2", "trainer.devices=1", "output=run")
FILES = {
    "config.yaml",
    "metrics.csv",
    "samples.jsonl",
    "result.json",
    ".lock",
    "report.html",
    "train.log",
    "rank_1.log",
    "hparams.yaml",
}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


def torchrun(folder: Path, *overrides: str):
    """A group of one process a node, which meet at a rendezvous."""
    meeting = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    command = (sys.executable, "-m", "torch.distributed.run", *meeting, "--rdzv-id=test", "-m", "rlmod.train")
    return [started(*NODES, *overrides, command=command, cwd=folder) for _ in range(2)]


def srun(folder: Path, *overrides: str):
    """Start one process per node with the variables by which SLURM's srun tells them apart."""
    shared = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}
    own = [{"SLURM_PROCID": str(node), "SLURM_NODEID": str(node)} for node in range(2)]
    return [started(*NODES, *overrides, command=TRAIN, cwd=folder, **shared, **meeting, **each) for each in own]


def kill_all(processes) -> None:
    for process in processes:
        kill(process)


@pytest.mark.parametrize(
    ("launch", "overrides"),
    [(torchrun, ("strategy=ddp",)), (torchrun, ("strategy=fsdp2",)), (srun, ("strategy=ddp",))],
    ids=["torchrun, ddp", "torchrun, fsdp2", "srun, ddp"],
)
def test_two_nodes_take_the_steps_of_one_process_and_go_on_after_a_kill(launch, overrides, one, tmp_path):
    folder_of_runs(tmp_path)
    nodes = launch(tmp_path, *overrides)
    try:
        wait_until(lambda: bool(list((tmp_path / "run" / "checkpoints").glob("step-*"))), nodes[0])
    finally:
        kill_all(nodes)
    nodes = launch(tmp_path, *overrides)
    try:
        outputs = [ended(node) for node in nodes]
    finally:
        kill_all(nodes)
    assert "".join(outputs).count("resuming from") <= 1  # 0: the first time it had come to its end already
    assert_same_steps(tmp_path / "run", one)
    # Written once.
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["reward/mean"]] == ["0", "1", "2"]
    names = {path.name for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert {name for name in names if not name.startswith("events.")} <= FILES


def test_a_slurm_job_that_is_told_of_its_end_goes_on_when_it_is_queued_again(tmp_path):
    """SIGUSR1 to every task. By its status 138 the script in docs/scale_out.md knows that the job is to be queued again."""
    folder_of_runs(tmp_path)
    assert 'if [ "$status" -eq 138 ]; then scontrol requeue' in Path("docs/scale_out.md").read_text()
    settings = ("strategy=ddp", "trainer.max_epochs=30", "callbacks.checkpoints.every=1000")
    nodes = srun(tmp_path, *settings)
    try:
        file = tmp_path / "run" / "metrics.csv"
        wait_until(lambda: file.exists() and "reward/mean" in file.read_text(), nodes[0])
        for node in nodes:
            node.send_signal(signal.SIGUSR1)
        assert "stopped; resume with" in ended(nodes[0], status=138)
        ended(nodes[1])
    finally:
        kill_all(nodes)
    nodes = srun(tmp_path, *settings)
    try:
        assert "resuming from" in ended(nodes[0])
        ended(nodes[1])
    finally:
        kill_all(nodes)
    with file.open() as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream) if row["reward/mean"]] == list(range(30))


def test_a_node_that_dies_ends_the_other(tmp_path):
    folder_of_runs(tmp_path)
    nodes = torchrun(tmp_path, "strategy=ddp", "trainer.max_epochs=10000")
    try:
        wait_until(lambda: bool(list((tmp_path / "run" / "checkpoints").glob("step-*"))), nodes[0])
        kill(nodes[1])
        output = ended(nodes[0], status=1, seconds=60)
    finally:
        kill_all(nodes)
    assert "another rank ended, so this one stops" in output
