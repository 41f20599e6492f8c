"""Files of a checkpoint without a run: the manifest, damage, settings that differ, and the decisions of the callback."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from rlmod.training import checkpoint as checkpoints
from rlmod.training.callbacks.checkpoints import Checkpoints
from tests.plain_trainer import plain_trainer
from tests.training.modules import module


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of two files, one of them in a folder."""
    folder = tmp_path / "checkpoints" / "step-000003"
    (folder / "policy").mkdir(parents=True)
    (folder / "config.yaml").write_text("a: 1\n")
    (folder / "policy" / "weights").write_bytes(b"12345")
    checkpoints.write_manifest(folder)
    return folder


def test_the_manifest_has_the_size_and_the_digest_of_every_file(folder):
    digest = hashlib.sha256(b"12345").hexdigest()
    entries = json.loads((folder / checkpoints.MANIFEST).read_text())
    assert entries["policy/weights"] == {"bytes": 5, "sha256": digest}
    assert set(entries) == {"config.yaml", "policy/weights"}
    assert checkpoints.find_damage(folder) is None
    checkpoints.write_manifest(folder)  # again: it does not list itself
    assert checkpoints.find_damage(folder) is None


def test_every_file_and_folder_of_a_checkpoint_is_flushed(folder, monkeypatch):
    flushed: list[Path] = []
    monkeypatch.setattr(checkpoints, "fsync", flushed.append)
    checkpoints.write_manifest(folder)
    assert set(flushed) == {*folder.rglob("*"), folder}


def test_contents_are_read_only_if_they_are_asked_for(folder):
    (folder / "policy" / "weights").write_bytes(b"54321")
    assert checkpoints.find_damage(folder, contents=False) is None
    assert "policy/weights was altered" in str(checkpoints.find_damage(folder))
    (folder / "policy" / "weights").write_bytes(b"123456")
    assert checkpoints.find_damage(folder, contents=False) == "policy/weights has 6 of 5 bytes"
    (folder / "policy" / "weights").unlink()
    assert checkpoints.find_damage(folder, contents=False) == "policy/weights is missing"
    (folder / "policy" / "more").write_bytes(b"")
    assert checkpoints.find_damage(folder, contents=False) == "policy/more does not belong to it"


@pytest.mark.parametrize(
    "entries",
    [{}, [], {"config.yaml": 5}, {"config.yaml": {"bytes": 5}}, {"config.yaml": {"bytes": "5", "sha256": "x"}},
     {"config.yaml": {"sha256": "x"}}],
)  # fmt: skip
def test_a_manifest_without_sizes_and_digests_is_damage(folder, entries):
    (folder / checkpoints.MANIFEST).write_text(json.dumps(entries))
    assert "does not hold the sizes and digests" in str(checkpoints.find_damage(folder))


def test_a_state_that_cannot_be_read_is_passed_over_although_its_manifest_fits(folder, caplog):
    (folder / "trainer.ckpt").write_bytes(b"no archive")
    checkpoints.write_manifest(folder)
    assert checkpoints.find_damage(folder) is None
    assert checkpoints.find_newest_checkpoint(folder.parents[1]) is None
    assert "trainer.ckpt cannot be read" in caplog.text


def test_settings_that_were_changed_added_or_removed_are_named(folder):
    old = {"lr": 1, "gone": {"a": 2}, "output": "runs/a", "resume": None, "logger": {"csv": {"dir": "/x/runs/a/logs"}}}
    new = {"lr": 3, "new": 4, "output": "runs/b", "resume": "runs/a", "logger": {"csv": {"dir": "/y/runs/b/logs"}}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(old)))
    assert checkpoints.changed_settings(folder, OmegaConf.create(new)) == [
        "lr was 1, now 3", "gone was {'a': 2}, now None", "new was None, now 4",
    ]  # fmt: skip
    new["logger"]["csv"]["dir"] = "/y/runs/b/elsewhere"
    assert any("logger.csv.dir" in each for each in checkpoints.changed_settings(folder, OmegaConf.create(new)))
    assert checkpoints.changed_settings(folder, OmegaConf.create({**old, "output": "runs/c", "logger": {}})) == [
        "logger.csv was {'dir': 'output/logs'}, now None"
    ]


def measured(accuracy: float | None, step: int = 3):
    made = module()
    made.held_out = {"step": step, "problems": 8, "accuracy": accuracy}
    return made


def test_only_a_higher_accuracy_of_this_step_makes_a_checkpoint_the_best(tmp_path):
    callback = Checkpoints(folder=str(tmp_path))
    found = [
        callback._improved(measured(accuracy, step), 3)
        for accuracy, step in [(None, 3), (float("nan"), 3), (0.5, 2), (0.5, 3), (0.5, 3), (0.4, 3), (0.6, 3)]
    ]
    assert found == [False, False, False, True, False, False, True]
    assert callback.state_dict() == {"best_accuracy": 0.6, "best_step": 3}
    assert not Checkpoints(folder=str(tmp_path), best=False)._improved(measured(0.5), 3)


def test_the_best_step_of_a_run_elsewhere_is_not_taken_over(folder):
    for step, taken in ((3, 3), (4, None)):
        callback = Checkpoints(folder=str(folder.parent))
        callback.load_state_dict({"best_accuracy": 0.5, "best_step": step})
        assert callback.best_step == taken


def test_a_stop_in_the_middle_of_an_iteration_is_put_off_to_its_end(tmp_path):
    callback, made = Checkpoints(folder=str(tmp_path)), module()
    trainer = plain_trainer()
    callback.on_train_batch_end(trainer, made, None, None, 0)
    assert (callback.stop_requested, trainer.should_stop) == (False, False)
    trainer.should_stop = True
    callback.on_train_batch_end(trainer, made, None, None, 0)
    assert (callback.stop_requested, trainer.should_stop) == (True, False)
    callback.on_train_batch_end(trainer, made, None, None, 1)
    assert callback.stop_requested  # until the end of the iteration


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_named_with_the_newest_checkpoint(folder, tmp_path, value):
    made = module()
    trainer = plain_trainer()
    callback = Checkpoints(folder=str(folder.parent))
    callback._check_finite(trainer, made)
    name, weight = list(made.policy.named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[-1] = value
    with pytest.raises(ValueError, match=rf"step 0: .*not finite \({name}\).*the newest one is {folder}"):
        callback._check_finite(trainer, made)
    with pytest.raises(ValueError, match="there is no earlier one"):
        Checkpoints(folder=str(tmp_path / "other" / "checkpoints"))._check_finite(trainer, made)
