"""Failures of a reward: the settings that every reward has for them, and their effect.

A reward fails for a completion if it raises, takes too long, ends its process, or returns something that is not a finite number. None is no
failure: the reward abstains.
"""

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor

from rlmod.types import Texts

log = logging.getLogger(__name__)

LONGEST_WAIT = 60.0
"""Seconds between two attempts: 1, 2, 4, ... up to this."""
MAX_ABANDONED = 8
"""Calls that never returned and whose threads still run. A further one stops the run."""


class RewardError(ValueError):
    """A reward raised an exception, or returned an invalid result."""


class TooManyCallsLeft(RewardError):
    """So many calls have not returned that the run must stop, whatever ``on_error`` says."""


class TimeLimit(TimeoutError):
    """A call took longer than ``timeout_seconds``."""


class Row(NamedTuple):
    """The result for one completion: a value, named terms, an abstention (``value`` is None), or a failure."""

    value: float | None
    terms: Mapping[str, float] | None = None
    outcome: float | None = None
    """The correctness score, if it is not ``value``."""
    failure: Literal["", "timeout", "error"] = ""
    detail: str = ""


class FailedRows(NamedTuple):
    """The failures of one reward: which completions, and which share of them is tolerated."""

    timeouts: Bool[Tensor, " R"]
    errors: Bool[Tensor, " R"]
    max_share: float

    def rows(self, index: Any) -> "FailedRows":
        return FailedRows(self.timeouts[index], self.errors[index], self.max_share)


class RewardResult(NamedTuple):
    rewards: Float[Tensor, " R"]
    terms: dict[str, Float[Tensor, " R"]]
    """The named terms whose sum is ``rewards``; none if the reward returns plain numbers."""
    outcomes: Float[Tensor, " R"]
    """``rewards`` without the reward's ``excluded_terms``: the correctness score."""
    abstained: Bool[Tensor, " R"]
    """True if the reward has no value for the completion; the numbers are 0 there, and nothing may use them."""
    failed: dict[str, FailedRows]
    """The failures, by the name of the term that failed; "" is the reward itself."""


class Rewards(list[float | None]):
    """One number per completion, None where the reward abstains, as a reward may return it; with what it counted in ``result``."""

    def __init__(self, result: RewardResult) -> None:
        pairs = zip(result.rewards.tolist(), result.abstained.tolist(), strict=True)
        super().__init__(None if abstained else reward for reward, abstained in pairs)
        self.result = result


OnError = Literal["stop", "retry", "abstain", "zero"]


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Settings that any reward accepts as keys of its node: what it reads, and what happens where it fails."""

    on_error: OnError = "stop"
    """stop: end the run, after a checkpoint. retry: the same after ``retries`` further attempts, 3 if it is 0. abstain: leave the
    completion out of its group. zero: reward 0."""
    retries: int = 0
    """Further attempts before ``on_error`` applies, after waits of 1, 2, 4, ... seconds."""
    timeout_seconds: float | None = None
    """Seconds of wall-clock time after which the reward has failed: per completion in worker processes, otherwise per call.
    null: no limit."""
    max_failure_share: float = 1.0
    """Share of a batch's completions that may fail; if more do, the run stops."""
    workers: int | None = None
    """Worker processes in which the reward is called with one completion each; null: it is called in the trainer's process."""

    skip_special_tokens: bool = False
    """True: the reward's texts hold no special tokens at all. By default they hold those that a completion contains, such as ``<think>`` in
    some tokenizers, but not BOS, EOS, padding and unknown tokens."""
    completion_prefix: str = ""
    """Text in which every prompt ends and with which the reward's texts begin, as in ``<think>`` where the chat template writes it. White
    space after it does not count."""

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "retry", "abstain", "zero"):
            raise ValueError(f"reward.on_error must be stop, retry, abstain or zero, got {self.on_error!r}")
        if self.retries < 0:
            raise ValueError(f"reward.retries must be at least 0, got {self.retries}")
        if self.timeout_seconds is not None and not 0 < self.timeout_seconds < float("inf"):
            raise ValueError(f"reward.timeout_seconds must be above 0 and finite, got {self.timeout_seconds}")
        if not 0 <= self.max_failure_share <= 1:
            raise ValueError(f"reward.max_failure_share must be from 0 to 1, got {self.max_failure_share}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"reward.workers must be at least 1, got {self.workers}")

    def add_prefix(self, texts: Texts) -> Texts:
        """Return the texts with ``completion_prefix`` in front of each completion."""
        if not self.completion_prefix:
            return texts
        return replace(texts, completions=[self.completion_prefix + text for text in texts.completions])

    @property
    def attempts(self) -> int:
        return 1 + (self.retries or (3 if self.on_error == "retry" else 0))


def evaluate_with_retries(
    settings: RewardSettings, evaluate: Callable[[Texts], list[Row]], texts: Texts, *, pointwise: bool
) -> list[Row]:
    """Evaluate the completions, and those that failed again; all of them if the reward compares completions with each other."""
    rows = evaluate(texts)
    for attempt in range(1, settings.attempts):
        failed = [index for index, row in enumerate(rows) if row.failure]
        if not failed:
            break
        wait = min(2.0 ** (attempt - 1), LONGEST_WAIT)
        _warn(
            f"{len(failed)} of {len(rows)} completions failed ({rows[failed[0]].detail}); attempt {attempt + 1} in {wait:.0f} s"
        )
        time.sleep(wait)
        again = failed if pointwise else list(range(len(rows)))
        for index, row in zip(again, evaluate(pick_texts(texts, again)), strict=True):
            rows[index] = row
    return rows


def apply_on_error(settings: RewardSettings, rows: Sequence[Row], texts: Texts, name: str) -> RewardResult:
    """Return the result of these rows, with ``on_error`` applied to those that failed. RewardError if one of them stops the run."""
    failed = [index for index, row in enumerate(rows) if row.failure]
    if failed and settings.on_error in ("stop", "retry"):
        index = failed[0]
        raise RewardError(
            f"{name} failed on {len(failed)} of {len(rows)} completions. The first is row {index}: {rows[index].detail}"
            f"{quote_completion(texts, index)}. reward.on_error=abstain or zero would go on without them"
        )
    if failed:
        effect = "abstains from" if settings.on_error == "abstain" else "gives reward 0 to"
        index = failed[0]
        _warn(
            f"{name} failed on {len(failed)} of {len(rows)} completions, and {effect} each of them. The first is row {index} "
            f"({rows[index].detail})"
            f"{quote_completion(texts, index)}"
        )
    abstained = torch.tensor(
        [row.value is None and not (row.failure and settings.on_error == "zero") for row in rows], dtype=torch.bool
    )
    names = list(dict.fromkeys(name for row in rows for name in row.terms or ()))

    def numbers(values: Iterable[float | None]) -> Float[Tensor, " R"]:
        return torch.tensor([value or 0.0 for value in values], dtype=torch.float32)

    return RewardResult(
        rewards=numbers(row.value for row in rows),
        terms={name: numbers((row.terms or {}).get(name) for row in rows) for name in names},
        outcomes=numbers(row.value if row.outcome is None else row.outcome for row in rows),
        abstained=abstained,
        failed={
            "": FailedRows(
                timeouts=torch.tensor([row.failure == "timeout" for row in rows], dtype=torch.bool),
                errors=torch.tensor([row.failure == "error" for row in rows], dtype=torch.bool),
                max_share=settings.max_failure_share,
            )
        },
    )


def has_value(result: RewardResult) -> Bool[Tensor, " R"]:
    """Return True for the completions that the reward gave a value."""
    without = result.abstained.clone()
    for rows in result.failed.values():
        without |= rows.timeouts | rows.errors
    return ~without


def check_failure_shares(result: RewardResult) -> None:
    """Raise RewardError if more completions of a batch failed than ``max_failure_share`` allows."""
    for term, rows in result.failed.items():
        failed, total = int((rows.timeouts | rows.errors).sum()), len(rows.errors)
        if total and failed / total > rows.max_share:
            key = f"reward.terms.{term}.reward" if term else "reward"
            raise RewardError(
                f"{key} failed on {failed} of {total} completions of a batch ({int(rows.timeouts.sum())} time-outs), more than "
                f"{key}.max_failure_share={rows.max_share}"
            )


def failure_metrics(
    batches: Sequence[Mapping[str, FailedRows]], abstained: Bool[Tensor, " R"] | None
) -> dict[str, float]:
    """Count the time-outs, errors and abstentions: failures/timeouts, failures/TERM/errors, failures/abstained.

    Empty if the reward counts no failures and has a value for every completion.
    """
    metrics: dict[str, float] = {}
    for failed in batches:
        for term, rows in failed.items():
            prefix = f"failures/{term}/" if term else "failures/"
            for name, which in (("timeouts", rows.timeouts), ("errors", rows.errors)):
                metrics[f"{prefix}{name}"] = metrics.get(f"{prefix}{name}", 0.0) + float(which.sum())
    without_value = 0.0 if abstained is None else float(abstained.sum())
    return {**metrics, "failures/abstained": without_value} if metrics or without_value else {}


@contextmanager
def agree_on_reward_errors() -> Iterator[None]:
    """Let all ranks raise the RewardError that one of them has, so that they can write a checkpoint together."""
    error = None
    try:
        yield
    except RewardError as raised:
        error = raised
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else str(error))
        found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if found and error is None:
            raise RewardError(f"rank {found[0][0]}: {found[0][1]}")
    if error is not None:
        raise error


def pick_texts(texts: Texts, rows: Sequence[int]) -> Texts:
    """Select completions by index."""
    fields = ("completions", "answers", "problems", "lengths", "truncated", "group")
    chosen: dict[str, Any] = {
        name: None if (values := getattr(texts, name)) is None else [values[row] for row in rows] for name in fields
    }
    return replace(texts, **chosen)


def quote_completion(texts: Texts, row: int) -> str:
    return f"; its completion begins {texts.completions[row][:100]!r}"


def call_with_limit(function: Callable[[], Any], seconds: float | None, name: str) -> Any:
    """Call the function; TimeLimit after ``seconds``. The call itself cannot be ended, so its thread stays behind."""
    if seconds is None:
        return function()
    box: list[Any] = []

    def run() -> None:
        try:
            box.append((function(), None))
        except BaseException as error:
            box.append((None, error))

    _abandoned[:] = [thread for thread in _abandoned if thread.is_alive()]
    if len(_abandoned) >= MAX_ABANDONED:
        raise TooManyCallsLeft(
            f"{name}: {len(_abandoned)} calls have not returned although their time was up. Give it worker processes, which can be "
            "killed: reward.workers=2"
        )
    thread = threading.Thread(target=run, daemon=True, name=f"reward {name}")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        _abandoned.append(thread)
        raise TimeLimit(f"it took longer than {seconds} s")
    result, error = box[0]
    if error is not None:
        raise error
    return result


_abandoned: list[threading.Thread] = []


@contextmanager
def heartbeat(what: str, seconds: float = 60.0) -> Iterator[None]:
    """Log every ``seconds`` what is being waited for."""
    ended = threading.Event()

    def beat() -> None:
        started = time.monotonic()
        while not ended.wait(seconds):
            log.warning("waiting for %s, for %.0f s so far", what, time.monotonic() - started)

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    try:
        yield
    finally:
        ended.set()


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=4)
