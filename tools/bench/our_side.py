"""rlmod's steps for the comparison with TRL: ``python -m tools.bench.our_side POLICY WORKLOAD PROMPTS MICRO_BATCH LONGEST``."""

import json
import sys
from typing import Any

import lightning as L

from rlmod.types import Problem, Texts
from tools.bench import setting
from tools.bench.workload import G, Steps, Workload


class Told(L.Callback):
    """From one epoch's start to the next one's: whatever Lightning does in between is measured."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch:
            self.steps.taken()
        else:
            self.steps.ready()


def main() -> None:
    folder, name, *numbers = sys.argv[1:]
    workload = Workload.of(name, *map(int, numbers))
    steps = Steps(workload)
    prompts = json.loads(sys.stdin.readline())
    setting.quiet()
    parts = setting.parts_of(
        "policy=hf", f"policy.path={folder}", f"sampler.completions_per_prompt={G}",
        f"sampler.max_new_tokens={max(workload.lengths)}", f"batch.prompts={workload.prompts}",
        f"batch.micro_batch={workload.micro_batch}",
    )  # fmt: skip
    tokenizer = parts.policy.tokenizer()
    policy = steps.policy(folder)

    def reward(texts: Texts) -> list[float]:
        assert texts.lengths is not None
        return steps.reward(sum(texts.lengths))

    module: Any = setting.module_of(parts, policy.train(), tokenizer, reward)
    module.collect = steps.timed("collect", module.collect)
    data = setting.data_of(parts, tokenizer, 1)
    problems = [Problem(prompt=prompt, answer="", source="the same for both sides") for prompt in prompts]
    data.train = parts.encoder.encode(problems, tokenizer)
    setting.trainer_of(data, 10_000, Told(steps)).fit(module, datamodule=data)


if __name__ == "__main__":
    main()
