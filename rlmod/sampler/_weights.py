"""Transfer of the policy's weights to an engine.

Within one process they are passed by reference. Otherwise the engine's workers fetch them over HTTP, from an address that the trainer has
given them before. Both sides prove that they know a secret, which is not sent: no other process can read the weights or supply them.
"""

import hmac
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

HEADER_LENGTH_BYTES = 8
"""Number of bytes that hold the length of the list of weights; they come first."""


def named_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and weights as in a saved policy. An adapter is merged into copies; the policy itself is not changed."""
    for config in getattr(policy, "peft_config", {}).values():
        for setting in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, setting, None):
                raise ValueError(
                    f"the policy's adapter has {setting}, which cannot be transferred to an engine yet; use sampler=hf"
                )
    merged = {name: layer for name, layer in policy.named_modules() if hasattr(layer, "get_delta_weight")}
    for name, weight in policy.named_parameters():
        if not merged:
            yield name, weight.detach()
        elif "lora_" not in name:
            layer, _, kind = name.rpartition(".base_layer.")
            weight = weight.detach()
            if kind == "weight" and layer in merged:
                adapted = cast(Any, merged[layer])
                weight = weight + sum(adapted.get_delta_weight(adapter) for adapter in adapted.active_adapters)
            yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight


def compute_dtype(policy: nn.Module, dtype: str | None = None) -> torch.dtype:
    """Return the dtype that an engine computes in: ``dtype``, or the policy's current one, autocast included."""
    if dtype is not None:
        return getattr(torch, dtype)
    parameter = next(policy.parameters())
    device = parameter.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else parameter.dtype


@runtime_checkable
class Writable(Protocol):
    def write(self, data: Any, /) -> Any: ...


@runtime_checkable
class Readable(Protocol):
    def readinto(self, buffer: Any, /) -> int | None: ...


NONCE_HEADER, PROOF_HEADER = "X-Nonce", "X-Proof"


class Publisher:
    """Serves weights over HTTP to those who know its secret."""

    def __init__(self, host: str, port: int) -> None:
        self.secret = secrets.token_urlsafe(32)
        self.header = b""
        self.weights: list[Tensor] = []
        self.shapes: dict[str, list[int]] = {}
        """Shape of each weight, by name."""
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                nonce = self.headers.get(NONCE_HEADER, "")
                proof = self.headers.get(PROOF_HEADER, "")
                if not hmac.compare_digest(proof.encode(), _proof(publisher.secret, "read", nonce).encode()):
                    self.send_error(403)
                    return
                self.send_response(200)
                self.send_header(PROOF_HEADER, _proof(publisher.secret, "supply", nonce))
                self.end_headers()
                publisher.write(self.wfile)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self.server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ValueError(
                f"sampler.weights_host={host} sampler.weights_port={port}: cannot listen there ({error.strerror}); set an address of "
                "this machine that the server can reach, and a free port (0: any)"
            ) from error
        self.source = {"host": host, "port": self.server.server_address[1], "secret": self.secret}
        """The arguments of ``fetch_weights``: this address, and the secret that both sides must know."""
        Thread(target=self.server.serve_forever, daemon=True).start()

    def publish(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """Serve a copy of these weights, in the engine's ``dtype``, until the next call."""
        named = [(name, weight.to("cpu", dtype).contiguous()) for name, weight in weights]
        listed = [{"name": n, "shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")} for n, w in named]
        self.header, self.weights = json.dumps(listed).encode(), [w for _, w in named]
        self.shapes = {n: list(w.shape) for n, w in named}

    def write(self, file: Writable) -> None:
        file.write(len(self.header).to_bytes(HEADER_LENGTH_BYTES, "big") + self.header)
        for weight in self.weights:
            file.write(weight.view(-1).view(torch.uint8).numpy())


@contextmanager
def fetch_weights(host: str, port: int, secret: str, *, timeout: float) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Connect to a Publisher and yield its weights. ConnectionError if the two do not know the same secret.

    ``timeout`` is in seconds without a byte. Redirects and proxies are not followed.
    """
    nonce = secrets.token_urlsafe(16)
    connection = HTTPConnection(host, port, timeout=timeout)
    try:
        connection.request("GET", "/", headers={NONCE_HEADER: nonce, PROOF_HEADER: _proof(secret, "read", nonce)})
        response = connection.getresponse()
        if response.status != 200:
            raise ConnectionError(f"{host}:{port} does not hand over the weights: {response.status} {response.reason}")
        proof = response.getheader(PROOF_HEADER, "")
        if not hmac.compare_digest(proof.encode(), _proof(secret, "supply", nonce).encode()):
            raise ConnectionError(
                f"{host}:{port} is not the trainer that this engine belongs to: its weights are refused"
            )
        yield read_weights(response)
    finally:
        connection.close()


def _proof(secret: str, role: str, nonce: str) -> str:
    """Return a proof that the sender knows the secret. The roles keep one side from answering with the other's proof."""
    return hmac.digest(secret.encode(), f"{role} {nonce}".encode(), "sha256").hex()


def read_weights(file: Readable) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that ``Publisher.write`` wrote, one by one. Raise ConnectionError if the data ends early."""
    header = _read(file, int.from_bytes(_read(file, HEADER_LENGTH_BYTES), "big"))
    for weight in json.loads(bytes(header)):
        dtype, shape = getattr(torch, weight["dtype"]), weight["shape"]
        data = _read(file, torch.Size(shape).numel() * dtype.itemsize)
        yield weight["name"], torch.frombuffer(data, dtype=dtype).view(shape)


def _read(file: Readable, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = file.readinto(view[done:])
        if not got:
            raise ConnectionError(f"the transfer of weights ended after {done:,} of {size:,} bytes")
        done += got
    return data
