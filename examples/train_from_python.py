"""Train from Python with your own reward function and a plain Lightning Trainer, without YAML.

python examples/train_from_python.py --steps 20
"""

import argparse

import lightning as L
import torch

import rlmod
from rlmod.data.arithmetic import Arithmetic
from rlmod.sampler.hf import HF
from rlmod.shaper.token_entropy import TokenEntropy


def final_digit(texts: rlmod.Texts) -> list[float]:
    """Return 1 for each completion whose last character is the answer."""
    return [float(c.strip()[-1:] == a) for c, a in zip(texts.completions, texts.answers, strict=True)]


def main(steps: int) -> tuple[float, float]:
    policy = rlmod.HFPolicy(path="tiny")
    tokenizer = policy.tokenizer()
    encode = rlmod.PromptEncoder().encode
    data = rlmod.RLData(
        train=encode(Arithmetic(split="train", size=512)(), tokenizer),
        held_out=encode(Arithmetic(split="held_out", size=128)(), tokenizer),
    )
    module = rlmod.RLModule(
        policy=policy.model(tokenizer), tokenizer=tokenizer, reward=final_digit, shaper=TokenEntropy(),
        sampler=HF(completions_per_prompt=8, max_new_tokens=40), batch=rlmod.Batch(prompts=16, micro_batch=64),
        optimizer=lambda weights: torch.optim.AdamW(weights, lr=2e-4), seed=0,
    )  # fmt: skip
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=steps, gradient_clip_val=1.0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=steps,
    )  # fmt: skip
    trainer.validate(module, datamodule=data, verbose=False)
    before = module.held_out["accuracy"]
    trainer.fit(module, datamodule=data)
    print(f"held-out accuracy: {before:.3f} -> {module.held_out['accuracy']:.3f} after {steps} steps")
    return before, module.held_out["accuracy"]


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=20)
    main(options.parse_args().steps)
