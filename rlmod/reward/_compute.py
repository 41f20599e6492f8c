"""Call a reward and validate its result, so that a faulty reward never counts as a reward of 0."""

import functools
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.interfaces import Reward, unwrap
from rlmod.types import Texts


class RewardError(ValueError):
    """A reward raised an exception, or returned an invalid result."""


class RewardResult(NamedTuple):
    rewards: Float[Tensor, " R"]
    terms: dict[str, Float[Tensor, " R"]]
    """The named terms whose sum is ``rewards``; none if the reward returns plain numbers."""
    outcomes: Float[Tensor, " R"]
    """``rewards`` without the reward's ``excluded_terms``: the correctness score."""


def compute_rewards(reward: Reward, texts: Texts) -> RewardResult:
    """Call the reward. Raise RewardError for anything but one finite number per completion and term."""
    name = _name(reward)
    try:
        result = reward(texts)
    except RewardError:  # already names the term
        raise
    except Exception as error:
        raise RewardError(f"the reward {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        rewards = _validate(result, f"the reward {name}", texts)
        return RewardResult(rewards, {}, rewards)
    if not result:
        raise RewardError(f"the reward {name} returned a mapping without a single term")
    terms = {key: _validate(values, f"the term {key!r} of the reward {name}", texts) for key, values in result.items()}
    excluded = getattr(unwrap(reward), "excluded_terms", ())
    included = [values for key, values in terms.items() if key not in excluded]
    outcomes = torch.stack(included).sum(0) if included else torch.zeros(len(texts), dtype=torch.float32)
    total = _validate(torch.stack(list(terms.values())).sum(0), f"the sum of the terms of the reward {name}", texts)
    return RewardResult(total, terms, outcomes)


def _name(reward: Reward) -> str:
    if isinstance(reward, functools.partial):
        return _name(reward.func)
    return getattr(reward, "__qualname__", type(reward).__qualname__)


def _validate(values: Any, what: str, texts: Texts) -> Tensor:
    """Return the values as float32 on the CPU, one finite number per completion."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise RewardError(
                f"{what} returned a tensor of shape {list(values.shape)}, expected one number per completion"
            )
        values = values.detach().cpu()
    elif isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise RewardError(f"{what} returned {type(values).__name__}, expected one number per completion")
    if len(values) != len(texts):
        raise RewardError(f"{what} returned {len(values)} numbers for {len(texts)} completions")
    numbers = []
    for row, value in enumerate(values):
        try:
            if isinstance(value, str):  # float("1") would pass
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError):
            raise RewardError(
                f"{what} returned {value!r} for row {row}, which is not a number{_quote_completion(texts, row)}"
            ) from None
    checked = torch.tensor(numbers, dtype=torch.float32)
    if not bool(checked.isfinite().all()):
        row = int((~checked.isfinite()).nonzero()[0])
        raise RewardError(f"{what} returned {numbers[row]} for row {row}{_quote_completion(texts, row)}")
    return checked


def _quote_completion(texts: Texts, row: int) -> str:
    return f"; its completion begins {texts.completions[row][:100]!r}"
