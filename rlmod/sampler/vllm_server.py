"""Sampling with a vLLM server, on other GPUs or another machine."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from rlmod.interfaces import OnFinished
from rlmod.sampler._sampling import (
    Completion,
    as_many,
    check_for_vllm,
    draws_from_the_whole,
    ends_of,
    prompts_as_lists,
    request,
    rollouts_of,
    rows_of,
    seed_of,
)
from rlmod.sampler._server import NoSignOfLife, Server
from rlmod.sampler._weights import Publisher, computes_in, named_weights
from rlmod.types import Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VERSIONS: dict[str, str] = {}
"""Version of the weights that each server was last given, by its address."""
FRESH = "default"
"""vLLM's version of the weights that a server was started with."""


@dataclass(frozen=True, kw_only=True)
class VLLMServer:
    """G completions a prompt from a vLLM server, which is given the policy's weights before each iteration.

    ``rlmod-serve`` starts it. It fetches the weights from the trainer's first rank, over vLLM's interface for their transfer; one that was
    started anew is given them again. ``max_difference`` and the rest as with ``sampler=vllm``.

    Source: vLLM, arXiv:2309.06180.
    Degenerate: with top_p, top_k or greedy no log-probabilities are handed over: vLLM's would be those of the cut distribution.
    """

    url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    completions_per_prompt: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: the whole vocabulary."""
    max_new_tokens: int = 1024
    greedy: bool = False
    """Take the most likely token instead of sampling; for evaluation."""
    max_difference: float = 0.1
    """Nats: the run stops where the mean of |log pi_old - sampler_logprobs| over a rollout batch's tokens is larger."""
    weights_host: str = "127.0.0.1"
    """This machine's address, as the server sees it: weights are fetched from there."""
    weights_port: int = 0
    """0: any that is free."""
    patience: float = 30.0
    """Seconds without a sign of life, after which the server counts as dead."""
    timeout: float = 1800.0
    """Seconds that one answer may take, all completions of a prompt, while the server says that it is well."""
    requests: int = 64
    """Prompts that are under way at once, on each rank."""

    def __post_init__(self) -> None:
        check_for_vllm(self)
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
        """The server's: prompt and completion together, in tokens."""
        return self._server.get("v1/models")["data"][0].get("max_model_len")

    def prepare(self, problems: Sequence[object], tokenizer: object) -> None:
        """A server that is not there shows before weights are loaded."""
        self._server.wait_until_awake()
        self._server.get("weight_info")

    def sync(self, policy: "PreTrainedModel") -> None:
        """The policy's weights as they are now are what is sampled with from now on, by all ranks."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            self._server.wait_until_awake()
            self._send(policy)
        if dist.is_initialized():
            dist.barrier()
        _VERSIONS[self.url] = self._server.get("weight_info")["weight_version"]

    def sleep(self) -> None:
        """The server has its own memory."""

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        ends, padding = ends_of(policy), cast(int, policy.generation_config.pad_token_id)
        asked = {
            i: {
                "prompt": ids,
                **request(self, seed_of(seed, i * self.completions_per_prompt), ends),
                "return_token_ids": True,
            }
            for i, ids in enumerate(prompts_as_lists(prompts))
        }
        answers: dict[int, list[Completion]] = {}

        def sampled() -> None:
            self._send_if_forgotten(policy)
            for i, answer in self._server.answers(
                "v1/completions", {i: asked[i] for i in asked.keys() - answers.keys()}
            ):
                answers[i] = self._completions(answer)
                if on_finished is not None:
                    on_finished(*rows_of(prompts, i, answers[i], padding))
            if self._check_undisturbed() == FRESH:
                raise ValueError(
                    f"sampler.url={self.url}: the server was started anew while it was sampled from, and some completions may be of other "
                    "weights; the same command with output=FOLDER resumes from the last checkpoint"
                )

        try:
            sampled()
        except NoSignOfLife:
            raise
        except OSError:
            self._server.wait_until_awake()  # the server comes back within its patience, or this raises
            sampled()
        return rollouts_of(prompts, [row for i in asked for row in answers[i]], padding)

    def _completions(self, answer: Mapping[str, Any]) -> list[Completion]:
        rows = sorted(answer["choices"], key=lambda row: row["index"])
        return [
            Completion(
                tokens=row["token_ids"],
                logprobs=row["logprobs"]["token_logprobs"] if draws_from_the_whole(self) else None,
                ended=row["finish_reason"] == "stop",
            )
            for row in as_many(rows, self.completions_per_prompt)
        ]

    def _send(self, policy: "PreTrainedModel") -> None:
        publisher = _publisher(self.weights_host, self.weights_port)
        publisher.offer(named_weights(policy), computes_in(policy))
        try:
            self._tell("start_weight_update")
        except NoSignOfLife:
            raise
        except ConnectionError:  # a trainer before this one died in the midst of it
            self._tell("finish_weight_update")
            self._tell("start_weight_update")
        self._tell("update_weights", {"update_info": {"url": publisher.url}})
        _VERSIONS[self.url] = secrets.token_hex(8)
        self._tell("finish_weight_update", {"weight_version": _VERSIONS[self.url]})
        self._tell("reset_prefix_cache")

    def _tell(self, what: str, body: Mapping[str, Any] | None = None) -> None:
        for _ in self._server.answers(what, {0: body}):
            pass

    def _send_if_forgotten(self, policy: "PreTrainedModel") -> None:
        """A server that was started anew would sample from weights that nobody knows."""
        if self._check_undisturbed() == _VERSIONS.get(self.url):
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise ConnectionError(
                f"sampler.url={self.url}: the connection broke off within a rollout batch; the same command with output=FOLDER goes on "
                "from the last checkpoint"
            )
        self._send(policy)

    def _check_undisturbed(self) -> str:
        """The version of the server's weights. ValueError where they are another run's."""
        version: str = self._server.get("weight_info")["weight_version"]
        if version not in (FRESH, _VERSIONS.get(self.url)):
            raise ValueError(
                f"sampler.url={self.url}: another run has given this server its weights while this one sampled; start one for each "
                "run, with another sampler.url"
            )
        return version


@cache
def _publisher(host: str, port: int) -> Publisher:
    return Publisher(host, port)
