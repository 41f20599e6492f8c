"""Checkpoints that are whole: the trainer's state, the policy in Hugging Face format, the config and the run's records, in one folder."""

import logging
import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from rlmod import ops
from rlmod.config.cli import Stopped
from rlmod.model.policy import save_policy
from rlmod.strategy._sharding import Sharding
from rlmod.training import checkpoint as checkpoints
from rlmod.training.module import RLModule

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and what schedulers send before they kill; SIGUSR2 is submitit's."""


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step-N/`` every so many iterations and after the last one, and keeps the newest ``keep`` whole ones.

        trainer.ckpt   weights, optimizer, schedule, position in the data, random states: what a run resumes from
        policy/        AutoModelForCausalLM.from_pretrained loads it
        config.yaml    the resolved config of the run
        metrics.csv, samples.jsonl   the run's records up to here
        complete.json  the size of each of these files

    A folder gets its name when it is complete, after the rollout batch's metrics have been logged. The first Ctrl-C, SIGTERM, SIGUSR1
    or SIGUSR2 lets the iteration finish and writes one; a second stops at once.
    """

    def __init__(self, *, folder: str, every: int = 50, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints.every and .keep must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.interrupted: signal.Signals | None = None
        self.fitting = False
        self.written: Path | None = None
        """Whole but for the records, and not yet named."""
        self.handlers: dict[int, Any] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        # All ranks stop together, whichever has had the signal.
        number = int(ops.all_max(torch.tensor(float(self.interrupted or 0), device=pl_module.device)))
        self.interrupted = signal.Signals(number) if number else None
        trainer.should_stop = trainer.should_stop or number > 0
        if number or last or done % self.every == 0:
            self.write(trainer, pl_module)

    # The Trainer logs a rollout batch's metrics after on_train_epoch_end: only now are they in metrics.csv.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule)
        partial = self.folder / f".partial-step-{trainer.global_step:06d}"
        try:
            if trainer.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            trainer.strategy.barrier()
            trainer.save_checkpoint(partial / "trainer.ckpt")
            sharding, policy = trainer.strategy, pl_module.policy
            policy, weights = sharding.full_state_dict(policy) if isinstance(sharding, Sharding) else (policy, None)
            if trainer.is_global_zero:
                save_policy(policy, pl_module.tokenizer, partial / "policy", weights)
                shutil.copy(self.folder.parent / "config.yaml", partial / "config.yaml")
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError where a disk is full
            raise self._not_written(partial, error) from error
        self.written = partial

    def publish(self, trainer: L.Trainer) -> None:
        """Adds the run's records and gives the folder its name."""
        if self.written is None:
            return
        partial, self.written = self.written, None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            try:
                for name in checkpoints.RECORDS:
                    if (self.folder.parent / name).is_file():
                        shutil.copy(self.folder.parent / name, partial / name)
                checkpoints.seal(partial)
            except OSError as error:
                raise self._not_written(partial, error) from error
            target = self.folder / partial.name.removeprefix(".partial-")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            checkpoints.on_disk(self.folder)
            whole = [each for each in checkpoints.checkpoints(self.folder.parent) if checkpoints.damage(each) is None]
            for old in whole[: -self.keep]:
                shutil.rmtree(old)
        trainer.strategy.barrier()

    def _not_written(self, partial: Path, error: Exception) -> ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints.checkpoints(self.folder.parent)
        reason = str(error).splitlines()[0]
        newest = f"the newest whole one is {kept[-1]}" if kept else "there is no earlier one"
        return ValueError(
            f"the checkpoint {partial.name.removeprefix('.partial-')} could not be written ({reason}); {newest}"
        )

    # The Trainer sets handlers of its own just before these hooks, and they would end the run in the middle of an iteration.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fitting = True
        self._listen()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()

    def _listen(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != self._interrupt:
                self.handlers[number] = signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted or not self.fitting:
            run = self.folder.parent
            raise Stopped(number, f"resume={run}" if checkpoints.checkpoints(run) else None)
        self.interrupted = signal.Signals(number)
        log.warning("%s: finishing this iteration, then a checkpoint; once more to stop at once", self.interrupted.name)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.fitting = False
        while self.handlers:
            number, handler = self.handlers.popitem()
            if signal.getsignal(number) == self._interrupt:  # or the Trainer has put back what was there before its own
                signal.signal(number, handler)
