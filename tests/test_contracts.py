"""What components declare is true: each shipped one runs on a record that holds only the fields it reads."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from rlmod.interfaces import ALL_FIELDS, DEFAULTS, check_declarations, declared
from rlmod.types import TENSOR_FIELDS, Rollouts
from tests.command_line import SHORT, run_train
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

    kept = torch.where(rollouts.mask, rollouts.entropy, 0.0)
    return replace(
        rollouts, outcomes=rollouts.rewards, logprobs=noise(), entropy=kept, sampler_logprobs=noise(),
        reference_logprobs=noise(), policy_entropy=-noise(), advantages=noise() * rollouts.mask,
        weights=rollouts.mask / rollouts.mask.sum(), from_guide=torch.arange(len(rollouts)) % 3 == 0,
        truncated=torch.arange(len(rollouts)) % 4 == 0, sub_batch=torch.zeros_like(rollouts.group),
    )  # fmt: skip


def poisoned(rollouts: Rollouts, reads: frozenset[str]) -> Rollouts:
    """The same record with NaN, or another value, in every field that is not read."""
    changes = {}
    for name in TENSOR_FIELDS:
        value = getattr(rollouts, name)
        if name in reads or name in ALWAYS:
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
        ("reads", frozenset({"reward"}), "'reward', which is no field of Rollouts; did you mean 'rewards'"),
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
        assert re.search(rf"^    {name} ", rlmod.interfaces.__doc__, re.MULTILINE), name


MINE = """
from dataclasses import dataclass

import torch

def by_token(rollouts):
    return torch.arange(rollouts.mask.shape[1]) * rollouts.mask.float()

def to_reference(logprobs, rollouts):
    return (logprobs - rollouts.reference_logprobs).square() * rollouts.mask, {"train/distance": 0.5}
to_reference.reads = frozenset({"reference_logprobs", "mask"})

def breaks(rollouts):
    return rollouts.rewards + None

def keeps_nothing(rollouts):
    return torch.zeros(int(rollouts.group.max()) + 1, dtype=torch.bool)

def keeps_too_much(rollouts):
    return torch.ones(len(rollouts), dtype=torch.bool)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    import sys

    sys.modules.pop("mine", None)


def refusal(monkeypatch, folder, *overrides: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run_train(monkeypatch, *SHORT, *overrides, f"output={folder / 'run'}")
    return str(stopped.value)


def function(stage: str, name: str) -> tuple[str, ...]:
    return (f"{stage}._target_=mine.{name}", f"+{stage}._partial_=true")


def test_an_own_token_level_shaper_with_a_sequence_loss_is_refused(mine, monkeypatch):
    message = refusal(
        monkeypatch,
        mine,
        "shaper=leave_one_out",
        *function("shaper", "by_token"),
        "loss=sequence_surrogate",
        "aggregation=rollout_mean",
    )
    assert "one ratio per completion" in message
    assert "by_token" in message


def test_an_own_loss_that_reads_the_reference_needs_one_and_counts_as_reading_it(mine, monkeypatch, recwarn):
    fields_of_loss = ("~loss.clip_low", "~loss.clip_high", *function("loss", "to_reference"))
    message = refusal(monkeypatch, mine, *fields_of_loss)
    assert "loss reads reference_logprobs, and there is no reference" in message
    run_train(
        monkeypatch, *SHORT, *fields_of_loss, "reference=frozen", "trainer.max_epochs=1", f"output={mine / 'run'}"
    )
    assert not [w for w in recwarn if "reference is unused" in str(w.message)]
    header, *_ = (mine / "run" / "metrics.csv").read_text().splitlines()
    assert "train/distance" in header.split(",")
    assert "train/train/distance" not in header


def test_a_traceback_inside_an_own_component_names_it_and_its_stage(mine, monkeypatch):
    with pytest.raises(TypeError) as raised:
        run_train(monkeypatch, *SHORT, "shaper=leave_one_out", *function("shaper", "breaks"), f"output={mine / 'run'}")
    assert "raised in the component mine.breaks, which is shaper" in "\n".join(raised.value.__notes__)


def test_a_filter_that_drops_everything_is_told_and_trains_nothing(mine, monkeypatch, capfd):
    run_train(
        monkeypatch, *SHORT, *function("filter", "keeps_nothing"), "trainer.max_epochs=1", f"output={mine / 'run'}"
    )
    said = "".join(capfd.readouterr())
    assert re.search("The filter dropped all|has signal", said), said


def test_a_filter_of_the_wrong_shape_is_refused(mine, monkeypatch):
    message = refusal(monkeypatch, mine, *function("filter", "keeps_too_much"))
    assert "one entry per group" in message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("filter=unknown", ["filter", "keep_all"]),
        ("batch=unknown", ["batch=unknown", "batch.KEY=VALUE"]),
        ("zero_reward=unknown", ["zero_reward=unknown", "zero_reward.KEY=VALUE"]),
        ("validation=unknown", ["validation=unknown", "validation.KEY=VALUE"]),
    ],
)
def test_a_value_in_the_place_of_a_group_gets_a_sentence(tmp_path, monkeypatch, override, words):
    message = refusal(monkeypatch, tmp_path, override)
    assert all(word in message for word in words), message


def test_a_regularizer_without_its_package_line_is_told_what_to_write(mine, monkeypatch):
    folder = mine / "conf" / "regularizer"
    folder.mkdir(parents=True)
    (folder / "distance.yaml").write_text("_target_: mine.to_reference\n_partial_: true\n")
    with pytest.raises(SystemExit) as stopped:
        run_train(
            monkeypatch, "--config-dir", str(mine / "conf"), *SHORT, "regularizer=[distance]", f"output={mine / 'run'}"
        )
    message = str(stopped.value)
    assert "# @package regularizer.NAME" in message


def test_an_own_loss_without_partial_is_told_what_to_write(mine, monkeypatch):
    message = refusal(monkeypatch, mine, "~loss.clip_low", "~loss.clip_high", "loss._target_=mine.to_reference")
    assert "_partial_: true" in message


def test_overlong_filtering_alone_forces_no_logprob_pass(tmp_path, monkeypatch):
    run_train(monkeypatch, *SHORT, "correction=[overlong_filtering]", "trainer.max_epochs=1", "sampler._target_=tests.silent.Silent",
              "validation.sampler._target_=rlmod.sampler.hf.HF", f"output={tmp_path / 'run'}")  # fmt: skip
    assert "completions/entropy" not in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
