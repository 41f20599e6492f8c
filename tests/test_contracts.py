"""What components declare is true: each shipped one runs on a record that holds only the fields it reads."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from rlmod.interfaces import ALL_FIELDS, DEFAULTS, check_declarations, declared
from rlmod.types import TENSOR_FIELDS, Rollouts
from tests.config.composing import composed
from tests.rollouts import ragged

STAGES = ("filter", "shaper", "correction", "aggregation", "loss", "regularizer")
LISTS = ("correction", "regularizer")
ROOT = Path(__file__).parents[1]
COMPONENTS = [(stage, file.stem) for stage in STAGES for file in sorted((ROOT / "conf" / stage).glob("*.yaml"))]
ALWAYS = {"group", "mask"}
"""Integer and boolean fields cannot hold a NaN; those that are not read are None or poisoned with other values."""


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
    )  # fmt: skip


def poisoned(rollouts: Rollouts, reads: frozenset[str]) -> Rollouts:
    """The same record with NaN, or another value, in every field that is not read."""
    changes = {}
    for name in TENSOR_FIELDS:
        value = getattr(rollouts, name)
        if name in reads or name in ALWAYS or value is None:
            continue
        if value.is_floating_point():
            changes[name] = torch.full_like(value, torch.nan)
        elif value.dtype == torch.bool:
            changes[name] = ~value
        else:
            changes[name] = value + 1
    return replace(rollouts, **changes)


def run(stage: str, made, rollouts: Rollouts):
    if stage in ("loss", "regularizer"):
        logprobs = torch.where(rollouts.mask, torch.full_like(rollouts.mask, -0.7, dtype=torch.float64), 0.0)
        return made(logprobs.requires_grad_(), rollouts)[0]
    found = made(rollouts)
    return torch.stack([found.advantages, found.mask.double()]) if isinstance(found, Rollouts) else found


@pytest.mark.parametrize(("stage", "option"), COMPONENTS)
def test_a_component_reads_no_more_than_it_declares(stage, option):
    made = component(stage, option)
    reads = made.reads
    check_declarations(made, stage)
    rollouts = full()
    expected, found = run(stage, made, rollouts), run(stage, made, poisoned(rollouts, reads))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.isfinite(found.double()).all()


@pytest.mark.parametrize(
    ("stage", "option"), [("shaper", "uniform"), ("loss", "clipped_surrogate"), ("filter", "dynamic_sampling")]
)
def test_a_declaration_that_leaves_a_field_out_is_found(stage, option):
    made = component(stage, option)
    missing = made.reads - {"rewards", "outcomes", "advantages"}
    rollouts = full()
    found = run(stage, made, poisoned(rollouts, missing))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, run(stage, made, rollouts), rtol=0, atol=0)


@pytest.mark.parametrize(("stage", "option"), COMPONENTS)
def test_the_docstring_names_the_fields_that_are_declared(stage, option):
    made = component(stage, option)
    line = re.search(r"Reads: ([^.]*)\.", type(made).__doc__ or "")
    assert line is not None
    named = set(re.findall(r"[a-z_]{3,}", line[1])) & ALL_FIELDS
    assert named <= made.reads | {"outcomes"}


def test_a_function_that_declares_nothing_is_taken_to_read_everything():
    assert declared(lambda rollouts: rollouts.mask, "reads") == ALL_FIELDS
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
