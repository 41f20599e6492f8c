"""The part that both sides of the comparison with TRL share: the completions' lengths, the rewards, and steps taken on request.

Nothing of rlmod is imported here: TRL's side runs in an environment of its own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

G = 8
LONGEST = 256


@dataclass(frozen=True, kw_only=True)
class Workload:
    name: str
    lengths: tuple[int, ...]
    """Length of each row's completion, EOS included; the rows of a prompt are consecutive."""
    rewards: tuple[float, ...]
    micro_batch: int
    """Rows of a forward and backward pass."""

    @classmethod
    def of(cls, name: str, prompts: int, micro_batch: int, longest: int = LONGEST) -> "Workload":
        """``ragged``: lengths 8 to 256 in a random order, every other group without signal; ``even``: as many tokens, all groups with."""
        rows = prompts * G
        ragged = name == "ragged"
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        spread = torch.linspace(8, longest, rows).round().int()[order]
        lengths = spread if ragged else torch.full_like(spread, round(float(spread.float().mean())))
        rewards = [0.0 if ragged and row // G % 2 == 0 else float(row % 2) for row in range(rows)]
        return cls(name=name, lengths=tuple(lengths.tolist()), rewards=tuple(rewards), micro_batch=micro_batch)

    @property
    def prompts(self) -> int:
        return len(self.lengths) // G


class Lengths(LogitsProcessor):
    """A row's EOS is certain at its prescribed length, and impossible before.

    ``generate`` may be interrupted and resume with the rows that have not ended, in their order, as rlmod's sampler does.
    """

    def __init__(self, lengths: tuple[int, ...], eos: int) -> None:
        self.lengths, self.eos = torch.tensor(lengths), eos
        self.start()

    def start(self) -> None:
        self.rows, self.prompt = self.lengths, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.prompt = self.prompt or input_ids.shape[1]
        done = input_ids.shape[1] - self.prompt
        if len(input_ids) < len(self.rows):
            self.rows = self.rows[self.rows > done]
        assert len(input_ids) == len(self.rows)
        scores = scores.clone()  # the sampler keeps the others: they are the policy's
        scores[:, self.eos] = -torch.inf
        ends = (self.rows == done + 1).nonzero()[:, 0]
        scores[ends] = -torch.inf
        scores[ends, self.eos] = 0.0
        return scores


def prescribe(policy: Any, lengths: Lengths) -> None:
    """From here on the policy's completions have these lengths."""
    generate = policy.generate

    def prescribed(*arguments: Any, logits_processor: Any = (), **settings: Any) -> Any:
        processors = LogitsProcessorList([*logits_processor, lengths])
        return generate(*arguments, logits_processor=processors, **settings)

    policy.generate = prescribed


class Steps:
    """One step of training for every line on stdin; its CPU seconds, by stage, on stdout."""

    def __init__(self, workload: Workload) -> None:
        # Whatever else prints, prints to stderr.
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.workload = workload
        self.stages: dict[str, float] = {}
        self.tokens = 0
        self.started = 0.0

    def policy(self, folder: str) -> Any:
        """The policy, whose completions have the prescribed lengths."""
        torch.set_num_threads(1)
        torch.manual_seed(0)
        policy: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        eos = policy.generation_config.eos_token_id
        self.lengths = Lengths(self.workload.lengths, eos[0] if isinstance(eos, list) else eos)
        policy.generate = self.timed("generate", policy.generate)
        prescribe(policy, self.lengths)
        return policy

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any, **settings: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **settings)
            self.stages[stage] = self.stages.get(stage, 0.0) + time.process_time() - started
            return result

        return measured

    def reward(self, completion_tokens: int) -> list[float]:
        self.tokens += completion_tokens
        return list(self.workload.rewards)

    def ready(self) -> None:
        self._say({})
        self._wait()

    def taken(self) -> None:
        """A step has ended; the next begins when it is asked for."""
        whole = time.process_time() - self.started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._say({"whole": whole, "tokens": self.tokens, "peak": peak, **self.stages})
        self._wait()

    def _say(self, answer: dict[str, float]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # nobody asks any more; neither side's trainer need finish
        self.stages, self.tokens = {}, 0
        self.lengths.start()
        self.started = time.process_time()
