"""Requests to a vLLM server, with health checks: it may freeze, disappear, or stay healthy and never answer."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

T = TypeVar("T")

HEALTH_CHECK_SECONDS = 5.0
"""Seconds between two health checks of the server, and the timeout of one."""


class ServerTimeout(ConnectionError):
    """The server did not respond within ``patience``, or not to a request within ``timeout``."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server over HTTP; its fields are those of the sampler with the same names."""

    url: str
    patience: float
    timeout: float
    requests: int

    def post_all(self, path: str, bodies: Mapping[int, Mapping[str, Any] | None]) -> Iterator[tuple[int, Any]]:
        """Post all requests, and yield each answer as it arrives.

        Raise ServerTimeout if the server fails its health checks for ``patience`` seconds, or does not answer within ``timeout``.
        """
        pending: SimpleQueue[int] = SimpleQueue()
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for i in bodies:
            pending.put(i)

        def work() -> None:
            with suppress(Empty):
                while True:
                    i = pending.get_nowait()
                    try:
                        done.put((i, self._post(path, bodies[i])))
                    except Exception as error:
                        list(_drain(pending))  # post nothing more
                        done.put((i, error))

        # No thread pool: the process would wait for its threads on exit, and with a frozen server they never end.
        for _ in range(min(self.requests, len(bodies))):
            Thread(target=work, daemon=True).start()
        try:
            for _ in bodies:
                i, answer = self._next(done)
                if isinstance(answer, Exception):
                    yield from ((j, other) for j, other in _drain(done) if not isinstance(other, Exception))
                    raise answer
                yield i, answer
        finally:  # post nothing more after an error in the caller either
            list(_drain(pending))

    def _next(self, done: "SimpleQueue[tuple[int, Any]]") -> tuple[int, Any]:
        while True:
            try:
                return done.get(timeout=HEALTH_CHECK_SECONDS)
            except Empty:
                self.wait_until_awake()

    def wait_until_awake(self) -> None:
        """Wait until a health check succeeds. Raise ServerTimeout after ``patience`` seconds without success."""
        started = time.monotonic()
        while True:
            try:
                with urlopen(f"{self.url}/health", timeout=HEALTH_CHECK_SECONDS):
                    return
            except (OSError, HTTPException) as error:
                if time.monotonic() - started > self.patience:
                    reason = getattr(error, "reason", None) or error
                    raise ServerTimeout(
                        f"sampler.url={self.url}: no answer for {self.patience:.0f} s ({reason}). Start the server with rlmod-serve, with "
                        "the policy and sampler of this run, and wait until it reports that it is up. To resume a run from its last "
                        "checkpoint, repeat its command with output=FOLDER"
                    ) from error
            time.sleep(min(1.0, self.patience / 10))

    def get(self, path: str) -> Any:
        try:
            with urlopen(f"{self.url}/{path}", timeout=self.patience) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise ValueError(
                f"sampler.url={self.url} answers, but not to /{path} ({error.code}): start it with rlmod-serve, which enables vLLM's "
                "weight-transfer interface"
            ) from error
        except (OSError, HTTPException) as error:
            raise self._connection_lost(path, error) from error

    def _post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data=data, headers={"Content-Type": "application/json"}, method="POST")
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            reason = error.read().decode(errors="replace")[:500]
            if error.code == 400:
                raise ValueError(f"sampler.url={self.url} refuses /{path}: {reason}") from error
            raise ConnectionError(
                f"sampler.url={self.url}: /{path} failed ({error.code}: {reason}); see the server's log. The server fetches weights from "
                "sampler.weights_host: check that it can reach this address"
            ) from error
        except (OSError, HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise ServerTimeout(
                    f"sampler.url={self.url}: no answer to /{path} within sampler.timeout={self.timeout:.0f} s, although the server passes "
                    "its health checks; see its log. If completions are long, raise sampler.timeout. To resume from the last checkpoint, "
                    "repeat the command with output=FOLDER"
                ) from error
            raise self._connection_lost(path, error) from error
        return json.loads(text) if text else None

    def _connection_lost(self, path: str, error: Exception) -> ConnectionError:
        return ConnectionError(
            f"sampler.url={self.url}: the connection for /{path} was lost ({getattr(error, 'reason', error)})"
        )


def _drain(queue: SimpleQueue[T]) -> Iterator[T]:
    """Yield the items that are in the queue now."""
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
