"""Requests to a vLLM server, with health checks: it may be starting, freeze, disappear, or stay healthy and never answer."""

import atexit
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from hydra.core.hydra_config import HydraConfig

from rlmod import distributed
from rlmod.sampler._access import HELD, KEY_VARIABLE, LEASE_SECONDS, LOST, SESSION_HEADER, VERSION_HEADER, WRONG_KEY

T = TypeVar("T")
log = logging.getLogger(__name__)

HEALTH_CHECK_SECONDS = 5.0
"""Seconds between two health checks of the server, and the timeout of one."""
REMINDER_SECONDS = 30.0
"""Seconds between two messages that the server is waited for."""
SESSION = secrets.token_hex(16)
"""The secret with which this process holds its leases."""
SINCE = f"{datetime.now():%Y-%m-%d %H:%M:%S}"


class ServerTimeout(ConnectionError):
    """The server did not respond within ``patience`` or ``startup_patience``, or not to a request within ``timeout``."""


@dataclass
class Known:
    """Facts about a server that this process has learned."""

    answered: bool = False
    """True once the server has answered."""
    lease: Mapping[str, str] | None = None
    """The lease that this process has taken last, which a thread renews; None before and after."""
    session: str = SESSION
    """The session of the lease: that of the first rank."""
    version: str = ""
    """Version of the weights last sent to the server."""


_KNOWN: dict[str, Known] = {}


def stored_secret(path: Path) -> str:
    """Return the secret in this file, which only its owner may read. Write a new one if there is none."""
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    path.chmod(0o600)
    return path.read_text(encoding="utf-8").strip()


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server over HTTP; its fields are those of the sampler with the same names."""

    url: str
    api_key_file: str | None
    startup_patience: float
    patience: float
    timeout: float
    requests: int

    @property
    def known(self) -> Known:
        return _KNOWN.setdefault(self.url, Known())

    def take_lease(self) -> None:
        """Take the server for this process, and keep it until the process ends. ValueError that names the holder if another run uses it.

        A resumed run takes over the lease of its earlier process: both find the same secret in the run's folder.
        """
        folder = _run_folder()
        run = SESSION if folder is None else stored_secret(folder / ".lease")
        holder = f"process {os.getpid()} on {socket.gethostname()}, started {SINCE}"
        holder = holder if folder is None else f"the run in {folder} ({holder})"
        lease = {"run": run, "session": SESSION, "holder": holder}
        self._post("rlmod/lease", lease, timeout=self.patience)
        before, self.known.lease = self.known.lease, lease
        if before is None:
            Thread(target=self._renew, daemon=True).start()
            atexit.register(self._release, os.getpid())

    def _renew(self) -> None:
        while (lease := self.known.lease) is not None:
            with suppress(OSError, ValueError):  # the next request of the sampler will tell
                self._post("rlmod/lease", lease, timeout=LEASE_SECONDS / 6)
            time.sleep(LEASE_SECONDS / 6)

    def _release(self, process: int) -> None:
        if os.getpid() == process:  # not in a fork
            self.known.lease = None
            with suppress(OSError, ValueError):
                self._post("rlmod/release", {}, timeout=HEALTH_CHECK_SECONDS)

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
        """Wait until a health check succeeds.

        Raise ServerTimeout after ``startup_patience`` seconds if nothing listens there or the server has never answered, and after
        ``patience`` seconds if it does not answer any more. Raise ValueError if it refuses the API key.
        """
        started = time.monotonic()
        reminded = started - REMINDER_SECONDS
        while True:
            try:
                with self._open("health", "GET", timeout=HEALTH_CHECK_SECONDS):
                    self.known.answered = True
                    return
            except (OSError, HTTPException) as error:
                if isinstance(error, HTTPError) and error.code == WRONG_KEY:
                    raise ValueError(self._explain_key()) from error
                reason = getattr(error, "reason", None) or error
                starting = isinstance(reason, ConnectionRefusedError | FileNotFoundError) or not self.known.answered
                key, limit = ("startup_patience", self.startup_patience) if starting else ("patience", self.patience)
                waited = time.monotonic() - started
                if waited > limit:
                    raise ServerTimeout(
                        f"sampler.url={self.url}: no answer for {limit:g} s, which is sampler.{key} ({reason}). Start the server with "
                        "rlmod-serve, with the policy and sampler of this run. To resume a run from its last checkpoint, repeat its "
                        "command with output=FOLDER"
                    ) from error
            if starting and time.monotonic() - reminded >= REMINDER_SECONDS and distributed.is_rank_zero():
                reminded = time.monotonic()
                left = limit - waited
                log.warning(
                    "sampler.url=%s does not answer yet (%s): waiting for the server, %.0f s left",
                    self.url,
                    reason,
                    left,
                )
            time.sleep(min(1.0, limit / 10))

    def get(self, path: str) -> Any:
        return self._answer(path, "GET", None, self.patience)

    def _post(self, path: str, body: Mapping[str, Any] | None, *, timeout: float | None = None) -> Any:
        return self._answer(path, "POST", body, timeout or self.timeout)

    def _open(self, path: str, method: str, body: Mapping[str, Any] | None = None, *, timeout: float) -> Any:
        headers = {"Content-Type": "application/json", SESSION_HEADER: self.known.session}
        if self.known.version:
            headers[VERSION_HEADER] = self.known.version
        if key := self._api_key():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        return urlopen(Request(f"{self.url}/{path}", data=data, headers=headers, method=method), timeout=timeout)

    def _answer(self, path: str, method: str, body: Mapping[str, Any] | None, timeout: float) -> Any:
        try:
            with self._open(path, method, body, timeout=timeout) as answer:
                text = answer.read()
        except HTTPError as error:
            raise self._explain_status(path, error) from error
        except (OSError, HTTPException) as error:
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise ServerTimeout(
                    f"sampler.url={self.url}: no answer to /{path} within {timeout:g} s, although the server passes its health checks; "
                    "see its log. If completions are long, raise sampler.timeout. To resume from the last checkpoint, repeat the command "
                    "with output=FOLDER"
                ) from error
            raise ConnectionError(
                f"sampler.url={self.url}: the connection for /{path} was lost ({getattr(error, 'reason', error)})"
            ) from error
        return json.loads(text) if text else None

    def _explain_status(self, path: str, error: HTTPError) -> Exception:
        reason = error.read().decode(errors="replace")[:1000]
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(reason)["error"]
            reason = told["message"] if isinstance(told, dict) else told
        if error.code == WRONG_KEY:
            return ValueError(self._explain_key())
        if error.code == HELD:
            return ValueError(f"sampler.url={self.url}: {reason}")
        if error.code == LOST:
            return ConnectionError(f"sampler.url={self.url}: {reason}")
        if error.code == 404:
            return ValueError(
                f"sampler.url={self.url} answers, but not to /{path} ({error.code}): start it with rlmod-serve of this version of rlmod"
            )
        if error.code == 400:
            return ValueError(f"sampler.url={self.url} refuses /{path}: {reason}")
        return ConnectionError(
            f"sampler.url={self.url}: /{path} failed ({error.code}: {reason}); see the server's log. The server fetches weights from "
            "sampler.weights_host: check that it can reach this address"
        )

    def _api_key(self) -> str:
        """Return the key. FileNotFoundError if ``api_key_file`` does not exist (yet): the server writes it when it starts."""
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE, "")
        return Path(self.api_key_file).read_text(encoding="utf-8").strip()

    def _explain_key(self) -> str:
        given = f"the environment variable {KEY_VARIABLE}" if self.api_key_file is None else self.api_key_file
        return (
            f"sampler.url={self.url}: the server does not accept the API key of {given}: set sampler.api_key_file=FOLDER/api_key, where "
            f"FOLDER is the output of rlmod-serve, or give {KEY_VARIABLE} the same value for both commands"
        )


def _run_folder() -> Path | None:
    """Return the folder of the run that rlmod-train trains; None outside of it."""
    if not HydraConfig.initialized() or HydraConfig.get().job.config_name != "train":
        return None
    return Path(HydraConfig.get().runtime.output_dir).absolute()


def _drain(queue: SimpleQueue[T]) -> Iterator[T]:
    """Yield the items that are in the queue now."""
    with suppress(Empty):
        while True:
            yield queue.get_nowait()
