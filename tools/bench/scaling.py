"""A whole step, as the rows of a rollout batch grow, and as they are shared out among processes on one machine."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import lightning as L

from rlmod.types import Texts
from tools.bench.frame import TOKENS
from tools.bench.setting import data_of, module_of, parts_of, quiet, trainer_of

ROOT = Path(__file__).parents[2]
WARM_UP = 2


class Watch(L.Callback):
    """CPU seconds of each iteration in this process."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = time.process_time()
        if trainer.current_epoch:
            self.seconds.append(now - self.started)
        self.started = now


def seconds(prompts: int, iterations: int, **trainer: object) -> list[float]:
    parts = parts_of(f"sampler.max_new_tokens={TOKENS}", f"batch.prompts={prompts}", "batch.micro_batch=32")
    tokenizer = parts.policy.tokenizer()
    policy = parts.policy.model(tokenizer)
    policy.generation_config.eos_token_id = [policy.config.vocab_size + 1]  # every row runs to the limit

    def reward(texts: Texts) -> list[float]:
        return [float(i % 3 == 0) for i in range(len(texts))]

    module, data, watch = module_of(parts, policy, tokenizer, reward), data_of(parts, tokenizer, prompts), Watch()
    trainer_of(data, iterations + WARM_UP + 1, watch, **trainer).fit(module, datamodule=data)
    return watch.seconds[WARM_UP:]


def of_ranks(ranks: int, prompts: int, iterations: int) -> list[float]:
    """CPU seconds of each iteration, all ranks together."""
    started = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
         "-m", "tools.bench.scaling", str(ranks), str(prompts), str(iterations)],
        cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if started.returncode:
        raise SystemExit(f"{ranks} ranks failed:\n{started.stderr[-3000:]}")
    answers = [json.loads(line) for line in started.stdout.splitlines() if line.startswith("[")]
    assert len(answers) == ranks
    return [sum(of_rank) for of_rank in zip(*answers, strict=True)]


def table(repetitions: int, prompts: tuple[int, ...] = (4, 8, 16, 32), shared: int = 16) -> list[str]:
    lines = ["| rows | ms a step | range | ms a row |", "|---|---|---|---|"]
    for number in prompts:
        taken = [1000 * s for s in seconds(number, repetitions)]
        middle = statistics.median(taken)
        lines.append(
            f"| {8 * number} | {middle:.0f} | {min(taken):.0f} to {max(taken):.0f} | {middle / number / 8:.2f} |"
        )
    lines += ["", "| processes | rows of each | ms of CPU a step, each | range |", "|---|---|---|---|"]
    for ranks, number in ((1, shared), (1, shared // 2), (2, shared)):
        taken = [1000 * s / ranks for s in of_ranks(ranks, number, repetitions)]
        spread = f"{min(taken):.0f} to {max(taken):.0f}"
        lines.append(f"| {ranks} | {8 * number // ranks} | {statistics.median(taken):.0f} | {spread} |")
    note = f"0.3 M parameters, {TOKENS} tokens a row, micro-batches of 32 rows; two processes: DDP over gloo."
    return [*lines, "", note]


def main() -> None:
    ranks, prompts, iterations = map(int, sys.argv[1:])
    quiet()
    strategy = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    # One write a line: ranks share the pipe.
    os.write(1, (json.dumps(seconds(prompts, iterations, **strategy)) + "\n").encode())


if __name__ == "__main__":
    main()
