"""Any reward, with settings for the completions on which it fails."""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rlmod.interfaces import Reward, SupportsPrepare, declared, unwrap
from rlmod.reward._compute import call_reward, read_result, reward_name
from rlmod.reward._failures import (
    RewardError,
    RewardResult,
    RewardSettings,
    Row,
    TimeLimit,
    TooManyCallsLeft,
    apply_on_error,
    call_with_limit,
    evaluate_with_retries,
    pick_texts,
)
from rlmod.reward._pool import PoolError, PoolSettings, Reply, run_in_pool
from rlmod.types import Problem, Texts

WORKER_MEMORY_GIB = 8.0


@dataclass(frozen=True, kw_only=True)
class Supervised(RewardSettings):
    """The reward ``supervised``, with the settings that every reward has.

    A config need not name it: the settings are keys of any reward, such as ``reward.on_error=abstain``.
    """

    supervised: Reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers is not None and getattr(unwrap(self.supervised), "pointwise", None) is False:
            raise ValueError(
                f"reward.workers={self.workers}: {reward_name(self.supervised)} compares the completions of a group, but a worker gets one "
                "completion at a time; give workers to the reward inside it"
            )

    @property
    def pointwise(self) -> bool:
        return self.workers is not None or bool(declared(self.supervised, "pointwise"))

    @property
    def counts_for_correctness(self) -> bool:
        return bool(declared(self.supervised, "counts_for_correctness"))

    @property
    def excluded_terms(self) -> tuple[str, ...]:
        return tuple(getattr(unwrap(self.supervised), "excluded_terms", ()))

    def prepare(self, problems: Sequence[Problem], tokenizer: Any) -> None:
        if isinstance(self.supervised, SupportsPrepare):
            self.supervised.prepare(problems, tokenizer)

    def __call__(self, texts: Texts) -> RewardResult:
        texts = self.add_prefix(texts)
        inner: list[RewardResult] = []
        evaluate = self._evaluate_in_pool if self.workers is not None else partial(self._evaluate, inner)
        rows = evaluate_with_retries(self, evaluate, texts, pointwise=self.pointwise)
        result = apply_on_error(self, rows, texts, f"the reward {reward_name(self.supervised)}")
        # What the terms of a weighted reward counted, if it was computed for all completions at once.
        counted = inner[-1].failed if inner and len(inner[-1].rewards) == len(texts) else {}
        return result._replace(failed={**counted, **result.failed})

    def _evaluate(self, inner: list[RewardResult], texts: Texts) -> list[Row]:
        """Call the reward once; if it raises and completions are independent, once per completion, to find the one to blame."""
        try:
            result = call_with_limit(
                lambda: call_reward(self.supervised, texts), self.timeout_seconds, reward_name(self.supervised)
            )
            checked, invalid = read_result(result, self.supervised, texts)
        except TooManyCallsLeft:
            raise
        except Exception as error:
            if self.pointwise and len(texts) > 1 and not isinstance(error, TimeLimit):
                return [row for index in range(len(texts)) for row in self._evaluate(inner, pick_texts(texts, [index]))]
            failure = "timeout" if isinstance(error, TimeoutError) else "error"
            return [Row(None, failure=failure, detail=_describe(error)) for _ in range(len(texts))]
        inner.append(checked)
        rows = []
        for index in range(len(texts)):
            if index in invalid:
                rows.append(Row(None, failure="error", detail=invalid[index]))
            elif checked.abstained[index]:
                rows.append(Row(None))
            else:
                terms = {name: float(values[index]) for name, values in checked.terms.items()}
                rows.append(Row(float(checked.rewards[index]), terms, float(checked.outcomes[index])))
        return rows

    def _evaluate_in_pool(self, texts: Texts) -> list[Row]:
        """Call the reward in worker processes, with one completion each."""
        name = reward_name(self.supervised)
        try:
            reward = pickle.dumps(self.supervised)
        except Exception as error:
            raise RewardError(
                f"reward.workers={self.workers}: {name} cannot be sent to a worker process ({error}); define it in a module, "
                "not in a script or a notebook"
            ) from error
        assert self.workers is not None
        settings = PoolSettings(
            function=f"{call_one.__module__}:{call_one.__qualname__}",
            workers=self.workers,
            seconds=self.timeout_seconds,
            memory_gib=WORKER_MEMORY_GIB,
            sandboxed=False,
            imports=getattr(unwrap(self.supervised), "__module__", None),
        )
        try:
            replies = run_in_pool(
                settings, [(reward, pick_texts(texts, [row])) for row in range(len(texts))], f"the reward {name}"
            )
        except PoolError as error:
            raise RewardError(str(error)) from error
        return [_row(reply) for reply in replies]


def call_one(reward: bytes, texts: Texts) -> tuple[float | None, dict[str, float], float | None]:
    """Call a pickled reward with one completion, in a worker process. Return its value, terms and correctness score."""
    function = _loaded.get(reward) or _loaded.setdefault(reward, pickle.loads(reward))
    checked, invalid = read_result(call_reward(function, texts), function, texts)
    if invalid:
        raise RewardError(invalid[0])
    if checked.abstained[0]:
        return None, {}, None
    terms = {name: float(values[0]) for name, values in checked.terms.items()}
    return float(checked.rewards[0]), terms, float(checked.outcomes[0])


_loaded: dict[bytes, Reward] = {}


def _row(reply: Reply) -> Row:
    if reply.status != "ok":
        return Row(None, failure="timeout" if reply.status == "timeout" else "error", detail=str(reply.value))
    value, terms, outcome = reply.value
    return Row(value, terms, outcome)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, RewardError | TimeoutError) else f"{type(error).__name__}: {error}"
