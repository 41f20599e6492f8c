"""The cost of the framework compared with a bare loop; both run in turn in one process."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch

from rlmod.training.datamodule import RLData
from rlmod.training.module import RLModule
from tools.bench.setting import data_of, module_of, parts_of, small_model, trainer_of

TOKENS = 32
MODELS = ("0.3 M", "2.6 M")


def built(model: str, prompts: int = 16, *overrides: str) -> tuple[RLModule, RLData]:
    parts = parts_of(
        f"sampler.max_new_tokens={TOKENS}", f"batch.prompts={prompts}", f"batch.micro_batch={prompts * 4}", *overrides
    )
    tokenizer = parts.policy.tokenizer()
    policy = parts.policy.model(tokenizer) if model == "0.3 M" else small_model(tokenizer)
    # No row ends early on either side: every step has the same number of tokens, and no compaction helps rlmod.
    policy.generation_config.eos_token_id = [policy.config.vocab_size + 1]
    policy.generation_config.pad_token_id = tokenizer.pad_token_id
    module = module_of(parts, policy, tokenizer, lambda texts: [float(i % 3 == 0) for i in range(len(texts))])
    return module, data_of(parts, tokenizer, prompts)  # the same prompts in every step


class BareLoop:
    """Generate, forward, backward, optimizer step: the least that anyone would write."""

    def __init__(self, module: RLModule, data: RLData, micro_batches: int) -> None:
        self.policy: Any = copy.deepcopy(module.policy)
        self.prompts = data.train.batch(range(module.batch.prompts))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5, weight_decay=0.0)
        self.micro_batches = micro_batches
        self.advantages = torch.where(torch.arange(8 * module.batch.prompts) % 3 == 0, 1.4, -0.7)[:, None]

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

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # From one epoch's start to the next one's: Lightning's own work between epochs counts as ours.
        now = time.process_time()
        if trainer.current_epoch:
            self.ours.append(now - self.started)
            self.other()
            self.theirs.append(time.process_time() - now)
        self.started = time.process_time()


def against_bare(model: str, repetitions: int, prompts: int) -> str:
    module, data = built(model, prompts)
    pairs = Pairs(BareLoop(module, data, 2))
    trainer_of(data, repetitions + 3, pairs).fit(module, datamodule=data)
    return f"| {model} | {compared(pairs.ours[2:], pairs.theirs[2:])} | 1.10 |"  # without the warm-up


def compared(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Both medians in ms, the ratio's median and range pair by pair, and how many pairs: five cells of a table."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return (
        f"{1000 * statistics.median(ours):.0f} | {1000 * statistics.median(theirs):.0f} "
        f"| **{statistics.median(ratios):.3f}** | {min(ratios):.3f} to {max(ratios):.3f} | {len(ratios)}"
    )


def table(repetitions: int, prompts: int = 16) -> list[str]:
    lines = [
        "| policy | rlmod, ms a step | bare loop, ms | ratio, median | range | pairs | aim |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [against_bare(model, repetitions, prompts) for model in MODELS]
    return [*lines, "", f"{prompts * 8} rows of {TOKENS} tokens, {prompts} prompts, 2 micro-batches, float32."]
