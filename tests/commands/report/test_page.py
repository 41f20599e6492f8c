"""The page of a run, for whole, killed and broken runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlmod.commands import report
from rlmod.commands.report import curves, page, panels, pictures, plots, runs
from tests.commands.report.folders import METRICS, RESULT, SAMPLES, page_of, sample, text_of, write_run


def test_page_says_what_was_composed_and_what_came_out(tmp_path):
    path = report.write_report(write_run(tmp_path / "gtpo"))
    text = text_of(path.read_text())
    assert path == tmp_path / "gtpo" / "report.html"
    assert "policy policies/tiny/arithmetic shaper token_entropy loss clipped_surrogate aggregation token_mean" in text
    assert "reward exact_match + format" in text
    assert "seed 7 steps 3 training 3 min 20 s tokens 123,456" in text
    assert "held-out mean@1 0.42 → 0.95 (+0.53) on 512 problems; standard error 0.022 before, 0.010 after" in text
    assert "alpha2: 0.1" in text
    assert "torch 2.13.0" in text
    assert "Missing or broken" not in text


def test_reward_terms_are_named_as_they_were_logged(tmp_path):
    run = write_run(tmp_path, metrics="step,reward/mean,reward/correct,reward/short\n1,0.5,0.4,0.1\n")
    assert page.composition(runs.read_run(run))["reward"] == "correct + short"
    assert 'id="terms"' in page_of(run)


def test_every_held_out_metric_has_first_last_and_best(tmp_path):
    run = write_run(tmp_path)
    assert runs.read_run(run).held_out == ["val/mean@1", "val/mean@16", "val/pass@16"]
    text = text_of(page_of(run))
    assert "mean@1 0.420 0.950 0.970 2 mean@16 0.400 0.940 0.940 3 pass@16 0.800 0.990 1.000 2" in text


def test_page_holds_its_pictures_and_no_script(tmp_path):
    page = page_of(write_run(tmp_path))
    assert "<script" not in page
    assert re.findall(r'(?:src|srcset|href)="(?!data:image/png;base64,)', page) == []
    assert page.count('<img src="data:image/png;base64,') == 2
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"headline.png", "headline-dark.png", "entropy.png", "entropy-dark.png"}


def test_only_logged_curves_are_drawn(tmp_path):
    curves = runs.read_run(write_run(tmp_path)).curves
    assert [panel.name for panel in panels.logged_panels(curves)] == ["entropy"]
    every = {column: {1: 0.5} for panel in panels.PANELS for column in panel.columns}
    names = ["entropy", "length", "prompts", "ratio", "gradient", "speed"]
    assert [panel.name for panel in panels.logged_panels(every)] == names


@pytest.mark.parametrize("column", sorted({column for panel in panels.PANELS for column in panel.columns}))
def test_a_panel_is_drawn_with_one_of_its_columns_alone(column):
    curves = {column: {step: 0.5 for step in range(1, 30)}}
    (panel,) = panels.logged_panels(curves)
    assert panels.draw_panel(panel, curves, pictures.LIGHT).axes


def test_samples_stand_side_by_side(tmp_path):
    text = text_of(page_of(write_run(tmp_path)))
    assert "Of the 2 recorded: 1 became correct, 1 stayed correct, 0 stayed incorrect, 0 became incorrect." in text
    assert "2+2? answer 4 ✗ incorrect reward 0 · 4 tokens five ✓ correct reward 1 · 5 tokens 2+2=4" in text
    assert "✓ correct reward 1 · 5 tokens · truncated 1+3=4" in text


def test_a_missing_sample_does_not_shift_the_pairs(tmp_path):
    run = runs.read_run(write_run(tmp_path, samples=[SAMPLES[0], SAMPLES[1], SAMPLES[3]]))
    pairs = [(first.completion, last and last.completion) for first, last in page._sample_pairs(run)["rows"]]
    assert pairs == [("five", None), ("four", "1+3=4")]


def test_tokens_carry_their_advantage_and_entropy(tmp_path):
    page = page_of(write_run(tmp_path))
    spans = re.findall(r'<span class="(\w) (\w+)" title="([^"]*)" style="([^"]*)">(.*?)</span>', page, re.DOTALL)
    # The scale is +-2 over all shown; MAX_COLOUR_PERCENT = 75 is its end. Mean of the first completion: 1.
    assert [(sign, apart, style, token) for sign, apart, _, style, token in spans] == [
        ("p", "dp", "--a:56%;--d:75%;--h:100%", "&lt;b&gt;"),
        ("p", "dn", "--a:19%;--d:75%;--h:50%", "4"),
        ("n", "dn", "--a:75%;--d:0%;--h:20%", "no"),
    ]
    assert spans[0][2] == "advantage +1.500 (+0.500 from its completion&#39;s mean), entropy 0.500 nats"
    assert "step 3" not in text_of(page).split("assigns credit")[1]  # its lists differ in length: left out


@pytest.mark.parametrize("place", ["prompt", "completion", "answer", "tokens"])
def test_what_a_run_holds_is_escaped(tmp_path, place):
    evil = "</div><script>alert('x')</script>&\"\ud800 \u2028"
    line = sample(0, "validation", "2+2?", "4", 1.0)
    if place == "tokens":
        line = sample(1, "train", "2+2?", evil, 1.0, tokens=[evil], entropy=[0.1], advantages=[1.0])
    else:
        line[place] = evil
    page = page_of(write_run(tmp_path, samples=[line]))
    assert "<script" not in page
    assert "&lt;/div&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;?" in page


@pytest.mark.parametrize(("answer", "shown"), [("4", "4"), (["4", "four"], "4 | four"), ([], "")])
def test_all_correct_answers_of_a_sample_are_read(tmp_path, answer, shown):
    line = sample(1, "train", "2+2?", "4", 1.0) | {"answer": answer}
    assert runs.read_run(write_run(tmp_path, samples=[line])).samples[0].answer == shown


def test_config_and_names_are_escaped(tmp_path):
    page = page_of(write_run(tmp_path, config="policy: <script>1</script>\n", overrides=["policy=<script>2</script>"]))
    assert "<script" not in page
    assert "&lt;script&gt;1&lt;/script&gt;" in page
    assert "&lt;script&gt;2&lt;/script&gt;" in page


def test_killed_run_is_reported_from_its_metrics(tmp_path):
    run = write_run(tmp_path, result=None, samples=SAMPLES[:2])
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "when": "tra')
    with (run / "metrics.csv").open("a") as file:
        file.write("3,4,0.9")
    text = text_of(page_of(run))
    assert "result.json is missing: the run was stopped before its end" in text
    assert "samples.jsonl: 1 line is broken and omitted" in text
    assert "Only the validation at step 0 is recorded" in text
    assert "held-out mean@1 0.42 → 0.95 (+0.53)" in text
    assert "steps 4" in text
    assert "problems; standard error" not in text


def test_killed_before_the_second_validation(tmp_path):
    metrics = "step,reward/mean,val/mean@1\n0,,0.42\n1,0.4,\n"
    text = text_of(page_of(write_run(tmp_path, metrics=metrics, result=None)))
    assert "held-out mean@1 0.42 before training; no later validation was logged" in text
    assert "→" not in text


def test_run_that_did_not_complete_says_so(tmp_path):
    text = text_of(page_of(write_run(tmp_path, result=RESULT | {"completed": False})))
    assert "The run did not complete" in text


def test_a_run_that_a_signal_stopped_says_at_which_step_its_last_number_was_measured(tmp_path):
    held_out = {**RESULT["held_out"], "after": None, "last": {"step": 3, "accuracy": 0.95}}
    stopped = RESULT | {"completed": False, "steps": 5, "held_out": held_out}
    text = text_of(page_of(write_run(tmp_path, metrics=METRICS + "4,5,0.91,0.4,,,\n", result=stopped)))
    assert "held-out mean@1 0.42 → 0.95 (+0.53) at step 3 of 5; no validation ran after the last step; on 512" in text
    text = text_of(page_of(write_run(tmp_path)))
    assert "no validation ran after" not in text


def test_metrics_alone_make_a_page(tmp_path):
    text = text_of(page_of(write_run(tmp_path, config=None, result=None, samples=None)))
    assert "Unknown composition" in text
    for name in ("config.yaml", "samples.jsonl", "result.json"):
        assert f"{name} is missing" in text


@pytest.mark.parametrize("metrics", ["", "step,epoch\n", "step,reward/mean\n"])
def test_empty_metrics_make_a_page(tmp_path, metrics):
    text = text_of(page_of(write_run(tmp_path, metrics=metrics, result=None)))
    assert "metrics.csv holds no values yet" in text
    assert "No held-out accuracy was logged." in text


def test_broken_files_are_named(tmp_path):
    run = write_run(tmp_path, config="a: [", samples=[])
    (run / "result.json").write_text('{"held_out": {')
    (run / "samples.jsonl").write_bytes(b'[1]\n{"step": 1}\n\xff\xfe\n\n')
    text = text_of(page_of(run))
    assert "config.yaml is broken" in text
    assert "result.json is broken" in text
    assert "samples.jsonl: 3 lines are broken" in text


def test_values_that_are_not_finite_are_named_and_not_drawn(tmp_path):
    metrics = "step,reward/mean,train/grad_norm\n1,0.5,1.0\n2,0.5,nan\n3,0.5,inf\n4,oops,2.0\n"
    run = runs.read_run(write_run(tmp_path, metrics=metrics))
    assert run.curves["train/grad_norm"] == {1: 1.0, 4: 2.0}
    assert any("train/grad_norm: 2 values not finite (NaN or infinite), the first at step 2" in n for n in run.notes)
    assert any("1 cell or row could not be read" in note for note in run.notes)


def test_resumed_run_keeps_the_later_value(tmp_path):
    run = write_run(tmp_path, metrics="step,reward/mean\n2,0.2\n1,0.1\n2,0.3\n")
    assert list(runs.read_run(run).curves["reward/mean"].items()) == [(1, 0.1), (2, 0.3)]


def test_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing is not a run folder: it has no metrics\.csv.*rlmod-train"):
        report.write_report(tmp_path / "nothing")


def test_command_names_the_mistake_without_a_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "it has no metrics.csv" in capsys.readouterr().err


def test_headline_picture_alone(tmp_path):
    path = report.headline_picture(write_run(tmp_path))
    assert path == tmp_path / "report" / "headline.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["headline.png"]
    with pytest.raises(ValueError, match="neither reward/mean nor a validation"):
        report.headline_picture(write_run(tmp_path / "empty", metrics="step,train/loss\n1,0\n"))


def test_headline_axis_is_0_to_1_unless_the_reward_leaves_it():
    def limits(reward: float) -> tuple[float, float]:
        curves = {"reward/mean": {1: reward}, "val/mean@1": {0: 0.4, 2: 0.9}}
        return plots.draw_headline(curves, "val/mean@1", [], "", pictures.LIGHT).axes[0].get_ylim()

    assert limits(0.5) == pytest.approx((-0.02, 1.02))
    assert limits(-1.0) == pytest.approx((-1.02, 1.02))


def test_smoothing_is_centred():
    assert curves.smooth([0.0, 3.0, 6.0, 0.0], 3) == [0.0, 3.0, 3.0, 0.0]
    straight = [float(i) for i in range(9)]
    assert curves.smooth(straight, 5) == straight
    assert [curves.window(points) for points in (1, 19, 20, 80, 10_000)] == [1, 1, 3, 5, 51]


# Several runs --------------------------------------------------------------------------------------------------------


def test_report_needs_no_torch():
    code = "import sys, rlmod.commands.report; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    root = Path(report.__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout.strip() == "[]"


def test_each_benchmark_has_a_curve_and_a_row_for_each_of_its_metrics(tmp_path):
    metrics = (
        "step,reward/mean,val/mean@1,val/aime24/maj@8,val/aime24/mean@8,val/amc23/mean@2,val/aime24/best@8\n"
        "0,,0.4,0.2,0.1,0.5,0.3\n1,0.5,,,,,\n2,,0.6,0.3,0.2,0.75,1.3\n"
    )
    run = write_run(tmp_path, metrics=metrics)
    expected = ["val/mean@1", "val/aime24/mean@8", "val/aime24/maj@8", "val/aime24/best@8", "val/amc23/mean@2"]
    assert runs.read_run(run).held_out == expected
    text = page_of(run)
    assert 'id="benchmarks"' in text
    assert "aime24/mean@8 0.100 0.200 0.200 2 aime24/maj@8 0.200 0.300 0.300 2" in text_of(text)


def test_a_run_on_benchmarks_alone_has_the_first_as_its_headline(tmp_path):
    metrics = "step,val/aime24/mean@8,val/aime24/pass@8,val/amc23/pass@2\n0,0.1,0.3,0.4\n2,0.2,0.5,0.6\n"
    result = RESULT | {"held_out": {"metric": "val/aime24/mean@8", "before": 0.1, "after": 0.2, "problems": 30}}
    run = write_run(tmp_path, metrics=metrics, result=result)
    text = text_of(page_of(run))
    assert "held-out aime24/mean@8 0.10 → 0.20 (+0.10)" in text
    assert "on 30 problems" in text
