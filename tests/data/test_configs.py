"""The files of conf/data, as Hydra makes them."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlmod.rollout.prompts import PromptEncoder
from tests.config.composing import composed

FOLDER = Path(__file__).parents[2] / "conf" / "data"


def group(name: str, /, **overrides: object):
    return OmegaConf.merge({"data": OmegaConf.load(FOLDER / f"{name}.yaml")}, {"data": overrides}).data


def save(path: Path, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": i + 1}) + "\n" for i in range(count)))
    return str(path)


NAMES = [path.stem for path in FOLDER.glob("*.yaml") if "_target_:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_of_every_file(name):
    data = group(name)
    assert {"train", "validation", "encoder"} <= data.keys()
    max_tokens = None if name in ("arithmetic", "sums") else 1024
    chat = False if name == "sums" else None  # its examples show the form
    assert instantiate(data.encoder) == PromptEncoder(max_tokens=max_tokens, chat=chat)
    # One place for each setting: what the sources share is interpolated.
    sources: Any = OmegaConf.to_container(data, resolve=False)
    shared = {"prompt_field", "answer_field", "template", "answer_pattern", "modulus", "seed"} & sources.keys()
    assert all(sources[part][key] == f"${{data.{key}}}" for part in ("train", "validation") for key in shared)


def test_gsm8k_is_problem_file_with_the_fields_of_its_files(tmp_path):
    line = {"question": "Ann has 3 apples and eats 1.", "answer": "3 - 1 = <<3-1=2>>2\n#### 2"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    data = composed(
        "data=gsm8k", f"data.path={tmp_path / 'a.jsonl'}", f"data.validation_path={tmp_path / 'a.jsonl'}"
    ).data
    assert set(data) == set(group("problem_file"))
    (problem,) = instantiate(data.train)()
    assert problem.answer == "2"
    assert (
        problem.prompt
        == "Ann has 3 apples and eats 1.\nReason step by step, and put the final answer within \\boxed{}.\n"
    )


def test_arithmetic():
    data = group("arithmetic", operations="+", train={"size": 30})
    train, validation = instantiate(data.train)(), instantiate(data.validation)()
    assert (len(train), len(validation)) == (30, 512)
    assert not {p.prompt for p in train} & {p.prompt for p in validation}
    assert not any(set("-*") & set(p.prompt) for p in train + validation)
    assert group("arithmetic").train.size == 20_000


def test_problem_file(tmp_path):
    path = save(tmp_path / "a.jsonl", 600)
    data = group("problem_file", path=path, validation_path=save(tmp_path / "b.jsonl", 5), limit=3)
    assert (len(instantiate(data.train)()), len(instantiate(data.validation)())) == (3, 5)
    # One file as both: the first 512 are held out.
    data = group("problem_file", path=path, validation_path=path, skip=512, validation_limit=512)
    assert (len(instantiate(data.train)()), len(instantiate(data.validation)())) == (88, 512)


def test_without_validation(tmp_path):
    data = group("problem_file", path=save(tmp_path / "a.jsonl", 3), validation=None)
    assert instantiate(data.validation) is None
    assert len(instantiate(data.train)()) == 3


def test_verl_parquet(tmp_path):
    path = tmp_path / "train.parquet"
    prompt = [{"role": "user", "content": "1+1=?"}]
    pd.DataFrame([{"prompt": prompt, "reward_model": {"style": "rule", "ground_truth": "2"}}]).to_parquet(path)
    data = group("verl_parquet", path=str(path), validation_path=str(path))
    (problem,) = instantiate(data.train)()
    assert (problem.prompt, problem.answer) == (tuple(prompt), "2")
    assert instantiate(data.validation)() == [problem]


def test_verl_parquet_in_shards_gives_its_columns_to_the_reward(tmp_path):
    for shard in range(2):
        record = {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{shard}+1=?"}],
            "reward_model": {"style": "rule", "ground_truth": str(shard + 1)},
            "extra_info": {"index": shard, "interaction": {"scale": 0.5}},
        }
        pd.DataFrame([record]).to_parquet(tmp_path / f"part-{shard}.parquet")
    data = group("verl_parquet", path=f"{tmp_path}/part-*.parquet", validation_path="unused.parquet")
    problems = instantiate(data.train)()
    assert [p.answer for p in problems] == ["1", "2"]
    assert [p.extra["extra_info"]["index"] for p in problems] == [0, 1]
    extra = problems[0].extra
    assert (extra["data_source"], extra["reward_model"]["ground_truth"]) == ("openai/gsm8k", "1")


def test_trl(tmp_path):
    chat = [{"role": "user", "content": "1+1=?"}]
    lines = [{"prompt": chat, "solution": "$2$", "level": 1}, {"prompt": "1+2=?", "solution": "$3$"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    data = composed("data=trl", f"data.path={path}", "data.validation=null").data
    assert set(data) == set(group("problem_file"))
    problems = instantiate(data.train)()
    assert [(p.prompt, p.answer) for p in problems] == [(tuple(chat), "$2$"), ("1+2=?", "$3$")]
    assert problems[0].extra["level"] == 1


def test_hub_dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the extra rlmod[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    save(tmp_path / "d" / "train.jsonl", 4)
    save(tmp_path / "d" / "test.jsonl", 2)
    data = group("hub_dataset", name=str(tmp_path / "d"))
    assert (len(instantiate(data.train)()), len(instantiate(data.validation)())) == (4, 2)
