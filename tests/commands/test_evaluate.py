import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from rlmod.commands.evaluate import _check_columns
from rlmod.training.accuracy import interval
from tests.command_line import SHORT, refused_eval, run_eval, run_train
from tests.real import real

SMALL = ("data.validation.size=24", "sampler.completions_per_prompt=4", "sampler.max_new_tokens=48")


def written(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_summary_is_what_the_samples_say(tmp_path, monkeypatch):
    run_eval(monkeypatch, *SMALL, "pass_at=[1,4]", f"output={tmp_path / 'a'}")
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").open()]
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert len(samples) == 96
    for sample in samples:
        assert sample["correct"] == (sample["completion"].split("#")[-1] == sample["answer"])
    groups = [samples[i : i + 4] for i in range(0, 96, 4)]
    assert all(len({sample["prompt"] for sample in group}) == 1 for group in groups)
    assert summary["problems"] == 24
    mean = sum(sample["correct"] for sample in samples) / 96
    assert summary["mean@4"]["value"] == summary["pass@1"]["value"] == pytest.approx(mean)
    any_right = sum(any(sample["correct"] for sample in group) for group in groups) / 24
    assert summary["pass@4"]["value"] == pytest.approx(any_right)
    low, high = summary["mean@4"]["interval"]
    assert low < mean < high
    run_eval(monkeypatch, *SMALL, f"output={tmp_path / 'b'}")
    assert (tmp_path / "b" / "samples.jsonl").read_text() == (tmp_path / "a" / "samples.jsonl").read_text()


def test_recorded_completions_are_scored_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.tokenizer", lambda *_: pytest.fail("a model was asked for"))
    source = written(
        tmp_path / "in.jsonl",
        {"completion": "so \\boxed{18}", "answer": "18", "id": 7},
        {"completion": "19", "answer": 18},
        {"completion": "it is 18.", "answer": 18.0},
    )
    run_eval(monkeypatch, f"completions={source}", "reward=math_verify", f"output={tmp_path / 'out.jsonl'}")
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [record["reward"] for record in scored] == [1.0, 0.0, 1.0]
    assert scored[0]["id"] == 7


def test_gsm8k_through_the_command(tmp_path, monkeypatch):
    records = [json.loads(line) for line in real("gsm8k/test.jsonl").open()]
    answers = [record["answer"].split("#### ")[1] for record in records]
    lines = [{"completion": r["answer"], "answer": a} for r, a in zip(records, answers, strict=True)]
    source = written(tmp_path / "in.jsonl", *lines)
    run_eval(monkeypatch, f"completions={source}", "reward=math_verify", f"output={tmp_path / 'out.jsonl'}")
    rewards = [json.loads(line)["reward"] for line in (tmp_path / "out.jsonl").open()]
    assert len(rewards) == 1319
    assert sum(rewards) == 1319


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (['{"completion": "1", "answer": "1"}', "{broken"], ["in.jsonl:2", "not a JSON object"]),
        (['{"completion": "1"}'], ["in.jsonl:1", "no field answer", "completion"]),
        (['{"completion": 3, "answer": "1"}'], ["in.jsonl:1", "completion must be text"]),
        (['{"completion": "3", "answer": {"is": 1}}'], ["in.jsonl:1", "answer must be text or a number"]),
        (["[1]"], ["in.jsonl:1", "must be a JSON object"]),
        ([], ["the file is empty"]),
    ],
)
def test_a_bad_file_of_completions_is_named_and_nothing_is_written(lines, expected, tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    message = refused_eval(monkeypatch, f"completions={source}", f"output={tmp_path / 'out.jsonl'}")
    assert all(part in message for part in expected), message
    assert list(tmp_path.iterdir()) == [source]


def test_other_mistakes(tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl", {"completion": "1", "answer": "1"})
    assert "there is no such file" in refused_eval(monkeypatch, "completions=nowhere.jsonl", "output=o.jsonl")
    assert "is the input file" in refused_eval(monkeypatch, f"completions={source}", f"output={source}")
    assert "must name a .jsonl file" in refused_eval(monkeypatch, f"completions={source}")
    assert "pass_at holds 9" in refused_eval(monkeypatch, "pass_at=[9]")
    assert "unknown key pas_at; did you mean pass_at?" in refused_eval(monkeypatch, "pas_at=[1]")


def test_interval_by_hand():
    # Wilson, 5 of 10, one completion each: +- z sqrt(0.25 / 10 + z^2 / 400) / (1 + z^2 / 10).
    low, high = interval([1.0] * 5 + [0.0] * 5)
    z2 = 1.959964**2
    half = 1.959964 * (0.25 / 10 + z2 / 400) ** 0.5 / (1 + z2 / 10)
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half))
    # Two completions a problem, one of which is right: with two 0 and two 1 besides the variance is 1 / 14, 3.5 times less than 0.25.
    counted = 3.5 * 14 - 4
    half = 1.959964 * (0.25 / counted + z2 / (4 * counted**2)) ** 0.5 / (1 + z2 / counted)
    assert interval([0.5] * 10) == pytest.approx((0.5 - half, 0.5 + half))
    # Nothing right of 30 does not claim to be exactly 0: the upper end is z^2 / (n + z^2).
    low, high = interval([0.0] * 30)
    assert low == 0
    assert high == pytest.approx(z2 / (30 + z2))
    assert interval([1.0] * 30)[0] == pytest.approx(1 - high)


def test_a_mean_just_below_1_is_no_surer_than_1_itself():
    """Four samples a problem, in one of 64 one right, in another two: pass@2 is 1/2 and 5/6 of these, pass@4 is 1 of all."""
    at_2, at_4 = interval([1.0] * 62 + [0.5, 5 / 6]), interval([1.0] * 64)
    assert at_2[0] < at_4[0]
    assert at_2[1] < at_4[1] == 1


def test_a_runs_checkpoint_is_evaluated_by_its_path_as_it_stands(tmp_path, monkeypatch):
    """Hydra reads an equals sign in a value as the beginning of another override: a folder's name must have none."""
    run_train(monkeypatch, *SHORT, "trainer.max_epochs=1", f"output={tmp_path / 'run'}")
    (policy,) = (tmp_path / "run" / "checkpoints").glob("*/policy")
    run_eval(
        monkeypatch, *SMALL, "policy=hf", f"policy.path={policy}", "policy.dtype=float32", f"output={tmp_path / 'eval'}"
    )
    assert json.loads((tmp_path / "eval" / "summary.json").read_text())["problems"] == 24


def test_recorded_tokens_are_those_of_the_text(tmp_path, monkeypatch):
    run_eval(monkeypatch, *SMALL, "record_tokens=true", f"output={tmp_path / 'a'}")
    for line in (tmp_path / "a" / "samples.jsonl").open():
        sample = json.loads(line)
        assert len(sample["completion_ids"]) == len(sample["logprobs"]) == sample["length"]
        assert max(sample["logprobs"]) <= 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pass_at=3", "pass_at must be a list"),
        ("device=foo", "device=foo: "),
        ("prompts_per_batch=0", "prompts_per_batch must be at least 1"),
        ("threshold=nan", "threshold must be a number"),
        ("seed=-1", "seed must be a whole number"),
    ],
)
def test_bad_settings_are_named_before_weights_load(override, message, tmp_path, monkeypatch):
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("weights were loaded"))
    assert message in refused_eval(monkeypatch, *SMALL, override, f"output={tmp_path / 'a'}")


def test_a_recorded_line_that_cannot_be_scored_is_named(tmp_path, monkeypatch):
    good = {"completion": "18", "answer": "18"}
    cases = [
        ({"completion": "18\ud800", "answer": "18"}, "half a character"),
        ({"completion": "18", "answer": 1e999}, "answer must be a finite number"),
    ]
    for record, reason in cases:
        source = written(tmp_path / "in.jsonl", good, record)
        message = refused_eval(
            monkeypatch, f"completions={source}", "reward=math_verify", f"output={tmp_path / 'out.jsonl'}"
        )
        assert "in.jsonl:2: " in message
        assert reason in message


def test_an_answer_that_cannot_be_read_gets_no_reward_and_is_counted(tmp_path, monkeypatch, capsys):
    records = [
        {"completion": "18", "answer": "18"},
        {"completion": "18", "answer": "\\frac{"},
        {"completion": "7", "answer": "18"},
    ]
    source, target = written(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl"
    run_eval(monkeypatch, f"completions={source}", "reward=math_verify", f"output={target}")
    assert [json.loads(line)["reward"] for line in target.read_text().splitlines()] == [1.0, None, 0.0]
    assert "mean reward 0.5000 of 2 completions, 1 abstained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "field", "refused"),
    [
        ("mine", "mine", True),
        ("mine", "mine_terms", True),
        ("mine", "terms", False),
        ("mine", "reward", False),
        ("reward", "terms", True),
        ("reward", "reward_terms", False),
    ],
)
def test_the_column_and_that_of_its_terms_must_be_free_on_every_line(column, field, refused):
    lines = [("a:1", {"completion": ""}), ("a:2", {field: 0})]
    with pytest.raises(ValueError, match=rf"^a:2: there is a field {field} already") if refused else nullcontext():
        _check_columns(lines, column)


@pytest.mark.parametrize("column", ["reward", "terms"])
def test_a_column_that_is_there_is_not_overwritten(column, tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl", {"completion": "18", "answer": "18", column: 0.25})
    words = (f"completions={source}", "reward=exact_match", "reward.pattern=null", f"output={tmp_path / 'out.jsonl'}")
    assert f"in.jsonl:1: there is a field {column} already" in refused_eval(monkeypatch, *words)
    run_eval(monkeypatch, *words, "column=mine")
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line) == {"completion": "18", "answer": "18", column: 0.25, "mine": 1.0}


def test_the_scored_file_is_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    source = written(tmp_path / "in.jsonl", {"completion": "é ∑", "answer": "é ∑", "note": "ß"})
    target = tmp_path / "out.jsonl"
    run_eval(monkeypatch, f"completions={source}", "reward=exact_match", "reward.pattern=null", f"output={target}")
    assert json.loads(target.read_bytes().decode("utf-8"))["note"] == "ß"


def test_a_runs_folder_as_the_policy_is_answered_with_its_newest_policy(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "step-000004" / "policy").mkdir(parents=True)
    message = refused_eval(monkeypatch, "policy=hf", f"policy.path={tmp_path}")
    assert f"its newest policy is policy.path={tmp_path / 'checkpoints' / 'step-000004' / 'policy'}" in message


def test_benchmarks_are_evaluated_in_place_of_the_held_out_problems(tmp_path, monkeypatch):
    """One with its own number of completions and lists, one with those of the command."""
    words = [
        f"+benchmark.{name}.{key}={value}"
        for name, keys in {
            "easy": {"size": 6},
            "hard": {"size": 5, "completions_per_prompt": 2, "maj_at": "[]"},
        }.items()
        for key, value in {"_target_": "rlmod.data.arithmetic.Arithmetic", "split": "held_out", **keys}.items()
    ]
    run_eval(
        monkeypatch, *SMALL, *words, "maj_at=[4]", "best_at=[1,2]", "prompts_per_batch=4", f"output={tmp_path / 'a'}"
    )
    found = json.loads((tmp_path / "a" / "summary.json").read_text(encoding="utf-8"))["benchmarks"]
    assert [(name, each["problems"], each["completions_per_problem"]) for name, each in found.items()] == [
        ("easy", 6, 4),
        ("hard", 5, 2),
    ]
    assert "maj@4" in found["easy"]
    assert "maj@4" not in found["hard"]
    for name, n in (("easy", 4), ("hard", 2)):
        assert found[name]["best@1"]["value"] == pytest.approx(found[name][f"mean@{n}"]["value"])
    samples = [json.loads(line) for line in (tmp_path / "a" / "samples.jsonl").open(encoding="utf-8")]
    assert [sample["benchmark"] for sample in samples] == ["easy"] * 24 + ["hard"] * 10
    assert all(
        sample["final_answer"] == sample["completion"].rpartition("#")[2]
        for sample in samples[:24]
        if sample["correct"]
    )
    assert "final_answer" not in samples[-1]


def test_a_benchmark_has_the_number_that_a_run_reports(tmp_path, monkeypatch):
    words = [
        f"+benchmark.hard.{key}={value}"
        for key, value in {
            "_target_": "rlmod.data.arithmetic.Arithmetic", "split": "held_out", "size": 20, "completions_per_prompt": 2, "maj_at": "[2]",
        }.items()
    ]  # fmt: skip
    run_train(monkeypatch, *SHORT, *words, "trainer.max_epochs=1", f"output={tmp_path / 'run'}")
    before = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))["benchmarks"]["hard"]["before"]
    run_eval(monkeypatch, *words, "sampler.max_new_tokens=40", "prompts_per_batch=64", f"output={tmp_path / 'eval'}")
    found = json.loads((tmp_path / "eval" / "summary.json").read_text(encoding="utf-8"))["benchmarks"]["hard"]
    assert found["mean@2"]["value"] == pytest.approx(before, abs=1e-6)


def test_a_majority_needs_a_reward_that_tells_the_answer(monkeypatch):
    assert "the reward Format does not tell the final answer" in refused_eval(
        monkeypatch, *SMALL, "maj_at=[2]", "reward=format"
    )
    assert "maj_at holds 9" in refused_eval(monkeypatch, "maj_at=[9]")


def test_the_interval_of_values_outside_0_to_1_is_the_normal_one():
    # -1 and 1: mean 0, std sqrt(2), so +- 1.959964 sqrt(2 / 2).
    assert interval([-1.0, 1.0]) == pytest.approx((-1.959964, 1.959964))
