"""Processes that train as one: who writes, and how they end."""

import pytest
from hydra.errors import MissingConfigException

from rlmod import distributed
from rlmod.config import cli
from tests.command_line import answer, refused, run_train


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
        # torchrun's rendezvous numbers the nodes in the order in which they come, whatever SLURM calls them.
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),
        ({"SLURM_PROCID": "2", "SLURM_LOCALID": "0"}, False),
        # Lightning starts the others of a node, in a job where SLURM has started one process.
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"NODE_RANK": "1"}, False),
        ({"GROUP_RANK": "1"}, False),
        ({"NODE_RANK": "0", "LOCAL_RANK": "0"}, True),
    ],
)
def test_one_process_writes_whoever_has_started_it(variables, first, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_rank_zero() is first


def test_ranks_that_are_started_by_themselves_must_be_told_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "give output=FOLDER" in answer(lambda: run_train(monkeypatch, "debug=short", "trainer.num_nodes=2"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "give output=FOLDER" in answer(lambda: run_train(monkeypatch, "debug=short"))
    assert "loss.clip_low" in answer(lambda: run_train(monkeypatch, "debug=short", "output=run", "loss.clip_low=-1"))


@pytest.mark.parametrize("nodes", ["null", "two", "0", "true"])
def test_a_number_of_nodes_that_is_none_is_refused(nodes, tmp_path, monkeypatch):
    message = refused(monkeypatch, tmp_path, "debug=short", f"trainer.num_nodes={nodes}")
    assert "trainer.num_nodes must be a whole number of at least 1" in message


def test_another_rank_keeps_out_of_the_first_ones_files(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert distributed.rank_output_overrides() == []
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert distributed.rank_output_overrides() == []
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert distributed.rank_output_overrides() == ["hydra.job.name=rank_3", "hydra.output_subdir=null"]
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # not started by srun
    assert distributed.rank_output_overrides() == []


def test_the_launcher_for_slurm_says_which_extra_it_needs():
    missing = MissingConfigException("In 'hydra/launcher/slurm': Could not load", "hydra/launcher/submitit_slurm")
    assert "pip install 'rlmod[slurm]'" in cli.explain_error(missing)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"LOCAL_RANK": "0", "RANK": "8"}, True),
        ({"LOCAL_RANK": "1", "RANK": "9"}, False),
        ({"SLURM_LOCALID": "2"}, False),
    ],
)
def test_the_first_rank_of_a_node(variables, first, monkeypatch):
    for name in ("LOCAL_RANK", "SLURM_LOCALID", "JSM_NAMESPACE_LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed.is_first_on_node() == first
