"""rlmod's parts, put together for a measurement as rlmod-train does it: composed configuration, module, data, Lightning's trainer."""

import logging
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlmod.config import cli
from rlmod.config.build import Components
from rlmod.interfaces import Reward
from rlmod.training.datamodule import RLData
from rlmod.training.module import RLModule


def quiet() -> None:
    torch.set_num_threads(1)
    logging.getLogger("rlmod").setLevel(logging.ERROR)  # every completion is truncated, on purpose
    cli.silence_libraries()


def parts_of(*overrides: str) -> Components:
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        return Components.from_config(compose("train", overrides=["output=unused", "optimizer.lr=1e-5", *overrides]))


def small_model(tokenizer: Any) -> Qwen2ForCausalLM:
    """2.6 M parameters with random weights."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def module_of(parts: Components, policy: Any, tokenizer: PreTrainedTokenizerBase, reward: Reward) -> RLModule:
    return RLModule(
        policy=policy, tokenizer=tokenizer, sampler=parts.sampler, guide=None, reward=reward, filter=parts.filter,
        zero_reward=parts.zero_reward, reference=None, shaper=parts.shaper, correction={}, aggregation=parts.aggregation, loss=parts.loss,
        regularizer={}, optimizer=parts.optimizer, schedule=None, validation=parts.validation, batch=parts.batch, seed=0,
    )  # fmt: skip


def data_of(parts: Components, tokenizer: PreTrainedTokenizerBase, problems: int) -> RLData:
    return RLData(train=parts.encoder.encode(parts.train()[:problems], tokenizer))


def trainer_of(data: RLData, iterations: int, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=iterations, limit_val_batches=0, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        callbacks=list(callbacks), logger=False, **{"devices": 1, **settings},
    )  # fmt: skip
    return trainer
