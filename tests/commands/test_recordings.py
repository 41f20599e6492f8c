"""Recordings of other tools as the input of rlmod-eval: samples of lm-eval, logs of Inspect."""

import json
from pathlib import Path

import pytest

from rlmod.commands.recordings import answer_of, read_recordings
from tests.command_line import refused_eval, run_eval

DOC = {"question": "What is 3 + 4?", "answer": "3 + 4 = 7\n#### 7"}


def lm_eval(number: int, *texts: str, **changed: object) -> dict[str, object]:
    line = {
        "doc_id": number,
        "doc": DOC,
        "target": DOC["answer"],
        "arguments": {"gen_args_0": {"arg_0": "Question: What is 3 + 4?\nAnswer:", "arg_1": {"until": ["Question:"]}}},
        "resps": [list(texts)],
        "filtered_resps": ["7"],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "doc_hash": "0f",
        "exact_match": 1.0,
    }
    return {name: value for name, value in {**line, **changed}.items() if value is not None}


def inspect(number: int, *contents: object, **changed: object) -> dict[str, object]:
    choices = [{"message": {"role": "assistant", "content": each}, "stop_reason": "stop"} for each in contents]
    sample = {
        "id": number,
        "epoch": 1,
        "input": "What is 3 + 4?",
        "target": "7",
        "output": {"model": "mockllm/model", "choices": choices},
        "scores": {"match": {"value": "C", "answer": "7"}},
    }
    return {**sample, **changed}


def save_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def save_log(path: Path, *samples: object) -> Path:
    log = {"version": 2, "status": "success", "eval": {"task": "sums"}, "samples": list(samples)}
    path.write_text(json.dumps(log, indent=2), encoding="utf-8")
    return path


def scored(source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.tokenizer", lambda *_: pytest.fail("a model was asked for"))
    run_eval(monkeypatch, f"completions={source}", "reward=math_verify", f"output={folder / 'out.jsonl'}")
    return [json.loads(line) for line in (folder / "out.jsonl").open(encoding="utf-8")]


def test_every_response_of_lm_eval_is_scored(tmp_path, monkeypatch):
    source = save_lines(
        tmp_path / "samples_sums.jsonl", lm_eval(0, "It is 7.", "It is 8."), lm_eval(1, "\\boxed{7}", target=7)
    )
    records = scored(source, tmp_path, monkeypatch)
    assert [record["reward"] for record in records] == [1.0, 0.0, 1.0]
    assert [record["doc_id"] for record in records] == [0, 0, 1]
    assert records[0]["doc"] == DOC


def test_a_response_that_is_recorded_for_two_filters_is_scored_once(tmp_path, caplog):
    lines = (
        lm_eval(0, "7"),
        lm_eval(0, "7", filter="flexible-extract"),
        lm_eval(1, "8"),
        lm_eval(1, "8", filter="flexible-extract"),
    )
    found = read_recordings(save_lines(tmp_path / "a.jsonl", *lines))
    assert [record["completion"] for _, record in found] == ["7", "8"]
    assert "2 lines repeat the responses for another filter than strict-match" in caplog.text


def test_every_choice_of_inspect_is_scored(tmp_path, monkeypatch):
    parts = [
        {"type": "reasoning", "reasoning": "maybe 9"},
        {"type": "text", "text": "It is 7"},
        {"type": "text", "text": "."},
    ]
    source = save_log(
        tmp_path / "log.json", inspect(1, "\\boxed{7}", "8"), inspect(2, parts, target=["6", "7"], epoch=2)
    )
    records = scored(source, tmp_path, monkeypatch)
    assert [record["reward"] for record in records] == [1.0, 0.0, 1.0]
    assert [(record["id"], record["epoch"]) for record in records] == [(1, 1), (1, 1), (2, 2)]
    assert records[2]["completion"] == "It is 7."


def test_several_targets_are_several_answers():
    assert answer_of({"answer": ["6", 7.0, "6"]}) == ("6", "7")
    assert answer_of({"answer": ["7"]}) == "7"
    assert answer_of({"answer": 7.0}) == "7"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([lm_eval(0, "7"), lm_eval(1, "7", target=None)], "a.jsonl:2: no field target, as samples of lm-eval have"),
        ([lm_eval(0, "7"), lm_eval(1, "7", target=[])], "a.jsonl:2: target must be text or a number, got []"),
        ([lm_eval(0, "7", resps=[[[-1.5, False]], [[-2.5, True]]])], "a.jsonl:1: resps must hold generated texts"),
        ([lm_eval(0, "7", resps=[])], "a.jsonl:1: resps must hold generated texts"),
        ([lm_eval(0, "7"), {"completion": "7", "answer": "7"}], "a.jsonl:2: no field doc"),
    ],
)
def test_a_bad_line_of_lm_eval_is_named(lines, message, tmp_path, monkeypatch):
    source = save_lines(tmp_path / "a.jsonl", *lines)
    assert message in refused_eval(monkeypatch, f"completions={source}", f"output={tmp_path / 'out.jsonl'}")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (
            [inspect(1, "7"), inspect(5)],
            "log.json: samples[1] (id 5, epoch 1): output.choices must hold at least one choice",
        ),
        ([inspect(1, error={"message": "rate limit"})], "the sample failed (rate limit); remove the sample"),
        (
            [inspect(1, 7)],
            "samples[0] (id 1, epoch 1): output.choices[0].message.content must be text or a list of parts, got int",
        ),
        ([inspect(1, "7", target={})], "samples[0] (id 1, epoch 1): target must be text or a number, got {}"),
        (["7"], "samples[0]: a sample must be an object, got str"),
        ([], "a .json file must be a log of Inspect"),
    ],
)
def test_a_bad_sample_of_inspect_is_named(samples, message, tmp_path, monkeypatch):
    source = save_log(tmp_path / "log.json", *samples)
    assert message in refused_eval(monkeypatch, f"completions={source}", f"output={tmp_path / 'out.jsonl'}")


def test_a_file_that_is_none_of_these_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "log.json"
    broken.write_text('{"samples": [\n{"id": 1,}]}', encoding="utf-8")
    output = f"output={tmp_path / 'out.jsonl'}"
    assert "log.json:2: not a JSON file" in refused_eval(monkeypatch, f"completions={broken}", output)
    (tmp_path / "log.eval").write_bytes(b"PK")
    assert "inspect log convert" in refused_eval(monkeypatch, f"completions={tmp_path / 'log.eval'}", output)


def test_several_answers_of_rlmods_own_samples_are_read(tmp_path):
    lines = [{"completion": "4", "answer": ["0", 4.0]}, {"completion": "5", "answer": 5}]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [answer_of(record) for _, record in read_recordings(path)] == [("0", "4"), "5"]
    path.write_text('{"completion": "4", "answer": []}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"samples\.jsonl:1: answer must be text or a number, got \[\]"):
        read_recordings(path)


def test_targets_with_a_whole_solution_get_a_hint(tmp_path, caplog):
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(lm_eval(0, "#### 7")) + "\n", encoding="utf-8")
    read_recordings(path)
    assert "have several lines" in caplog.text
