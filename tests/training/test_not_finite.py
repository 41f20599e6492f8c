"""A step whose gradient is not finite is skipped on all ranks, counted and named; five in a row stop the run."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from tests.command_line import SHORT, run_train
from tests.processes import ended, started

CALLS: list[int] = []
"""One entry per call of the loss in this process."""


@dataclass(frozen=True, kw_only=True)
class Spiked(ClippedSurrogate):
    """The shipped loss, but with a value that is not finite in the given steps, counted from 1."""

    steps: tuple[int, ...] = ()
    infinite: bool = False
    rank: int = 0
    """The rank on which it happens."""

    def __call__(self, logprobs, rollouts) -> Any:
        per_token, metrics = super().__call__(logprobs, rollouts)
        CALLS.append(len(CALLS) + 1)
        if CALLS[-1] in self.steps and self.rank == (dist.get_rank() if dist.is_initialized() else 0):
            spike = torch.zeros_like(per_token)
            spike[0, 0] = float("inf" if self.infinite else "nan")
            per_token = per_token + spike * logprobs
        return per_token, metrics


@pytest.fixture
def train(monkeypatch, tmp_path) -> Callable[..., tuple[dict[str, torch.Tensor], list[float]]]:
    def trained(name: str, steps: list[int], *overrides: str):
        CALLS.clear()
        run_train(
            monkeypatch, *SHORT, "trainer.max_epochs=4", "data.validation=null", "batch.micro_batch=1000",
            "loss._target_=tests.training.test_not_finite.Spiked",
            f"+loss.steps={steps}", *overrides, f"output={tmp_path / name}",
        )  # fmt: skip
        with (tmp_path / name / "metrics.csv").open() as file:
            skipped = [float(row["train/skipped_steps"]) for row in csv.DictReader(file) if row["train/skipped_steps"]]
        return load_file(max((tmp_path / name).glob("checkpoints/step-*/policy/model.safetensors"))), skipped

    return trained


@pytest.mark.parametrize("step", [1, 3, 4])
@pytest.mark.parametrize("infinite", ["false", "true"])
def test_one_step_that_is_not_finite_is_skipped_counted_and_named(train, capsys, step, infinite):
    weights, skipped = train("run", [step], f"+loss.infinite={infinite}")
    assert skipped == [float(i == step) for i in range(1, 5)]
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
    output = "".join(capsys.readouterr())
    assert output.count("is skipped") == 1
    assert f"step {step} is skipped: the norm of its gradient is not finite" in output


def test_the_skipped_step_changes_nothing(train):
    """The last of four steps is skipped: the weights are those after three."""
    skipped, _ = train("skipped", [4])
    three, _ = train("three", [], "trainer.max_epochs=3")
    for name, weight in three.items():
        assert torch.equal(weight, skipped[name]), name


def test_too_many_in_a_row_stop_the_run(train):
    with pytest.raises(SystemExit) as stop:
        train("run", [2, 3], "guard.max_skipped=2")
    assert "step 3: the gradient was not finite in 2 steps in a row (guard.max_skipped)" in str(stop.value)
    train("apart", [1, 3], "guard.max_skipped=2")


def test_the_stop_keeps_the_last_good_weights_and_the_micro_batches_to_blame(train, tmp_path):
    with pytest.raises(SystemExit):
        train(
            "run", [3, 4], "guard.max_skipped=2", "batch.micro_batch=64"
        )  # three calls of the loss: the last of each step
    run = tmp_path / "run"
    good = load_file(max(run.glob("checkpoints/step-*/policy/model.safetensors")))
    assert all(bool(weight.isfinite().all()) for weight in good.values())
    saved = torch.load(run / "not_finite-rank-0.pt", weights_only=True)
    assert saved
    assert all(rows["completion_ids"].shape == rows["mask"].shape for rows in saved)


def test_weights_that_are_not_finite_are_never_in_a_checkpoint(train, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(
            "run",
            [],
            "+callbacks.poison={_target_: tests.training.faults.Poison, step: 3}",
            "callbacks.checkpoints.every=1",
        )
    run = tmp_path / "run"
    assert "step 3: the policy has weights that are not finite (" in str(stop.value)
    assert f"the newest one is {run / 'checkpoints' / 'step-000002'}" in str(stop.value)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == "step-000002"
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("rate", ["1e3", "1e30"])
def test_a_learning_rate_far_too_high_goes_on_or_stops_in_a_sentence(train, tmp_path, rate):
    stopped = answer_or_none(lambda: train("run", [], f"optimizer.lr={rate}", "trainer.max_epochs=8"))
    assert stopped is None or "not finite" in stopped
    for file in (tmp_path / "run").glob("checkpoints/step-*/policy/model.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(file).values())
    result = tmp_path / "run" / "result.json"
    assert (stopped is None) == (result.exists() and '"completed": true' in result.read_text())


def answer_or_none(act: Callable[[], object]) -> str | None:
    """The sentence that a run stopped with, or None."""
    try:
        act()
    except SystemExit as stop:
        return str(stop.code)
    return None


def test_a_reward_whose_square_overflows_is_named(train, capsys):
    train("run", [], "reward.correct=1e25", "trainer.max_epochs=1")
    output = "".join(capsys.readouterr())
    assert "The largest reward is 1e+25" in output
    assert "scale the reward" in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_skip_the_step_of_which_one_has_a_bad_loss(strategy, tmp_path):
    output = ended(
        started(
            *SHORT, f"strategy={strategy}", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.max_epochs=4", "data.validation=null",
            "batch.micro_batch=1000", "loss._target_=tests.training.test_not_finite.Spiked", "+loss.steps=[2]", "+loss.rank=1",
            f"output={tmp_path / 'run'}",
        )
    )  # fmt: skip
    assert output.count("step 2 is skipped") == 1
    with (tmp_path / "run" / "metrics.csv").open() as file:
        skipped = [float(row["train/skipped_steps"]) for row in csv.DictReader(file) if row["train/skipped_steps"]]
    assert skipped == [0.0, 1.0, 0.0, 0.0]
    weights = load_file(max((tmp_path / "run").glob("checkpoints/step-*/policy/model.safetensors")))
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
