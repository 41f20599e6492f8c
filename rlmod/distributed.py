"""Coordination of several ranks: which one writes files, and how all end together when one fails, with the cause printed once."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SHUTDOWN_GRACE_SECONDS = 5.0
"""Seconds that other ranks wait before they report an error, so that rank 0 reports it first. A rank that lost a connection
waits twice as long for its children to end."""


def is_rank_zero() -> bool:
    """Return True on the rank that writes files. It reads the launchers' environment variables, so no process group is needed.

    torchrun's RANK counts over all nodes. Without it, SLURM's process number decides, or the local rank and the node rank of processes
    that Lightning started.
    """
    other_launchers = ("SLURM_PROCID", "JSM_NAMESPACE_RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    numbers = ("RANK",) if "RANK" in os.environ else other_launchers
    return all(os.environ.get(name, "0") == "0" for name in numbers)


def is_first_on_node() -> bool:
    """Return True on the rank that writes files for its node: it reads the launchers' environment variables."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "JSM_NAMESPACE_LOCAL_RANK")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def is_multi_process_launch() -> bool:
    """Return True if a launcher (torchrun, srun) has started several ranks, each with the same command."""
    return any(int(os.environ.get(name, 1)) > 1 for name in _world_size_variables())


def rank_output_overrides() -> list[str]:
    """Return Hydra overrides that keep other ranks from writing to rank 0's files; empty for rank 0 and for a single process."""
    if not is_multi_process_launch() or is_rank_zero():
        return []
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    return [f"hydra.job.name=rank_{rank}", "hydra.output_subdir=null"]


def _world_size_variables() -> tuple[str, ...]:
    if "RANK" in os.environ:
        return ("WORLD_SIZE",)
    return () if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") else ("SLURM_NTASKS",)


@contextmanager
def rank_zero_reports_first() -> Iterator[None]:
    """Let rank 0 report an error that all ranks have. The others wait, and the launcher ends them in the meantime."""
    try:
        yield
    except Exception:
        if not is_rank_zero():
            time.sleep(SHUTDOWN_GRACE_SECONDS)
        raise


@contextmanager
def terminate_together(children: Callable[[], Sequence["subprocess.Popen[bytes]"]]) -> Iterator[None]:
    """Kill the ``children`` (the ranks that this process started) if this rank fails.

    ValueError if the error was caused by the end of another rank, or by a port that is in use.
    """
    # True if torchrun, or the first rank of this node, started this process.
    if "RANK" in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        yield
    except BaseException as error:
        lost = _is_connection_lost(error)
        exits = _describe_exits(children()) if lost else []
        for child in children():
            child.kill()
        if "EADDRINUSE" in str(error):
            raise ValueError(
                f"MASTER_PORT={os.environ.get('MASTER_PORT')} is in use by another program, so the ranks cannot connect: set it to a free "
                "port, or unset it if one process starts the others"
            ) from error
        if "timed out" in str(error).lower() and lost:
            raise ValueError(
                "a rank waited for another one longer than guard.rank_timeout, so the run ends: that rank hangs (in a reward? the lines "
                "above say what it was waiting for), or is so much slower that guard.rank_timeout must be raised"
            ) from error
        if lost:
            raise ValueError(
                f"{' and '.join(exits) or 'another rank ended'}, so this one stops: the cause is printed above, or it was killed from "
                "outside (memory?); the same command resumes from the last checkpoint if it names output=FOLDER"
            ) from error
        raise


def _is_connection_lost(error: BaseException) -> bool:
    """Return True for an error of a collective. Gloo raises RuntimeError with its file in the text, NCCL raises DistBackendError."""
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo/transport" in text or type(error).__name__ == "DistBackendError")


def _describe_exits(children: Sequence["subprocess.Popen[bytes]"]) -> list[str]:
    """Wait until a child has ended, within a limit, and return how the children that failed ended."""
    deadline = time.monotonic() + 2 * SHUTDOWN_GRACE_SECONDS
    while children and all(child.poll() is None for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    statuses = {rank: child.poll() for rank, child in enumerate(children, 1)}
    return [
        f"local rank {rank} ended by {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"
        for rank, status in statuses.items()
        if status
    ]


def _exit_with_parent(parent: int) -> None:
    """Kill this process once its parent is gone. A killed parent cannot end its children, which may wait half an hour in a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
