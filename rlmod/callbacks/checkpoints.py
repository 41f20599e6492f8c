"""Checkpoints that are whole: the trainer's state, the policy in Hugging Face format, and the config, in one folder."""

import logging
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from rlmod.module import RLModule
from rlmod.policy import save_policy

log = logging.getLogger(__name__)


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step-N/`` every so many collections and after the last one, and keeps the newest ``keep``.

        trainer.ckpt   weights, optimizer, schedule, position in the data: what ``resume=`` goes on from
        policy/        AutoModelForCausalLM.from_pretrained loads it
        config.yaml    the resolved config of the run

    A folder gets its name only when it is complete. The first Ctrl-C (or SIGTERM) lets the iteration finish and writes one; a second stops
    at once.
    """

    def __init__(self, *, folder: str, every: int = 50, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints.every and .keep must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.interrupted = False
        self.handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        log.warning(
            "%s: finishing this iteration, then a checkpoint; once more to stop at once", signal.Signals(number).name
        )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if self.interrupted:
            trainer.should_stop = True
        if self.interrupted or last or done % self.every == 0:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule)
        target = self.folder / f"step-{trainer.global_step:06d}"
        partial = target.with_name(f".partial-{target.name}")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial / "trainer.ckpt")
        if trainer.is_global_zero:
            save_policy(pl_module.policy, pl_module.tokenizer, partial / "policy")
            shutil.copy(self.folder.parent / "config.yaml", partial / "config.yaml")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
                shutil.rmtree(old)
        trainer.strategy.barrier()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        while self.handlers:
            number, handler = self.handlers.popitem()
            signal.signal(number, handler)
