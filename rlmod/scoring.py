"""Making a reward from its configuration, and calling it so that nothing it does wrong passes for a reward of 0."""

import functools
import inspect
import re
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import hydra
import torch
from hydra.errors import InstantiationException
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from rlmod.fields import check_types
from rlmod.interfaces import Reward
from rlmod.types import Texts


class RewardError(ValueError):
    """A reward raised, or returned what is no reward."""


class Scores(NamedTuple):
    rewards: Float[Tensor, " R"]
    terms: dict[str, Float[Tensor, " R"]]
    """The named terms that ``rewards`` is the sum of: none where the reward returns plain numbers."""
    outcomes: Float[Tensor, " R"]
    """``rewards`` without the terms that the reward's ``penalties`` name: what a completion's correctness is judged by."""


def score(reward: Reward, texts: Texts) -> Scores:
    """Calls the reward; RewardError for whatever is not one finite number a row and term."""
    name = _name(reward)
    try:
        result = reward(texts)
    except RewardError:  # already says which term it was
        raise
    except Exception as error:
        raise RewardError(f"the reward {name} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, Mapping):
        rewards = _checked(result, f"the reward {name}", texts)
        return Scores(rewards, {}, rewards)
    if not result:
        raise RewardError(f"the reward {name} returned a mapping without a single term")
    terms = {key: _checked(values, f"the term {key!r} of the reward {name}", texts) for key, values in result.items()}
    penalties = getattr(reward, "penalties", ())
    judged = [values for key, values in terms.items() if key not in penalties]
    outcomes = torch.stack(judged).sum(0) if judged else torch.zeros(len(texts), dtype=torch.float32)
    total = _checked(torch.stack(list(terms.values())).sum(0), f"the sum of the terms of the reward {name}", texts)
    return Scores(total, terms, outcomes)


def build(config: Mapping[Any, Any]) -> Reward:
    """The reward that a configuration describes.

    A class is instantiated. A plain function is the reward itself: the other keys become its arguments (a function that
    makes a reward says ``_partial_: false``). The same holds for the rewards inside ``terms``.
    """
    node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
    targets = _functions_as_partials(OmegaConf.to_container(node, resolve=True), "reward")
    check_types(node, "reward")
    try:
        return hydra.utils.instantiate(targets, _convert_="all")
    except InstantiationException as error:
        # Hydra wraps what the constructor raised, whose own words name the key, and knows where in the tree it was.
        where = re.search(r"full_key: (\S+)", str(error))
        raise ValueError(f"reward{f'.{where[1]}' if where else ''}: {error.__cause__ or error}") from error


def _functions_as_partials(node: Any, key: str) -> dict[str, Any]:
    if not isinstance(node, dict) or not node.get("_target_"):
        raise ValueError(
            f"{key}._target_ is missing: the import path of a reward, such as rlmod.reward.exact_match.ExactMatch"
        )
    target = node["_target_"]
    try:
        resolved = hydra.utils.get_object(target)
    except Exception as error:  # whatever the user's module raises while it is imported
        module = target.rpartition(".")[0] or target
        raise ValueError(
            f"{key}._target_: cannot import {target!r}: {_cause(error)} (the module {module} is looked for in the "
            "current folder and in the installed packages)"
        ) from error
    node = dict(node)
    if inspect.isfunction(resolved):
        node.setdefault("_partial_", True)
    if isinstance(node.get("reward"), dict):  # one that builds on another
        node["reward"] = _functions_as_partials(node["reward"], f"{key}.reward")
    terms = node.get("terms")
    if isinstance(terms, dict):
        node["terms"] = {
            name: {**term, "reward": _functions_as_partials(term["reward"], f"{key}.terms.{name}.reward")}
            if isinstance(term, dict) and term.get("reward") is not None
            else term
            for name, term in terms.items()
        }
    return node


def _cause(error: BaseException) -> BaseException:
    """The exception at the root of it: Hydra wraps what an import raised, and says it over three lines."""
    return _cause(error.__cause__) if error.__cause__ else error


def _name(reward: Reward) -> str:
    if isinstance(reward, functools.partial):
        return _name(reward.func)
    return getattr(reward, "__qualname__", type(reward).__qualname__)


def _checked(values: Any, what: str, texts: Texts) -> Tensor:
    """The values as float32 on the CPU, one finite number a completion."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise RewardError(
                f"{what} returned a tensor of shape {list(values.shape)}, expected one number a completion"
            )
        values = values.detach().cpu()
    elif isinstance(values, str | bytes | Mapping | Set) or not hasattr(values, "__len__"):
        raise RewardError(f"{what} returned {type(values).__name__}, expected one number a completion")
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
                f"{what} returned {value!r} for row {row}, which is no number{_row(texts, row)}"
            ) from None
    checked = torch.tensor(numbers, dtype=torch.float32)
    if not bool(checked.isfinite().all()):
        row = int((~checked.isfinite()).nonzero()[0])
        raise RewardError(f"{what} returned {numbers[row]} for row {row}{_row(texts, row)}")
    return checked


def _row(texts: Texts, row: int) -> str:
    return f"; its completion begins {texts.completions[row][:100]!r}"
