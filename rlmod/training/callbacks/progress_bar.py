"""One progress bar for the whole run, with one step per iteration."""

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlmod.training.module import RLModule

SHOWN = {
    "reward/mean": ("reward", ".3f"),
    "completions/entropy": ("entropy", ".3f"),
    "completions/length": ("length", ".0f"),
    "speed/tokens_per_second": ("tok/s", ",.0f"),
}


class ProgressBar(L.Callback):
    """A bar with reward, held-out accuracy, entropy, length and tokens per second. Without a terminal it prints lines instead."""

    def __init__(self, *, lines: int = 10) -> None:
        if lines < 1:
            raise ValueError(f"callbacks.progress_bar.lines must be at least 1, got {lines}")
        self.lines = lines
        """Number of lines printed over the whole run if there is no terminal."""
        self.held_out = ""
        self.validated_after = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
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
        )
        self.task = self.progress.add_task(
            "iterations", total=trainer.max_epochs, completed=trainer.current_epoch, numbers=""
        )
        self.progress.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule)
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
        self.progress.update(self.task, completed=done, numbers=numbers)
        total = trainer.max_epochs or done
        if (
            trainer.is_global_zero
            and not self.console.is_terminal
            and done * self.lines // total > (done - 1) * self.lines // total
        ):
            self.console.print(f"iteration {done}/{total}  {numbers}", soft_wrap=True, highlight=False)
            self.held_out = ""  # printed in one line only

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if hasattr(self, "progress"):
            self.progress.stop()
