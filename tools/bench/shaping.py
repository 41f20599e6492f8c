"""A step of GTPO against a step of GRPO: one run whose shaper changes with every iteration, all else the same."""

import random
import statistics
import time
from collections.abc import Sequence

import lightning as L

from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.shaper.uniform import Uniform
from rlmod.training.module import RLModule
from tools.bench import peak
from tools.bench.frame import MODELS, TOKENS, built
from tools.bench.setting import trainer_of

WARM_UP = 2


class Turns(L.Callback):
    """CPU seconds and peak bytes of the iterations, GTPO's and GRPO's in turn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self.shapers = (TokenEntropy(), Uniform())

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch:
            self.seconds.append(time.process_time() - self.started)
            self.bytes.append(peak.since(self.resident))
        assert isinstance(pl_module, RLModule)
        pl_module.shaper = self.shapers[trainer.current_epoch % 2]
        self.resident, self.started = peak.start(), time.process_time()

    def pairs(self, measured: Sequence[float]) -> tuple[list[float], list[float]]:
        """GTPO's and GRPO's, rollout batch by rollout batch."""
        counted = measured[2 * WARM_UP :]
        return list(counted[::2]), list(counted[1::2])


def turns(model: str, pairs: int, prompts: int) -> Turns:
    module, data = built(model, prompts)
    measured = Turns()
    trainer_of(data, 2 * (pairs + WARM_UP) + 1, measured).fit(module, datamodule=data)
    return measured


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % interval for the median, from the medians of samples drawn from these values."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[-51]


def row(model: str, what: str, unit: float, gtpo: list[float], grpo: list[float], aim: str) -> str:
    ratios = [a / b for a, b in zip(gtpo, grpo, strict=True)]
    low, high = interval(ratios)
    return (
        f"| {model} | {what} | {statistics.median(gtpo) / unit:.1f} | {statistics.median(grpo) / unit:.1f} "
        f"| **{statistics.median(ratios):.3f}** | {low:.3f} to {high:.3f} | {len(ratios)} | {aim} |"
    )


def table(repetitions: int, prompts: int = 16) -> list[str]:
    lines = [
        "| policy | what | GTPO | GRPO | ratio, median | its 95 % interval | pairs | aim |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        peak.own_pages()
        held = turns(model, repetitions, prompts)
        peak.recycled_pages()
        timed = turns(model, 4 * repetitions, prompts)  # the difference looked for is a hundredth
        lines.append(row(model, "ms of CPU", 1e-3, *timed.pairs(timed.seconds), "1.02"))
        lines.append(row(model, "peak MiB of a step", 2**20, *held.pairs(held.bytes), "1.01"))
    return [*lines, "", f"{prompts * 8} rows of {TOKENS} tokens, {prompts} prompts, 2 micro-batches, float32."]
