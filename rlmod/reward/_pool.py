"""A pool of worker processes for rewards that are slow, may hang, or run third-party code on a model's text.

trainer -> server (_pool_server.py) -> workers

Each item has a time limit. A worker that exceeds it, or that dies, is replaced; the item is reported and the others go on. Replies come in
the order of the items.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from rlmod.reward._pool_server import PoolSettings

log = logging.getLogger(__name__)

START_SECONDS = 300.0
"""Time limit for importing the function, long enough for a busy machine with a slow disk."""
HEARTBEAT_SECONDS = 60.0
MAX_STARTS = 3
"""Times that a server is started for one call of ``Pool.map``. It ends only if it is killed, as by a kernel short of memory."""
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
"""Environment variables that a sandboxed worker gets; no others, because they may hold secrets."""


class Reply(NamedTuple):
    status: str
    """``ok``, ``error`` or ``timeout``."""
    value: Any
    """The function's result, or a description of what went wrong."""


class PoolError(RuntimeError):
    """The pool itself does not work: its function cannot be imported, or its server keeps dying."""


def default_workers() -> int:
    """Return this rank's share of the cores that the process may use, at most 32.

    torchrun and SLURM name the number of ranks on a machine. Lightning's own launcher names only that of all ranks.
    """
    named = next(
        (
            os.environ[name]
            for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE")
            if name in os.environ
        ),
        "",
    )
    ranks = int(named) if named.isdigit() else 1
    return min(max(len(os.sched_getaffinity(0)) // max(ranks, 1), 1), 32)


def run_in_pool(settings: PoolSettings, items: Sequence[tuple[Any, ...]], what: str) -> list[Reply]:
    """Call ``settings.function`` with each item's arguments, in worker processes; return the replies in the order of the items.

    ``what`` names the reward in the lines that tell what is being waited for. PoolError if the pool itself does not work.
    """
    if not items:
        return []
    with _lock:
        if settings not in _pools or _pools[settings].owner != os.getpid():  # a fork's copy belongs to the parent
            _pools[settings] = Pool(settings)
        pool = _pools[settings]
    return pool.map(items, what)


class Pool:
    """The server of one function, started for the first item. It lives as long as the process, because components hold no state."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings, self.owner = settings, os.getpid()
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def map(self, items: Sequence[tuple[Any, ...]], what: str) -> list[Reply]:
        replies: dict[int, Reply] = {}
        with self.lock:
            for start in range(1, MAX_STARTS + 1):
                try:
                    self._start()
                    self._collect(items, replies, what)
                    return [replies[index] for index in range(len(items))]
                except (EOFError, OSError) as error:
                    log.warning(
                        "%s: the worker pool's server died (start %d of %d): %r", what, start, MAX_STARTS, error
                    )
                finally:
                    # Also after Ctrl-C: late replies must not be taken for the next call's.
                    if len(replies) < len(items):
                        self.stop()
        raise PoolError(f"{what}: the worker pool's server died {MAX_STARTS} times; is the machine short of memory?")

    def _collect(self, items: Sequence[tuple[Any, ...]], replies: dict[int, Reply], what: str) -> None:
        """Send the items that have no reply yet, and add their replies."""
        left = [index for index in range(len(items)) if index not in replies]
        self.connection.send([items[index] for index in left])
        started = time.monotonic()
        while len(replies) < len(items):
            while not self.connection.poll(HEARTBEAT_SECONDS):
                waited = time.monotonic() - started
                log.warning("waiting for %s: %d of %d done after %.0f s", what, len(replies), len(items), waited)
            replies |= {left[index]: Reply(status, value) for index, status, value in self.connection.recv()}

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        self.folder = tempfile.TemporaryDirectory(prefix="rlmod-pool-")
        os.chmod(self.folder.name, 0o500)  # the working folder of the workers; nothing can be written there
        self.connection, theirs = multiprocessing.Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        kept = {name: value for name, value in os.environ.items() if name in PASSED_ON or not self.settings.sandboxed}
        # start_new_session: Ctrl-C reaches only the trainer, which then ends the pool; and the pool can be killed as a whole.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from rlmod.reward._pool_server import main; main({theirs.fileno()})"],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd=self.folder.name,
            env={**kept, "PYTHONPATH": os.pathsep.join(paths), "HOME": self.folder.name},
        )
        theirs.close()
        self.connection.send(self.settings)
        if not self.connection.poll(START_SECONDS):
            self.stop()
            raise PoolError(f"the worker pool of {self.settings.function} did not start within {START_SECONDS:.0f} s")
        try:
            status, detail = self.connection.recv()
        except EOFError:
            raise PoolError(
                f"the worker pool of {self.settings.function} ended during its start; see its error above"
            ) from None
        if status != "ready":
            raise PoolError(f"the worker pool cannot use {self.settings.function}: {detail}")

    def stop(self) -> None:
        """Kill the server and its workers, and wait for the server so that no zombie is left."""
        if self.process is not None and self.owner == os.getpid():
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.connection.close()
            self.process.wait()
        self.process = None
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None


_pools: dict[PoolSettings, Pool] = {}
_lock = threading.Lock()


@atexit.register
def stop_pools() -> None:
    """Stop all worker pools of this process."""
    for pool in _pools.values():
        if pool.owner == os.getpid():
            pool.stop()
    _pools.clear()
