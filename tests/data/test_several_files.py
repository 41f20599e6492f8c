"""One path names many files: lists, patterns, packed files, and files whose columns differ."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from rlmod.data.problem_file import ProblemFile


def line(prompt: object, **others: object) -> str:
    return json.dumps({"prompt": str(prompt), "answer": "1", **others}) + "\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three files in two folders, in the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for number, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl")):
        (tmp_path / "data" / name).write_text(line(name[-7]) + line(number), encoding="utf-8")
    return tmp_path


def prompts(path: object, **settings: int) -> str:
    return " ".join(str(problem.prompt) for problem in ProblemFile(path=path, **settings)())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/*.jsonl", "a 1 b 0"),
        ("data/**/*.jsonl", "a 1 b 0 c 2"),
        ("data/**", "a 1 b 0 c 2"),
        ("data/[b-z].jsonl", "b 0"),
        ("data/?.jsonl", "a 1 b 0"),
        (["data/b.jsonl", "data/a.jsonl"], "b 0 a 1"),
        (["data/deep/*.jsonl", Path("data/a.jsonl")], "c 2 a 1"),
    ],
)
def test_a_list_keeps_its_order_and_a_pattern_sorts_its_files(folder, path, expected):
    assert prompts(path) == expected


def test_each_file_is_read_once(folder, caplog):
    assert prompts(["data/b.jsonl", "data/*.jsonl", "data/../data/b.jsonl", str(folder / "data/a.jsonl")]) == "b 0 a 1"
    assert "names 3 files more than once; each is read once" in caplog.text


def test_the_source_names_the_file_and_its_own_line(folder):
    problems = ProblemFile(path="data/*.jsonl")()
    assert [p.source for p in problems] == [f"data/{name}.jsonl:{number}" for name in "ab" for number in (1, 2)]


def test_skip_and_limit_count_over_all_files(folder):
    (folder / "data" / "deep" / "c.jsonl").write_text("broken\n", encoding="utf-8")
    assert prompts("data/**/*.jsonl", skip=1, limit=2) == "1 b"  # and the third file is not read


def test_a_name_with_wildcards_is_that_file_if_it_exists(folder):
    (folder / "data" / "[b].jsonl").write_text(line("bracket"), encoding="utf-8")
    assert prompts("data/[b].jsonl") == "bracket"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("data/*.csv", r"data\.path .*: no file matches the pattern data/\*\.csv in the folder {folder}/data$"),
        ("none/*.jsonl", r"the pattern none/\*\.jsonl in the folder {folder}/none, which does not exist$"),
        (["data/a.jsonl", "*.jsonl"], r"no file matches the pattern \*\.jsonl in the folder {folder}$"),
        ("dat[a]", r"no file matches the pattern dat\[a\]"),
        (["data/a.jsonl", "data/none.jsonl"], r"there is no file data/none\.jsonl"),
        ("data", r"data\.path .* must end in"),
    ],
)
def test_a_path_without_a_file_is_named(folder, path, message):
    with pytest.raises(ValueError, match=message.replace("{folder}", str(folder))):
        ProblemFile(path=path)()


def test_a_pattern_that_finds_another_kind_of_file_names_it(folder):
    (folder / "data" / "README.md").write_text("notes", encoding="utf-8")
    with pytest.raises(ValueError, match=r"data\.path .* must end in .*, got data/README\.md"):
        ProblemFile(path="data/*")()


def test_an_empty_file_among_others_is_said(folder, caplog):
    (folder / "data" / "empty.jsonl").write_text("\n", encoding="utf-8")
    assert prompts("data/*.jsonl") == "a 1 b 0"
    assert "data/empty.jsonl holds no problems" in caplog.text


def test_files_with_other_columns_are_one_set_if_prompt_and_answer_are_in_all(folder):
    (folder / "data" / "a.jsonl").write_text(line("a", level=3), encoding="utf-8")
    pd.DataFrame([{"prompt": "p", "answer": 1, "topic": "sums"}]).to_parquet("data/p.parquet")
    first, *_, last = ProblemFile(path=["data/a.jsonl", "data/b.jsonl", "data/p.parquet"])()
    assert (first.extra["level"], last.extra["topic"], last.answer) == (3, "sums", "1")
    assert "level" not in last.extra


def test_a_file_without_the_prompts_column_is_named_with_the_difference(folder):
    (folder / "data" / "b.jsonl").write_text('{"question": "b", "answer": 1}\n', encoding="utf-8")
    message = (
        r"data/b\.jsonl:1: data\.prompt_field=prompt, but .*; there are: question, answer; the columns of the files differ: "
        r"only data/a\.jsonl has prompt; only data/b\.jsonl has question$"
    )
    with pytest.raises(ValueError, match=message):
        ProblemFile(path="data/*.jsonl")()


def test_a_field_that_only_one_record_lacks_is_named_without_comparing_files(folder):
    (folder / "data" / "b.jsonl").write_text(line("b") + line("c").replace("answer", "reply"), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"data/b\.jsonl:2: data\.answer_field=answer, but .* there are: prompt, reply$"
    ):
        ProblemFile(path="data/*.jsonl")()


RECORDS = [{"prompt": "é\n1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
PACKED = {
    ".jsonl.gz": "".join(json.dumps(record) + "\n" for record in RECORDS),
    ".json.gz": json.dumps(RECORDS, ensure_ascii=False),
    ".CSV.GZ": '\ufeffprompt,answer\r\n"é\n1+1=",2\r\n2+2=,4\r\n',
}


@pytest.mark.parametrize("suffix", PACKED)
def test_packed_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(PACKED[suffix].encode()))
    problems = ProblemFile(path=path)()
    assert [p.extra for p in problems] == RECORDS
    assert problems[1].source == f"{path}:{4 if suffix == '.CSV.GZ' else 2}"


@pytest.mark.parametrize(
    "content",
    [b"not packed\n", gzip.compress(PACKED[".jsonl.gz"].encode())[:-9], b"\x1f\x8b\x08" + b"\0" * 40],
    ids=["plain text", "cut off", "altered"],
)
def test_a_damaged_packed_file_is_named(tmp_path, content):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: not a complete gzip file: "):
        ProblemFile(path=tmp_path / "a.jsonl.gz")()
