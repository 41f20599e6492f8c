"""``make bench-gpu`` prints a step of GTPO on a GPU, as a Markdown table for docs/benchmarks.md.

A policy of 0.5 B parameters (the shape of Qwen2.5-0.5B, random weights, nothing is downloaded) in bfloat16; 16 prompts, 8 completions
each, of 1,024 tokens. ``--smoke`` runs a tiny shape, on a CPU too: a test of this tool, not a measurement.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlmod.rollout.prompts import EncodedProblems
from rlmod.training.module import RLModule
from rlmod.types import Problem
from tools.bench.setting import data_of, module_of, parts_of, quiet

G = 8
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165}
"""Dense bfloat16, from the makers' data sheets."""


@dataclass(frozen=True, kw_only=True)
class Size:
    layers: int
    width: int
    heads: int
    key_value_heads: int
    inner: int
    vocabulary: int
    prompts: int
    prompt: int
    """Tokens of a prompt."""
    completion: int
    micro_batch: int

    def policy(self, device: torch.device) -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads,
            tie_word_embeddings=True, max_position_embeddings=32_768, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with device:
            policy: Any = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        # No row ends early: every step has the same number of tokens.
        policy.generation_config.eos_token_id = [self.vocabulary + 1]
        policy.generation_config.pad_token_id = 0
        return policy.train()

    def training_flops(self, parameters: int) -> float:
        """Return the operations of forward and backward: 6 per parameter and token, 12 x layers x width per token and attended token.

        Source: PaLM, arXiv:2204.02311, appendix B. Differs: causal attention counts half, since the other half is not needed; the head
        (tied to the embeddings) counts at completion tokens alone, where alone it is used.
        """
        length, rows = self.prompt + self.completion, self.prompts * G
        body = parameters - self.vocabulary * self.width
        attention = 12 * self.layers * self.width * length / 2
        return rows * (length * (6 * body + attention) + self.completion * 6 * self.vocabulary * self.width)


FULL = Size(
    layers=24, width=896, heads=14, key_value_heads=2, inner=4_864, vocabulary=151_936, prompts=16, prompt=128,
    completion=1_024, micro_batch=16,
)  # fmt: skip
SMOKE = Size(
    layers=2, width=32, heads=2, key_value_heads=2, inner=64, vocabulary=128, prompts=2, prompt=8, completion=16,
    micro_batch=8,
)  # fmt: skip


class Stages(L.Callback):
    """Seconds and peak bytes of every iteration, by stage."""

    def __init__(self, module: RLModule, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {"sampling": [], "rest of the rollout batch": [], "training": []}
        self.peaks: list[int] = []
        self.rollout_batch_seconds = self.started = 0.0
        taken: Any = module
        taken.sampler = Timed(module.sampler, self.now)
        self.sampler, collect = taken.sampler, module.collect

        def collected(*arguments: Any) -> Any:
            started = self.now()
            rollouts = collect(*arguments)
            self.rollout_batch_seconds = self.now() - started
            return rollouts

        taken.collect = collected

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch:
            whole = self.now() - self.started
            sampling = self.sampler.seconds
            for stage, taken in zip(
                self.seconds,
                (sampling, self.rollout_batch_seconds - sampling, whole - self.rollout_batch_seconds),
                strict=True,
            ):
                self.seconds[stage].append(taken)
            self.peaks.append(torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.started = self.now()


class Timed:
    """The sampler, with the seconds of its last call."""

    def __init__(self, sampler: Any, now: Callable[[], float]) -> None:
        self.sampler, self.now, self.seconds = sampler, now, 0.0
        self.completions_per_prompt, self.temperature = sampler.completions_per_prompt, sampler.temperature

    def __call__(self, *arguments: Any) -> Any:
        started = self.now()
        rollouts = self.sampler(*arguments)
        self.seconds = self.now() - started
        return rollouts


def measured(size: Size, device: torch.device, repetitions: int) -> tuple[Stages, int]:
    parts = parts_of(
        "shaper=token_entropy", f"batch.prompts={size.prompts}", f"batch.micro_batch={size.micro_batch}",
        f"sampler.completions_per_prompt={G}", f"sampler.max_new_tokens={size.completion}",
    )  # fmt: skip
    tokenizer = parts.policy.tokenizer()
    policy = size.policy(device)
    # Random weights make ids that the tiny tokenizer does not know; no text is read here.
    decoded: Any = tokenizer
    decoded.batch_decode = lambda ids, **_: [""] * len(ids)
    module = module_of(parts, policy, tokenizer, lambda texts: [float(i % 3 == 0) for i in range(len(texts))])
    data = data_of(parts, tokenizer, 1)
    problem = Problem(prompt="", answer="", source="random")
    ids = torch.randint(3, size.vocabulary, (size.prompts, size.prompt), generator=torch.Generator().manual_seed(0))
    data.train = EncodedProblems(
        problems=(problem,) * size.prompts, ids=tuple(map(tuple, ids.tolist())), pad_id=0, dropped=0
    )
    stages = Stages(module, device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=repetitions + 2, precision="bf16-true",
        limit_val_batches=0, gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[stages], logger=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return stages, sum(p.numel() for p in policy.parameters())


def table(size: Size, device: torch.device, repetitions: int, tflops: float | None) -> list[str]:
    stages, parameters = measured(size, device, repetitions)
    middle = {name: statistics.median(taken[1:]) for name, taken in stages.seconds.items()}  # without the warm-up
    whole = sum(middle.values())
    rows = size.prompts * G
    used = size.training_flops(parameters) / middle["training"] / 1e12
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    tflops = tflops or next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    mfu = f"{100 * used / tflops:.1f} % of {tflops:.0f} TFLOP/s" if tflops else "give --peak-tflops"
    lines = ["| what | value |", "|---|---|", f"| device | {name}, torch {torch.__version__} |"]
    lines += [f"| parameters, rows, completion tokens | {parameters / 1e6:.1f} M, {rows}, {rows * size.completion:,} |"]
    lines += [f"| {stage}, s | {seconds:.3f} |" for stage, seconds in middle.items()]
    lines += [
        f"| step, s | {whole:.3f} |",
        f"| completion tokens a second, whole step | {rows * size.completion / whole:,.0f} |",
        f"| completion tokens a second, sampling | {rows * size.completion / middle['sampling']:,.0f} |",
        f"| tokens a second, training | {rows * (size.prompt + size.completion) / middle['training']:,.0f} |",
        f"| peak memory, MiB | {max(stages.peaks) / 2**20:,.0f} |",
        f"| training, TFLOP/s | {used:.3g} |",
        f"| MFU of training | {mfu} |",
    ]
    return lines


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--smoke", action="store_true", help="a tiny shape, on a CPU too")
    options.add_argument("--repetitions", type=int, default=3)
    options.add_argument("--micro-batch", type=int, help="rows of a forward and backward pass; 16 without it")
    options.add_argument(
        "--peak-tflops", type=float, help="of the device, dense bfloat16; known for " + ", ".join(PEAK_TFLOPS)
    )
    given = options.parse_args()
    if not torch.cuda.is_available() and not given.smoke:
        raise SystemExit("there is no GPU here: make bench-gpu measures on one (--smoke runs a tiny shape on a CPU)")
    quiet()
    size = SMOKE if given.smoke else FULL
    if given.micro_batch:
        size = replace(size, micro_batch=given.micro_batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("\n".join(table(size, device, given.repetitions, given.peak_tflops)))


if __name__ == "__main__":
    main()
