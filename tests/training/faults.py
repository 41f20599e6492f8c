"""Components that fail when a file or an environment variable says so. Runs name them by import path."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L

from rlmod.types import Texts


def reward(texts: Texts, flag: str = "") -> list[float]:
    """The exact reward. It fails or hangs at its call number N if the file ``flag`` holds "raise N" or "hang N"."""
    path = Path(flag)
    if path.is_file():
        what, number = path.read_text().split()
        calls = path.with_suffix(".calls")
        count = int(calls.read_text() or 0) + 1 if calls.is_file() else 1
        calls.write_text(str(count))
        if count == int(number):
            if what == "hang":
                path.with_suffix(".hangs").write_text("")
                time.sleep(600)
            raise ConnectionError("503 from the judge")
    return [float(c == a) for c, a in zip(texts.completions, texts.answers, strict=True)]


class StopAtBatch(L.Callback):
    """Asks to stop in the middle of an iteration, as a Timer does."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step >= self.batch:
            trainer.should_stop = True


class SignalAtStep(L.Callback):
    """Sends SIGTERM to this process after an optimizer step, and then takes its time."""

    def __init__(self, step: int, seconds: float) -> None:
        self.step, self.seconds = step, seconds

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(self.seconds)


class Table(L.Callback):
    """Keeps a dictionary that it is given."""

    def __init__(self, table: dict[int, Any]) -> None:
        self.table = table


class Poison(L.Callback):
    """Makes a weight infinite after an optimizer step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            next(pl_module.parameters()).data.view(-1)[0] = float("inf")


def hang_on_rank(texts: Texts, rank: int) -> list[float]:
    if int(os.environ.get("LOCAL_RANK", "0")) == rank:
        time.sleep(600)
    return [0.0] * len(texts)


def fail_on_rank(texts: Texts, rank: int, call: int) -> list[float]:
    if int(os.environ.get("LOCAL_RANK", "0")) == rank:
        _calls.append(1)
        if len(_calls) == call:
            raise ConnectionError("503 from the judge")
    return [float(len(text) % 2) for text in texts.completions]


_calls: list[int] = []
