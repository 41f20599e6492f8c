"""TRL's steps, in an environment of its own: ``python -m tools.bench.trl_side POLICY WORKLOAD PROMPTS MICRO_BATCH LONGEST``."""

import json
import sys
import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tools.bench.workload import G, Steps, Workload


class Told(TrainerCallback):
    """From the end of one optimizer step to the end of the next: whatever the trainer does in between is measured."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.steps.ready()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.taken()


def main() -> None:
    folder, name, *numbers = sys.argv[1:]
    workload = Workload.of(name, *map(int, numbers))
    steps = Steps(workload)
    prompts = json.loads(sys.stdin.readline())
    policy = steps.policy(folder)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return steps.reward(sum(map(len, completion_ids)))

    rows = len(workload.lengths)
    with tempfile.TemporaryDirectory() as output:
        # One update a generation: TRL takes no log-probabilities of the old policy then. What is not named is TRL's default.
        config = GRPOConfig(
            output_dir=output, max_steps=10_000, use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=workload.micro_batch, gradient_accumulation_steps=rows // workload.micro_batch,
            num_generations=G, max_completion_length=max(workload.lengths), num_iterations=1, beta=0.0,
            learning_rate=1e-5, shuffle_dataset=False, report_to=[], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=policy, args=config, reward_funcs=[reward], train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Told(steps)],
        )  # fmt: skip
        collect: Any = trainer._generate_and_score_completions
        trainer._generate_and_score_completions = steps.timed("collect", collect)  # pyright: ignore
        trainer.train()


if __name__ == "__main__":
    main()
