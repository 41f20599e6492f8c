"""Several processes that train as one: which of them writes, and that they end together when one does, with the cause printed once."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SHUTDOWN_GRACE_SECONDS = 5.0
"""Seconds in which the first rank may say what went wrong, before another one does; and in which another may end by itself."""


def is_rank_zero() -> bool:
    """Return True on the rank that writes. Before there is a process group, the launchers' variables decide.

    torchrun's RANK counts over all nodes. Without it there is SLURM's number of the process; or Lightning has started the processes of
    each node, with a number within the node and the number of the node.
    """
    without = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    numbers = ("RANK",) if "RANK" in os.environ else without
    return all(os.environ.get(name, "0") == "0" for name in numbers)


def is_multi_process_launch() -> bool:
    """Return True if a launcher (torchrun, srun) has started several ranks, each with the same command."""
    return any(int(os.environ.get(name, 1)) > 1 for name in _sizes())


def rank_output_overrides() -> list[str]:
    """Overrides by which a rank that is started apart, but for the first, keeps out of the first one's files."""
    if not is_multi_process_launch() or is_rank_zero():
        return []
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    return [f"hydra.job.name=rank_{rank}", "hydra.output_subdir=null"]


def _sizes() -> tuple[str, ...]:
    if "RANK" in os.environ:
        return ("WORLD_SIZE",)
    return () if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") else ("SLURM_NTASKS",)


@contextmanager
def rank_zero_reports_first() -> Iterator[None]:
    """Let rank 0 report an error that all ranks have: the others wait, and their launcher ends them meanwhile."""
    try:
        yield
    except Exception:
        if not is_rank_zero():
            time.sleep(SHUTDOWN_GRACE_SECONDS)
        raise


@contextmanager
def terminate_together(children: Callable[[], Sequence["subprocess.Popen[bytes]"]]) -> Iterator[None]:
    """Ends the ``children`` (the ranks that this process has started) when this rank ends by an error.

    ValueError where the error is but the end of another rank, or a port that is taken.
    """
    if (
        "RANK" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0"
    ):  # started by torchrun, or by the first rank of this node
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except BaseException as error:
        lost = _connection_lost(error)
        ends = _ends(children()) if lost else []
        for child in children():
            child.kill()
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} is taken by another program, and the ranks cannot meet there: set it to a "
                "free port, or leave it unset where one process starts the others"
            ) from error
        if lost:
            raise ValueError(
                f"{' and '.join(ends) or 'another rank ended'}, so this one stops: what is printed above is the cause, or it was "
                "killed from outside (memory?); the same command resumes from the last checkpoint if it names output=FOLDER"
            ) from error
        raise


def _connection_lost(error: BaseException) -> bool:
    """Gloo's errors are plain RuntimeErrors with its file in the text; NCCL's are DistBackendErrors."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/transport" in text or type(error).__name__ == "DistBackendError")


def _ends(children: Sequence["subprocess.Popen[bytes]"]) -> list[str]:
    """How the first children ended, once one has."""
    deadline = time.monotonic() + 2 * SHUTDOWN_GRACE_SECONDS
    while children and all(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    statuses = {rank: child.poll() for rank, child in enumerate(children, 1)}
    return [
        f"local rank {rank} ended by {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"
        for rank, status in statuses.items()
        if status
    ]


def _end_with(parent: int) -> None:
    """A parent that is killed cannot end its children, which may be waiting for it for half an hour."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
