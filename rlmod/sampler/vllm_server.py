"""Sampling with a vLLM server, on other GPUs or another machine."""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rlmod import distributed
from rlmod.interfaces import OnFinished
from rlmod.sampler._sampling import Answers, Completion, VLLMSamplingParameters
from rlmod.sampler._server import Server, ServerTimeout
from rlmod.sampler._weights import Publisher, compute_dtype, named_weights
from rlmod.types import Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VLLMServer(VLLMSamplingParameters):
    """G completions per prompt from a vLLM server, which gets the policy's weights before each iteration.

    ``rlmod-serve`` starts the server. One run at a time uses it. It fetches the weights from the trainer's first rank, through vLLM's
    weight-transfer interface; a restarted server gets them again. ``max_difference`` and the other fields mean the same as in
    ``sampler=vllm``.

    Source: vLLM, arXiv:2309.06180.
    Degenerate: with top_p, top_k or greedy no log-probabilities are returned: vLLM's would be those of the truncated distribution.
    """

    url: str = "http://127.0.0.1:8000"
    """URL of the server."""
    api_key_file: str | None = None
    """File with the server's API key: ``api_key`` in the output folder of rlmod-serve. null: the environment variable RLMOD_API_KEY."""
    weights_host: str = "127.0.0.1"
    """This machine's address as seen from the server, which fetches the weights from there."""
    weights_port: int = 0
    """0: any free port."""
    startup_patience: float = 600.0
    """Seconds to wait for a server that is starting: it has never answered, or nothing listens at its port."""
    patience: float = 30.0
    """Seconds without a successful health check, after which a server that has answered before counts as dead."""
    timeout: float = 1800.0
    """Seconds that one request (all completions of a prompt) may take while the server passes its health checks."""
    requests: int = 64
    """Maximum number of concurrent requests (prompts) per rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"sampler.url must be like http://127.0.0.1:8000, got {self.url!r}")
        for name in ("startup_patience", "patience", "timeout"):
            if not 0 < (seconds := getattr(self, name)) < float("inf"):
                raise ValueError(f"sampler.{name} must be above 0 seconds and finite, got {seconds}")
        if self.requests < 1:
            raise ValueError(f"sampler.requests must be at least 1, got {self.requests}")
        if not 0 <= self.weights_port < 2**16:
            raise ValueError(f"sampler.weights_port must be from 0 to {2**16 - 1}, got {self.weights_port}")

    @property
    def _server(self) -> Server:
        return Server(
            url=self.url.rstrip("/"),
            api_key_file=self.api_key_file,
            startup_patience=self.startup_patience,
            patience=self.patience,
            timeout=self.timeout,
            requests=self.requests,
        )

    @property
    def max_model_len(self) -> int | None:
        """The server's maximum length of prompt and completion together, in tokens."""
        return self._server.get("v1/models")["data"][0].get("max_model_len")

    def prepare(self, problems: Sequence[object], tokenizer: object) -> None:
        """Wait until the server is up, and take its lease, before the policy is loaded. ValueError if another run uses it."""
        self._server.wait_until_awake()
        if distributed.is_rank_zero():
            self._server.take_lease()

    def sync(self, policy: "PreTrainedModel") -> None:
        """Send the policy's current weights to the server. All ranks sample with them afterwards."""
        server = self._server
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self._send_weights_patiently(policy)
            return
        dist.barrier()  # no rank samples any more
        if dist.get_rank() == 0:
            self._send_weights_patiently(policy)
        access = [(server.known.session, server.known.version)]
        dist.broadcast_object_list(access)
        server.known.session, server.known.version = access[0]

    def sleep(self) -> None:
        """Do nothing: the server has its own memory."""

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        requests = self.build_requests(policy, prompts, seed)
        answers = Answers(policy, prompts, self.completions_per_prompt, on_finished)

        def sample_missing() -> None:
            bodies = {
                i: {"prompt": requests[i][0], **requests[i][1], "return_token_ids": True} for i in answers.missing
            }
            for i, answer in self._server.post_all("v1/completions", bodies):
                answers.add(i, self._completions(answer))

        missing_before = None
        while answers.missing:
            try:
                sample_missing()
            except ServerTimeout:
                raise
            except ConnectionError as error:
                if len(answers.missing) == missing_before:
                    raise  # nothing was completed since the last time
                missing_before = len(answers.missing)
                self._recover(policy, error)
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

    def _send_weights_patiently(self, policy: "PreTrainedModel") -> None:
        """Send the weights, and once more if the server is lost in the meantime."""
        try:
            self._send_weights(policy)
        except ServerTimeout:
            raise
        except ConnectionError as error:
            log.warning("%s; sending the weights again when the server is back", error)
            self._send_weights(policy)

    def _send_weights(self, policy: "PreTrainedModel") -> None:
        """Take the lease, check that the weights fit the server's, and let it fetch them. Requests in flight are aborted."""
        server = self._server
        server.wait_until_awake()
        server.take_lease()
        publisher = _publisher(self.weights_host, self.weights_port)
        publisher.publish(named_weights(policy), compute_dtype(policy))
        self._call("rlmod/check_weights", {"shapes": publisher.shapes})
        self._call("init_weight_transfer_engine", {"init_info": publisher.source})
        self._call("pause?mode=abort")  # the engine fails if it computes while its weights change
        try:
            self._call("start_weight_update")
        except ServerTimeout:
            raise
        except ConnectionError:  # an earlier trainer died during its update
            self._call("finish_weight_update")
            self._call("start_weight_update")
        self._call("update_weights", {"update_info": {}})
        server.known.version = secrets.token_hex(8)
        self._call("finish_weight_update", {"weight_version": server.known.version})
        self._call("reset_prefix_cache")
        self._call("resume")

    def _call(self, path: str, body: Mapping[str, Any] | None = None) -> None:
        for _ in self._server.post_all(path, {0: body}):
            pass

    def _recover(self, policy: "PreTrainedModel", error: ConnectionError) -> None:
        """Wait until a server that was lost is back, and send it the weights again if it was restarted."""
        log.warning("%s; going on with the missing completions when the server is back", error)
        self._server.wait_until_awake()  # raises if the server does not come back in time
        if self._server.get("weight_info")["weight_version"] == self._server.known.version:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConnectionError(
                f"sampler.url={self.url}: the server was restarted within a rollout batch; repeat the command with output=FOLDER to resume "
                "from the last checkpoint"
            )
        self._send_weights_patiently(policy)


@cache
def _publisher(host: str, port: int) -> Publisher:
    return Publisher(host, port)
