"""The process that runs a pool of workers for one reward function. Pool (in _pool.py) starts it.

It is a program of its own, so that a worker never inherits the trainer's memory, threads, CUDA context, open files or environment. It has
one thread and has imported the function, so its workers can be forked: replacing a killed one takes milliseconds.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

LARGEST_CHUNK = 16
"""Items that a worker gets at once. It replies to each of them, so that each has its own time limit."""

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class PoolSettings:
    """Settings of a pool. The function gets the arguments of one item; its result must be picklable."""

    function: str
    """``module:name``."""
    workers: int
    seconds: float | None
    """Time limit per item, in seconds of wall-clock time; None: no limit."""
    memory_gib: float
    """Memory that a worker may add to what it starts with."""
    sandboxed: bool
    """True for third-party code that sees a model's text (_sandbox.py)."""
    imports: str | None = None
    """A module that the items need. It is imported before workers are forked, so that no item's time limit includes it."""


@dataclass(eq=False)
class Worker:
    """A forked process, and the indices of the items that it has received and not yet answered."""

    process: BaseProcess
    connection: Connection
    pending: deque[int] = field(default_factory=deque)
    deadline: float = float("inf")
    """When the first of ``pending`` is out of time, on the clock of ``time.monotonic``."""

    def kill(self) -> int | None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        return self.process.exitcode


class Server:
    """Distributes items over the workers. Replies are (index of the item, status, value); see ``Reply`` in _pool.py."""

    def __init__(self, settings: PoolSettings, trainer: Connection) -> None:
        self.settings, self.trainer = settings, trainer
        self.function = load(settings.function)
        if settings.imports is not None:
            importlib.import_module(settings.imports)
        warm_up = getattr(sys.modules[self.function.__module__], "warm_up", None)
        if warm_up is not None:
            warm_up()
        self.workers: list[Worker] = []

    def run(self, items: Sequence[tuple[Any, ...]]) -> None:
        """Send one reply per item, in the order in which they are done."""
        waiting = deque(range(len(items)))
        unanswered = len(items)
        while unanswered:
            for worker in [each for each in self.workers if not each.pending and not each.process.is_alive()]:
                worker.kill()  # it died while it had nothing to do
                self.workers.remove(worker)
            while len(self.workers) < self.settings.workers:
                self.workers.append(self._fork())
            for worker in self.workers:
                if waiting and not worker.pending:
                    self._assign(worker, items, waiting)
            busy = {worker.connection: worker for worker in self.workers if worker.pending}
            first = min(worker.deadline for worker in busy.values())
            seconds = None if first == float("inf") else max(first - time.monotonic(), 0)
            ready = wait([self.trainer, *busy], timeout=seconds)
            if self.trainer in ready:  # it sends nothing while it waits for replies
                raise EOFError
            replies = [self._receive(busy[connection], waiting) for connection in ready]  # pyright: ignore[reportArgumentType]
            now = time.monotonic()
            replies += [
                self._end(worker, waiting, "timeout")
                for worker in busy.values()
                if worker.pending and worker.deadline <= now and worker.connection not in ready
            ]
            unanswered -= len(replies)
            self.trainer.send(replies)

    def _fork(self) -> Worker:
        ours, theirs = FORK.Pipe()
        others = [ours, self.trainer, *(worker.connection for worker in self.workers)]
        process = FORK.Process(target=work, args=(self.settings, self.function, theirs, others), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def _assign(self, worker: Worker, items: Sequence[tuple[Any, ...]], waiting: deque[int]) -> None:
        # Small chunks towards the end, so that no worker is idle while another has a chunk left.
        size = min(max(len(waiting) // (2 * len(self.workers)), 1), LARGEST_CHUNK)
        worker.pending.extend(waiting.popleft() for _ in range(size))
        with suppress(OSError):  # it has just died: receiving from it tells
            worker.connection.send([items[index] for index in worker.pending])
        self._start_clock(worker)

    def _start_clock(self, worker: Worker) -> None:
        limit = float("inf") if self.settings.seconds is None else self.settings.seconds
        worker.deadline = time.monotonic() + limit if worker.pending else float("inf")

    def _receive(self, worker: Worker, waiting: deque[int]) -> tuple[int, str, Any]:
        try:
            status, value = worker.connection.recv()
        except (EOFError, OSError):
            return self._end(worker, waiting, "error")
        index = worker.pending.popleft()
        self._start_clock(worker)
        return index, status, value

    def _end(self, worker: Worker, waiting: deque[int], status: str) -> tuple[int, str, Any]:
        """Kill a worker that is out of time or dead. Its first item is to blame; the others go back to the queue."""
        self.workers.remove(worker)
        if status == "error":
            worker.process.join(1)  # it is ending by itself: its own exit status tells more than ours
        code = worker.kill()
        index = worker.pending.popleft()
        waiting.extendleft(reversed(worker.pending))
        worker.pending.clear()
        if status == "timeout":
            return index, status, f"it took longer than {self.settings.seconds} s"
        return index, status, f"the worker ended with exit status {code}"


def work(
    settings: PoolSettings, function: Callable[..., Any], connection: Connection, others: list[Connection]
) -> None:
    """Serve chunks of items in a worker process, until the server is gone."""
    from rlmod.reward import _sandbox

    for each in others:  # inherited copies would keep these pipes open when the server is dead
        each.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _sandbox.limit_resources(settings.memory_gib)
    if settings.sandboxed:
        _sandbox.install()
    while True:
        try:
            items = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        for arguments in items:
            # The server kills this process in time. If the server is dead, this timer does.
            signal.setitimer(signal.ITIMER_REAL, 0 if settings.seconds is None else 2 * settings.seconds + 10)
            reply = _call(settings, function, arguments)
            signal.setitimer(signal.ITIMER_REAL, 0)
            try:
                connection.send(reply)
            except (OSError, BrokenPipeError):
                os._exit(0)
            except Exception as error:  # a result that cannot be pickled
                connection.send(("error", _describe(error)))


def _call(settings: PoolSettings, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    from rlmod.reward import _sandbox

    try:
        with _sandbox.scoring() if settings.sandboxed else nullcontext([]) as denied:
            value = function(*arguments)
        return ("error", f"it is not allowed: {denied[0]}") if denied else ("ok", value)
    except MemoryError:
        return "error", f"MemoryError: it needs more than {settings.memory_gib} GiB"
    except BaseException as error:  # SystemExit, too
        return "error", _describe(error)


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {str(error)[:300]}"
    except BaseException:  # the text of the error may fail, too
        return type(error).__name__


def load(function: str) -> Callable[..., Any]:
    """Import ``module:name``."""
    module, _, name = function.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def main(descriptor: int) -> None:
    """Serve until the trainer closes its end of the connection or dies."""
    connection = Connection(descriptor)
    settings: PoolSettings = connection.recv()
    try:
        server = Server(settings, connection)
        connection.send(("ready", None))
        while True:
            server.run(connection.recv())
    except (EOFError, OSError):  # the trainer has ended
        pass
    except Exception as error:
        connection.send(("error", _describe(error)))
    finally:
        os.killpg(os.getpgid(0), signal.SIGKILL)
