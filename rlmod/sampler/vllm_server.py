"""Sampling with a vLLM server, on other GPUs or another machine."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rlmod.interfaces import OnFinished
from rlmod.sampler._sampling import Answers, Completion, VLLMSamplingParameters
from rlmod.sampler._server import Server, ServerTimeout
from rlmod.sampler._weights import Publisher, compute_dtype, named_weights
from rlmod.types import Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERSIONS: dict[str, str] = {}
"""Version of the weights last sent to each server, by its URL."""
INITIAL_VERSION = "default"
"""vLLM's name for the version of the weights that a server starts with."""


@dataclass(frozen=True, kw_only=True)
class VLLMServer(VLLMSamplingParameters):
    """G completions per prompt from a vLLM server, which gets the policy's weights before each iteration.

    ``rlmod-serve`` starts the server. It fetches the weights from the trainer's first rank, through vLLM's weight-transfer interface; a
    restarted server gets them again. ``max_difference`` and the other fields mean the same as in ``sampler=vllm``.

    Source: vLLM, arXiv:2309.06180.
    Degenerate: with top_p, top_k or greedy no log-probabilities are returned: vLLM's would be those of the truncated distribution.
    """

    url: str = "http://127.0.0.1:8000"
    """URL of the server."""
    weights_host: str = "127.0.0.1"
    """This machine's address as seen from the server, which fetches the weights from there."""
    weights_port: int = 0
    """0: any free port."""
    patience: float = 30.0
    """Seconds without a successful health check, after which the server counts as dead."""
    timeout: float = 1800.0
    """Seconds that one request (all completions of a prompt) may take while the server passes its health checks."""
    requests: int = 64
    """Maximum number of concurrent requests (prompts) per rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"sampler.url must be like http://127.0.0.1:8000, got {self.url!r}")
        if self.patience <= 0:
            raise ValueError(f"sampler.patience must be above 0 seconds, got {self.patience}")
        if self.timeout <= 0:
            raise ValueError(f"sampler.timeout must be above 0 seconds, got {self.timeout}")
        if self.requests < 1:
            raise ValueError(f"sampler.requests must be at least 1, got {self.requests}")
        if not 0 <= self.weights_port < 2**16:
            raise ValueError(f"sampler.weights_port must be from 0 to {2**16 - 1}, got {self.weights_port}")

    @property
    def _server(self) -> Server:
        return Server(url=self.url, patience=self.patience, timeout=self.timeout, requests=self.requests)

    @property
    def max_model_len(self) -> int | None:
        """The server's maximum length of prompt and completion together, in tokens."""
        return self._server.get("v1/models")["data"][0].get("max_model_len")

    def prepare(self, problems: Sequence[object], tokenizer: object) -> None:
        """Check that the server is up and can receive weights, before the policy is loaded."""
        self._server.wait_until_awake()
        self._server.get("weight_info")

    def sync(self, policy: "PreTrainedModel") -> None:
        """Send the policy's current weights to the server. All ranks sample with them afterwards."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._server.wait_until_awake()
            self._send_weights(policy)
        if dist.is_initialized():
            dist.barrier()
        _VERSIONS[self.url] = self._server.get("weight_info")["weight_version"]

    def sleep(self) -> None:
        """Do nothing: the server has its own memory."""

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        requests = self.build_requests(policy, prompts, seed)
        answers = Answers(policy, prompts, self.completions_per_prompt, on_finished)

        def sample_missing() -> None:
            self._resend_weights_after_restart(policy)
            bodies = {
                i: {"prompt": requests[i][0], **requests[i][1], "return_token_ids": True} for i in answers.missing
            }
            for i, answer in self._server.post_all("v1/completions", bodies):
                answers.add(i, self._completions(answer))
            if self._check_weight_version() == INITIAL_VERSION:
                raise ValueError(
                    f"sampler.url={self.url}: the server was restarted during sampling, so some completions may come from other weights; "
                    "repeat the command with output=FOLDER to resume from the last checkpoint"
                )

        try:
            sample_missing()
        except ServerTimeout:
            raise
        except OSError:
            self._server.wait_until_awake()  # raises if the server does not come back within ``patience``
            sample_missing()
        return answers.rollouts()

    def _completions(self, answer: Mapping[str, Any]) -> list[Completion]:
        rows = sorted(answer["choices"], key=lambda row: row["index"])
        return [
            Completion(
                tokens=row["token_ids"],
                logprobs=row["logprobs"]["token_logprobs"] if self.samples_full_distribution else None,
                ended=row["finish_reason"] == "stop",
            )
            for row in rows
        ]

    def _send_weights(self, policy: "PreTrainedModel") -> None:
        publisher = _publisher(self.weights_host, self.weights_port)
        publisher.publish(named_weights(policy), compute_dtype(policy))
        try:
            self._call("start_weight_update")
        except ServerTimeout:
            raise
        except ConnectionError:  # an earlier trainer died during its update
            self._call("finish_weight_update")
            self._call("start_weight_update")
        self._call("update_weights", {"update_info": {"url": publisher.url}})
        _VERSIONS[self.url] = secrets.token_hex(8)
        self._call("finish_weight_update", {"weight_version": _VERSIONS[self.url]})
        self._call("reset_prefix_cache")

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        for _ in self._server.post_all(path, {0: body}):
            pass

    def _resend_weights_after_restart(self, policy: "PreTrainedModel") -> None:
        """Send the weights again if the server was restarted: it would sample with its initial weights."""
        if self._check_weight_version() == _VERSIONS.get(self.url):
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConnectionError(
                f"sampler.url={self.url}: the connection was lost within a rollout batch; repeat the command with output=FOLDER to resume "
                "from the last checkpoint"
            )
        self._send_weights(policy)

    def _check_weight_version(self) -> str:
        """Return the version of the server's weights. Raise ValueError if they belong to another run."""
        version: str = self._server.get("weight_info")["weight_version"]
        if version not in (INITIAL_VERSION, _VERSIONS.get(self.url)):
            raise ValueError(
                f"sampler.url={self.url}: another run has sent its weights to this server while this run was sampling; start one server "
                "per run, each with its own sampler.url"
            )
        return version


@cache
def _publisher(host: str, port: int) -> Publisher:
    return Publisher(host, port)
