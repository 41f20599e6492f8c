"""An ASGI middleware for a vLLM server: a key on all routes, a lease so that one run uses the server, and the version of its weights.

``rlmod-serve`` passes it to vLLM, whose own ``--api-key`` does not protect the routes that change weights.
"""

import hashlib
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

KEY_VARIABLE = "RLMOD_API_KEY"
WEIGHTS_VARIABLE = "RLMOD_SERVER_WEIGHTS"
"""Environment variable with the path of a JSON file: the shape of each of the server's weights, by name."""
SESSION_HEADER, VERSION_HEADER = "x-rlmod-session", "x-rlmod-version"
LEASE_SECONDS = 60.0
"""Seconds after the last sign of life of its holder, after which a lease ends."""
WRONG_KEY, HELD, LOST = 401, 409, 412
"""Status codes: the key is wrong; another run holds the lease; the server holds no lease of this run, or not its current weights."""


class Refusal(Exception):
    """A request that is answered with an error. ``status`` is its HTTP status code."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Lease:
    """The process that uses the server, until it stops renewing the lease."""

    run: str
    """A secret of the run: with it, the run takes over the lease of its earlier process when it resumes."""
    session: str
    """A secret of the process and its ranks, sent with each request."""
    holder: str
    renewed: float

    @property
    def age(self) -> float:
        """Seconds since the last sign of life."""
        return time.monotonic() - self.renewed


class ServerAccess:
    """Answers requests without the key with 401. Passes a POST on only from the holder of the lease, and only with current weights."""

    def __init__(self, app: App) -> None:
        self.app = app
        if not (key := os.environ.get(KEY_VARIABLE)):
            raise ValueError(f"{KEY_VARIABLE} is not set: start the server with rlmod-serve")
        self.key = _digest(key)
        self.shapes: dict[str, list[int]] = json.loads(Path(os.environ[WEIGHTS_VARIABLE]).read_text(encoding="utf-8"))
        self.lease: Lease | None = None
        self.version: str | None = None
        """Version of the weights that the server holds; None before the first update and during one."""

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_key(headers)
            if scope["type"] == "websocket":
                raise Refusal(403, "websockets are not available on this server")
            if scope["method"] not in ("GET", "HEAD"):
                await self._handle_post(scope["path"], headers, scope, receive, send)
                return
        except Refusal as refusal:
            await _refuse(scope, send, refusal)
            return
        await self.app(scope, receive, send)

    def _check_key(self, headers: Mapping[str, str]) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key), self.key):
            raise Refusal(WRONG_KEY, "the API key is missing or wrong")

    async def _handle_post(
        self, path: str, headers: Mapping[str, str], scope: Message, receive: Receive, send: Send
    ) -> None:
        session, version = headers.get(SESSION_HEADER, ""), headers.get(VERSION_HEADER)
        if path == "/rlmod/lease":
            await _answer(send, 200, self._take_lease(await _read_json(receive)))
            return
        self._check_session(session)
        if path == "/rlmod/release":
            self.lease = None
            await _answer(send, 200, {})
        elif path == "/rlmod/check_weights":
            self._check_shapes((await _read_json(receive))["shapes"])
            await _answer(send, 200, {})
        elif path in ("/start_weight_update", "/update_weights"):
            self.version = None  # until the update is complete: it may fail, and leave weights of two policies
            await self.app(scope, receive, send)
        elif path == "/finish_weight_update":
            await self.app(scope, receive, self._after_success(send, version))
        elif path.startswith("/v1/"):
            await self._complete(version, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _take_lease(self, request: Mapping[str, str]) -> dict[str, float]:
        lease, run, session = self.lease, request["run"], request["session"]
        if lease is not None and lease.age < LEASE_SECONDS and run != lease.run and session != lease.session:
            raise Refusal(
                HELD,
                f"it is in use by {lease.holder}, which was last heard of {lease.age:.0f} s ago; wait until that run has ended (a run that "
                f"was killed loses the server after {LEASE_SECONDS:.0f} s), or start a server of your own under another sampler.url",
            )
        self.lease = Lease(run=run, session=session, holder=request["holder"], renewed=time.monotonic())
        return {"seconds": LEASE_SECONDS}

    def _check_session(self, session: str) -> None:
        if self.lease is None:
            raise Refusal(LOST, "nobody holds a lease of this server (was it restarted?)")
        if not hmac.compare_digest(session.encode(), self.lease.session.encode()):
            raise Refusal(HELD, f"it is in use by {self.lease.holder}")
        self.lease.renewed = time.monotonic()

    def _check_shapes(self, shapes: Mapping[str, list[int]]) -> None:
        differing = [name for name in (*self.shapes, *shapes) if self.shapes.get(name) != shapes.get(name)]
        if differing:
            name = differing[0]
            ours, theirs = (_describe(side.get(name)) for side in (self.shapes, shapes))
            raise Refusal(
                400,
                f"the server has another policy: {len(set(differing))} weights differ, such as {name} ({ours} on the server, {theirs} in "
                "this run). Nothing was changed; start a server with the policy of this run: rlmod-serve policy=... sampler.url=...",
            )

    def _after_success(self, send: Send, version: str | None) -> Send:
        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                self.version = version
            await send(message)

        return forward

    async def _complete(self, version: str | None, scope: Message, receive: Receive, send: Send) -> None:
        """Pass on a request for completions. Refuse it, or its answer, if the server does not hold this version of the weights."""
        refusal: Refusal | None = None

        def check_version() -> None:
            if version is None or self.version != version:
                raise Refusal(LOST, "it does not hold this run's current weights (was it restarted?)")

        async def forward(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start":
                try:
                    check_version()
                except Refusal as error:
                    refusal = error
                    await _refuse(scope, send, error)
            if refusal is None:
                await send(message)

        check_version()
        await self.app(scope, receive, forward)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def _describe(shape: list[int] | None) -> str:
    return "missing" if shape is None else str(shape)


async def _read_json(receive: Receive) -> dict[str, Any]:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    try:
        return json.loads(body)
    except ValueError:
        raise Refusal(400, "the body is not JSON") from None


async def _refuse(scope: Message, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
    else:
        await _answer(send, refusal.status, {"error": str(refusal)})


async def _answer(send: Send, status: int, body: Mapping[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
