"""One progress bar for the whole run, with one step per iteration, and one for a validation."""

import math
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlmod.training.module import RLModule

SHOWN = {
    "reward/mean": ("reward", ".3f"),
    "completions/entropy": ("entropy", ".3f"),
    "completions/length": ("length", ".0f"),
    "speed/tokens_per_second": ("tok/s", ",.0f"),
}

SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, the time after which a validation prints a line, and after which it prints the next."""


class ProgressBar(L.Callback):
    """A bar with reward, held-out accuracy, entropy, length and tokens per second. Without a terminal it prints lines instead.

    A line ends with the estimated time to the end, ETA, in hours, minutes and seconds. It counts validations, because they take time too.
    """

    def __init__(self, *, lines: int = 10) -> None:
        if lines < 1:
            raise ValueError(f"callbacks.progress_bar.lines must be at least 1, got {lines}")
        self.lines = lines
        """Number of lines printed over the whole run if there is no terminal."""
        self.held_out = ""
        self.validated_after = 0
        self.progress: Progress | None = None
        self.validation: TaskID | None = None

    def _start(self, trainer: L.Trainer) -> Progress:
        """Return the bars, which appear now unless they are there. Training and a validation before it each have their own."""
        if self.progress is None:
            self.console = Console()
            self.progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                disable=not (trainer.is_global_zero and self.console.is_terminal),
                speed_estimate_period=3600,  # of the last hour: an iteration may take minutes
            )
            self.progress.start()
        return self.progress

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        progress = self._start(trainer)
        self.task = progress.add_task(
            "iterations", total=trainer.max_epochs, completed=trainer.current_epoch, numbers=""
        )
        self.began, self.began_at = time.perf_counter(), _share_done(trainer, trainer.current_epoch)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        batches = sum(trainer.num_val_batches)
        total = int(batches) if math.isfinite(batches) else None  # a loader of the user's own may not know its length
        self.validation = self._start(trainer).add_task("validation", total=total, numbers="batches")
        self.validated_batches, self.validation_began = 0, time.perf_counter()
        self.last_line = self.validation_began

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.validation is None or self.progress is None:
            return
        self.validated_batches += 1
        self.progress.update(self.validation, completed=self.validated_batches)
        total, now = self.progress.tasks[-1].total, time.perf_counter()
        long = now - self.last_line >= SECONDS_BETWEEN_LINES and total is not None and self.validated_batches < total
        if trainer.is_global_zero and not self.console.is_terminal and long:
            self.last_line, took = now, now - self.validation_began
            left = _duration(took / self.validated_batches * ((total or 0) - self.validated_batches))
            self.console.print(
                f"validation: {self.validated_batches} of {total:.0f} batches in {_duration(took)}  ETA {left}",
                highlight=False,
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule)
        if self.validation is not None and self.progress is not None:
            self.progress.remove_task(self.validation)
            self.validation = None
        objective = pl_module.objective
        if objective in trainer.callback_metrics:
            self.held_out = f"held-out {float(trainer.callback_metrics[objective]):.3f}"
            # In fit the current iteration is not counted yet. The validation before training comes after iteration 0.
            self.validated_after = trainer.current_epoch + int(trainer.state.fn == TrainerFn.FITTING)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule) and pl_module.rollout_batch is not None
        # This rollout batch's metrics come last: the Trainer's are from the previous iteration until the module has logged the new ones.
        metrics = {**{k: float(v) for k, v in trainer.callback_metrics.items()}, **pl_module.rollout_batch.metrics}
        shown = [f"{label} {metrics[name]:{form}}" for name, (label, form) in SHOWN.items() if name in metrics]
        done = trainer.current_epoch + 1
        earlier = f" (iteration {self.validated_after})" if self.validated_after != done else ""
        held_out = f"{self.held_out}{earlier}"
        numbers = "  ".join([shown[0], *([held_out] if self.held_out else []), *shown[1:]])
        assert self.progress is not None
        self.progress.update(self.task, completed=done, numbers=numbers)
        total = trainer.max_epochs or done
        if (
            trainer.is_global_zero
            and not self.console.is_terminal
            and done * self.lines // total > (done - 1) * self.lines // total
        ):
            share, took = _share_done(trainer, done), time.perf_counter() - self.began
            eta = f"  ETA {_duration(took * (1 - share) / (share - self.began_at))}" if share < 1 else ""
            self.console.print(f"iteration {done}/{total}  {numbers}{eta}", soft_wrap=True, highlight=False)
            self.held_out = ""  # printed in one line only

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = self.validation = None


def _share_done(trainer: L.Trainer, iterations: int) -> float:
    """Return the share of the run that is done after so many iterations, by the limit that is reached first."""
    shares = [iterations / trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
    return max([*shares, trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else shares, default=1.0)


def _duration(seconds: float) -> timedelta:
    """Return a time that prints in whole seconds, as in 0:12:34."""
    return timedelta(seconds=round(seconds))
