"""A step of rlmod beside a step of TRL's GRPOTrainer: each a process of its own that takes a step when it is told to."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlmod.model.policy import SHIPPED, HFPolicy
from tools.bench.setting import parts_of, small_model
from tools.bench.workload import LONGEST

ROOT = Path(__file__).parents[2]
AIMS = {"ragged": 0.60, "even": 0.95}
WARM_UP = 2
Answer = dict[str, float]


class Side:
    """A process that takes one step for every ``step()``."""

    def __init__(self, python: str, module: str, arguments: list[str], prompts: list[str]) -> None:
        self.name = module
        # Its own output may be long: a file holds it until it is needed.
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [python, "-m", f"tools.bench.{module}", *arguments], cwd=ROOT, text=True, stderr=self.said,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        self._tell(json.dumps(prompts))
        self._answer()

    def step(self) -> Answer:
        self._tell("step")
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.said.close()

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.said.seek(0)
            raise SystemExit(f"{self.name} failed:\n{self.said.read()[-3000:]}")
        return json.loads(line)


def measured(
    trl: str, policy: str, name: str, prompts: int, micro_batch: int, longest: int, repetitions: int
) -> tuple[list[Answer], list[Answer]]:
    """The answers of both sides to ``repetitions`` steps, in turn, each first every other time."""
    texts = [problem.prompt for problem in parts_of().train()[:prompts]]
    arguments = [policy, name, str(prompts), str(micro_batch), str(longest)]
    sides: list[Side] = []
    try:
        for python, module in ((sys.executable, "our_side"), (trl, "trl_side")):
            sides.append(Side(python, module, arguments, [str(text) for text in texts]))
        answers: tuple[list[Answer], list[Answer]] = [], []
        for i in range(WARM_UP + repetitions):
            for side in (0, 1) if i % 2 else (1, 0):
                answers[side].append(sides[side].step())
    finally:
        for side in sides:
            side.close()
    for a, b in zip(*answers, strict=True):
        assert a["tokens"] == b["tokens"], f"{a['tokens']:.0f} tokens here, {b['tokens']:.0f} there"
    return answers[0][WARM_UP:], answers[1][WARM_UP:]


def stages(answer: Answer) -> Answer:
    """CPU seconds by stage."""
    return {
        "sampling": answer["generate"],
        "rest of the rollout batch": answer["collect"] - answer["generate"],
        "training": answer["whole"] - answer["collect"],
    }


def table(trl: str, repetitions: int) -> list[str]:
    whole = [
        "| policy | completions | rlmod, s | TRL, s | ratio, median | range | pairs | aim | rlmod, MiB | TRL, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_stage = ["| policy | completions | stage | rlmod, s | TRL, s |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for policy, path, prompts, micro_batch in (
            ("0.3 M", str(SHIPPED / "tiny"), 16, 32),
            ("2.6 M", saved(folder), 8, 16),
        ):
            for name, aim in AIMS.items():
                ours, theirs = measured(trl, path, name, prompts, micro_batch, LONGEST, repetitions)
                whole.append(f"| {policy} | {name} | {compared(ours, theirs, aim)} |")
                print(whole[-1], flush=True)
                of_stages = [[stages(answer) for answer in side] for side in (ours, theirs)]
                for stage in of_stages[0][0]:
                    seconds = " | ".join(f"{median(side, stage):.2f}" for side in of_stages)
                    by_stage.append(f"| {policy} | {name} | {stage} | {seconds} |")
                    print(by_stage[-1], flush=True)
    return [*whole, "", *by_stage]


def compared(ours: list[Answer], theirs: list[Answer], aim: float) -> str:
    ratios = [a["whole"] / b["whole"] for a, b in zip(ours, theirs, strict=True)]
    return (
        f"{median(ours, 'whole'):.2f} | {median(theirs, 'whole'):.2f} | **{statistics.median(ratios):.3f}** "
        f"| {min(ratios):.3f} to {max(ratios):.3f} | {len(ratios)} | {aim:.2f} "
        f"| {median(ours, 'peak'):.0f} | {median(theirs, 'peak'):.0f}"
    )


def saved(folder: str) -> str:
    """The folder of a policy of 2.6 M parameters with random weights."""
    tokenizer = HFPolicy(path="tiny").tokenizer()
    model: Any = small_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def median(answers: list[Answer], name: str) -> float:
    return statistics.median(answer[name] for answer in answers)
