"""Components of one's own, run by the command: what they declare, what they return, and what they raise."""

import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from rlmod.config import compatibility
from rlmod.config.build import Components
from rlmod.interfaces import check_declarations
from rlmod.reward.overlong import Overlong
from tests.command_line import SHORT, run_train
from tests.config.composing import composed

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
        ("guard=unknown", ["guard=unknown", "guard.KEY=VALUE"]),
        ("guard.max_skipped=0", ["guard.max_skipped must be at least 1, got 0"]),
        ("zero_reward=unknown", ["zero_reward=unknown", "zero_reward.KEY=VALUE"]),
        ("validation=unknown", ["validation=unknown", "validation.KEY=VALUE"]),
        ("batch=null", ["batch=null: a run cannot do without it"]),
        ("zero_reward=null", ["zero_reward=null: a run cannot do without it"]),
        ("data.train=null", ["data.train=null: a run cannot do without it"]),
        ("loss=null", ["a group got null", "guide=none"]),
        ("validation.reward=null", ["validation.reward=null: give a reward"]),
        ("validation.reward=unknown", ["validation.reward=unknown: give a reward"]),
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


def test_something_that_is_no_component_is_refused(monkeypatch, tmp_path):
    fields_of_loss = ("~loss.clip_low", "~loss.clip_high")
    message = refusal(monkeypatch, tmp_path, *fields_of_loss, "loss._target_=builtins.dict")
    assert "loss: builtins.dict gives an object of type dict, which is no Loss" in message


def component(**declarations: Any) -> Any:
    def shaper(rollouts):
        return rollouts.mask

    vars(shaper).update(declarations)
    return shaper


@pytest.mark.parametrize(
    ("declarations", "message"),
    [
        ({"raeds": frozenset()}, "declares raeds; did you mean reads?"),
        ({"granularty": "token"}, "did you mean granularity?"),
        ({"reads": ["rewards"]}, "reads must be a frozenset"),
        ({"reads": frozenset({"reward"})}, "did you mean 'rewards'"),
        ({"granularity": "word"}, "granularity must be 'token' or 'sequence', got 'word'"),
        ({"min_group_size": 0}, "min_group_size must be a whole number of at least 1, got 0"),
        ({"max_generation_batches": "3"}, "max_generation_batches must be a whole number of at least 1, got '3'"),
        ({"pointwise": "yes"}, "pointwise must be True or False, got 'yes'"),
        ({"needs_answer": "no"}, "needs_answer must be True or False, got 'no'"),
        ({"proportional_to_advantage": 1}, "proportional_to_advantage must be True or False, got 1"),
        ({"counts_for_correctness": None}, "counts_for_correctness must be True or False, got None"),
    ],
)
def test_a_declaration_that_cannot_be_right_is_named(declarations, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_declarations(component(**declarations), "shaper")
    check_declarations(component(reads=frozenset({"rewards"}), heads=4, min_group_size=2), "shaper")


def test_a_filter_that_reads_what_is_computed_later_is_refused():
    components = Components.from_config(composed(*SHORT, "output=unused"))
    keep = component(reads=frozenset({"rewards", "entropy"}))
    with pytest.raises(ValueError, match="'entropy', which is computed only after the filter"):
        compatibility.check(replace(components, filter=keep))


def test_an_only_reward_that_does_not_tell_correct_from_incorrect_is_told():
    components = Components.from_config(composed(*SHORT, "output=unused"))
    with pytest.warns(UserWarning, match="reward=weighted") as told:
        compatibility.check(replace(components, reward=Overlong(max_tokens=40, buffer=10)))
    assert ["Overlong, does not tell correct from incorrect" in str(each.message) for each in told] == [True]


def test_overlong_filtering_alone_forces_no_logprob_pass(tmp_path, monkeypatch):
    run_train(monkeypatch, *SHORT, "correction=[overlong_filtering]", "trainer.max_epochs=1", "sampler._target_=tests.silent.Silent",
              "validation.sampler._target_=rlmod.sampler.hf.HF", f"output={tmp_path / 'run'}")  # fmt: skip
    assert "completions/entropy" not in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
