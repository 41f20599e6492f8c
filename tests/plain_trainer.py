"""RLModule and RLData with a plain Trainer, from the config of a command."""

import lightning as L

from rlmod.config.build import Components
from rlmod.training.datamodule import RLData
from rlmod.training.module import RLModule
from tests.config.composing import composed

SETTINGS = (
    "debug=short", "callbacks.completions.every=0", "data.validation=null", "batch.prompts=8", "batch.minibatches=2",
    "batch.micro_batch=4", "sampler.completions_per_prompt=4", "shaper=token_entropy", "trainer.max_epochs=2",
    "optimizer.lr=1e-3", "trainer.gradient_clip_val=1.0",
)  # fmt: skip
"""16 rows per optimizer step in 4 micro-batches, 2 optimizer steps per iteration."""


def build_components(*overrides: str):
    cfg = composed(*SETTINGS, *overrides)
    cfg.output = "unused"
    return Components.from_config(cfg)


def module_and_data(components: Components) -> tuple[RLModule, RLData]:
    tokenizer = components.policy.tokenizer()
    problems = components.encoder.encode(components.train(), tokenizer)
    module = RLModule(
        policy=components.policy.model(tokenizer), tokenizer=tokenizer, sampler=components.sampler,
        reward=components.reward, shaper=components.shaper, loss=components.loss, optimizer=components.optimizer,
        batch=components.batch, aggregation=components.aggregation,
    )  # fmt: skip
    return module, RLData(train=problems)


def plain_trainer(**settings) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        **{**quiet, "accelerator": "cpu", "devices": 1, "max_epochs": 2, "gradient_clip_val": 1.0, **settings}
    )
