"""Several rewards, each with a name and a weight."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from rlmod.interfaces import SupportsPrepare, declared
from rlmod.reward._compute import add_terms, compute_rewards
from rlmod.reward._failures import FailedRows, RewardError, RewardResult
from rlmod.types import Problem, Texts


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """reward_i = sum_k weight_k * reward_{k,i}, over the terms k

    It returns weight * reward under each term's name, so that the logged terms add up to the reward. A penalty inside a term, such as
    Grop's, is logged as ``term/penalty``.

    Source: none.
    Differs: if one term abstains from a completion, so does the sum.
    Degenerate: a term of weight 0 is still computed, and logged as 0.
    Reads: the fields that its terms read.
    """

    terms: Mapping[str, Mapping[str, Any]]
    """The terms by name: {weight: a number, reward: a component or a plain function}. Add ``counts_for_correctness: false`` to a term
    that does not decide whether a completion is correct, such as a classifier beside a rule."""

    def __post_init__(self) -> None:
        if OmegaConf.is_config(self.terms):  # Hydra passes this without `_convert_: all`
            object.__setattr__(self, "terms", OmegaConf.to_object(self.terms))
        if not self.terms:
            raise ValueError("reward.terms is empty: add at least one term, NAME: {weight: ..., reward: ...}")
        for name, term in self.terms.items():
            key = f"reward.terms.{name}"
            if not isinstance(term, Mapping):
                raise ValueError(f"{key} must be {{weight: ..., reward: ...}}, got {term!r}")
            for part in ("weight", "reward"):
                if term.get(part) is None:
                    raise ValueError(f"{key}.{part} is missing; a term is {{weight: ..., reward: ...}}")
            if unknown := sorted(set(term) - {"weight", "reward", "counts_for_correctness"}):
                raise ValueError(
                    f"{key}.{unknown[0]} is unknown; a term is {{weight: ..., reward: ..., counts_for_correctness: true or false}}"
                )
            if not isinstance(term.get("counts_for_correctness", True), bool):
                raise ValueError(
                    f"{key}.counts_for_correctness must be true or false, got {term['counts_for_correctness']!r}"
                )
            weight = term["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not isfinite(weight):
                raise ValueError(f"{key}.weight must be a finite number, got {weight!r}")
            if not callable(term["reward"]):
                raise ValueError(f"{key}.reward must have a _target_, got {term['reward']!r}")

    @property
    def pointwise(self) -> bool:
        return all(bool(declared(term["reward"], "pointwise")) for term in self.terms.values())

    @property
    def excluded_terms(self) -> tuple[str, ...]:
        """Terms that do not count for correctness, such as a length penalty. The reward declares it, or the config sets it."""
        own = [
            name
            for name, term in self.terms.items()
            if not term.get("counts_for_correctness", True) or not declared(term["reward"], "counts_for_correctness")
        ]
        return (*own, *(f"{name}/{inner}" for name in self.terms for inner in self._excluded_inner(name)))

    def _excluded_inner(self, name: str) -> tuple[str, ...]:
        return tuple(getattr(self.terms[name]["reward"], "excluded_terms", ()))

    def prepare(self, problems: Sequence[Problem], tokenizer: Any) -> None:
        for name, term in self.terms.items():
            if isinstance(term["reward"], SupportsPrepare):
                with _prefix_errors(name):
                    term["reward"].prepare(problems, tokenizer)

    def __call__(self, texts: Texts) -> RewardResult:
        values: dict[str, Tensor] = {}
        abstained = torch.zeros(len(texts), dtype=torch.bool)
        failed: dict[str, FailedRows] = {}
        for name, term in self.terms.items():
            with _prefix_errors(name):
                result = compute_rewards(term["reward"], texts)
            values[name] = term["weight"] * result.outcomes
            values |= {f"{name}/{inner}": term["weight"] * result.terms[inner] for inner in self._excluded_inner(name)}
            abstained = abstained | result.abstained
            failed |= {f"{name}/{inner}".rstrip("/"): rows for inner, rows in result.failed.items()}
        values = {name: numbers.masked_fill(abstained, 0) for name, numbers in values.items()}
        return add_terms(values, self, texts, abstained, failed)


@contextmanager
def _prefix_errors(name: str) -> Iterator[None]:
    """Add the term's name to the message of an error."""
    try:
        yield
    except ValueError as error:
        raise RewardError(f"reward.terms.{name}: {error}") from error
