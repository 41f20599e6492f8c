"""Rewards whose scorer runs in worker processes: math_verify and reasoning_gym."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rlmod.reward._failures import (
    OnError,
    RewardError,
    Rewards,
    RewardSettings,
    Row,
    apply_on_error,
    evaluate_with_retries,
)
from rlmod.reward._pool import PoolError, PoolSettings, Reply, default_workers, run_in_pool
from rlmod.types import Texts

MEMORY_GIB = 2.0
"""Memory that a worker may add to what it starts with."""
LONGEST_TEXT = 1_000_000
"""Characters of a text that is sent to a scorer; a longer one is a failure."""


@dataclass(frozen=True, kw_only=True)
class PooledScorer(RewardSettings):
    """A reward that scores each completion in a sandboxed worker process, with a time limit (see _pool.py and _sandbox.py)."""

    pointwise: ClassVar[bool] = True
    function: ClassVar[str]
    """The scorer, as ``module:name``; workers import its module."""

    on_error: OnError = "zero"
    timeout_seconds: float | None = 5.0
    """Seconds of wall-clock time per completion. null: no limit."""
    workers: int | None = None
    """Worker processes; null: as many as the rank has cores."""

    @abstractmethod
    def _arguments(self, texts: Texts, row: int) -> tuple[Any, ...] | None:
        """Return the scorer's arguments for a completion; None if it gets reward 0 without a scorer."""

    @abstractmethod
    def _read(self, reply: Reply, texts: Texts, row: int) -> Row:
        """Return the reward of a completion from the scorer's reply, whose status is ok."""

    def __call__(self, texts: Texts) -> Rewards:
        texts = self.add_prefix(texts)
        rows = evaluate_with_retries(self, self._evaluate, texts, pointwise=True)
        return Rewards(apply_on_error(self, rows, texts, type(self).__name__))

    def _evaluate(self, texts: Texts) -> list[Row]:
        rows = [Row(0.0)] * len(texts)
        items: dict[int, tuple[Any, ...]] = {}
        for row, completion in enumerate(texts.completions):
            arguments = self._arguments(texts, row)
            if len(completion) > LONGEST_TEXT:
                detail = f"the completion has {len(completion):,} characters, more than {LONGEST_TEXT:,}"
                rows[row] = Row(None, failure="error", detail=detail)
            elif arguments is not None:
                items[row] = arguments
        for row, reply in zip(items, self._score(list(items.values())), strict=True):
            if reply.status == "ok":
                rows[row] = self._read(reply, texts, row)
            else:
                failure = "timeout" if reply.status == "timeout" else "error"
                rows[row] = Row(None, failure=failure, detail=str(reply.value))
        return rows

    def _score(self, items: Sequence[tuple[Any, ...]], function: str | None = None) -> list[Reply]:
        settings = PoolSettings(
            function=function or self.function,
            workers=self.workers or default_workers(),
            seconds=self.timeout_seconds,
            memory_gib=MEMORY_GIB,
            sandboxed=True,
        )
        try:
            return run_in_pool(settings, items, f"the reward {type(self).__name__}")
        except PoolError as error:
            raise RewardError(str(error)) from error
