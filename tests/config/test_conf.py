"""The folders are the map: package = conf group = key, module = YAML = snake_case of its class, in the order of the data."""

import inspect
import re
from dataclasses import fields

import pytest
from hydra.utils import get_class

from rlmod.config.build import Components
from rlmod.config.validation import check_types
from rlmod.reward._failures import RewardSettings
from rlmod.training.module import RLModule
from tests.config.composing import ROOT, composed

WAY = [
    "sampler",
    "guide",
    "reward",
    "filter",
    "reference",
    "shaper",
    "correction",
    "aggregation",
    "loss",
    "regularizer",
]
LISTS = ["correction", "regularizer"]  # of these there may be several
OPTIONS = [
    (stage, file.stem)
    for stage in WAY
    for file in sorted((ROOT / "conf" / stage).glob("*.yaml"))
    if file.stem != "none"
]
RECIPES = sorted(file.stem for file in (ROOT / "conf" / "experiment").glob("*.yaml"))
DEBUGS = sorted(file.stem for file in (ROOT / "conf" / "debug").glob("*.yaml"))
FILES = ("policy.path=folder", "data.path=a.jsonl", "data.validation_path=b.jsonl")
SIZES = {"toy": (), "gsm8k": FILES, "paper_7b": FILES, "paper_32b": FILES}
NEEDS = {"gsm8k": FILES, "real": ("policy.path=tiny",)}
"""Overrides that a recipe needs: files of the user, or another policy than one that has to be fetched."""


def is_variant(stage: str, option: str) -> bool:
    """Return True if the option's YAML is another option of its group with other numbers."""
    text = (ROOT / "conf" / stage / f"{option}.yaml").read_text(encoding="utf-8")
    return "_target_:" not in text


@pytest.mark.parametrize(("stage", "option"), [each for each in OPTIONS if not is_variant(*each)])
def test_every_option_is_a_module_with_a_class_of_its_name_and_all_its_fields(stage, option):
    cfg = composed(f"{stage}=[{option}]" if stage in LISTS else f"{stage}={option}")
    node = cfg[stage][option] if stage in LISTS else cfg[stage]
    module, _, name = node._target_.rpartition(".")
    assert module == f"rlmod.{stage}.{option}"
    assert re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower() == option
    described = {field.name for field in fields(get_class(node._target_))}
    if stage == "reward":  # settings of any reward; a reward without such a field is wrapped
        described |= {field.name for field in fields(RewardSettings)}
    assert {key for key in node if not key.startswith("_")} == described
    doc = get_class(node._target_).__doc__ or ""
    if stage in ("reference", "shaper", "correction", "aggregation", "loss", "regularizer"):
        for part in ("Source:", "Degenerate:", "Reads:"):
            assert part in doc, f"{name} lacks {part}"


@pytest.mark.parametrize(("stage", "option"), [each for each in OPTIONS if is_variant(*each)])
def test_a_variant_is_an_option_with_other_numbers_and_no_further_keys(stage, option):
    text = (ROOT / "conf" / stage / f"{option}.yaml").read_text(encoding="utf-8")
    (base,) = set(re.findall(r"^  - (\w+)", text, re.MULTILINE)) - {"_self_"}
    before, after = (
        composed(f"{stage}=[{name}]" if stage in LISTS else f"{stage}={name}")[stage] for name in (base, option)
    )
    if stage in LISTS:
        (before,), (after,) = before.values(), after.values()
    assert set(before) == set(after)
    assert before != after


@pytest.mark.parametrize("stage", WAY)
def test_every_module_has_an_option(stage):
    modules = {file.stem for file in (ROOT / "rlmod" / stage).glob("[!_]*.py")}
    assert modules == {option for group, option in OPTIONS if group == stage and not is_variant(group, option)}


def test_the_order_of_the_data_is_the_same_everywhere():
    groups = re.findall(r"^  - (\w+):", (ROOT / "conf" / "train.yaml").read_text(), re.MULTILINE)
    assert [group for group in groups if group in WAY] == WAY
    built = [field.name for field in fields(Components)]
    assert [name for name in built if name in WAY] == WAY
    wired = list(inspect.signature(RLModule).parameters)
    assert [name for name in wired if name in WAY] == WAY
    for document in (inspect.getdoc(inspect.getmodule(RLModule)), (ROOT / "README.md").read_text()):
        start = document.index("prompts -> sampler")
        way = document[start : document.index("optimizer", start)]
        assert [stage.strip() for stage in way.split("->") if stage.strip() in WAY] == WAY


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_builds_and_says_what_to_expect(recipe):
    text = (ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8")
    cfg = composed(f"experiment={recipe}", *NEEDS.get(recipe, ()))
    cfg.output = "unused"
    assert isinstance(Components.from_config(cfg), Components)
    assert cfg.name == recipe
    assert f"rlmod-train experiment={recipe}" in text
    assert "Hardware" in text
    assert "xpect" in text or "no number to state" in text.replace("\n# ", " ")


@pytest.mark.parametrize("debug", DEBUGS)
def test_every_debug_run_composes(debug):
    assert composed(f"debug={debug}").trainer.max_epochs <= 20


def test_check_types_knows_numbers_switches_and_texts():
    cfg = composed("shaper.eps=1", "threshold=1")  # a whole number is a number
    check_types(cfg.shaper, "shaper")
    check_types(cfg.filter, "filter")
    with pytest.raises(ValueError, match=r"sampler\.top_k must be a whole number, got True"):
        check_types(composed("sampler.top_k=true").sampler, "sampler")
    with pytest.raises(ValueError, match=r"optimizer\.lr must be a number of at most 64 bits, got one of 1329 bits"):
        check_types(composed("optimizer.lr=1" + "0" * 400).optimizer, "optimizer")
