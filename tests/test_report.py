"""What the page of a run says, for whole, killed and broken runs, and what a comparison says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlmod import report
from rlmod.report import comparison, curves, page, panels, pictures, plots, runs

CONFIG = """
seed: 7
policy: {_target_: rlmod.policy.pretrained, path: policies/tiny/arithmetic}
shaper: {_target_: rlmod.shaper.token_entropy.TokenEntropy, alpha2: 0.1}
loss: {_target_: rlmod.loss.clipped_surrogate.ClippedSurrogate}
weighting: {_target_: rlmod.weighting.token_mean.TokenMean}
reward:
  _target_: rlmod.reward.weighted.Weighted
  terms: [{_target_: rlmod.reward.exact_match.ExactMatch}, {_target_: rlmod.reward.format.Format}]
"""
METRICS = """epoch,step,reward/mean,completions/entropy,val/mean@1,val/mean@16,val/pass@16
0,0,,,0.42,0.40,0.80
0,1,0.40,0.6,,,
1,2,0.60,0.5,,,
1,2,,,0.97,0.93,1.0
2,3,0.90,0.4,,,
2,3,,,0.95,0.94,0.99
"""
RESULT = {
    "held_out": {"before": 0.42, "after": 0.95, "metric": "val/mean@1", "problems": 512},
    "seconds": {"training": 200.0, "total": 230.0},
    "steps": 3,
    "tokens": 123456,
    "seed": 7,
    "versions": {"torch": "2.13.0"},
    "completed": True,
}


def sample(step: int, when: str, prompt: str, completion: str, reward: float, **more: object) -> dict[str, object]:
    shared = {"answer": "4", "truncated": False, "length": len(completion)}
    return {"step": step, "when": when, "prompt": prompt, "completion": completion, "reward": reward} | shared | more


SAMPLES = [
    sample(0, "validation", "2+2?", "five", 0.0),
    sample(0, "validation", "1+3?", "four", 1.0),
    sample(3, "validation", "2+2?", "2+2=4", 1.0),
    sample(3, "validation", "1+3?", "1+3=4", 1.0, truncated=True),
    sample(1, "train", "0+4?", "<b>4", 1.0, tokens=["<b>", "4"], entropy=[0.5, 0.25], advantages=[1.5, 0.5]),
    sample(1, "train", "4+0?", "no", 0.0, tokens=["no"], entropy=[0.1], advantages=[-2.0]),
    sample(3, "train", "3+1?", "4", 1.0, tokens=["4"], entropy=[0.2, 0.3], advantages=[1.0]),
]


def write_run(
    folder: Path,
    *,
    metrics: str = METRICS,
    config: str | None = CONFIG,
    result: dict[str, object] | None = RESULT,
    samples: list[dict[str, object]] | None = SAMPLES,
    overrides: list[str] | None = None,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").write_text(metrics)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if samples is not None:
        (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))
    if overrides is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides))
    return folder


def page_of(folder: Path) -> str:
    return report.write_report(folder).read_text()


def text_of(page: str) -> str:
    """What a reader sees, without tags, on one line."""
    body = page.split("</style>")[1]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)).replace("&#39;", "'")


@pytest.fixture(autouse=True)
def drawn_small(monkeypatch):
    """Drawing takes nearly all the time of a report; the pictures have a test of their own."""
    monkeypatch.setattr(pictures, "DPI", 30)


def test_page_says_what_was_composed_and_what_came_out(tmp_path):
    path = report.write_report(write_run(tmp_path / "gtpo"))
    text = text_of(path.read_text())
    assert path == tmp_path / "gtpo" / "report.html"
    assert "policy policies/tiny/arithmetic shaper token_entropy loss clipped_surrogate weighting token_mean" in text
    assert "reward exact_match + format" in text
    assert "seed 7 steps 3 training 3 min 20 s tokens 123,456" in text
    assert "held-out mean@1 0.42 → 0.95 (+0.53) on 512 problems; standard error 0.022 before, 0.010 after" in text
    assert "alpha2: 0.1" in text
    assert "torch 2.13.0" in text
    assert "missing or broken" not in text


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
    assert [panel.name for panel in panels.logged(curves)] == ["entropy"]
    every = {column: {1: 0.5} for panel in panels.PANELS for column in panel.columns}
    names = ["entropy", "length", "prompts", "ratio", "gradient", "speed"]
    assert [panel.name for panel in panels.logged(every)] == names


@pytest.mark.parametrize("column", sorted({column for panel in panels.PANELS for column in panel.columns}))
def test_a_panel_is_drawn_with_one_of_its_columns_alone(column):
    curves = {column: {step: 0.5 for step in range(1, 30)}}
    (panel,) = panels.logged(curves)
    assert panels.small(panel, curves, pictures.LIGHT).axes


def test_samples_stand_side_by_side(tmp_path):
    text = text_of(page_of(write_run(tmp_path)))
    assert "Of the 2 recorded: 1 became right, 1 stayed right, 0 stayed wrong, 0 became wrong." in text
    assert "2+2? answer 4 ✗ wrong reward 0 · 4 tokens five ✓ right reward 1 · 5 tokens 2+2=4" in text
    assert "✓ right reward 1 · 5 tokens · truncated 1+3=4" in text


def test_a_missing_sample_does_not_shift_the_pairs(tmp_path):
    run = runs.read_run(write_run(tmp_path, samples=[SAMPLES[0], SAMPLES[1], SAMPLES[3]]))
    pairs = [(first.completion, last and last.completion) for first, last in page._pairs(run)["rows"]]
    assert pairs == [("five", None), ("four", "1+3=4")]


def test_tokens_carry_their_advantage_and_entropy(tmp_path):
    page = page_of(write_run(tmp_path))
    spans = re.findall(r'<span class="(\w) (\w+)" title="([^"]*)" style="([^"]*)">(.*?)</span>', page, re.DOTALL)
    # The scale is +-2 over all shown; DEEPEST = 75 % of colour is its end. Mean of the first completion: 1.
    assert [(sign, apart, style, token) for sign, apart, _, style, token in spans] == [
        ("p", "dp", "--a:56%;--d:75%;--h:100%", "&lt;b&gt;"),
        ("p", "dn", "--a:19%;--d:75%;--h:50%", "4"),
        ("n", "dn", "--a:75%;--d:0%;--h:20%", "no"),
    ]
    assert spans[0][2] == "advantage +1.500 (+0.500 from its completion&#39;s mean), entropy 0.500 nats"
    assert "step 3" not in text_of(page).split("puts its credit")[1]  # its lists differ in length: left out


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
    assert "samples.jsonl: 1 line is broken and left out" in text
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


def test_metrics_alone_make_a_page(tmp_path):
    text = text_of(page_of(write_run(tmp_path, config=None, result=None, samples=None)))
    assert "Composition not known" in text
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
        return plots.headline(curves, "val/mean@1", [], "", pictures.LIGHT).axes[0].get_ylim()

    assert limits(0.5) == pytest.approx((-0.02, 1.02))
    assert limits(-1.0) == pytest.approx((-1.02, 1.02))


def test_smoothing_is_centred():
    assert curves.smooth([0.0, 3.0, 6.0, 0.0], 3) == [0.0, 3.0, 3.0, 0.0]
    straight = [float(i) for i in range(9)]
    assert curves.smooth(straight, 5) == straight
    assert [curves.window(points) for points in (1, 19, 20, 80, 10_000)] == [1, 1, 3, 5, 51]


# Several runs --------------------------------------------------------------------------------------------------------


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
    assert "3 runs compared by held-out mean@1 All of them: loss=cispo" in text
    assert "shaper=uniform, seed=1 0.420 0.900 +0.480 0.970 3 3 min 20 s 1" in text
    assert "shaper=gtpo, seed=1 0.420 0.970 +0.550 0.970 3 3 min 20 s 1" in text
    assert '<td class="most">0.970</td>' in page
    assert "what differs runs mean after lowest highest shaper=uniform 2 0.920 0.900 0.940" in text
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
    def read(name: str, overrides: list[str] | None) -> runs.Run:
        return runs.read_run(write_run(tmp_path / name, overrides=overrides))

    same = [read("a", ["x=1"]), read("b", ["x=1"])]
    assert comparison.labels(same) == ["a", "b"]
    mixed = [read("c", ["x=1", "y=2"]), read("d", ["x=1", "y=3"]), read("e", ["x=1", "y=3"])]
    assert comparison.labels(mixed) == ["y=2", "y=3 [d]", "y=3 [e]"]
    seeds = [read("f", ["x=1", "seed=1"]), read("g", ["x=1", "seed=2"])]
    assert comparison.without_seed(seeds) == comparison.labels(seeds) == ["seed=1", "seed=2"]


def test_a_legend_holds_any_label():
    groups = {"_target_=$x$": [{1: 0.1, 2: 0.2}], "b": [{1: 0.3}]}
    figure = plots.overlaid(groups, is_accuracy=True, points=False, theme=pictures.LIGHT)
    assert [text.get_text().strip() for text in figure.legends[0].get_texts()] == ["_target_=$x$", "b"]


def test_report_needs_no_torch():
    code = "import sys, rlmod.report; print([m for m in ('torch', 'lightning') if m in sys.modules])"
    root = Path(report.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout.strip() == "[]"
