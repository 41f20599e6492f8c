import functools
import sys
from collections.abc import Sequence

import pytest
import torch
from omegaconf import OmegaConf

from rlmod.config.build import build_reward
from rlmod.reward._compute import RewardError, compute_rewards
from rlmod.reward.exact_match import ExactMatch
from rlmod.types import Texts

TEXTS = Texts(completions=["one", "two" * 100], answers=["1", "2"])


def returning(value):
    def mine(texts):
        return value

    return mine


@pytest.mark.parametrize("value", [[1, 0.5], (True, 0.5), torch.tensor([1.0, 0.5], dtype=torch.float64)])
def test_plain_numbers_become_a_float32_tensor_without_terms(value):
    total, terms, *_ = compute_rewards(returning(value), TEXTS)
    assert total.dtype == torch.float32
    assert total.tolist() == [1.0, 0.5]
    assert terms == {}


def test_a_gradient_is_left_behind():
    assert not compute_rewards(returning(torch.ones(2, requires_grad=True)), TEXTS)[0].requires_grad


def test_named_terms_are_summed():
    total, terms, *_ = compute_rewards(returning({"a": [1.0, 2.0], "b": torch.tensor([0.25, -4.0])}), TEXTS)
    assert total.tolist() == [1.25, -2.0]
    assert {name: term.tolist() for name, term in terms.items()} == {"a": [1, 2], "b": [0.25, -4]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], r"mine returned 1 numbers for 2 completions$"),
        ([], r"mine returned 0 numbers for 2 completions$"),
        ({"a": [0.0, 0.0], "b": [1.0, 2.0, 3.0]}, r"the term 'b' of the reward .*mine returned 3 numbers for 2"),
        ([0.0, float("nan")], r"mine returned nan for row 1; its completion begins '(two){33}t'$"),
        ({"a": [float("inf"), 0.0]}, r"the term 'a' .* returned inf for row 0; its completion begins 'one'$"),
        ([1e39, 0.0], r"returned 1e\+39 for row 0"),  # infinite as float32
        (["1", "2"], r"returned '1' for row 0, which is not a number"),
        (torch.zeros(2, 1), r"a tensor of shape \[2, 1\]"),
        (torch.tensor(1.0), r"a tensor of shape \[\]"),
        (None, r"returned NoneType, expected one number per completion"),
        ("12", r"returned str, expected one number per completion"),
        (1.0, r"returned float, expected one number per completion"),
        ({}, r"a mapping without a single term"),
    ],
)
def test_what_is_no_reward_is_an_error(value, message):
    with pytest.raises(RewardError, match=message):
        compute_rewards(returning(value), TEXTS)


def broken(texts):
    return 1 / 0


class Broken:
    def __call__(self, texts):
        raise RuntimeError("out of luck")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (broken, "the reward broken raised ZeroDivisionError: division by zero"),
        (functools.partial(broken), "the reward broken raised ZeroDivisionError: division by zero"),
        (Broken(), "the reward Broken raised RuntimeError: out of luck"),
    ],
)
def test_an_exception_names_the_reward_and_is_chained(reward, message):
    with pytest.raises(RewardError, match=f"^{message}$") as caught:
        compute_rewards(reward, TEXTS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError | RuntimeError)


@pytest.fixture
def mylab(tmp_path, monkeypatch):
    """A user's module in the current folder."""
    (tmp_path / "mylab.py").write_text(
        "def length(texts, scale=1.0):\n    return [scale * len(c) for c in texts.completions]\n"
        "def factory(value):\n    return lambda texts: [value] * len(texts)\n"
    )
    (tmp_path / "mylab_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("mylab", "mylab_broken"):
        sys.modules.pop(name, None)


def test_a_class_is_instantiated():
    assert build_reward(
        OmegaConf.create({"_target_": "rlmod.reward.exact_match.ExactMatch", "correct": 2.0})
    ) == ExactMatch(correct=2.0)


@pytest.mark.parametrize("create", [dict, OmegaConf.create], ids=["dict", "DictConfig"])
def test_a_plain_function_is_the_reward_and_the_other_keys_are_its_arguments(mylab, create):
    reward = build_reward(create({"_target_": "mylab.length", "scale": 0.5}))
    assert compute_rewards(reward, TEXTS)[0].tolist() == [1.5, 150.0]


def test_an_exception_in_a_function_that_was_built_names_the_function(mylab):
    with pytest.raises(RewardError, match=r"^the reward length raised TypeError"):
        compute_rewards(build_reward({"_target_": "mylab.length", "scale": {}}), TEXTS)


def test_a_factory_says_so(mylab):
    reward = build_reward({"_target_": "mylab.factory", "_partial_": False, "value": 0.25})
    assert compute_rewards(reward, TEXTS)[0].tolist() == [0.25, 0.25]


def test_plain_functions_work_as_terms_also_nested_ones(mylab):
    leaf = {"_target_": "mylab.length", "scale": 0.5}
    inner = {"_target_": "rlmod.reward.weighted.Weighted", "terms": {"length": {"weight": 2, "reward": leaf}}}
    config = {
        "_target_": "rlmod.reward.weighted.Weighted",
        "terms": {"flat": {"weight": 1.0, "reward": leaf}, "nested": {"weight": 10.0, "reward": inner}},
    }
    total, terms, *_ = compute_rewards(build_reward(OmegaConf.create(config)), TEXTS)
    assert terms["flat"].tolist() == [1.5, 150]
    assert terms["nested"].tolist() == [30, 3000]
    assert total.tolist() == [31.5, 3150]


def test_interpolations_into_the_whole_configuration_are_resolved(mylab):
    config = OmegaConf.create({"k": 3.0, "reward": {"_target_": "mylab.length", "scale": "${k}"}})
    assert compute_rewards(build_reward(config.reward), TEXTS)[0].tolist() == [9.0, 900.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pattern": "x"}, r"^reward\._target_ is missing"),
        (
            {"_target_": "nolab.mine"},
            r"^reward\._target_: .*No module named .nolab. .the module nolab is looked for in the current folder",
        ),
        ({"_target_": "mylab.nothing"}, r"^reward\._target_: cannot import 'mylab\.nothing'"),
        ({"_target_": "mylab_broken.mine"}, r"^reward\._target_: .*No module named .no_such_library"),
        (
            {"_target_": "rlmod.reward.exact_match.ExactMatch", "pattern": "("},
            r"^reward: reward\.pattern=.* is not a regular",
        ),
        (
            {"_target_": "rlmod.reward.exact_match.ExactMatch", "patern": "x"},
            r"^reward: .*unexpected keyword.*'patern'",
        ),
        (
            {
                "_target_": "rlmod.reward.weighted.Weighted",
                "terms": {"a": {"weight": 1, "reward": {"_target_": "nolab.x"}}},
            },
            r"^reward\.terms\.a\.reward\._target_: cannot import 'nolab\.x'",
        ),
        (
            {
                "_target_": "rlmod.reward.weighted.Weighted",
                "terms": {
                    "a": {"weight": 1, "reward": {"_target_": "rlmod.reward.exact_match.ExactMatch", "pattern": "("}}
                },
            },
            r"^reward\.terms\.a\.reward: reward\.pattern=.* is not a regular",
        ),
        (
            {"_target_": "rlmod.reward.weighted.Weighted", "terms": {"a": {"weight": 1}}},
            r"reward\.terms\.a\.reward is missing",
        ),
    ],
)
def test_a_wrong_configuration_names_its_key(mylab, config, message):
    with pytest.raises(ValueError, match=message):
        build_reward(config)


def test_rows_keep_their_types_for_sequences_of_any_kind():
    class Own(Sequence):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return [torch.tensor(0.5), 1][index]

    assert compute_rewards(returning(Own()), TEXTS)[0].tolist() == [0.5, 1.0]


def _of_trl(completions, answers, **kwargs):
    return [0.0] * len(completions)


def _two_arguments(texts, scale):
    return [scale] * len(texts)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": f"{__name__}._of_trl"}, r"^reward: the reward is called with one argument, texts"),
        ({"_target_": f"{__name__}._two_arguments"}, r"^reward: .*missing a required argument: 'scale'"),
        (
            {"_target_": f"{__name__}._two_arguments", "per_char": 1},
            r"^reward\.per_char: _two_arguments has no such argument",
        ),
        (
            {
                "_target_": "rlmod.reward.weighted.Weighted",
                "terms": {"a": {"weight": 1, "reward": {"_target_": f"{__name__}._of_trl"}}},
            },
            r"^reward\.terms\.a\.reward: the reward is called with one argument",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_is_sampled(config, message):
    with pytest.raises(ValueError, match=message):
        build_reward(config)
