"""What the frame costs: ``make bench`` prints the tables and writes them into docs/benchmarks.md.

CPU time of one thread. rlmod's Trainer runs; between two of its collections, in the same process, the bare loop takes a step on a copy
of the policy: every pair is measured side by side, so that a machine that speeds up or slows down does so for both.
"""

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlmod import cli
from rlmod.loader import RLData
from rlmod.module import RLModule
from rlmod.parts import Parts

TOKENS = 32
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


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


def built(model: str, *overrides: str) -> tuple[RLModule, RLData, dict[str, Any]]:
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        cfg = compose(
            "train",
            overrides=[
                "output=unused", f"sampler.max_new_tokens={TOKENS}", "batch.prompts=16", "batch.micro_batch=64",
                "optimizer.lr=1e-5", *overrides,
            ],
        )  # fmt: skip
    parts = Parts.of(cfg)
    tokenizer = parts.policy.tokenizer()
    policy = parts.policy.model(tokenizer) if model == "tiny" else small_model(tokenizer)
    # No row ends early on either side: every step has the same number of tokens, and no compaction helps rlmod.
    policy.generation_config.eos_token_id = [policy.config.vocab_size + 1]
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    module = RLModule(
        policy=policy, tokenizer=tokenizer, sampler=parts.sampler, guide=None,
        reward=lambda texts: [float(i % 3 == 0) for i in range(len(texts))],
        filter=parts.filter, zero_reward=parts.zero_reward, reference=None, shaper=parts.shaper, correction={},
        loss=parts.loss, penalty={}, optimizer=parts.optimizer, schedule=instantiate(cfg.schedule),
        validation=parts.validation, batch=parts.batch, seed=0,
    )  # fmt: skip
    problems = parts.encoder.encode(parts.train()[:256], tokenizer)
    data = RLData(
        train=problems, held_out=None, batch=parts.batch, weighting=parts.weighting, rows_per_prompt=8,
        zero_reward=parts.zero_reward, every_row=False, validation_prompts=64, seed=0,
    )  # fmt: skip
    trainer = {"accumulate_grad_batches": parts.batch.micro_batches(8)}
    return module, data, trainer


class BareLoop:
    """Generate, forward, backward, optimizer step: the least that anyone would write."""

    def __init__(self, module: RLModule, data: RLData, micro_batches: int) -> None:
        self.policy: Any = copy.deepcopy(module.policy)
        self.prompts = data.train.batch(range(16))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, weight_decay=0.0)
        self.micro_batches = micro_batches
        self.advantages = torch.where(torch.arange(128) % 3 == 0, 1.4, -0.7)[:, None]

    def __call__(self) -> None:
        ids = self.prompts.ids.repeat_interleave(8, 0)
        mask = self.prompts.mask.repeat_interleave(8, 0).long()
        self.policy.eval()
        with torch.no_grad():
            rows = self.policy.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=TOKENS
            )
        self.policy.train()
        size = len(rows) // self.micro_batches
        mask = torch.nn.functional.pad(mask, (0, TOKENS), value=1)
        for start in range(0, len(rows), size):
            part, attention = rows[start : start + size], mask[start : start + size]
            logits = self.policy(
                input_ids=part, attention_mask=attention, position_ids=(attention.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=TOKENS + 1, use_cache=False,
            ).logits[:, :-1]  # fmt: skip
            chosen = part[:, -TOKENS:, None]
            logprobs = (logits.gather(-1, chosen) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)
            ratio = (logprobs - logprobs.detach()).exp()
            advantages = self.advantages[start : start + size]
            loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            (loss.sum() / (len(rows) * TOKENS)).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Pairs(L.Callback):
    """CPU seconds of each of rlmod's iterations, and of ``other`` right after it."""

    def __init__(self, other: Callable[[], None]) -> None:
        self.other, self.ours, self.theirs = other, [], []
        self.started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.process_time()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # From one epoch's start to the next one's: Lightning's own work between epochs counts as ours.
        now = time.process_time()
        if trainer.current_epoch:
            self.ours.append(now - self.started)
            self.other()
            self.theirs.append(time.process_time() - now)
        self.started = time.process_time()


def paired(
    module: RLModule,
    data: RLData,
    settings: dict[str, Any],
    other: Callable[[], None],
    repetitions: int,
) -> tuple[list[float], list[float]]:
    pairs = Pairs(other)
    L.Trainer(
        accelerator="cpu", devices=1, max_epochs=repetitions + 3, limit_val_batches=0, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1,
        callbacks=[pairs], logger=False, **settings,
    ).fit(module, datamodule=data)  # fmt: skip
    return pairs.ours[2:], pairs.theirs[2:]  # without the warm-up


def row(name: str, ours: list[float], theirs: list[float], bound: str) -> str:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    milliseconds = f"{1000 * statistics.median(ours):.0f} | {1000 * statistics.median(theirs):.0f}"
    return (
        f"| {name} | {milliseconds} | **{statistics.median(ratios):.3f}** | {min(ratios):.3f} to {max(ratios):.3f} "
        f"| {len(ratios)} | {bound} |"
    )


def against_bare(model: str, repetitions: int) -> str:
    module, data, settings = built(model)
    bare = BareLoop(module, data, settings["accumulate_grad_batches"])
    ours, theirs = paired(module, data, settings, bare, repetitions)
    return row(f"rlmod against the bare loop, {model}", ours, theirs, "1.10")


def shaper_against_shaper(model: str, repetitions: int) -> str:
    """Iterations of both in turn, each first every other time."""
    gtpo, data, settings = built(model, "shaper=token_entropy")
    grpo, grpo_data, _ = built(model)
    iteration = stepper(grpo, grpo_data, settings)
    also = stepper(gtpo, data, settings)
    ours, theirs = [], []
    for i in range(repetitions + 2):
        for step, times in ((also, ours), (iteration, theirs)) if i % 2 else ((iteration, theirs), (also, ours)):
            started = time.process_time()
            step()
            times.append(time.process_time() - started)
    return row(f"GTPO against GRPO, {model}", ours[2:], theirs[2:], "1.03")


def stepper(module: RLModule, data: RLData, settings: dict[str, Any]) -> Callable[[], None]:
    """One whole iteration a call: collect, shape, weight, forward, backward, step, as RLModule and RLData do them."""
    L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_val_batches=0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **settings,
    ).fit(module, datamodule=data)  # fmt: skip
    optimizer = torch.optim.AdamW(module.policy.parameters(), lr=1e-5)
    loader = data.train_dataloader()

    def iteration() -> None:
        for i, batch in enumerate(loader):
            loss = module.training_step(batch, i)
            assert loss is not None
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return iteration


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repetitions", type=int, default=10)
    repetitions = options.parse_args().repetitions
    torch.set_num_threads(1)
    logging.getLogger("rlmod").setLevel(logging.ERROR)  # every completion is truncated, on purpose
    cli.quiet()
    lines = [
        "| what | ms of CPU a step | ms, the other | ratio, median | range | pairs | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    for measure in (against_bare, shaper_against_shaper):
        for model in ("tiny", "2.6 M"):
            lines.append(measure(model, repetitions))
            print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "transformers"))
    lines += ["", f"128 rows of {TOKENS} tokens, 16 prompts, 2 micro-batches, float32, one thread; {versions}."]
    head, _, rest = PAGE.read_text().partition("<!-- begin -->")
    tail = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{head}<!-- begin -->\n\n" + "\n".join(lines) + f"\n\n<!-- end -->{tail}")


if __name__ == "__main__":
    main()
