"""Several ranks as one run: killed and resumed bit for bit, stopped together, ended together. Real processes, over gloo."""

import json
import signal
import socket
import sys
import time

import pytest

from tests.command_line import SHORT
from tests.config.composing import ROOT
from tests.killed import check_killed_equals_whole
from tests.processes import ended, kill, started, wait_until

PYTHON = sys.executable

pytestmark = pytest.mark.slow

TWO = (
    *SHORT,
    "strategy=ddp",
    "trainer.devices=2",
    "trainer.accelerator=cpu",
    "shaper=token_entropy",
    "optimizer.lr=1e-3",
)
OWN_REWARD = (*TWO, "~reward.pattern", "~reward.correct", "~reward.incorrect", "data.validation=null")


def test_two_ranks_killed_three_times_equal_two_that_never_were_bit_for_bit(tmp_path):
    """SIGKILL at random moments; the same command goes on. With dropout, so that the random states of each rank matter."""
    settings = (*TWO, "adapter=lora", "policy.adapter.dropout=0.1")
    check_killed_equals_whole(tmp_path, settings, iterations=20, kills=3)
    assert (tmp_path / "killed" / "result.json").is_file()


@pytest.mark.parametrize(
    ("strategy", "problems"),
    [("ddp", 1), ("fsdp2", 5), *(pytest.param(*each, marks=pytest.mark.weekly) for each in (("ddp", 5), ("fsdp2", 1)))],
)
def test_fewer_held_out_problems_than_batches_of_all_ranks(strategy, problems, tmp_path):
    """One problem for two ranks; five in batches of one, three and two of them."""
    settings = (
        *TWO,
        f"strategy={strategy}",
        "trainer.max_epochs=1",
        f"data.validation.size={problems}",
        "trainer.limit_val_batches=1.0",
    )
    output = ended(started(*settings, "validation.prompts_per_batch=1", f"output={tmp_path / 'a'}"))
    assert f"on {problems} problems" in output
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["completed"]
    assert result["held_out"]["problems"] == problems
    assert round(result["held_out"]["after"] * problems, 6) in range(problems + 1)


def test_a_reward_that_hangs_on_one_rank_ends_the_run(tmp_path):
    words = (
        *OWN_REWARD,
        "reward._target_=tests.training.faults.hang_on_rank",
        "+reward.rank=1",
        "guard.rank_timeout=15",
    )
    output = ended(started(*words, f"output={tmp_path / 'a'}", cwd=ROOT, PYTHONPATH=str(ROOT)), status=1)
    assert "longer than guard.rank_timeout" in output


def test_a_reward_that_fails_on_one_rank_stops_all_after_a_checkpoint(tmp_path):
    words = (
        *OWN_REWARD, "reward._target_=tests.training.faults.fail_on_rank", "+reward.rank=1", "+reward.call=3", "trainer.max_epochs=5",
    )  # fmt: skip
    output = ended(started(*words, f"output={tmp_path / 'a'}", cwd=ROOT, PYTHONPATH=str(ROOT)), status=1)
    assert "503 from the judge" in output
    assert [path.name for path in (tmp_path / "a" / "checkpoints").glob("step-*")] == ["step-000002"]


def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(tmp_path):
    words = (*TWO, "trainer.max_epochs=10000", "callbacks.checkpoints.wait_seconds=0.01")  # for one process only
    process = started(*words, f"output={tmp_path / 'a'}")
    try:
        file = tmp_path / "a" / "metrics.csv"
        wait_until(lambda: file.exists() and "reward/mean" in file.read_text(), process)
        process.send_signal(signal.SIGTERM)
        output = ended(process, status=128 + signal.SIGTERM, seconds=120)
    finally:
        kill(process)
    assert output.count("stopped; resume with resume=") == 1
    assert "Traceback" not in output
    assert len(list((tmp_path / "a" / "checkpoints").glob("step-*"))) == 1
    assert not json.loads((tmp_path / "a" / "result.json").read_text())["completed"]


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    "deed", ["raise ValueError('the disk of this node is gone')", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_rank_that_ends_ends_the_others_within_a_minute_and_the_cause_is_printed_once(deed, rank, tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os, signal\n"
        "calls = []\n"
        "def reward(texts):\n"
        "    calls.append(1)\n"
        f"    if os.environ.get('LOCAL_RANK') == '{rank}' and len(calls) == 3:\n"
        "        open('died', 'w').close()\n"
        f"        {deed}\n"
        "    return [float(len(c) % 2) for c in texts.completions]\n"
    )
    process = started(
        *OWN_REWARD, "reward._target_=dying.reward", "output=run", "trainer.max_epochs=10000", cwd=tmp_path
    )
    try:
        wait_until((tmp_path / "died").exists, process)
        died = time.monotonic()
        killed = "SIGKILL" in deed
        # The first rank is the process whose exit status this is; a shell says of it that it was killed.
        output = ended(process, status=-signal.SIGKILL if killed and rank == "0" else 1, seconds=60)
        assert time.monotonic() - died < 60
    finally:
        kill(process)
    assert "Traceback" not in output
    assert output.count("the disk of this node is gone") == (0 if killed else 1)
    # An error of a reward is told to all ranks, so rank 0 reports it; of a rank that was killed it reports the end.
    assert output.count("local rank 1 ended by SIGKILL, so this one stops") == (1 if killed and rank == "1" else 0)
    if not killed:
        assert ("rank 1: the reward reward raised" in output) == (rank == "1")
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_port_that_is_taken_is_one_sentence(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        output = ended(started(*TWO, f"output={tmp_path / 'a'}", MASTER_PORT=port), status=1, seconds=60)
    assert output.count(f"MASTER_PORT={port} is in use by another program") == 1
    assert "Traceback" not in output


def test_a_disk_that_is_full_ends_all_ranks_with_one_sentence(tmp_path):
    """A limit on the size of a file stands in for the disk: the policy fits, the optimizer's state does not."""
    (tmp_path / "limited.py").write_text(
        "import resource, signal\n"
        "from rlmod.train import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
        "if __name__ == '__main__':\n"
        "    main()\n"
    )
    process = started(*TWO, "output=run", "trainer.max_epochs=2", command=(PYTHON, "limited.py"), cwd=tmp_path)
    output = ended(process, status=1, seconds=120)
    assert output.count("the checkpoint step-000002 could not be written") == 1
    assert "Traceback" not in output
