"""Sizes of one iteration, and the settings of validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlmod.interfaces import Reward, Sampler, component_name
from rlmod.reward._final_answers import find_answer_reader


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The sizes of one iteration."""

    prompts: int = 32
    """Prompts (groups) per rollout batch, over all ranks."""
    minibatches: int = 1
    """Optimizer steps that one pass over the rollout batch is split into."""
    epochs: int = 1
    """Passes over the rollout batch."""
    micro_batch: int = 64
    """Completions per forward and backward pass on one rank. It affects memory only, not the result."""
    micro_batch_tokens: int | None = None
    """Tokens per forward and backward pass, padding included, as a second limit; a longer completion goes alone. null: no limit."""
    logprob_pass: Literal["needed", "always"] = "needed"
    """Condition for computing pi_old's log-probabilities and entropies before training. ``needed``: only if a component reads them.
    ``always``: in every iteration, so that ``completions/entropy`` is logged. If the sampler fills both, no pass is needed."""

    def __post_init__(self) -> None:
        for name in ("prompts", "minibatches", "epochs", "micro_batch", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"batch.{name} must be at least 1, got {value}")

    def micro_batches(self, completions_per_prompt: int, ranks: int = 1, extra_rows: int = 0) -> int:
        """Return the maximum number of micro-batches of one optimizer step on one rank.

        ValueError if the prompts do not divide among the ranks, or the completions among the minibatches.
        ``extra_rows`` is the maximum number of rows that the zero-reward batch may add. The last micro-batch may have fewer than
        ``micro_batch`` rows. With a token limit, each row may need its own micro-batch.
        """
        if self.prompts % ranks:
            raise ValueError(
                f"batch.prompts={self.prompts} cannot be divided among {ranks} ranks: give a multiple of {ranks}"
            )
        rows = self.prompts // ranks * completions_per_prompt
        if rows % self.minibatches:
            raise ValueError(
                f"batch.minibatches={self.minibatches} does not divide the {rows} completions of a rollout batch "
                f"({self.prompts // ranks} prompts x {completions_per_prompt} completions per rank): give one of {_divisors(rows)}"
            )
        step = rows // self.minibatches
        if self.micro_batch_tokens is not None:
            return step + math.ceil(extra_rows / self.minibatches)
        return math.ceil((step + math.ceil(extra_rows / self.minibatches)) / self.micro_batch)


def check_seed(seed: object, key: str) -> None:
    """Raise ValueError unless the seed is a whole number of 32 bits. ``key`` is its config key."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise ValueError(f"{key} must be a whole number from 0 to {2**32 - 1}, got {seed!r}")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """The limits of what a run puts up with before it stops."""

    max_skipped: int = 5
    """Optimizer steps in a row whose gradient is not finite. Each is skipped on all ranks; after so many the run stops."""
    rank_timeout: float = 1800.0
    """Seconds that a rank waits for another one before the run ends, such as for a reward that hangs there."""
    large_lr: bool = False
    """True allows a learning rate above 1e-5 in full fine-tuning of more than 50 M weights."""

    def __post_init__(self) -> None:
        if self.max_skipped < 1:
            raise ValueError(f"guard.max_skipped must be at least 1, got {self.max_skipped}")
        if not 0 < self.rank_timeout < float("inf"):
            raise ValueError(f"guard.rank_timeout must be above 0 and finite, got {self.rank_timeout}")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Settings of validation on one set of problems: mean@n over the sampler's n completions, and what the lists of k ask for."""

    sampler: Sampler
    reward: Reward
    threshold: float = 0.5
    """A completion is correct if its correctness score is above this."""
    pass_at: Sequence[int] = ()
    """Numbers k of pass@k: the chance that one of k completions is correct."""
    maj_at: Sequence[int] = ()
    """Numbers k of maj@k: the chance that the most frequent answer among k completions is correct."""
    best_at: Sequence[int] = ()
    """Numbers k of best@k: the expected highest reward among k completions."""
    prompts_per_batch: int = 512
    """Prompts sampled together. It affects memory and the random numbers of sampling."""
    seed: int = 0
    benchmark: str = ""
    """Name of the benchmark; empty: the held-out problems of ``data``."""

    def __post_init__(self) -> None:
        check_seed(self.seed, "validation.seed")
        if self.prompts_per_batch < 1:
            raise ValueError(f"validation.prompts_per_batch must be at least 1, got {self.prompts_per_batch}")
        n = self.sampler.completions_per_prompt
        place = f"benchmark.{self.benchmark}" if self.benchmark else "validation"
        sampled = f"{place}.completions_per_prompt" if self.benchmark else "validation.sampler.completions_per_prompt"
        for name in ("pass_at", "maj_at", "best_at"):
            for k in getattr(self, name):
                if not 1 <= k <= n:
                    remedy = (
                        f"; give {place}.{name}=[], if it was taken over from the other sets" if self.benchmark else ""
                    )
                    raise ValueError(
                        f"{place}.{name} holds {k}, but k must be between 1 and {sampled} = {n}: raise that{remedy}"
                    )
        if self.maj_at and find_answer_reader(self.reward) is None:
            raise ValueError(
                f"{place}.maj_at={list(self.maj_at)}: the reward {component_name(self.reward)} does not tell the final answer of a "
                "completion, so there is nothing to vote for; use reward=math_verify or exact_match, give your own reward a method "
                "final_answers(completions), or set maj_at=[]"
            )

    @property
    def objective(self) -> str:
        """The metric of this set that result.json reports."""
        return self.metric("mean", self.sampler.completions_per_prompt)

    def metric(self, name: str, k: int) -> str:
        """Return the logged name of a metric at k, as ``val/pass@4`` or ``val/aime24/pass@4``."""
        return f"val/{self.benchmark}/{name}@{k}" if self.benchmark else f"val/{name}@{k}"
