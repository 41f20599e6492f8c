"""Sampling with vLLM, in this process."""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
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
from rlmod.sampler._surroundings import check_heads, check_neighbours, not_installed, quiet_environment
from rlmod.sampler._weights import Publisher, computes_in, named_weights
from rlmod.types import Problem, Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class VLLM:
    """G completions a prompt from a vLLM engine in this process, one on every rank, given the policy's weights before each iteration.

    It hands over the log-probability of every sampled token at the sampling temperature (``sampler_logprobs``); pi_old's own and the
    entropy, which vLLM does not report, come from the policy. ``max_difference`` bounds how far the two may be apart.

    Source: vLLM, arXiv:2309.06180.
    Degenerate: with top_p, top_k or greedy no log-probabilities are handed over: vLLM's would be those of the cut distribution.
    """

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
    max_model_len: int | None = None
    """Prompt and completion together, in tokens; null: as the policy's config says. Shorter leaves room for more rows at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: what the policy computes in, which is trainer.precision."""
    gpu_memory_utilization: float = 0.5
    """The engine's share of a GPU: its weights and its key-value cache."""
    tensor_parallel_size: int = 1
    """GPUs that one engine's weights are split over; above 1 with one rank alone."""
    sleep_while_training: bool = False
    """Give the engine's memory back while the policy trains; on a GPU."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that vllm.LLM takes."""

    def __post_init__(self) -> None:
        check_for_vllm(self)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"sampler.gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        for name in ("max_model_len", "tensor_parallel_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"sampler.{name} must be at least 1, got {value}")
        if self.sleep_while_training and not torch.cuda.is_available():
            raise ValueError("sampler.sleep_while_training=true needs a GPU: there is no memory to give back on a CPU")
        if find_spec("vllm") is None:
            raise ValueError(not_installed("sampler=vllm"))

    def prepare(self, problems: list[Problem], tokenizer: object) -> None:
        check_neighbours()

    def sync(self, policy: "PreTrainedModel") -> None:
        """The policy's weights as they are now are what is sampled with from now on. Begins with the engine's start, some half a minute."""
        # Lightning validates in inference mode; weights that were taken over in it could never be written to again.
        with torch.inference_mode(False), torch.no_grad():
            self._hand_over(policy, self._llm(policy))

    def _hand_over(self, policy: "PreTrainedModel", llm: Any) -> None:
        if self.sleep_while_training:
            llm.wake_up()
        weights = named_weights(policy)
        llm.start_weight_update()
        if self.tensor_parallel_size == 1:
            llm.update_weights({"update_info": {"weights": weights}})
        else:  # its workers are processes of their own
            publisher = _publisher()
            publisher.offer(weights, computes_in(policy, self.dtype))
            llm.update_weights({"update_info": {"url": publisher.url}})
        llm.finish_weight_update()
        llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Nothing is sampled for a while."""
        if self.sleep_while_training:
            for llm in _ENGINES.values():
                llm.sleep(level=2)  # the weights come anew with the next sync

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        g, padding = self.completions_per_prompt, cast(int, policy.generation_config.pad_token_id)
        settings = [
            SamplingParams(
                **request(self, seed_of(seed, i * g), ends_of(policy)),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for i in range(len(prompts))
        ]
        names = [str(next(_NAMES)) for _ in settings]
        answers: dict[int, list[Completion]] = {}
        with _by_itself():
            engine = self._llm(policy).llm_engine
            try:
                for name, ids, setting in zip(names, prompts_as_lists(prompts), settings, strict=True):
                    engine.add_request(name, {"prompt_token_ids": ids}, setting)
                while engine.has_unfinished_requests():
                    for answer in engine.step():
                        i = names.index(answer.request_id)
                        answers[i] = [*map(self._completion, as_many(answer.outputs, g))]
                        if on_finished is not None:
                            on_finished(*rows_of(prompts, i, answers[i], padding))
            finally:
                engine.abort_request([name for i, name in enumerate(names) if i not in answers])
        return rollouts_of(prompts, [row for i in range(len(prompts)) for row in answers[i]], padding)

    def _completion(self, row: Any) -> Completion:
        logprobs = None
        if draws_from_the_whole(self):
            logprobs = [at[token].logprob for at, token in zip(row.logprobs, row.token_ids, strict=True)]
        return Completion(tokens=row.token_ids, logprobs=logprobs, ended=row.finish_reason == "stop")

    def _llm(self, policy: "PreTrainedModel") -> Any:
        """The engine, which samplers with the same settings for it share."""
        key = (
            policy.config.to_json_string(),
            self.max_model_len,
            str(computes_in(policy, self.dtype)),
            self.gpu_memory_utilization,
            self.tensor_parallel_size,
            self.sleep_while_training,
            repr(sorted(self.engine.items())),
        )
        if key not in _ENGINES:
            with _by_itself():
                _ENGINES[key] = self._started(policy)
        return _ENGINES[key]

    def _started(self, policy: "PreTrainedModel") -> Any:
        quiet_environment()
        from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]

        from rlmod.sampler._vllm_worker import BACKEND, register

        register()
        check_heads(policy)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks > 1 and self.tensor_parallel_size > 1:
            raise ValueError(
                f"sampler.tensor_parallel_size={self.tensor_parallel_size} with {ranks} ranks: each rank has an engine of its own on its "
                "own GPU; give 1, or sampler=vllm_server, whose server may be split"
            )
        with TemporaryDirectory() as folder, _launched(ranks):
            save_shape(policy, Path(folder))
            return LLM(
                **{
                    "model": folder,
                    "load_format": "dummy",
                    "skip_tokenizer_init": True,
                    "generation_config": "vllm",
                    "dtype": str(computes_in(policy, self.dtype)).removeprefix("torch."),
                    "max_model_len": self.max_model_len,
                    "logprobs_mode": "processed_logprobs",
                    "gpu_memory_utilization": self.gpu_memory_utilization,
                    "tensor_parallel_size": self.tensor_parallel_size,
                    "distributed_executor_backend": "external_launcher" if ranks > 1 else None,
                    "enable_sleep_mode": self.sleep_while_training,
                    "enforce_eager": not torch.cuda.is_available(),
                    "weight_transfer_config": {"backend": BACKEND},
                    **self.engine,
                }
            )


_NAMES = count()
"""Request names: the engine outlives a run that fails."""
_ENGINES: dict[tuple[object, ...], Any] = {}


def save_shape(policy: "PreTrainedModel", folder: Path) -> None:
    """The config of the policy, or of what is under its adapter, as an engine reads it."""
    model = cast(Any, policy).get_base_model() if hasattr(policy, "peft_config") else policy
    model.config.save_pretrained(folder)


@cache
def _publisher() -> Publisher:
    return Publisher("127.0.0.1", 0)


@contextmanager
def _launched(ranks: int) -> Iterator[None]:
    """Set the environment like a launcher: from it, one of several engines takes its place among the ranks."""
    places = (
        {"RANK": dist.get_rank(), "LOCAL_RANK": int(os.environ.get("LOCAL_RANK", 0)), "WORLD_SIZE": ranks}
        if ranks > 1
        else {}
    )
    before = {name: os.environ.get(name) for name in places}
    os.environ.update({name: str(place) for name, place in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _by_itself() -> Iterator[None]:
    """The engine seeds every generator of the process for its own purposes, and computes in its own precision, not in the trainer's."""
    states = random.getstate(), np.random.get_state()
    autocast = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False)
    with torch.random.fork_rng(range(torch.cuda.device_count())), autocast:
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
