"""One run per folder: a lock that a dead process does not hold."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

NAME = ".lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold the run's folder. ValueError that names the holder if another process holds it.

    The lock belongs to the open file: the operating system releases it when the process ends, however it ends. Only rank 0 takes it.
    """
    descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"output={folder} is in use by another run ({_describe_holder(descriptor)}): wait until it has ended, stop it, or give "
                "another output=FOLDER"
            ) from None
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.truncate(descriptor, 0)
        os.write(descriptor, (json.dumps(holder) + "\n").encode())
        try:
            yield
        finally:
            os.truncate(descriptor, 0)  # nobody holds it now
    finally:
        os.close(descriptor)


def _describe_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock, and not yet written its name
        return "which has just started"
