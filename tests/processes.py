"""Runs the commands in processes of their own, which may be killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TRAIN = (str(Path(sys.executable).with_name("rlmod-train")),)


def started(
    *words: str, command: tuple[str, ...] = TRAIN, cwd: Path | None = None, **env: str
) -> "subprocess.Popen[str]":
    """In a session of its own, so that all of its ranks can be killed at once."""
    return subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env={**os.environ, **env},
        start_new_session=True,
    )


def kill(process: "subprocess.Popen[str]") -> None:
    """Kill the process and all the ranks that it has started."""
    subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)  # torchrun's are not of its session
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def ended(process: "subprocess.Popen[str]", status: int = 0, seconds: float = 300) -> str:
    """Wait for the process to end with this status, and return its output."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == status, f"exit status {process.returncode}\n{output}"
    return output


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]", seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
