"""Times of an iteration and tokens per second."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from rlmod.training.module import RLModule


class Throughput(L.Callback):
    """Logs this rank's times in seconds and the sampled completion tokens per second.

    ``time/collect`` is the sampling of the rollout batch, ``time/train`` the optimizer steps, without validation.
    ``speed/tokens_per_second`` divides by both.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started, self.collected, self.validating = time.perf_counter(), None, 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.collected is None:
            self.collected = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # The validation at the end of an iteration comes later; trainer.val_check_interval may put one between two batches.
        self.trained, self.validating_between = time.perf_counter(), self.validating

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validation_started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validating += time.perf_counter() - self.validation_started

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule) and pl_module.rollout_batch is not None and self.collected is not None
        collect = self.collected - self.started
        train = self.trained - self.collected - self.validating_between
        pl_module.log_dict(
            {
                "time/collect": collect,
                "time/train": train,
                "speed/tokens_per_second": pl_module.rollout_batch.metrics["completions/tokens"] / (collect + train),
            },
            batch_size=1,
        )
