"""Mixtures: the share of each source in a pass is what its weight says, and nothing is left out."""

import logging
from collections import Counter
from pathlib import Path

import pytest
from hydra.utils import instantiate

from rlmod.data._sources import parse_sources
from rlmod.data.problem_file import ProblemFile
from tests.config.composing import composed
from tests.data.test_several_files import line


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Files of one, three and ten problems, each with its own prompts."""
    monkeypatch.chdir(tmp_path)
    for name, count in {"a": 10, "b": 3, "c": 1}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(line(f"{name}{i}") for i in range(count)), encoding="utf-8")
    return tmp_path


def mixture(weights: dict[str, float]) -> list[dict[str, object]]:
    return [{"path": f"{name}.jsonl", "weight": weight} for name, weight in weights.items()]


def prompts(path: object, **settings: object) -> list[str]:
    return [str(problem.prompt) for problem in ProblemFile(path=path, **settings)()]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 10, "b": 10}),
        ({"a": 1, "b": 2}, {"a": 10, "b": 20}),
        ({"a": 10, "b": 3, "c": 1}, {"a": 10, "b": 3, "c": 1}),
        (
            {"a": 0.9, "b": 0.1},
            {"a": 27, "b": 3},
        ),  # the smaller source decides, so that none of its problems is left out
        ({"a": 700, "b": 300}, {"a": 10, "b": 4}),
        ({"b": 0.2}, {"b": 3}),
    ],
)
def test_shares(folder, weights, counts):
    found = prompts(mixture(weights))
    assert Counter(prompt[0] for prompt in found) == counts
    times = Counter(found)
    for name, count in counts.items():
        own = [times[f"{name}{i}"] for i in range({"a": 10, "b": 3, "c": 1}[name])]
        assert sum(own) == count
        assert min(own) >= 1
        assert max(own) - min(own) <= 1
        assert own == sorted(own, reverse=True)  # the last repetition has the beginning of the source


def test_a_part_of_the_pass_has_the_shares_too(folder):
    found = "".join(prompt[0] for prompt in prompts(mixture({"a": 2, "b": 1})))
    assert found == 5 * "aba"
    assert found == "".join(prompt[0] for prompt in prompts(mixture({"a": 2, "b": 1})))


def test_the_log_says_how_often_each_source_is_repeated(folder, caplog):
    with caplog.at_level(logging.INFO):
        prompts(mixture({"a": 1, "b": 2}))
    assert (
        "has 30 problems and leaves out none: 10 from a.jsonl (1 times each), 20 from b.jsonl (6.67 times each)"
        in caplog.text
    )


def test_skip_and_limit_count_in_each_entry(folder):
    """So what is held out of a file cannot come back when the file is repeated."""
    found = prompts(mixture({"a": 1, "b": 1}), skip=1, limit=4)
    assert Counter(found) == {"a1": 1, "a2": 1, "a3": 1, "a4": 1, "b1": 2, "b2": 2}


def test_an_entry_may_have_several_files(folder):
    path = [{"path": ["c.jsonl", "b*.jsonl"], "weight": 2}, {"path": "a.jsonl", "weight": 5}]
    assert Counter(prompt[0] for prompt in prompts(path)) == {"a": 10, "b": 3, "c": 1}


def test_on_the_command_line(folder):
    data = composed(
        "data=problem_file",
        "data.path=[{path:a.jsonl,weight:0.5},{path:'b*.jsonl',weight:0.5}]",
        "data.validation_path=[c.jsonl,b.jsonl]",
    ).data
    for kind in ("all", "none"):
        train, held_out = (instantiate(data[part], _convert_=kind)() for part in ("train", "validation"))
        assert Counter(problem.prompt[0] for problem in train) == {"a": 10, "b": 10}
        assert [problem.prompt for problem in held_out] == ["c0", "b0", "b1", "b2"]


def test_an_entry_may_have_its_own_fields(folder):
    text = '{"Body": "One.", "Question": "How many?", "Answer": "so\\n#### 1"}\n'
    (folder / "d.jsonl").write_text(text, encoding="utf-8")
    own = {"template": "{Body} {Question}", "answer_field": "Answer", "answer_pattern": "#### (.+)"}
    problems = ProblemFile(path=[*mixture({"c": 1}), {"path": "d.jsonl", "weight": 1, **own}])()
    assert [(p.prompt, p.answer) for p in problems] == [("c0", "1"), ("One. How many?", "1")]


@pytest.mark.parametrize("weight", [0, -1, -0.0, float("nan"), float("inf"), "much", True, None])
def test_a_weight_that_is_not_above_0_is_named(folder, weight):
    with pytest.raises(
        ValueError, match=rf"data\.path .*: the weight of b\.jsonl must be a number above 0, got {weight!r}"
    ):
        ProblemFile(path=mixture({"a": 1, "b": weight}))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ([*mixture({"a": 1}), "b.jsonl"], r"either every entry has a weight or none, but b\.jsonl has none"),
        ([{"path": "a.jsonl"}], r"must be \{path: \.\.\., weight: \.\.\.\}, got \{'path': 'a\.jsonl'\}$"),
        ({"a.jsonl": 0.7, "b.jsonl": 0.3}, r"must be \{path: .*, got \{'a\.jsonl': 0\.7, .*; a list is needed"),
        ([*mixture({"a": 1}), {"path": "b", "weight": 1, "limit": 3}], r"may also set prompt_field, .*, but not limit"),
        ([{"path": "b", "weight": 1, "template": 3}], r"template of b must be text or null, got 3"),
        ([{"path": "b", "weight": 1, "prompt_field": None}], r"prompt_field of b must be text, got None"),
        ([{"path": [], "weight": 1}], r"must be a path, a list of paths, .* got \[\]"),
        (None, r"must be a path, a list of paths, .* got None"),
        ([{"path": 3, "weight": 1}], r"must be a path, a list of paths, .* got 3"),
    ],
)
def test_another_form_is_refused(path, message):
    with pytest.raises(ValueError, match=rf"data\.path \(or data\.validation_path\).*{message}"):
        parse_sources(path)


def test_fields_of_an_entry_are_checked_at_once():
    with pytest.raises(ValueError, match=r"data\.answer_pattern=\( is not a regular expression"):
        ProblemFile(path=[{"path": "a.jsonl", "weight": 1, "answer_pattern": "("}])


def test_a_file_in_two_entries_is_refused(folder):
    path = [{"path": "*.jsonl", "weight": 1}, {"path": "./b.jsonl", "weight": 1}]
    with pytest.raises(ValueError, match=r"b\.jsonl is in two entries of the mixture"):
        ProblemFile(path=path)()


def test_weights_that_repeat_a_problem_too_often_are_refused(folder):
    with pytest.raises(
        ValueError, match=r"the weight 1e\+06, the 1 problems of c\.jsonl would be repeated 10000000 times per pass"
    ):
        prompts(mixture({"a": 1, "c": 1e6}))
