import csv
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmod.data.problem_file import ProblemFile
from rlmod.reward._compute import compute_rewards
from rlmod.types import Problem, Texts

RECORDS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}, {"prompt": "3+3=", "answer": "6"}]


@pytest.fixture
def write(tmp_path):
    """Writes a text, or records as JSON Lines, and says where."""

    def written(content: str | list, name: str = "problems.jsonl") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else "".join(json.dumps(r) + "\n" for r in content))
        return path

    return written


def test_numbers_keep_the_form_in_which_they_are_written(write, tmp_path):
    lines = '{"prompt": "a", "answer": 0.0000001}\n{"prompt": "b", "answer": 0.10}\n{"prompt": "c", "answer": 5e0}\n'
    assert [problem.answer for problem in ProblemFile(path=write(lines))()] == ["0.0000001", "0.10", "5"]
    short = pa.array([0.1, 2.0], pa.float32())
    nested = pa.StructArray.from_arrays([short, pa.array([[0.2], [0.3]], pa.list_(pa.float32()))], ["x", "y"])
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": short, "deep": nested}), tmp_path / "a.parquet")
    for field, expected in {"answer": ["0.1", "2"], "deep.x": ["0.1", "2"], "deep.y.0": ["0.2", "0.3"]}.items():
        assert [p.answer for p in ProblemFile(path=tmp_path / "a.parquet", answer_field=field)()] == expected


def test_a_cell_of_a_csv_may_be_long(write):
    [problem] = ProblemFile(path=write('prompt,answer\n"' + "x" * 140_000 + '",1\n', "long.csv"))()
    assert len(problem.prompt) == 140_000


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(RECORDS)


FORMATS = {
    ".jsonl": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
    ".json": lambda path: path.write_text(json.dumps(RECORDS, indent=2)),
    ".csv": write_csv,
    ".parquet": lambda path: pd.DataFrame(RECORDS).to_parquet(path),
    ".JSONL": lambda path: path.write_text("\n".join(map(json.dumps, RECORDS))),
}


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_problems(tmp_path, suffix):
    path = tmp_path / f"problems{suffix}"
    FORMATS[suffix](path)
    problems = ProblemFile(path=path)()
    assert [(p.prompt, p.answer) for p in problems] == [("1+1=", "2"), ("2+2=", "4"), ("3+3=", "6")]
    first = 2 if suffix == ".csv" else 1  # after the header
    assert [p.source for p in problems] == [f"{path}:{first + i}" for i in range(3)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_all_its_columns_to_the_reward(tmp_path, suffix):
    path = tmp_path / f"problems{suffix}"
    FORMATS[suffix](path)
    assert [problem.extra for problem in ProblemFile(path=path, template="{prompt} = ?")()] == RECORDS


def test_a_plain_function_reads_a_column_of_its_problem(write):
    def within(texts: Texts) -> list[float]:
        return [float(len(c) <= p.extra["limit"]) for c, p in zip(texts.completions, texts.problems or (), strict=True)]

    problems = ProblemFile(path=write([{**RECORDS[0], "limit": 3}, {**RECORDS[1], "limit": 1}]))()
    texts = Texts(completions=["abc", "abc"], answers=[p.answer for p in problems], problems=problems)
    assert compute_rewards(within, texts).rewards.tolist() == [1, 0]


def test_the_source_is_the_line(write):
    path = write("\n" + json.dumps(RECORDS[0]) + "\n\n  \n" + json.dumps(RECORDS[1]) + "\n\n")
    assert [p.source for p in ProblemFile(path=str(path))()] == [f"{path}:2", f"{path}:5"]


def test_the_source_is_the_line_a_csv_record_starts_on(write):
    path = write('\ufeffprompt,answer\n"two\nlines",1\nthree,2\n', "problems.csv")
    problems = ProblemFile(path=path)()
    assert [(p.prompt, p.source) for p in problems] == [("two\nlines", f"{path}:2"), ("three", f"{path}:4")]


def test_limit_and_skip_cut_one_file_in_two(write):
    path = write(RECORDS)
    assert [p.answer for p in ProblemFile(path=path, limit=2)()] == ["2", "4"]
    assert [p.answer for p in ProblemFile(path=path, skip=2)()] == ["6"]
    assert [(p.answer, p.source) for p in ProblemFile(path=path, limit=1, skip=1)()] == [("4", f"{path}:2")]


def test_nothing_beyond_the_limit_is_read(write):
    path = write(json.dumps(RECORDS[0]) + "\nbroken\n")
    assert len(ProblemFile(path=path, limit=1)()) == 1


def test_answers_of_a_parquet_file(tmp_path):
    path = tmp_path / "p.parquet"
    frame = pd.DataFrame({"prompt": ["a", "b"], "f": [27.0, 0.25], "i": np.array([3, 4]), "b": [True, False]})
    frame["d"] = [Decimal("2.00"), Decimal("0.25")]
    frame.to_parquet(path)
    for field, answers in {"f": ["27", "0.25"], "i": ["3", "4"], "b": ["True", "False"], "d": ["2", "0.25"]}.items():
        assert [p.answer for p in ProblemFile(path=path, answer_field=field)()] == answers


CHAT = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1=?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": CHAT,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0, "question": "1+1=?"},
}


@pytest.mark.parametrize(
    "save",
    [
        lambda path: pd.DataFrame([VERL, VERL]).to_parquet(path),
        lambda path: pd.DataFrame([VERL | {"prompt": np.array(CHAT, dtype=object)}] * 2).to_parquet(path),
        lambda path: pq.write_table(pa.Table.from_pylist([VERL, VERL]), path),
    ],
    ids=["pandas", "pandas-numpy", "pyarrow"],
)
def test_verl_parquet(tmp_path, save):
    path = tmp_path / "train.parquet"
    save(path)
    problems = ProblemFile(path=path, answer_field="reward_model.ground_truth")()
    assert problems == [Problem(prompt=tuple(CHAT), answer="2", source=f"{path}:{n}", extra=VERL) for n in (1, 2)]
    assert (
        ProblemFile(path=path, prompt_field="prompt.1.content", answer_field="ability", limit=1)()[0].prompt == "1+1=?"
    )


BAD_FILES = [
    ("empty.jsonl", "", "empty.jsonl holds no problems"),
    ("blank.jsonl", "\n \n", "holds no problems"),
    ("empty.json", "", "holds no problems"),
    ("list.json", "[]", "holds no problems"),
    ("empty.csv", "", "holds no problems"),
    ("header.csv", "prompt,answer\n", "holds no problems"),
    ("a.jsonl", '{"prompt": "a", "answer": 1}\n{"prompt": ', r"a\.jsonl:2: each line must be one JSON object"),
    ("a.jsonl", "[1]\n", r"a\.jsonl:1: a record must be an object with named fields, got list"),
    ("a.json", '[{"prompt": "a"},\n{]', r"a\.json:2: the file must be one JSON list of objects"),
    ("a.json", '{"a": 1}\n{"a": 2}', r"a\.json:2: .* name the file \.jsonl"),
    ("a.json", '{"data": []}', "must be one JSON list of objects, got dict"),
    ("a.json", "[3]", r"a\.json:1: a record must be an object with named fields, got int"),
    ("a.csv", "prompt,answer\na,1\nb\n", r"a\.csv:3: a row must have as many cells as the header, 2"),
    ("a.csv", "prompt,answer\na,1,2\n", r"a\.csv:2: a row must have as many cells"),
    ("a.csv", 'prompt,answer\na,"1\n', r"a\.csv:2: malformed CSV"),
    ("a.parquet", "not Parquet", r"a\.parquet: not a Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(write, name, content, message):
    with pytest.raises(ValueError, match=message):
        ProblemFile(path=write(content, name))()


def test_a_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "é", "answer": 1}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.jsonl: the file must be UTF-8"):
        ProblemFile(path=path)()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "a.txt"}, r"data\.path .* must end in \.jsonl, .*, \.jsonl\.gz, .*, got a\.txt"),
        ({"path": "a.parquet.gz"}, r"data\.path .* must end in .*, got a\.parquet\.gz"),
        ({"path": ["a.jsonl", "a.txt"]}, r"data\.path .* must end in .*, got a\.txt"),
        ({"path": []}, r"data\.path .* must be a path, a list of paths, .*, got \[\]"),
        ({"path": ["a.jsonl", 3]}, r"data\.path .* must be a path, a list of paths, .*, got \['a\.jsonl', 3\]"),
        ({"limit": 0}, r"data\.limit .* must be null \(all problems\) or at least 1, got 0"),
        ({"skip": -1}, r"data\.skip .* must be at least 0, got -1"),
        ({"template": "no field"}, r"data\.template='no field' must name the fields it uses"),
        ({"template": "{q} \\boxed{}"}, r"data\.template=.* write a literal brace twice"),
        ({"template": "{q"}, r"data\.template='\{q' is not a str\.format template"),
        ({"answer_pattern": "("}, r"data\.answer_pattern=\( is not a regular expression"),
        ({"answer_pattern": "#### .+"}, r"data\.answer_pattern=.* needs a group"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        ProblemFile(**{"path": "a.jsonl"} | fields)


def test_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"data\.path .* no file a\.jsonl; relative paths start at {tmp_path}"):
        ProblemFile(path="a.jsonl")()
    with pytest.raises(ValueError, match=r"data\.path .* no file .*/a\.jsonl$"):
        ProblemFile(path=tmp_path / "a.jsonl")()


def test_a_folder(tmp_path):
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"data\.path .* is a folder; .* data=hub_dataset"):
        ProblemFile(path=tmp_path / "a.jsonl")()


def test_skipping_everything(write):
    with pytest.raises(ValueError, match=r"holds no problems after the 3 that data\.skip"):
        ProblemFile(path=write(RECORDS), skip=3)()


def test_half_a_character_is_named(write):
    path = write('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "a\\ud800", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"problems\.jsonl:2: the prompt holds '\\ud800', half a character"):
        ProblemFile(path=str(path))()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": "a", "answer": ' + "9" * 5000 + "}"])
def test_what_json_cannot_take_is_named(write, line):
    with pytest.raises(ValueError, match=r"problems\.jsonl:1: each line must be one JSON object"):
        ProblemFile(path=str(write(line + "\n")))()
    with pytest.raises(ValueError, match=r"problems\.json: the file must be one JSON list"):
        ProblemFile(path=str(write(line, "problems.json")))()


def test_two_columns_of_one_name_are_refused(write):
    path = write("prompt,answer,prompt\na,b,c\n", "problems.csv")
    with pytest.raises(ValueError, match=r"problems\.csv:1: two columns have the name 'prompt'"):
        ProblemFile(path=str(path))()


@pytest.mark.parametrize("template", ["{prompt:d}", "{prompt!z}"])
def test_a_template_that_a_value_does_not_take_is_named_with_its_place(write, template):
    with pytest.raises(ValueError, match=r"problems\.jsonl:1: data\.template="):
        ProblemFile(path=str(write(RECORDS)), template=template)()
