import json
import sys

import pytest

from rlmod.data.hub_dataset import HubDataset

datasets = pytest.importorskip("datasets", reason="needs the extra rlmod[datasets]")

TRAIN = [{"prompt": f"{i}+1=", "answer": float(i + 1)} for i in range(4)]
TEST = [{"prompt": "9+9=", "answer": 18.0}]


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(params=["save_to_disk", "jsonl"])
def folder(request, tmp_path):
    """A data set of two splits."""
    path = tmp_path / "sums"
    splits = {"train": TRAIN, "test": TEST}
    if request.param == "save_to_disk":
        datasets.DatasetDict({n: datasets.Dataset.from_list(r) for n, r in splits.items()}).save_to_disk(path)
    else:
        path.mkdir()
        for name, records in splits.items():
            (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_splits(folder):
    train, test = HubDataset(name=folder)(), HubDataset(name=folder, split="test")()
    assert [(p.prompt, p.answer) for p in train] == [("0+1=", "1"), ("1+1=", "2"), ("2+1=", "3"), ("3+1=", "4")]
    assert [(p.prompt, p.answer, p.source) for p in test] == [("9+9=", "18", f"{folder}[test]:0")]
    assert [[p.extra for p in problems] for problems in (train, test)] == [TRAIN, TEST]


def test_limit_skip_and_template(folder):
    problems = HubDataset(name=folder, limit=2, skip=1, template="Q: {prompt}")()
    assert [(p.prompt, p.source) for p in problems] == [
        ("Q: 1+1=", f"{folder}[train]:1"),
        ("Q: 2+1=", f"{folder}[train]:2"),
    ]


def test_an_unknown_split(folder):
    with pytest.raises(ValueError, match=r"(?s)split.*(dev.*train.*test|train.*test.*dev)"):
        HubDataset(name=folder, split="dev")()


def test_the_splits_there_are_are_named(tmp_path):
    datasets.DatasetDict({"a": datasets.Dataset.from_list(TRAIN)}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match=r"data\.split .* must be one of those in .*/d, a; got train"):
        HubDataset(name=str(tmp_path / "d"))()


def test_one_data_set_saved_without_splits_is_train(tmp_path):
    name = str(tmp_path / "one")
    datasets.Dataset.from_list(TRAIN).save_to_disk(name)
    assert len(HubDataset(name=name)()) == 4
    with pytest.raises(ValueError, match=r"data\.split .*, train; got test"):
        HubDataset(name=name, split="test")()


def test_chat_messages(tmp_path):
    messages = [{"role": "user", "content": "1+1=?"}]
    name = str(tmp_path / "chat")
    datasets.Dataset.from_list([{"prompt": messages, "reward_model": {"ground_truth": "2"}}]).save_to_disk(name)
    (problem,) = HubDataset(name=name, answer_field="reward_model.ground_truth")()
    assert (problem.prompt, problem.answer) == (tuple(messages), "2")


def test_a_missing_field(folder):
    with pytest.raises(ValueError, match=r"\[train\]:0: data\.answer_field=solution, .* there are: prompt, answer"):
        HubDataset(name=folder, answer_field="solution")()


def test_skipping_everything(folder):
    with pytest.raises(ValueError, match=r"\[test\] holds no problems after the 1 that data\.skip"):
        HubDataset(name=folder, split="test", skip=1)()


def test_a_name_that_cannot_be_loaded():
    with pytest.raises(
        ValueError, match=r"data\.name=no/such .* cannot be loaded, .* from the hub: Couldn't reach[^\n]*$"
    ):
        HubDataset(name="no/such")()


def test_a_folder_without_data(tmp_path):
    with pytest.raises(ValueError, match=r"data\.name=.* cannot be loaded"):
        HubDataset(name=str(tmp_path))()


def test_without_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data\.name=a/b needs datasets: pip install 'rlmod\[datasets\]'"):
        HubDataset(name="a/b")()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, r"data\.name must be a name"),
        ({"limit": 0}, r"data\.limit"),
        ({"skip": -1}, r"data\.skip"),
        ({"template": "{"}, r"data\.template"),
        ({"answer_pattern": "x"}, r"data\.answer_pattern"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        HubDataset(**{"name": "a/b"} | fields)
