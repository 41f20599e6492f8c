"""Recipes with every option of every group, and at every size: each is built, or refused in one sentence."""

import itertools
import re
import warnings

import pytest
import yaml
from hydra.errors import InstantiationException
from omegaconf import DictConfig

from rlmod.config.build import Components
from rlmod.config.compatibility import check
from tests.config.composing import ROOT, composed
from tests.config.test_conf import LISTS, NEEDS, OPTIONS, RECIPES, SIZES, WAY, is_variant

GROUPS = {stage: [o for group, o in OPTIONS if group == stage and not is_variant(stage, o)] for stage in WAY}
"""A variant has the keys of the option that it varies."""
GROUPS |= {"sampler": ["hf", "vllm_server"], "size": list(SIZES)}
"""sampler=vllm is refused where vLLM is not installed, before anything else is looked at."""
GIVEN = {
    "guide=demonstrations": ("guide.path=demonstrations.jsonl",),
    "guide=policy": ("guide.policy.path=folder",),
    "reward=classifier": ("reward.path=folder",),
}
"""Overrides that options ask for."""


TABLE = ("grpo", "dapo", "dapo_forking", "gtpo", "grpo_s")
"""The methods of GTPO's Table 1."""


def build(cfg: DictConfig) -> str:
    """Return the sentence with which the config is refused; empty if its components are built and fit together."""
    cfg.output = "unused"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(Components.from_config(cfg))
        except InstantiationException as error:
            if not isinstance(error.__cause__, ValueError):  # such as an argument that the class does not have
                raise
            return str(error.__cause__)
        except ValueError as error:
            return str(error)
    return ""


def swaps() -> list[tuple[str, ...]]:
    """Return lists of options, one of each group, that together contain every option."""
    columns = [
        [f"{stage}=[{option}]" if stage in LISTS else f"{stage}={option}" for option in options]
        for stage, options in GROUPS.items()
    ]
    longest = max(map(len, columns))
    return [tuple(column[i % len(column)] for column in columns) for i in range(longest)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_no_key_of_an_option_that_may_be_swapped(recipe):
    """Only ``sampler``, whose parameters all samplers share."""
    body = yaml.safe_load((ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    assert set(body) & {*WAY, "policy", "data", "verifier", "strategy", "schedule"} <= {"sampler"}
    shared = yaml.safe_load((ROOT / "conf" / "sampler" / "base" / "parameters.yaml").read_text(encoding="utf-8"))
    assert set(body.get("sampler", ())) <= set(shared)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_every_option_is_built_or_refused_in_a_sentence(recipe):
    """One composition swaps an option of each group; all together hold every option of every group with the recipe."""
    for options in swaps():
        (size,) = [option.removeprefix("size=") for option in options if option.startswith("size=")]
        further = itertools.chain.from_iterable(GIVEN.get(option, ()) for option in options)
        files = NEEDS["real"] if recipe == "real" else SIZES[size]  # it brings its problems at any size
        sentence = build(composed(f"experiment={recipe}", *options, *files, *further))
        assert "\n" not in sentence
        assert not sentence or re.search(r"[a-z_]+[.=][a-z_]+", sentence), sentence  # it names a key


@pytest.mark.parametrize("recipe", TABLE)
@pytest.mark.parametrize("size", SIZES)
def test_the_five_methods_are_built_at_every_size(recipe, size):
    engine = ("sampler=hf",) if size.startswith("paper") else ()
    assert build(composed(f"experiment={recipe}", f"size={size}", *SIZES[size], *engine)) == ""


def test_a_size_does_not_choose_the_components_of_the_algorithm():
    for recipe in ("gtpo", "dapo", "luffy"):
        toy, paper = (composed(f"experiment={recipe}", f"size={size}") for size in ("toy", "paper_7b"))
        for stage in ("filter", "shaper", "correction", "loss", "regularizer"):
            assert toy.get(stage) == paper.get(stage)
        assert toy.aggregation._target_ == paper.aggregation._target_
        assert recipe == "luffy" or toy.reward._target_ == paper.reward._target_
    assert composed("experiment=gtpo", "size=paper_7b").reward.reward._target_ == "rlmod.reward.math_verify.MathVerify"
    assert composed("experiment=grpo", "size=gsm8k").reward._target_ == "rlmod.reward.math_verify.MathVerify"
    assert composed("experiment=gtpo").reward.reward._target_ == "rlmod.reward.exact_match.ExactMatch"
    assert (
        composed("experiment=gtpo", "reward@verifier=math_verify").reward.reward._target_
        == "rlmod.reward.math_verify.MathVerify"
    )
