from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from rlmod.config.build import build_reward
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward.exact_match import ExactMatch
from rlmod.reward.overlong import Overlong
from rlmod.reward.weighted import Weighted
from rlmod.types import Problem, Texts
from tests.config.composing import composed

TEXTS = Texts(completions=["6", "7", "6"], answers=["6", "6", "6"], lengths=[10, 8, 4])
EXACT = "rlmod.reward.exact_match.ExactMatch"
OVERLONG = {"_target_": "rlmod.reward.overlong.Overlong", "max_tokens": 10, "buffer": 4}


def fail(texts):
    raise KeyError("no such field")


def test_the_weighted_terms_add_up_to_the_reward():
    reward = Weighted(
        terms={
            "correct": {"weight": 2.0, "reward": ExactMatch()},
            "overlong": {"weight": 0.5, "reward": Overlong(max_tokens=10, buffer=4)},
        }
    )
    total, terms, outcomes, *_ = compute_rewards(reward, TEXTS)
    # overlong: (6 - 10)/4 = -1, (6 - 8)/4 = -0.5, 0; halved
    assert {name: term.tolist() for name, term in terms.items()} == {"correct": [2, 0, 2], "overlong": [-0.5, -0.25, 0]}
    assert total.tolist() == [1.5, -0.25, 2]
    # The penalty does not make a correct answer wrong.
    assert outcomes.tolist() == [2, 0, 2]


def test_a_reward_of_nothing_but_penalties_judges_nothing_right():
    reward = Weighted(terms={"overlong": {"weight": 1, "reward": Overlong(max_tokens=10, buffer=4)}})
    assert compute_rewards(reward, TEXTS).outcomes.tolist() == [0, 0, 0]


def test_what_a_term_finds_wrong_with_the_problems_is_told_by_its_name():
    class Refusing(Overlong):
        def prepare(self, problems, tokenizer):
            raise ValueError(f"{problems[0].source} is refused")

    terms = {"right": {"weight": 1, "reward": Refusing(max_tokens=10, buffer=4)}}
    reward = Weighted(terms={**terms, "same": {"weight": 1, "reward": ExactMatch()}})
    with pytest.raises(ValueError, match=r"reward\.terms\.right: a\.csv:3 is refused"):
        reward.prepare([Problem(prompt="?", answer="", source="a.csv:3")], None)


def test_a_term_may_be_weighted_itself():
    inner = Weighted(terms={"a": {"weight": 3, "reward": ExactMatch()}, "b": {"weight": 1, "reward": ExactMatch()}})
    total, terms, *_ = compute_rewards(Weighted(terms={"both": {"weight": 0.5, "reward": inner}}), TEXTS)
    assert terms["both"].tolist() == total.tolist() == [2, 0, 2]


CONFIG = {
    "_target_": "rlmod.reward.weighted.Weighted",
    "terms": {
        "correct": {"weight": 1.0, "reward": {"_target_": EXACT}},
        "overlong": {"weight": 1.0, "reward": OVERLONG},
    },
}


@pytest.mark.parametrize("make", [build_reward, hydra.utils.instantiate], ids=["build", "hydra"])
def test_it_is_built_from_a_configuration_with_overrides(make):
    config = OmegaConf.merge(OmegaConf.create(CONFIG), OmegaConf.from_dotlist(["terms.overlong.weight=0.5"]))
    assert compute_rewards(make(config), TEXTS)[0].tolist() == [0.5, -0.25, 1]


def test_the_yaml_composes_with_the_samplers_limit():
    reward: Any = build_reward(composed("reward=weighted", "sampler.max_new_tokens=2000").reward)
    assert reward.terms["overlong"]["reward"] == Overlong(max_tokens=2000, buffer=16)
    assert list(reward.terms) == ["correct", "overlong"]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, r"^reward\.terms is empty"),
        ({"a": {"reward": ExactMatch()}}, r"^reward\.terms\.a\.weight is missing"),
        ({"a": {"weight": 1.0}}, r"^reward\.terms\.a\.reward is missing"),
        ({"a": {"weight": 1.0, "reward": ExactMatch(), "wieght": 2.0}}, r"^reward\.terms\.a\.wieght is unknown"),
        (
            {"a": {"weight": 1.0, "reward": ExactMatch(), "counts_for_correctness": "no"}},
            r"^reward\.terms\.a\.counts_for_correctness must be true or false, got 'no'",
        ),
        ({"a": {"weight": "1", "reward": ExactMatch()}}, r"^reward\.terms\.a\.weight must be a finite number, got '1'"),
        ({"a": {"weight": float("nan"), "reward": ExactMatch()}}, r"^reward\.terms\.a\.weight must be a finite number"),
        ({"a": {"weight": 1.0, "reward": {"pattern": "x"}}}, r"^reward\.terms\.a\.reward must have a _target_"),
    ],
)
def test_a_wrong_term_names_its_key(terms, message):
    with pytest.raises(ValueError, match=message):
        Weighted(terms=terms)


def test_an_error_inside_a_term_names_the_term_and_its_cause():
    reward = Weighted(terms={"mine": {"weight": 1.0, "reward": fail}})
    with pytest.raises(RewardError, match=r"^reward\.terms\.mine: the reward fail raised KeyError: 'no such field'"):
        compute_rewards(reward, TEXTS)


def test_a_nan_inside_a_term_is_found_even_under_a_weight_of_zero():
    reward = Weighted(terms={"mine": {"weight": 0.0, "reward": lambda texts: torch.tensor([0.0, torch.nan, 0.0])}})
    with pytest.raises(RewardError, match=r"^reward\.terms\.mine: .* nan for row 1; its completion begins '7'"):
        compute_rewards(reward, TEXTS)
