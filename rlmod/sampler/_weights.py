"""The policy's weights on their way to an engine.

In one process they are handed over as they are. Elsewhere the engine's workers fetch them from the trainer over HTTP: nothing has to be
agreed on beforehand but an address, so a server that was started anew needs no more than the next rollout batch.
"""

import json
import secrets
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

HEADER = 8
"""Bytes of the length of the list of weights, which comes first."""


def named_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as a saved policy has them; an adapter's are added to those that it adapts, which stay as they are."""
    for config in getattr(policy, "peft_config", {}).values():
        for setting in ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices"):
            if getattr(config, setting, None):
                raise ValueError(
                    f"the policy's adapter has {setting}, which no engine can be given yet; use sampler=hf"
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


def computes_in(policy: nn.Module, dtype: str | None = None) -> torch.dtype:
    """Return the dtype an engine computes in: ``dtype``, or that of the policy now, autocast included."""
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


class Publisher:
    """Offers weights to whoever knows the address, which cannot be guessed."""

    def __init__(self, host: str, port: int) -> None:
        self.secret = secrets.token_urlsafe(16)
        self.listed = b""
        self.weights: list[Tensor] = []
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path != f"/{publisher.secret}":
                    self.send_error(404)
                    return
                self.send_response(200)
                self.end_headers()
                publisher.write(self.wfile)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        try:
            self.server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise ValueError(
                f"sampler.weights_host={host} sampler.weights_port={port}: cannot listen there ({error.strerror}); give an address of "
                "this machine that the server can reach, and a port that is free (0: any)"
            ) from error
        self.url = f"http://{host}:{self.server.server_address[1]}/{self.secret}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def offer(self, weights: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        """These weights, as they are now, until the next are offered; in ``dtype``, which is the engine's."""
        named = [(name, weight.to("cpu", dtype).contiguous()) for name, weight in weights]
        what = [{"name": n, "shape": list(w.shape), "dtype": str(w.dtype).removeprefix("torch.")} for n, w in named]
        self.listed, self.weights = json.dumps(what).encode(), [w for _, w in named]

    def write(self, file: Writable) -> None:
        file.write(len(self.listed).to_bytes(HEADER, "big") + self.listed)
        for weight in self.weights:
            file.write(weight.view(-1).view(torch.uint8).numpy())


def fetched(file: Readable) -> Iterator[tuple[str, Tensor]]:
    """Read what ``Publisher.write`` wrote, weight by weight. ConnectionError if it breaks off."""
    listed = _read(file, int.from_bytes(_read(file, HEADER), "big"))
    for weight in json.loads(bytes(listed)):
        dtype, shape = getattr(torch, weight["dtype"]), weight["shape"]
        data = _read(file, torch.Size(shape).numel() * dtype.itemsize)
        yield weight["name"], torch.frombuffer(data, dtype=dtype).view(shape)


def _read(file: Readable, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = file.readinto(view[done:])
        if not got:
            raise ConnectionError(f"the weights broke off after {done:,} of {size:,} bytes")
        done += got
    return data
