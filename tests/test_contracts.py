"""Declarations of components: each shipped one reads the fields that it declares, and no others."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate

from rlmod.interfaces import ALL_FIELDS, DEFAULTS, check_declarations, declared
from rlmod.types import MAPPINGS, TENSOR_FIELDS, Rollouts
from tests.config.composing import composed
from tests.rollouts import ragged

STAGES = ("filter", "shaper", "correction", "aggregation", "loss", "regularizer")
LISTS = ("correction", "regularizer")
ROOT = Path(__file__).parents[1]
COMPONENTS = [
    (stage, file.stem)
    for stage in STAGES
    for file in sorted((ROOT / "conf" / stage).glob("*.yaml"))
    if "_target_:" in file.read_text(encoding="utf-8")  # a variant is the same class
]
READ_IF = {
    "dynamic_sampling": {"from_guide": {"over": "own"}},
    "uniform": {"from_guide": {"pool": "own"}},
    "kl": {"logprobs": {"importance": True}},
    "dppo": {"logprobs": {"anchor": "pi_old"}},
}
"""Fields that a component reads only with these settings."""


@cache
def component(stage: str, option: str):
    cfg = composed(f"{stage}=[{option}]" if stage in LISTS else f"{stage}={option}")
    return instantiate(cfg[stage][option] if stage in LISTS else cfg[stage], _convert_="all")


def full(seed: int = 0) -> Rollouts:
    """A record with every field filled."""
    rollouts = ragged(seed)
    draw = torch.Generator().manual_seed(seed + 1)

    def noise() -> torch.Tensor:
        return -3 * torch.rand(rollouts.mask.shape, generator=draw).double()

    assert rollouts.entropy is not None
    kept = torch.where(rollouts.mask, rollouts.entropy, 0.0)
    return replace(
        rollouts, outcomes=rollouts.rewards, logprobs=noise(), entropy=kept, sampler_logprobs=noise(),
        reference_logprobs=noise(), policy_entropy=-noise(), advantages=noise() * rollouts.mask,
        weights=rollouts.mask / rollouts.mask.sum(), from_guide=torch.arange(len(rollouts)) % 3 == 0,
        truncated=torch.arange(len(rollouts)) % 4 == 0, sub_batch=torch.zeros_like(rollouts.group),
        abstained=torch.zeros(len(rollouts), dtype=torch.bool),
        extra={"kl_cov": rollouts.mask & (torch.arange(len(rollouts)) % 2 == 0)[:, None]},
        terms={"a": torch.rand(len(rollouts), generator=draw), "b": torch.rand(len(rollouts), generator=draw)},
    )  # fmt: skip


def poison(name: str, value: Any) -> Any:
    """Return other values of a field: NaN if it can hold one, otherwise values that are possible but wrong."""
    if isinstance(value, Mapping):
        return {key: poison(name, each) for key, each in value.items()}
    if value.is_floating_point():
        return torch.full_like(value, torch.nan)
    if name == "mask":
        return value.roll(1, 0) & (torch.arange(len(value)) % 2 == 0)[:, None]
    return ~value if value.dtype == torch.bool else value.flip(0) // 2 + 1


def poisoned(rollouts: Rollouts, names: Collection[str]) -> Rollouts:
    """Return the record with other values in these fields."""
    filled = {name: value for name in names if (value := getattr(rollouts, name, None)) is not None}
    return replace(rollouts, **{name: poison(name, value) for name, value in filled.items()})


def outputs(stage: str, made, rollouts: Rollouts) -> dict[str, torch.Tensor]:
    """Return everything that the component computes, its metrics included."""
    torch.manual_seed(0)  # clip_cov draws
    if stage in ("loss", "regularizer"):
        logprobs = torch.full(rollouts.mask.shape, -0.7, dtype=torch.float64, requires_grad=True)
        per_token, metrics = made(logprobs, rollouts)
        return {"": per_token, **{name: torch.as_tensor(value) for name, value in metrics.items()}}
    found = made(rollouts)
    if not isinstance(found, Rollouts):
        return {"": found}
    # What a correction passes on unchanged is not its own.
    before, after = (
        {name: getattr(each, name) for name in TENSOR_FIELDS} | dict(each.extra) for each in (rollouts, found)
    )
    return {name: value for name, value in after.items() if value is not before.get(name)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].isnan(), value.isnan()) and torch.equal(found[name].nan_to_num(), value.nan_to_num())
        for name, value in expected.items()
    )


def fields_read(stage: str, made) -> set[str]:
    """Return the fields that change something the component returns."""
    records = [full(0), replace(full(1), outcomes=None, terms={})]
    expected = [outputs(stage, made, record) for record in records]
    return {
        name
        for name in (*TENSOR_FIELDS, *MAPPINGS)
        for record, value in zip(records, expected, strict=True)
        if not same(outputs(stage, made, poisoned(record, {name})), value)
    }


@pytest.mark.parametrize(("stage", "option"), COMPONENTS)
def test_a_component_reads_what_it_declares_and_nothing_else(stage, option):
    made, rollouts = component(stage, option), full()
    check_declarations(made, stage)
    everything_else = {*TENSOR_FIELDS, *MAPPINGS} - made.reads
    expected = outputs(stage, made, rollouts)
    assert same(outputs(stage, made, poisoned(rollouts, everything_else)), expected)
    assert torch.isfinite(next(iter(expected.values())).double()).all()
    read = fields_read(stage, made)
    for name, settings in READ_IF.get(option, {}).items():
        assert name not in read
        read |= fields_read(stage, replace(made, **settings)) & {name}
    assert read == made.reads


def reads_for_metrics(logprobs: torch.Tensor, rollouts: Rollouts):
    return torch.where(rollouts.mask, logprobs, 0), {"entropy": rollouts.entropy}


def reads_the_mask(rollouts: Rollouts):
    return rollouts.weights * rollouts.mask


def reads_the_group(rollouts: Rollouts):
    return rollouts.group % 2 == 0


@pytest.mark.parametrize(
    ("stage", "function", "read"),
    [
        ("loss", reads_for_metrics, {"mask", "entropy"}),
        ("aggregation", reads_the_mask, {"mask", "weights"}),
        ("filter", reads_the_group, {"group"}),
    ],
)
def test_a_field_that_is_read_is_found_wherever_it_is_read(stage, function, read):
    assert fields_read(stage, function) == read


@pytest.mark.parametrize(("stage", "option"), COMPONENTS)
def test_the_docstring_names_the_fields_that_are_declared(stage, option):
    made = component(stage, option)
    line = re.search(r"Reads: ([^.]*)\.", type(made).__doc__ or "")
    assert line is not None
    assert set(re.findall(r"[a-z_]{3,}", line[1])) & ALL_FIELDS == made.reads


def test_what_a_component_does_not_declare_is_assumed_to_be_the_safe_value():
    """A loss may have a gradient where the advantage is 0, and a reward may compare completions."""
    expected = {
        "reads": ALL_FIELDS, "granularity": "sequence", "max_generation_batches": 1, "min_group_size": 1,
        "accepts_penalties": True,
        "proportional_to_advantage": False, "counts_for_correctness": True, "pointwise": False, "skip_special_tokens": False,
        "needs_answer": False,
    }  # fmt: skip
    assert {name: declared(lambda rollouts: rollouts.mask, name) for name in DEFAULTS} == expected
    assert {f.name for f in fields(Rollouts)} == ALL_FIELDS


@dataclass(frozen=True, kw_only=True)
class Own:
    def __call__(self, rollouts):
        return rollouts.rewards[:, None] * rollouts.mask


@pytest.mark.parametrize(
    ("declaration", "value", "message"),
    [
        ("read", frozenset({"rewards"}), "did you mean reads"),
        ("reads", frozenset({"reward"}), "'reward', which is not a field of Rollouts; did you mean 'rewards'"),
        ("reads", "rewards", "reads must be a frozenset"),
        ("granularity", "tokens", "granularity must be 'token' or 'sequence', got 'tokens'"),
        ("granularty", "token", "did you mean granularity"),
        ("min_group_size", 0, "min_group_size must be a whole number of at least 1"),
        ("proportional_to_advantages", True, "did you mean proportional_to_advantage"),
    ],
)
def test_a_misspelt_declaration_is_told(declaration, value, message):
    own = type("Own", (Own,), {declaration: value})()
    with pytest.raises(ValueError, match=re.escape(message)):
        check_declarations(own, "shaper")


def test_defaults_are_documented():
    import rlmod.interfaces

    for name in DEFAULTS:
        assert re.search(rf"^    {name} ", str(rlmod.interfaces.__doc__), re.MULTILINE), name
