"""Environment variables, which may be secrets, stay out of files and messages."""

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import OmegaConf

from rlmod.config import cli
from rlmod.config.environment import read_config, redact, resolve_without_environment, select
from tests.command_line import SHORT, answer, refused, run_train


def test_everything_is_resolved_but_environment_variables(monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret")
    cfg = OmegaConf.create(
        {
            "key": "${oc.env:RLMOD_TEST_KEY}", "url": "https://x/${key}/y", "n": 3, "list": ["${url}", "${n}"],
            "default": "${oc.env:RLMOD_TEST_NONE,7}", "null": "${oc.env:RLMOD_TEST_NONE,null}",
            "inner": {"again": "${oc.decode:${oc.env:RLMOD_TEST_KEY}}"},
        }
    )  # fmt: skip
    found = resolve_without_environment(cfg)
    assert found == {
        "key": "${oc.env:RLMOD_TEST_KEY}",
        "url": "https://x/${oc.env:RLMOD_TEST_KEY}/y",
        "n": 3,
        "list": ["https://x/${oc.env:RLMOD_TEST_KEY}/y", 3],
        "default": "${oc.env:RLMOD_TEST_NONE,7}",
        "null": "${oc.env:RLMOD_TEST_NONE,null}",
        "inner": {"again": "${oc.env:RLMOD_TEST_KEY}"},
    }
    assert resolve_without_environment(OmegaConf.create(found)) == found
    assert cfg.key == "s3cret"  # the resolver is as before
    assert OmegaConf.create(found).url == "https://x/s3cret/y"
    with pytest.raises(Exception, match="RLMOD_TEST_NONE"):
        _ = OmegaConf.create({"a": "${oc.env:RLMOD_TEST_NONE}"}).a


def test_a_run_writes_no_secret_and_resumes_with_another_one(tmp_path, monkeypatch):
    run = tmp_path / "a"
    words = (
        *SHORT,
        "trainer.max_epochs=2",
        "+judge_key=${oc.env:RLMOD_TEST_KEY}",
        "data.validation=null",
        f"output={run}",
    )
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-one")
    run_train(monkeypatch, *words)
    for file in (file for file in run.rglob("*") if file.is_file() and not file.is_symlink()):
        assert b"s3cret-one" not in file.read_bytes(), file
    assert "${oc.env:RLMOD_TEST_KEY}" in (run / "config.yaml").read_text()
    # The variable's value is no setting: the same command finds its own run.
    (run / "result.json").unlink()
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-two")
    run_train(monkeypatch, *words)


def test_a_config_that_somebody_else_wrote_prints_no_variable(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret")
    run = tmp_path / "a"
    run_train(monkeypatch, *SHORT, "data.validation=null", f"output={run}")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("name: train", "name: ${oc.env:RLMOD_TEST_KEY}"))
    message = answer(lambda: run_train(monkeypatch, *SHORT, "data.validation=null", f"output={run}"))
    assert "name was '${oc.env:RLMOD_TEST_KEY}'" in message
    assert "s3cret" not in message


def test_a_message_names_the_variable_and_not_its_value(tmp_path, monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-of-somebody")
    monkeypatch.setenv("RLMOD_TEST_SHORT", "12")
    message = refused(monkeypatch, tmp_path, *SHORT, "optimizer.lr=${oc.env:RLMOD_TEST_KEY}")
    assert "optimizer.lr must be a number, got '${oc.env:RLMOD_TEST_KEY}'" in message
    assert OmegaConf.create({"a": "${oc.env:RLMOD_TEST_SHORT}"}).a == "12"
    assert redact("in 12 of 123") == "in 12 of 123"
    error = ValueError("the server refused s3cret-of-somebody")
    assert cli.explain_error(error) == "the server refused ${oc.env:RLMOD_TEST_KEY}"


def test_a_config_is_read_without_resolving_or_importing_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-of-somebody")
    file = tmp_path / "config.yaml"
    file.write_text(
        "optimizer: {_target_: '${oc.env:RLMOD_TEST_KEY}', lr: 1e-6}\nown: {_target_: os.system, command: ls}\n"
    )
    config = read_config(file)
    assert config["optimizer"] == {"_target_": "${oc.env:RLMOD_TEST_KEY}", "lr": 1e-6}
    assert config["own"] == {"_target_": "os.system", "command": "ls"}
    assert select(config, "optimizer.lr") == 1e-6
    assert select(config, "optimizer.lr.x") is None
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read as the config of a run"):
        read_config(tmp_path / "none.yaml")


def test_the_table_of_a_multirun_has_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("RLMOD_TEST_KEY", "s3cret-of-somebody")
    job = {"num": 0, "override_dirname": "key=${oc.env:RLMOD_TEST_KEY}"}
    config = OmegaConf.create({"hydra": {"mode": RunMode.MULTIRUN, "job": job, "sweep": {"dir": str(tmp_path)}}})
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("the server refused s3cret-of-somebody")
    cli.Results().on_job_end(config, failed)
    assert (tmp_path / "results.csv").read_text().splitlines()[1] == (
        "0,key=${oc.env:RLMOD_TEST_KEY},,the server refused ${oc.env:RLMOD_TEST_KEY}"
    )
