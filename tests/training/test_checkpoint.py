"""Resuming: the checkpoint that is chosen, the files of the run, and checkpoints that are damaged or set aside."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from rlmod import train
from rlmod.training import checkpoint as checkpoints
from tests.command_line import SHORT, answer, run_train

QUICK = (*SHORT, "shaper=token_entropy", "optimizer.lr=1e-3", "trainer.max_epochs=4", "callbacks.checkpoints.every=1")


def steps(run: Path) -> list[int]:
    """The steps whose metrics a run has, in the order of its file."""
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["reward/mean"]]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(checkpoint / "policy").state_dict()


def same(checkpoint: Path, other: Path) -> bool:
    theirs = weights(other)
    return all(torch.equal(value, theirs[name]) for name, value in weights(checkpoint).items())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Four iterations, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *QUICK, "callbacks.checkpoints.keep=9", f"output={folder}")
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of the run without its result, as if it had been killed at its end, and moved."""
    folder = tmp_path / "a"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    return folder


def command(run: Path, keep: int = 9) -> tuple[str, ...]:
    return *QUICK, f"callbacks.checkpoints.keep={keep}", f"output={run}"


def test_newer_checkpoints_are_set_aside_when_a_run_goes_on_from_an_older_one(finished, run, monkeypatch):
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-000003", folder / "passed-over-step-000003")  # of an earlier time
    run_train(monkeypatch, *command(run), f"resume={folder / 'step-000002'}", "trainer.max_epochs=3")
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "passed-over-step-000003", "passed-over-step-000003-2", "passed-over-step-000004",
        "step-000001", "step-000002", "step-000003",
    ]  # fmt: skip
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["step-000001", "step-000002", "step-000003"]
    assert steps(run) == steps(finished)[:3]  # those of the steps that were taken back are gone
    assert same(folder / "step-000003", folder / "passed-over-step-000003-2")  # the same steps again, bit for bit


def test_a_broken_checkpoint_is_set_aside_and_does_not_count_among_those_that_are_kept(finished, run, monkeypatch):
    folder = run / "checkpoints"
    for step in ("step-000001", "step-000003", "step-000004"):
        os.truncate(folder / step / "trainer.ckpt", 1000)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("keep: 9", "keep: 1"))
    run_train(monkeypatch, *command(run, keep=1))
    log = (run / "train.log").read_text()
    for step in ("step-000003", "step-000004"):
        assert f"{folder / step} is damaged and is skipped: trainer.ckpt has 1,000 of" in log
    assert f"resuming from {folder / 'step-000002'}" in log
    # The older broken one stays, and the new one is the one that is kept.
    assert [path.name for path in checkpoints.list_checkpoints(run)] == ["step-000001", "step-000004"]
    assert sorted(path.name for path in folder.glob("passed-over-*")) == [
        "passed-over-step-000003",
        "passed-over-step-000004",
    ]
    assert same(folder / "step-000004", finished / "checkpoints" / "step-000004")
    assert steps(run) == steps(finished)


def test_with_broken_checkpoints_alone_the_same_command_says_so_in_its_own_words(run, monkeypatch):
    for checkpoint in checkpoints.list_checkpoints(run):
        (checkpoint / "complete.json").unlink()
    message = answer(lambda: run_train(monkeypatch, *command(run)))
    assert f"output={run}: every checkpoint of this run is damaged" in message
    assert "resume=" not in message


def test_a_checkpoint_copied_elsewhere_under_another_name_begins_a_run(run, finished, tmp_path, monkeypatch):
    best = tmp_path / "best"
    shutil.copytree(run / "checkpoints" / "step-000003", best)
    other = tmp_path / "other"
    run_train(monkeypatch, *command(other), f"resume={best}")
    assert steps(other) == steps(finished)[3:]
    assert same(other / "checkpoints" / "step-000004", finished / "checkpoints" / "step-000004")
    # Begun from another's checkpoint and killed, the same command resumes from its own.
    (other / "result.json").unlink()
    run_train(monkeypatch, *command(other), f"resume={best}")
    assert f"resuming from {other / 'checkpoints' / 'step-000004'}" in (other / "train.log").read_text()
    assert json.loads((other / "result.json").read_text())["completed"]
    assert steps(other) == steps(finished)[3:]


def test_a_renamed_checkpoint_in_the_runs_own_folder_is_refused(run, monkeypatch):
    shutil.move(run / "checkpoints" / "step-000003", run / "checkpoints" / "best")
    message = answer(lambda: run_train(monkeypatch, *command(run), f"resume={run / 'checkpoints' / 'best'}"))
    assert "in the run's own folder, but is not one of its checkpoints/step-N" in message
    assert "output=FOLDER" in message


def test_an_earlier_end_does_not_outlive_the_steps_that_are_taken_back(finished, tmp_path, monkeypatch):
    """Going on from an older checkpoint and killed at once, the same command does not claim to be finished."""
    folder = tmp_path / "a"
    shutil.copytree(finished, folder)
    checkpoints.rewind(folder, folder / "checkpoints" / "step-000002")
    assert not (folder / "result.json").exists()
    assert steps(folder) == steps(finished)[:2]


def test_config_yaml_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from omegaconf import OmegaConf

    checkpoints.write_config(tmp_path, OmegaConf.create({"a": 1}))

    def full(cfg, path):
        Path(path).write_text("a: ")
        raise OSError("No space left on device")

    monkeypatch.setattr(OmegaConf, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write_config(tmp_path, OmegaConf.create({"a": 2}))
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


@pytest.mark.parametrize("content", [bytes, os.urandom], ids=["zeros", "noise"])
def test_a_checkpoint_whose_size_is_right_and_nothing_else_is_passed_over(run, monkeypatch, caplog, content):
    """A power cut may leave such a file."""
    state = run / "checkpoints" / "step-000004" / "trainer.ckpt"
    state.write_bytes(content(state.stat().st_size))
    assert checkpoints.find_newest_checkpoint(run) == run / "checkpoints" / "step-000003"
    assert "step-000004 is damaged and is skipped: trainer.ckpt was altered" in caplog.text


def flip(file: Path, older: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a bit flipped": flip,
    "cut": lambda file, older: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file, older: file.write_bytes(b""),
    "zeros": lambda file, older: file.write_bytes(bytes(file.stat().st_size)),
    "missing": lambda file, older: file.unlink(),
    "longer": lambda file, older: file.write_bytes(file.read_bytes() + b" "),
    "a folder": lambda file, older: (file.unlink(), file.mkdir()),
    "of the step before": lambda file, older: shutil.copy(older, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_one_before_is_taken(run, damage, caplog):
    newest, before = (run / "checkpoints" / f"step-{step:06d}" for step in (4, 3))
    files = sorted(file.relative_to(newest) for file in newest.rglob("*") if file.is_file())
    files.remove(Path(checkpoints.MANIFEST))  # the next test's
    altered = 0
    for name in files:
        content = (newest / name).read_bytes()
        DAMAGE[damage](newest / name, before / name)
        if (newest / name).is_file() and (newest / name).read_bytes() == content:
            continue  # the tokenizer is that of the step before
        altered += 1
        caplog.clear()
        assert checkpoints.find_newest_checkpoint(run) == before, name
        assert f"{newest} is damaged and is skipped: " in caplog.text
        assert str(name) in caplog.text
        if (newest / name).is_dir():
            (newest / name).rmdir()
        (newest / name).write_bytes(content)
    assert checkpoints.find_newest_checkpoint(run) == newest
    assert len(files) == 9
    assert altered == (4 if damage == "of the step before" else 9)


@pytest.mark.parametrize("manifest", ["", "null", "[]", "{}", "3", '{"trainer.ckpt": "x"}'])
def test_a_manifest_that_is_none_makes_a_checkpoint_broken(run, manifest):
    checkpoint = run / "checkpoints" / "step-000004"
    (checkpoint / checkpoints.MANIFEST).write_text(manifest)
    assert checkpoints.MANIFEST in str(checkpoints.find_damage(checkpoint))
    assert checkpoints.find_newest_checkpoint(run) == run / "checkpoints" / "step-000003"


def test_what_differs_is_named_and_where_it_is_written_is_no_difference(run, tmp_path):
    before = OmegaConf.load(run / "config.yaml")
    now = OmegaConf.create(OmegaConf.to_yaml(before).replace(before.output, str(tmp_path / "elsewhere")))
    now.optimizer.lr = 1e-5
    assert checkpoints.changed_settings(run / "checkpoints" / "step-000004", now) == [
        "optimizer.lr was 0.001, now 1e-05"
    ]


def test_a_sharded_checkpoint_of_another_folder_is_read_only_if_the_user_trusts_it(tmp_path):
    folder = tmp_path / "theirs" / "checkpoints" / "step-000001"
    (folder / "trainer.ckpt").mkdir(parents=True)
    strategy = {"_target_": "rlmod.strategy.fsdp2.FSDP2"}
    (folder / "config.yaml").write_text("trainer: {strategy: {_target_: rlmod.strategy.fsdp2.FSDP2}}")
    cfg = OmegaConf.create({"resume": "theirs", "trust_checkpoint": False, "trainer": {"strategy": strategy}})
    with pytest.raises(
        ValueError, match=r"executes any code that somebody put into it.*trust_checkpoint=true; or start a new"
    ):
        checkpoints.check_sharded(tmp_path / "mine", folder, cfg)
    checkpoints.check_sharded(tmp_path / "theirs", folder, cfg)  # the run's own
    cfg.trust_checkpoint = True
    checkpoints.check_sharded(tmp_path / "mine", folder, cfg)
    cfg.trainer.strategy = "auto"
    with pytest.raises(ValueError, match="only the strategy that wrote it can read it"):
        checkpoints.check_sharded(tmp_path / "mine", folder, cfg)
    assert "trust_checkpoint" not in vars(checkpoints)["_comparable_settings"]({"trust_checkpoint": True})


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nothing_in_a_checkpoint_that_is_one_file_is_executed(run, tmp_path, monkeypatch):
    theirs = run / "checkpoints" / "step-000004"
    state = torch.load(theirs / "trainer.ckpt", weights_only=True)
    torch.save({**state, "extra": Bomb(tmp_path / "executed")}, theirs / "trainer.ckpt")
    (theirs / checkpoints.MANIFEST).unlink()
    checkpoints.write_manifest(theirs)  # no signature: whoever alters a checkpoint can write it again
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    words = (*QUICK, "trainer.max_epochs=5", f"output={tmp_path / 'b'}", f"resume={theirs}")
    message = answer(lambda: run_train(monkeypatch, *words))
    assert f"{theirs / 'trainer.ckpt'} holds more than tensors and plain values" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["a: [", "[1, 2]", "\xff"])
def test_a_config_that_cannot_be_read_is_named(run, monkeypatch, content):
    (run / "config.yaml").write_bytes(content.encode("latin-1"))
    message = answer(lambda: run_train(monkeypatch, *command(run)))
    assert f"{run / 'config.yaml'} cannot be read as the config of a run: " in message


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"completed": true}', "[" * 100_000])
def test_a_result_that_cannot_be_read_is_named_and_the_run_goes_on(run, content, caplog):
    (run / "result.json").write_text(content)
    cfg = OmegaConf.load(run / "config.yaml")
    assert vars(train)["_find_finished_result"](run, cfg) is None
    assert f"{run / 'result.json'} is broken, so the run does not count as complete" in caplog.text
