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
from rlmod.model.policy import tokenizer_of
from rlmod.sampler._sampling import Answers, Completion, VLLMSamplingParameters
from rlmod.sampler._vllm_environment import (
    check_head_size,
    check_torch_extensions,
    explain_missing_vllm,
    set_environment_defaults,
)
from rlmod.sampler._weights import Publisher, compute_dtype, named_weights
from rlmod.types import Problem, Prompts, Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class VLLM(VLLMSamplingParameters):
    """G completions per prompt from a vLLM engine in this process, one per rank, which gets the policy's weights before each iteration.

    It returns the log-probability of every sampled token at the sampling temperature (``sampler_logprobs``). The log-probabilities of
    pi_old, and the entropy, which vLLM does not report, are computed with the policy. ``max_difference`` bounds their difference.

    Source: vLLM, arXiv:2309.06180.
    Degenerate: with top_p, top_k or greedy no log-probabilities are returned: vLLM's would be those of the truncated distribution.
    """

    max_model_len: int | None = None
    """Maximum length of prompt and completion together, in tokens; null: from the policy's config. A lower limit fits more rows at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """null: the dtype that the policy computes in (trainer.precision)."""
    gpu_memory_utilization: float = 0.5
    """The engine's share of a GPU's memory, for its weights and its key-value cache."""
    tensor_parallel_size: int = 1
    """Number of GPUs that one engine's weights are split over; above 1 only with a single rank."""
    sleep_while_training: bool = False
    """Release the engine's memory while the policy trains; GPU only."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vllm.LLM."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"sampler.gpu_memory_utilization must be above 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        for name in ("max_model_len", "tensor_parallel_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"sampler.{name} must be at least 1, got {value}")
        if self.sleep_while_training and not torch.cuda.is_available():
            raise ValueError("sampler.sleep_while_training=true needs a GPU: on a CPU there is no memory to release")
        if find_spec("vllm") is None:
            raise ValueError(explain_missing_vllm("sampler=vllm"))

    def prepare(self, problems: list[Problem], tokenizer: object) -> None:
        check_torch_extensions()

    def sync(self, policy: "PreTrainedModel") -> None:
        """Load the policy's current weights into the engine. The first call starts the engine, which takes about half a minute."""
        # Lightning validates in inference mode; weights that were loaded in it could never be written to again.
        with torch.inference_mode(False), torch.no_grad():
            self._load_weights(policy, self._engine(policy))

    def _load_weights(self, policy: "PreTrainedModel", llm: Any) -> None:
        if self.sleep_while_training:
            llm.wake_up()
        weights = named_weights(policy)
        llm.start_weight_update()
        if self.tensor_parallel_size == 1:
            llm.update_weights({"update_info": {"weights": weights}})
        else:  # the engine's workers are separate processes
            publisher = _publisher()
            publisher.publish(weights, compute_dtype(policy, self.dtype))
            llm.init_weight_transfer_engine({"init_info": publisher.source})
            llm.update_weights({"update_info": {}})
        llm.finish_weight_update()
        llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Release the engines' memory until the next sync, if ``sleep_while_training`` is set."""
        if self.sleep_while_training:
            for llm in _ENGINES.values():
                llm.sleep(level=2)  # discards the weights: the next sync loads them again

    @torch.no_grad()
    def __call__(
        self, policy: "PreTrainedModel", prompts: Prompts, seed: int, on_finished: OnFinished | None = None
    ) -> Rollouts:
        from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        requests = self.build_requests(policy, prompts, seed)
        names = [str(next(_NAMES)) for _ in requests]
        answers = Answers(policy, prompts, self.completions_per_prompt, on_finished)
        with isolated_from_trainer():
            engine = self._engine(policy).llm_engine
            try:
                for name, (ids, parameters) in zip(names, requests, strict=True):
                    settings = SamplingParams(
                        **parameters, detokenize=bool(self.stop), output_kind=RequestOutputKind.FINAL_ONLY
                    )
                    engine.add_request(name, {"prompt_token_ids": ids}, settings)
                while engine.has_unfinished_requests():
                    for answer in engine.step():
                        answers.add(names.index(answer.request_id), [*map(self._completion, answer.outputs)])
            finally:
                engine.abort_request([names[i] for i in answers.missing])
        return answers.rollouts()

    def _completion(self, row: Any) -> Completion:
        logprobs = None
        if self.samples_full_distribution:
            logprobs = [at[token].logprob for at, token in zip(row.logprobs, row.token_ids, strict=True)]
        return Completion(tokens=row.token_ids, logprobs=logprobs, ended=row.finish_reason == "stop")

    def _engine(self, policy: "PreTrainedModel") -> Any:
        """Return the engine. Samplers with the same engine settings share it."""
        key = (
            policy.config.to_json_string(),
            self.max_model_len,
            str(compute_dtype(policy, self.dtype)),
            self.gpu_memory_utilization,
            self.tensor_parallel_size,
            self.sleep_while_training,
            bool(self.stop),
            repr(sorted(self.engine.items())),
        )
        if key not in _ENGINES:
            with isolated_from_trainer():
                _ENGINES[key] = self._start_engine(policy)
        return _ENGINES[key]

    def _start_engine(self, policy: "PreTrainedModel") -> Any:
        set_environment_defaults()
        from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]

        from rlmod.sampler._vllm_worker import BACKEND, register

        register()
        check_head_size(policy)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks > 1 and self.tensor_parallel_size > 1:
            raise ValueError(
                f"sampler.tensor_parallel_size={self.tensor_parallel_size} with {ranks} ranks: each rank has its own engine on its own "
                "GPU; set it to 1, or use sampler=vllm_server, whose server may use several GPUs"
            )
        with TemporaryDirectory() as folder, launcher_environment(ranks):
            save_model_config(policy, Path(folder))
            if self.stop:  # the engine looks for them in the text
                tokenizer_of(policy).save_pretrained(folder)
            return LLM(
                **{
                    "model": folder,
                    "load_format": "dummy",
                    "skip_tokenizer_init": not self.stop,
                    "generation_config": "vllm",
                    "dtype": str(compute_dtype(policy, self.dtype)).removeprefix("torch."),
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
"""Unique request names, because an engine may still hold requests of a run that failed."""
_ENGINES: dict[tuple[object, ...], Any] = {}


def save_model_config(policy: "PreTrainedModel", folder: Path) -> None:
    """Save the config of the policy, or of the base model under its adapter, for an engine to read."""
    model = cast(Any, policy).get_base_model() if hasattr(policy, "peft_config") else policy
    model.config.save_pretrained(folder)


@cache
def _publisher() -> Publisher:
    return Publisher("127.0.0.1", 0)


@contextmanager
def launcher_environment(ranks: int) -> Iterator[None]:
    """Set the environment variables of a launcher, from which each of several engines reads its rank."""
    variables = (
        {"RANK": dist.get_rank(), "LOCAL_RANK": int(os.environ.get("LOCAL_RANK", 0)), "WORLD_SIZE": ranks}
        if ranks > 1
        else {}
    )
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def isolated_from_trainer() -> Iterator[None]:
    """Restore the random states afterwards, which the engine reseeds, and disable autocast, since the engine has its own precision."""
    states = random.getstate(), np.random.get_state()
    autocast = torch.autocast("cuda" if torch.cuda.is_available() else "cpu", enabled=False)
    with torch.random.fork_rng(range(torch.cuda.device_count())), autocast:
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
