"""Requests to a vLLM server, watched over: it may freeze, vanish, or stay well and never answer."""

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
"""Seconds between two looks at the server's health, and the longest that one may take."""


class NoSignOfLife(ConnectionError):
    """The server has had its ``patience``, or its ``timeout``."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server over HTTP; the fields are the sampler's of the same names."""

    url: str
    patience: float
    timeout: float
    requests: int

    def answers(self, what: str, asked: Mapping[int, Mapping[str, Any] | None]) -> Iterator[tuple[int, Any]]:
        """To all requests, as they come. NoSignOfLife once the server has been silent for too long, however long its answers may take."""
        left: SimpleQueue[int] = SimpleQueue()
        done: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        for i in asked:
            left.put(i)

        def work() -> None:
            with suppress(Empty):
                while True:
                    i = left.get_nowait()
                    try:
                        done.put((i, self._post(what, asked[i])))
                    except Exception as error:
                        list(_taken(left))  # nothing more is asked
                        done.put((i, error))

        # No pool: its threads would be waited for when the process ends, and those of a server that is frozen never end.
        for _ in range(min(self.requests, len(asked))):
            Thread(target=work, daemon=True).start()
        try:
            for _ in asked:
                i, answer = self._next(done)
                if isinstance(answer, Exception):
                    yield from ((j, other) for j, other in _taken(done) if not isinstance(other, Exception))
                    raise answer
                yield i, answer
        finally:  # nor after an error of whoever asks
            list(_taken(left))

    def _next(self, done: "SimpleQueue[tuple[int, Any]]") -> tuple[int, Any]:
        while True:
            try:
                return done.get(timeout=HEALTH_CHECK_SECONDS)
            except Empty:
                self.wait_until_awake()

    def wait_until_awake(self) -> None:
        """Waits for a sign of life. NoSignOfLife where there is none for ``patience`` seconds."""
        started = time.monotonic()
        while True:
            try:
                with urlopen(f"{self.url}/health", timeout=HEALTH_CHECK_SECONDS):
                    return
            except (OSError, HTTPException) as error:
                if time.monotonic() - started > self.patience:
                    reason = getattr(error, "reason", None) or error
                    raise NoSignOfLife(
                        f"sampler.url={self.url}: no answer for {self.patience:.0f} s ({reason}). Start the server with rlmod-serve, with "
                        "this run's policy and sampler, and wait until it says that it is up; a run that has checkpoints resumes from the "
                        "last one by the same command with output=FOLDER"
                    ) from error
            time.sleep(min(1.0, self.patience / 10))

    def get(self, what: str) -> Any:
        try:
            with urlopen(f"{self.url}/{what}", timeout=self.patience) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise ValueError(
                f"sampler.url={self.url} answers, but not to /{what} ({error.code}): start it with rlmod-serve, which opens vLLM's "
                "interface for the transfer of weights"
            ) from error
        except (OSError, HTTPException) as error:
            raise self._broken_off(what, error) from error

    def _post(self, what: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{what}", data=data, headers={"Content-Type": "application/json"}, method="POST")
        try:
            with urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            if error.code == 400:
                raise ValueError(f"sampler.url={self.url} refuses /{what}: {said}") from error
            raise ConnectionError(
                f"sampler.url={self.url}: /{what} failed ({error.code}: {said}); the server's log says more. It fetches weights from "
                "sampler.weights_host, which it has to reach"
            ) from error
        except (OSError, HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise NoSignOfLife(
                    f"sampler.url={self.url}: no answer to /{what} within sampler.timeout={self.timeout:.0f} s, while the server says that "
                    "it is well; its log says more. Long completions may need more time; the same command with output=FOLDER goes on "
                    "from the last checkpoint"
                ) from error
            raise self._broken_off(what, error) from error
        return json.loads(text) if text else None

    def _broken_off(self, what: str, error: Exception) -> ConnectionError:
        return ConnectionError(f"sampler.url={self.url}: /{what} broke off ({getattr(error, 'reason', error)})")


def _taken(queue: SimpleQueue[T]) -> Iterator[T]:
    """Yield the items that are in the queue now."""
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
