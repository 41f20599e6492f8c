"""The optimizer's settings are the config's, also where a run resumes from a checkpoint that was made with others."""

import csv
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from rlmod.adapter.lora import LoRA
from rlmod.config.sizes import Guard
from rlmod.model.policy import HFPolicy
from rlmod.model.saving import save_policy
from rlmod.training import optimizer as optimizers
from rlmod.training.optimizer import apply_new_hyperparameters, build_optimizer, check_learning_rate
from tests.command_line import SHORT, refused, run_train
from tests.runs import QUICK, weights
from tests.training.modules import module


def state(run: Path, step: int) -> tuple[dict, list[dict]]:
    """Return the settings of a checkpoint's one group of weights, and the state of its schedule."""
    saved = torch.load(run / "checkpoints" / f"step-{step:06d}" / "trainer.ckpt", weights_only=False)
    return saved["optimizer_states"][0]["param_groups"][0], saved["lr_schedulers"]


def test_by_hand():
    def optimizer(weights, lr, decay):
        return torch.optim.AdamW(weights, lr=lr, weight_decay=decay)

    def cosine(optimizer, num_training_steps):
        return get_cosine_schedule_with_warmup(optimizer, 0, num_training_steps)

    weight = nn.Parameter(torch.ones(2))
    restored, schedule = build_optimizer(lambda w: optimizer(w, 0.3, 0.0), cosine, [weight], 4)
    weight.grad = torch.ones(2)
    for _ in range(2):
        restored.step()
        schedule.step()
    moments = restored.state[weight]["exp_avg"].clone()
    trainer = SimpleNamespace(
        global_step=2, optimizers=[restored], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]
    )
    fresh = build_optimizer(lambda w: optimizer(w, 2.0, 0.1), cosine, [nn.Parameter(torch.zeros(1))], 4)
    apply_new_hyperparameters(trainer, *fresh)  # pyright: ignore[reportArgumentType]
    (group,) = restored.param_groups
    assert group["lr"] == pytest.approx(1.0)  # 2 (1 + cos(pi 2 / 4)) / 2
    assert group["weight_decay"] == 0.1
    assert group["params"][0] is weight
    assert torch.equal(restored.state[weight]["exp_avg"], moments)
    restored.step()
    schedule.step()
    assert schedule.get_last_lr() == [group["lr"]] == pytest.approx([1 + math.cos(math.pi * 3 / 4)])


def test_a_run_that_goes_on_takes_the_new_learning_rate(run, tmp_path, monkeypatch):
    """The new rate is 0: no weight changes any more."""
    changes = ("optimizer.lr=0.0", "optimizer.weight_decay=0.3", "trainer.max_epochs=6")
    run_train(monkeypatch, *QUICK, *changes, f"resume={run}", f"output={tmp_path / 'b'}")
    group, _ = state(tmp_path / "b", 6)
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.3)
    stayed = weights(tmp_path / "b")
    assert all(torch.equal(value, stayed[name]) for name, value in weights(run).items())
    steps = [row["step"] for row in csv.DictReader((tmp_path / "b" / "metrics.csv").open()) if row["reward/mean"]]
    assert len(steps) == 2


def test_a_schedule_goes_on_where_the_run_is_at_the_new_height(run, tmp_path, monkeypatch):
    changes = ("optimizer.lr=0.004", "schedule=cosine", "trainer.max_epochs=6", "callbacks.checkpoints.every=1")
    run_train(monkeypatch, *QUICK, *changes, f"resume={run}", f"output={tmp_path / 'b'}")
    group, (schedule,) = state(tmp_path / "b", 5)
    assert group["lr"] == pytest.approx(0.004 * (1 + math.cos(math.pi * 5 / 6)) / 2)
    assert schedule["base_lrs"] == [0.004]
    assert schedule["last_epoch"] == 5
    assert state(run, 4)[0]["lr"] == 1e-4


def test_another_optimizer_is_refused_before_weights_are_loaded(run, tmp_path, monkeypatch):
    other = ("optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps")
    message = refused(monkeypatch, tmp_path, *QUICK, *other, f"resume={run}")
    assert "optimizer._target_=torch.optim.SGD" in message
    assert "holds the state of torch.optim.AdamW" in message
    assert "policy.path=" in message


def test_fewer_collections_than_there_are_is_a_sentence(run, tmp_path, monkeypatch):
    message = refused(monkeypatch, tmp_path, *QUICK, "trainer.max_epochs=2", f"resume={run}")
    assert "trainer.max_epochs=2: the checkpoint to resume from comes after 4 iterations" in message


class Sized(nn.Module):
    """A policy of ``number`` weights that take no memory."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.inner = nn.Linear(number, 1, bias=False, device="meta")


def test_the_learning_rate_of_a_toy_is_refused_for_a_large_policy():
    small, large, adapted = Sized(50_000_000), Sized(50_000_001), Sized(60_000_000)
    adapted.inner.weight.requires_grad_(False)
    adapted.adapter = nn.Linear(2, 2)
    for policy, rate in ((small, 1e-4), (large, 1e-5), (adapted, 1e-4)):
        check_learning_rate(torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=rate), policy)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.1e-5)
    with pytest.raises(
        ValueError, match=r"optimizer\.lr=1\.1e-05 for full fine-tuning of 50 M weights.*guard\.large_lr=true"
    ):
        check_learning_rate(optimizer, large)
    get_cosine_schedule_with_warmup(optimizer, 10, 100)  # warm-up begins at 0
    with pytest.raises(ValueError, match=r"optimizer\.lr=1\.1e-05"):
        check_learning_rate(optimizer, large)


@pytest.mark.parametrize("forced", [False, True])
def test_the_module_asks_before_it_trains(forced, monkeypatch):
    monkeypatch.setattr(optimizers, "LARGE_POLICY", 1000)
    made = module(guard=Guard(large_lr=forced))
    made.optimizer = partial(torch.optim.AdamW, lr=1e-3)
    made.trainer = SimpleNamespace(estimated_stepping_batches=4)  # pyright: ignore
    if forced:
        assert made.configure_optimizers().param_groups[0]["lr"] == 1e-3
    else:
        with pytest.raises(ValueError, match=r"guard\.large_lr"):
            made.configure_optimizers()


def test_a_command_is_refused_before_the_weights_load(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "LARGE_POLICY", 1000)
    monkeypatch.setattr("rlmod.model.policy.HFPolicy.model", lambda *_: pytest.fail("weights were loaded"))
    assert "optimizer.lr=0.0001 for full fine-tuning of 0 M weights" in refused(monkeypatch, tmp_path, *SHORT)


def test_an_adapter_is_not_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(optimizers, "LARGE_POLICY", 1000)
    build = partial(torch.optim.AdamW, lr=1e-3)
    optimizers.check_rate_before_loading(build, HFPolicy(path="tiny", adapter=LoRA()))
    optimizers.check_rate_before_loading(partial(torch.optim.AdamW, lr=1e-5), HFPolicy(path="tiny"))
    adapted = HFPolicy(path="tiny", adapter=LoRA(rank=2))
    save_policy(adapted.model(adapted.tokenizer()), adapted.tokenizer(), tmp_path / "adapter")
    optimizers.check_rate_before_loading(build, HFPolicy(path=str(tmp_path / "adapter")))
    with pytest.raises(ValueError, match=r"guard\.large_lr"):
        optimizers.check_rate_before_loading(build, HFPolicy(path="tiny"))


def test_the_highest_rate_of_several_groups_counts():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1e-6, 2e-5, 1e-7)]
    with pytest.raises(ValueError, match=r"optimizer\.lr=2e-05"):
        check_learning_rate(torch.optim.AdamW(groups), Sized(60_000_000))
