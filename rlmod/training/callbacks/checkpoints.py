"""Complete checkpoints: the trainer's state, the policy in Hugging Face format, the config and the run's records, in one folder."""

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
"""Ctrl-C, and the signals that schedulers send before they kill a job. submitit sends SIGUSR2."""


class Checkpoints(Checkpoint):
    """Writes ``checkpoints/step-N/`` every ``every`` iterations and after the last one, and keeps the newest ``keep`` intact ones.

        trainer.ckpt   weights, optimizer, schedule, position in the data, random states: a run resumes from these
        policy/        the policy, for AutoModelForCausalLM.from_pretrained
        config.yaml    the resolved config of the run
        metrics.csv, samples.jsonl   the run's records up to here
        complete.json  the size of each of these files

    A folder gets its name when it is complete, after the rollout batch's metrics have been logged. The first Ctrl-C, SIGTERM, SIGUSR1
    or SIGUSR2 lets the iteration finish and writes a checkpoint; a second one stops the run at once. ValueError if a checkpoint cannot
    be written.
    """

    def __init__(self, *, folder: str, every: int = 50, keep: int = 2) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints.every and .keep must be at least 1, got {every} and {keep}")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.interrupted: signal.Signals | None = None
        self.fitting = False
        self.unpublished: Path | None = None
        """The folder of a checkpoint that still lacks the run's records, its manifest and its final name."""
        self.handlers: dict[int, Any] = {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = trainer.current_epoch + 1
        last = done == trainer.max_epochs or trainer.global_step == trainer.max_steps
        # All ranks stop together, even if only one received the signal.
        number = int(ops.all_max(torch.tensor(float(self.interrupted or 0), device=pl_module.device)))
        self.interrupted = signal.Signals(number) if number else None
        trainer.should_stop = trainer.should_stop or number > 0
        if number or last or done % self.every == 0:
            self.write(trainer, pl_module)

    # The Trainer logs a rollout batch's metrics after on_train_epoch_end, so metrics.csv has them only from these hooks on.

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.publish(trainer)

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write everything but the run's records into a folder with a temporary name."""
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
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError if a disk is full
            raise self._write_error(partial, error) from error
        self.unpublished = partial

    def publish(self, trainer: L.Trainer) -> None:
        """Add the run's records and the manifest, give the folder its final name, and delete the oldest checkpoints beyond ``keep``."""
        if self.unpublished is None:
            return
        partial, self.unpublished = self.unpublished, None
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            try:
                for name in checkpoints.RECORDS:
                    if (self.folder.parent / name).is_file():
                        shutil.copy(self.folder.parent / name, partial / name)
                checkpoints.write_manifest(partial)
            except OSError as error:
                raise self._write_error(partial, error) from error
            target = self.folder / partial.name.removeprefix(".partial-")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial, target)
            checkpoints.fsync(self.folder)
            found = checkpoints.list_checkpoints(self.folder.parent)
            intact = [each for each in found if checkpoints.find_damage(each) is None]
            for old in intact[: -self.keep]:
                shutil.rmtree(old)
        trainer.strategy.barrier()

    def _write_error(self, partial: Path, error: Exception) -> ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        kept = checkpoints.list_checkpoints(self.folder.parent)
        reason = str(error).splitlines()[0]
        newest = f"the newest complete one is {kept[-1]}" if kept else "there is no earlier one"
        return ValueError(
            f"the checkpoint {partial.name.removeprefix('.partial-')} could not be written ({reason}); {newest}"
        )

    # The Trainer installs its signal handlers just before these hooks. They would end the run in the middle of an iteration.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fitting = True
        self._install_handlers()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install_handlers()

    def _install_handlers(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) != self._handle_signal:
                self.handlers[number] = signal.signal(number, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted or not self.fitting:
            run = self.folder.parent
            raise Stopped(number, f"resume={run}" if checkpoints.list_checkpoints(run) else None)
        self.interrupted = signal.Signals(number)
        log.warning(
            "%s: finishing this iteration, then writing a checkpoint; send it again to stop at once",
            self.interrupted.name,
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.fitting = False
        while self.handlers:
            number, handler = self.handlers.popitem()
            # Otherwise the Trainer has already restored the earlier handler.
            if signal.getsignal(number) == self._handle_signal:
                signal.signal(number, handler)
