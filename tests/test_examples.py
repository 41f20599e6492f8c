"""The examples run, and the loop in one file trains what the framework trains."""

import importlib.util
from pathlib import Path

import lightning as L
import torch

import rlmod
from rlmod.data.arithmetic import Arithmetic
from rlmod.sampler.hf import HF

FOLDER = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_from_python_learns_something(capsys):
    """Six steps raise the accuracy from 0.46 to 0.56."""
    before, after = example("train_from_python").main(6)
    assert 0.4 < before < after - 0.05 < 0.6
    assert f"held-out accuracy: {before:.3f} -> {after:.3f} after 6 steps" in capsys.readouterr().out


def test_one_file_grpo_trains_what_the_framework_trains():
    """Three iterations, same seed: weights agree to 1e-6, for the loss is summed in another order.

    Adam's eps is large: with a small one, gradients that are nothing but rounding make steps as long as any other.
    """
    one_file = example("one_file_grpo")
    adam = {"learning_rate": 1e-3, "adam_eps": 1e-2}
    plain = one_file.train(iterations=3, prompts_per_iteration=8, completions_per_prompt=4, problems=64, **adam)
    specification = rlmod.HFPolicy(path="tiny")
    tokenizer = specification.tokenizer()
    problems = rlmod.PromptEncoder().encode(Arithmetic(split="train", size=64)(), tokenizer)
    module = rlmod.RLModule(
        policy=specification.model(tokenizer),
        tokenizer=tokenizer,
        sampler=HF(completions_per_prompt=4, max_new_tokens=40),
        reward=lambda texts: one_file.final_digit(texts.completions, texts.answers),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=1e-3, eps=1e-2),
        batch=rlmod.Batch(prompts=8, micro_batch=32),
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=rlmod.RLData(train=problems))
    start = specification.model(tokenizer).state_dict()
    moved = 0.0
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(module.policy.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
        moved = max(moved, float((weight - start[name]).abs().max()))
    assert moved > 1e-4
