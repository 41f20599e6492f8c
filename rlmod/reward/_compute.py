"""Call a reward and validate its result, so that a faulty reward never counts as a reward of 0."""

import functools
import os
import threading
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from math import isfinite
from typing import Any, NoReturn

import torch
from torch import Tensor

from rlmod.interfaces import Reward, unwrap
from rlmod.reward._failures import RewardError, RewardResult, Rewards, heartbeat, quote_completion
from rlmod.types import Texts

STATISTICS = ("mean", "std", "min", "max")
"""Last parts of the names of metrics, which no term of a reward may have."""

__all__ = ["RewardError", "RewardResult", "call_reward", "compute_rewards", "read_result", "reward_name"]


def compute_rewards(reward: Reward, texts: Texts) -> RewardResult:
    """Call the reward. Raise RewardError for anything but one finite number, or None, per completion and term."""
    name = reward_name(reward)
    try:
        result = call_reward(reward, texts)
    except RewardError:  # already names the term
        raise
    except Exception as error:
        raise RewardError(f"the reward {name} raised {type(error).__name__}: {error}") from error
    checked, invalid = read_result(result, reward, texts)
    if invalid:
        row = min(invalid)
        raise RewardError(f"{invalid[row]}{quote_completion(texts, row)}")
    return checked


def call_reward(reward: Reward, texts: Texts) -> Any:
    """Call the reward. If it tries to end the process, that is an error of the reward and not the end of the run."""
    name = reward_name(reward)
    with heartbeat(f"the reward {name}, which has {len(texts)} completions"), _exit_refused(name):
        try:
            return reward(texts)
        except SystemExit as error:
            raise RewardError(f"the reward {name} called sys.exit({error.code!r})") from error


@contextmanager
def _exit_refused(name: str) -> Iterator[None]:
    """Make ``os._exit`` raise in this thread: it would end the run at once, with whatever status the reward chose."""
    before = getattr(_calling, "name", None)
    _calling.name = name
    try:
        yield
    finally:
        _calling.name = before


_calling = threading.local()
_exit, _process = os._exit, os.getpid()


def _exit_unless_in_reward(status: int) -> NoReturn:
    # A child that a reward forks must be able to end.
    if (name := getattr(_calling, "name", None)) is not None and os.getpid() == _process:
        raise RewardError(f"the reward {name} called os._exit({status})")
    _exit(status)


os._exit = _exit_unless_in_reward


def read_result(result: Any, reward: Reward, texts: Texts) -> tuple[RewardResult, dict[int, str]]:
    """Convert what a reward returned. Return also what is wrong with single completions, by row.

    RewardError if the result as a whole is wrong, such as one of another length.
    """
    name = reward_name(reward)
    if isinstance(result, Rewards):
        return result.result, {}
    if isinstance(result, RewardResult):
        return result, {}
    if not isinstance(result, Mapping):
        rewards, abstained, invalid = _read_numbers(result, f"the reward {name}", texts)
        return RewardResult(rewards, {}, rewards, abstained, {}), invalid
    if not result:
        raise RewardError(f"the reward {name} returned a mapping without a single term")
    terms: dict[str, Tensor] = {}
    abstained, invalid = torch.zeros(len(texts), dtype=torch.bool), {}
    for key, values in result.items():
        terms[key], none, wrong = _read_numbers(values, f"the term {key!r} of the reward {name}", texts)
        abstained, invalid = abstained | none, {**wrong, **invalid}
    terms = {key: values.masked_fill(abstained, 0) for key, values in terms.items()}
    return add_terms(terms, reward, texts, abstained, {}, invalid), invalid


def add_terms(
    terms: dict[str, Tensor],
    reward: Reward,
    texts: Texts,
    abstained: Tensor,
    failed: Mapping[str, Any],
    invalid: dict[int, str] | None = None,
) -> RewardResult:
    """Return the result whose rewards are the sum of these terms, and whose outcomes are the sum of those that count for correctness."""
    for name in terms:
        if name.split("/")[-1] in STATISTICS:
            raise RewardError(
                f"the reward {reward_name(reward)} has a term named {name!r}, which its metric reward/{name} would mix up with a statistic "
                f"of the terms ({', '.join(STATISTICS)}); give it another name"
            )
    excluded = getattr(unwrap(reward), "excluded_terms", ())
    included = [values for key, values in terms.items() if key not in excluded]
    outcomes = torch.stack(included).sum(0) if included else torch.zeros(len(texts), dtype=torch.float32)
    what = f"the sum of the terms of the reward {reward_name(reward)}"
    total, _, wrong = _read_numbers(torch.stack(list(terms.values())).sum(0), what, texts)
    if wrong and invalid is None:
        row = min(wrong)
        raise RewardError(f"{wrong[row]}{quote_completion(texts, row)}")
    if invalid is not None:
        invalid.update({row: message for row, message in wrong.items() if row not in invalid})
    return RewardResult(total, terms, outcomes, abstained, dict(failed))


def reward_name(reward: Reward) -> str:
    """Return the name of a reward for messages: its class or function."""
    if isinstance(reward, functools.partial):
        return reward_name(reward.func)
    if (inner := getattr(reward, "supervised", None)) is not None:
        return reward_name(inner)
    return getattr(reward, "__qualname__", type(reward).__qualname__)


def _read_numbers(values: Any, what: str, texts: Texts) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return the values as float32 on the CPU (0 where there is none), where the reward abstains, and what is wrong, by row."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise RewardError(
                f"{what} returned a tensor of shape {list(values.shape)}, expected one number per completion"
            )
        values = values.detach().cpu().tolist()
    elif isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise RewardError(f"{what} returned {type(values).__name__}, expected one number per completion")
    if len(values) != len(texts):
        raise RewardError(f"{what} returned {len(values)} numbers for {len(texts)} completions")
    numbers, invalid = [0.0] * len(texts), {}
    for row, value in enumerate(values):
        if value is None:
            continue
        try:
            numbers[row] = to_number(value)
        except ValueError as error:
            invalid[row] = f"{what} returned {error.args[0]} for row {row}{error.args[1]}"
    abstained = torch.tensor([value is None for value in values], dtype=torch.bool)
    return torch.tensor(numbers, dtype=torch.float32), abstained, invalid


def to_number(value: Any) -> float:
    """Return the value as a float that float32 can hold. ValueError, with the value and a reason, for anything else."""
    try:
        if isinstance(value, str):  # float("1") would pass
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(repr(value), ", which is not a number") from None
    if not isfinite(number) or abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(str(number), "")
    return number
