"""benchmark=[...]: the sets that come with the project, one's own, and what is refused."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlmod.config.benchmarks import load_benchmarks
from rlmod.config.build import Components
from rlmod.data.hub_or_file import HubOrFile
from tests.command_line import SHORT, answer, refused, run_train
from tests.config.composing import ROOT, composed

NAMES = sorted(file.stem for file in (ROOT / "conf" / "benchmark").glob("*.yaml"))
HARD = (
    "+benchmark.hard._target_=rlmod.data.arithmetic.Arithmetic",
    "+benchmark.hard.split=held_out",
    "+benchmark.hard.size=6",
)


def built(*overrides: str) -> Components:
    cfg = composed(*overrides)
    cfg.output = "unused"
    return Components.from_config(cfg)


def own(folder: Path, name: str, text: str) -> str:
    (folder / "conf" / "benchmark").mkdir(parents=True, exist_ok=True)
    (folder / "conf" / "benchmark" / f"{name}.yaml").write_text(text, encoding="utf-8")
    return str(folder / "conf")


def refused_with(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
    words = ("--config-dir", folder, *SHORT, *overrides, f"output={tmp_path / 'refused'}")
    return answer(lambda: run_train(monkeypatch, *words))


def test_the_known_sets_are_all_there():
    assert set(NAMES) >= {"math500", "aime24", "aime25", "amc23", "minerva", "olympiad", "gsm8k", "svamp"}


@pytest.mark.parametrize("name", NAMES)
def test_a_set_is_one_word_and_asks_for_a_box(name):
    parts = built(f"benchmark={name}")
    problems = parts.benchmark_problems[name]
    assert isinstance(problems, HubOrFile)
    assert problems.path is None
    assert "/" in problems.name
    assert (problems.template or "").endswith("Reason step by step, and put the final answer within \\boxed{{}}.\n")
    settings = parts.benchmark[name]
    assert settings.reward is parts.validation.reward
    assert settings.objective == f"val/{name}/mean@{settings.sampler.completions_per_prompt}"
    keys = set(composed(f"benchmark={name}").benchmark[name])
    assert keys == set(composed("benchmark=aime24").benchmark.aime24)


def test_settings_that_a_set_leaves_null_are_those_of_the_validation():
    parts = built(
        "benchmark=[aime24,amc23]",
        "validation.sampler.completions_per_prompt=4",
        "validation.pass_at=[4]",
        "benchmark.amc23.completions_per_prompt=null",
        "benchmark.aime24.maj_at=[32]",
        "benchmark.aime24.pass_at=[]",
    )
    aime, amc = parts.benchmark["aime24"], parts.benchmark["amc23"]
    assert (aime.sampler.completions_per_prompt, aime.maj_at, aime.pass_at) == (32, [32], [])
    assert amc.sampler is parts.validation.sampler
    assert (amc.maj_at, amc.pass_at) == ([], [4])
    assert aime.metric("maj", 32) == "val/aime24/maj@32"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["benchmark=aime42"], "Could not find 'benchmark/aime42'"),
        (["benchmark=[aime24,aime24]"], "benchmark=[aime24,aime24]: aime24 is given twice; give each set once"),
        (["benchmark=aime24", "benchmark.aime24.pth=a.jsonl"], "unknown key benchmark.aime24.pth; did you mean benchmark.aime24.path"),
        (["benchmark=aime24", "benchmark.aime24.maj_at=[64]"], "benchmark.aime24.maj_at holds 64, but k must be between 1 and benchmark"),
        (["benchmark=gsm8k", "validation.sampler.completions_per_prompt=8", "validation.pass_at=[8]"], "taken over from the other sets"),
        (["benchmark=aime24", "benchmark.aime24.completions_per_prompt=0"], "completions_per_prompt must be null or at least 1, got 0"),
        (["benchmark=aime24", "benchmark.aime24.completions_per_prompt=two"], "completions_per_prompt must be a whole number or null"),
        (["benchmark=aime24", "benchmark.aime24.path=a.txt"], "benchmark.aime24.path must end in .jsonl"),
        (["benchmark=aime24", "benchmark.aime24.path=gone.jsonl"], "benchmark.aime24.path: there is no file gone.jsonl; relative paths"),
        (["+benchmark.mine.path=a.jsonl"], "benchmark.mine._target_ is missing"),
        (["+benchmark.mine=a.jsonl"], "benchmark.mine must be a set of problems, got 'a.jsonl'"),
        (["+benchmark.mine._target_=rlmod.data.problem_file.ProblemFile", "+benchmark.mine.path=???"], "benchmark.mine.path is missing"),
        (["validation.maj_at=[2]"], "validation.maj_at holds 2, but k must be between 1 and validation.sampler.completions_per_prompt = 1"),
        (["validation.best_at=[0]"], "validation.best_at holds 0"),
        (["validation.maj_at=[1]", "reward=overlong"], "the reward Overlong does not tell the final answer"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_key(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("weights were loaded"))
    assert message in refused(monkeypatch, tmp_path, *SHORT, *overrides)


def test_names_that_no_metric_can_have_are_refused():
    cfg = composed(*HARD)
    cfg.output = "unused"
    OmegaConf.set_struct(cfg, False)
    node = {"_target_": "rlmod.data.problem_file.ProblemFile", "path": "a.jsonl"}
    for name in ("a/b", "mean@1", "a b", "ä", ""):
        with pytest.raises(ValueError, match="cannot be part of a metric's name"):
            Components.from_config(OmegaConf.merge(cfg, {"benchmark": {name: node}}))  # pyright: ignore[reportArgumentType]


def test_the_hub_that_cannot_be_reached_is_answered_with_the_local_file(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="needs the extra rlmod[datasets]")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = refused(monkeypatch, tmp_path, *SHORT, "benchmark=aime24")
    assert "benchmark.aime24.name=HuggingFaceH4/aime_2024" in message
    assert "no route to the hub" in message
    assert "give a local file with the same fields: benchmark.aime24.path=FILE" in message


def test_a_set_of_ones_own_is_a_yaml_of_a_few_lines(tmp_path, monkeypatch):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1+2:", "answer": "3"}\n{"prompt": "2+2:", "answer": 4}\n')
    text = (
        "# @package benchmark.mine\n_target_: rlmod.data.problem_file.ProblemFile\n"
        f"path: {tmp_path / 'mine.jsonl'}\ncompletions_per_prompt: 2\n"
    )
    folder = own(tmp_path, "mine", text)
    words = ("--config-dir", folder, "benchmark=[mine]", "trainer.max_epochs=1", f"output={tmp_path / 'run'}")
    run_train(monkeypatch, *words, *SHORT)
    assert "val/mine/mean@2" in (tmp_path / "run" / "metrics.csv").read_text(encoding="utf-8")


def test_ones_own_set_under_a_name_that_is_taken_is_refused(tmp_path, monkeypatch):
    folder = own(
        tmp_path,
        "aime24",
        "# @package benchmark.aime24\n_target_: rlmod.data.problem_file.ProblemFile\npath: a.jsonl\n",
    )
    message = refused_with(folder, tmp_path, monkeypatch, "benchmark=aime24")
    assert "there are two files of the name aime24" in message
    assert "give yours another name" in message


@pytest.mark.parametrize("package", ["# @package benchmark.aime24\n", ""])
def test_a_file_whose_set_has_another_name_is_refused(package, tmp_path, monkeypatch):
    folder = own(tmp_path, "mine", f"{package}_target_: rlmod.data.problem_file.ProblemFile\npath: a.jsonl\n")
    message = refused_with(folder, tmp_path, monkeypatch, "benchmark=[aime24,mine]")
    assert "mine.yaml gives no set of the name mine; its first line must be `# @package benchmark.mine`" in message


def test_an_answer_that_cannot_be_read_names_the_benchmark(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_text('{"problem": "1+1", "answer": "\\\\boxed{"}\n', encoding="utf-8")
    words = (
        "benchmark=aime24",
        f"benchmark.aime24.path={file}",
        "validation.reward={_target_: rlmod.reward.math_verify.MathVerify}",
    )
    message = refused(monkeypatch, tmp_path, *SHORT, *words)
    assert message.startswith("rlmod-train: benchmark.aime24: 1 of 1 answers cannot be read by the reward")
    assert f"{file}:1" in message


def test_the_python_interface_refuses_what_the_command_refuses():
    import rlmod

    with pytest.raises(ValueError, match="aime24 is given twice"):
        rlmod.train(["benchmark=[aime24,aime24]", "output=unused"])  # pyright: ignore[reportCallIssue]


def test_problems_are_read_under_their_names():
    loaded = load_benchmarks(built(*HARD).benchmark_problems, 60.0)
    assert {name: len(problems) for name, problems in loaded.items()} == {"hard": 6}
