"""Long forms: a run that is killed twenty times, and three hundred collections in one process. Once a week."""

import os
import statistics
from typing import Any

import lightning as L
import pytest

from tests.command_line import SHORT, run_train
from tests.killed import check_killed_equals_whole

pytestmark = pytest.mark.weekly

DROPOUT = (*SHORT, "shaper=token_entropy", "optimizer.lr=1e-3", "adapter=lora", "policy.adapter.dropout=0.1")
WHOLE = (*SHORT, "shaper=token_entropy", "optimizer.lr=1e-4")
TWO = ("trainer.devices=2", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    "settings",
    [DROPOUT, (*DROPOUT, "strategy=ddp", *TWO), (*WHOLE, "strategy=fsdp2", *TWO)],
    ids=["one process", "ddp", "fsdp2"],
)
def test_killed_twenty_times_equals_uninterrupted_bit_for_bit(settings, tmp_path):
    check_killed_equals_whole(tmp_path, settings, iterations=40, kills=16, early=4)
    assert (tmp_path / "killed" / "result.json").is_file()


class Watch(L.Callback):
    """Records resident memory in MiB, open descriptors, threads and child processes after each iteration."""

    seen: list[tuple[float, int, int, int]] = []  # noqa: RUF012

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with open("/proc/self/status", encoding="utf-8") as file:
            status: dict[str, Any] = dict(line.split(":", 1) for line in file)
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="utf-8") as file:
            children = len(file.read().split())
        memory = int(status["VmRSS"].split()[0]) / 1024
        self.seen.append((memory, len(os.listdir("/proc/self/fd")), int(status["Threads"]), children))


@pytest.mark.parametrize("reward", ["exact_match", "math_verify"])
def test_three_hundred_collections_leave_memory_descriptors_and_threads_flat(reward, tmp_path, monkeypatch):
    """``math_verify`` grades in worker processes, while the policy samples."""
    Watch.seen.clear()
    run_train(
        monkeypatch, *WHOLE, f"reward={reward}", "trainer.max_epochs=300", "trainer.check_val_every_n_epoch=100",
        f"output={tmp_path / 'a'}", "+callbacks.watch._target_=tests.training.test_endurance.Watch", "callbacks.checkpoints.every=25",
    )  # fmt: skip
    memory, *counts = zip(*Watch.seen, strict=True)
    assert len(memory) == 300
    early, late = statistics.median(memory[60:110]), statistics.median(memory[250:])
    print(
        f"{reward}: {early:.0f} MiB resident after 60 to 110 collections, {late:.0f} after 250 to 300; {[c[-1] for c in counts]}"
    )
    assert late - early < 0.02 * early
    for count in counts:  # descriptors, threads, children
        assert max(count[250:]) <= max(count[60:110])
