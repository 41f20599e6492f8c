"""The page that compares several runs."""

import pytest

from rlmod.commands import report
from rlmod.commands.report import comparison, pictures, plots, runs
from tests.commands.report.folders import RESULT, text_of, write_run


def result(after: float, seed: int = 7) -> dict[str, object]:
    return RESULT | {"held_out": {**RESULT["held_out"], "after": after}, "seed": seed}


def test_multirun_folder_is_compared(tmp_path):
    for number, shaper, seed, after in ((0, "uniform", 1, 0.90), (1, "uniform", 2, 0.94), (2, "gtpo", 1, 0.97)):
        overrides = ["loss=cispo", f"shaper={shaper}", f"seed={seed}"]
        write_run(tmp_path / str(number), result=result(after, seed), overrides=overrides)
    path = report.write_report(tmp_path)
    page = path.read_text()
    text = text_of(page)
    assert path == tmp_path / "comparison.html"
    assert "3 runs compared by held-out mean@1 Common to all: loss=cispo" in text
    assert "shaper=uniform, seed=1 0.420 0.900 +0.480 0.970 3 3 min 20 s 1" in text
    assert "shaper=gtpo, seed=1 0.420 0.970 +0.550 0.970 3 3 min 20 s 1" in text
    assert '<td class="most">0.970</td>' in page
    assert "difference runs mean after lowest highest shaper=uniform 2 0.920 0.900 0.940" in text
    pictures = {file.name for file in (tmp_path / "report").glob("*[!k].png")}
    assert pictures == {
        "comparison-val-mean-at-1.png",
        "comparison-reward-mean.png",
        "comparison-completions-entropy.png",
    }


def test_named_runs_are_compared_in_the_first_folder(tmp_path, capsys):
    write_run(tmp_path / "a<b", result=result(0.9))
    write_run(tmp_path / "killed", result=None)
    report.main([str(tmp_path / "a<b"), str(tmp_path / "killed")])
    path = tmp_path / "a<b" / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    text = text_of(path.read_text())
    assert "a&lt;b 0.420 0.900" in text
    assert "killed (not completed) 0.420 0.950" in text
    assert "killed: result.json is missing" in text


def test_runs_of_a_multirun_are_in_natural_order(tmp_path):
    for name in ("10", "9", "2"):
        write_run(tmp_path / name)
    assert [folder.name for folder in comparison.run_folders(tmp_path)] == ["2", "9", "10"]


def test_labels_say_what_differs_and_are_distinct(tmp_path):
    def read(name: str, overrides: list[str] | None) -> runs.RecordedRun:
        return runs.read_run(write_run(tmp_path / name, overrides=overrides))

    same = [read("a", ["x=1"]), read("b", ["x=1"])]
    assert comparison.labels(same) == ["a", "b"]
    mixed = [read("c", ["x=1", "y=2"]), read("d", ["x=1", "y=3"]), read("e", ["x=1", "y=3"])]
    assert comparison.labels(mixed) == ["y=2", "y=3 [d]", "y=3 [e]"]
    seeds = [read("f", ["x=1", "seed=1"]), read("g", ["x=1", "seed=2"])]
    assert comparison.seed_groups(seeds) == comparison.labels(seeds) == ["seed=1", "seed=2"]


def test_a_legend_holds_any_label():
    groups = {"_target_=$x$": [{1: 0.1, 2: 0.2}], "b": [{1: 0.3}]}
    figure = plots.draw_overlay(groups, is_accuracy=True, points=False, theme=pictures.LIGHT)
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_target_=$x$", "b"]


def test_a_run_that_cannot_be_read_is_listed_with_the_reason_beside_the_others(tmp_path, capsys):
    write_run(tmp_path / "good")
    write_run(tmp_path / "bad", metrics="step,reward/mean\n1," + "9" * 200_000)
    report.main([str(tmp_path)])
    text = text_of((tmp_path / "comparison.html").read_text())
    assert f"unreadable: {tmp_path / 'bad' / 'metrics.csv'} cannot be read: field larger than field limit" in text
    assert "good 0.420 0.950" in text
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "bad")])
    assert "metrics.csv cannot be read: field larger than field limit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("config.yaml", "policy: 2020-99-99", "config.yaml is broken"),
        ("config.yaml", "[" * 2_000, "config.yaml is broken"),
        ("config.yaml", "policy: " + "9" * 5000, "config.yaml is broken"),
        ("result.json", "[" * 100_000, "result.json is broken"),
        ("samples.jsonl", "[" * 100_000, "samples.jsonl: 1 line is broken"),
    ],
    ids=["date", "nested config", "digits", "nested result", "nested sample"],
)
def test_what_cannot_be_parsed_is_a_note(tmp_path, name, content, note):
    write_run(tmp_path)
    (tmp_path / name).write_text(content)
    assert any(note in line for line in runs.read_run(tmp_path).notes)


def test_numbers_that_no_run_writes_still_give_a_page(tmp_path):
    write_run(tmp_path, metrics="step,reward/mean\n" + "9" * 300 + ",1\n1,0.5\n")
    (tmp_path / "result.json").write_text('{"completed": true, "steps": ' + "9" * 400 + "}")
    sample = '{"completion": "a", "step": Infinity, "when": "train", "prompt": "a", "reward": 1}'
    (tmp_path / "samples.jsonl").write_text(sample + "\n" + sample.replace("Infinity", "1").replace('"a"', '"\\ud800"'))
    text = text_of(report.write_report(tmp_path).read_text())
    assert "samples.jsonl: 1 line is broken" in text
    assert "metrics.csv: 1 cell or row could not be read" in text
