"""The adapters of docs/from_trl.md: reward functions that were written for TRL and verl."""

import re
from decimal import Decimal
from pathlib import Path

from hydra.utils import instantiate

from rlmod.config.build import build_reward
from rlmod.reward._compute import compute_rewards
from rlmod.types import Problem, Texts

PAGE = (Path(__file__).parents[1] / "docs" / "from_trl.md").read_text(encoding="utf-8")


def adapters() -> dict:
    code = re.search(r"    # mylab/adapters\.py\n((?:    .*\n|\n)+)", PAGE)
    assert code is not None
    names: dict = {}
    exec(re.sub(r"^    ", "", code[1], flags=re.MULTILINE), names)
    return names


def texts() -> Texts:
    records = [
        {"prompt": "1+1", "solution": "2", "data_source": "sums", "extra_info": {"level": Decimal("0.5")}},
        {"prompt": "1+2", "solution": "3", "data_source": "other", "extra_info": {"level": 2}},
    ]
    problems = [
        Problem(prompt=r["prompt"], answer=(r["solution"], "x"), source=str(i), extra=r) for i, r in enumerate(records)
    ]
    return Texts(completions=["2", "9"], answers=[p.answer for p in problems], problems=problems)


def trl_reward(prompts, completions, solution, **columns):
    assert set(columns) == {"data_source", "extra_info"}
    assert prompts == ["1+1", "1+2"]
    return [float(c == s) for c, s in zip(completions, solution, strict=True)]


def verl_reward(data_source, solution_str, ground_truth, extra_info):
    return (solution_str == ground_truth) + float(extra_info["level"]) * (data_source == "sums")


def test_a_reward_function_of_trl_gets_the_columns():
    assert adapters()["from_trl"](texts(), trl_reward) == [1.0, 0.0]


def test_a_reward_function_of_verl_gets_source_answer_and_extra_info():
    assert adapters()["from_verl"](texts(), verl_reward) == [1.5, 0.0]


def test_the_function_may_be_named_in_the_yaml(monkeypatch, tmp_path):
    (tmp_path / "adapters_of_the_page.py").write_text(
        "def from_trl(texts, function):\n    return function([p.prompt for p in texts.problems], list(texts.completions),"
        " **{k: [p.extra[k] for p in texts.problems] for k in ('solution', 'data_source', 'extra_info')})\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = {"_target_": "hydra.utils.get_method", "path": "tests.test_from_trl.trl_reward"}
    assert instantiate(function) is trl_reward
    reward = build_reward({"_target_": "adapters_of_the_page.from_trl", "function": function})
    assert compute_rewards(reward, texts()).rewards.tolist() == [1.0, 0.0]
