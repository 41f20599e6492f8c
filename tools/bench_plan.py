"""The forecast of rlmod-plan compared with what training takes: ``python tools/bench_plan.py`` prints the table of docs/scaling.md.

Each row is a run of rlmod-train in a process of its own, with a policy of random weights and rows of full length. Measured is the peak of
two optimizer steps: the tensors that are alive before them, and what torch's allocator hands out and takes back meanwhile, as its
profiler records it.
"""

import gc
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.autograd.profiler import profile

from rlmod.commands.plan import memory
from rlmod.commands.plan.read import run_from_config
from rlmod.config import cli
from rlmod.sampler.hf import HF
from rlmod.types import Prompts, Rollouts, Texts, build_rollouts

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """A policy and the rows that it is trained on at once."""

    name: str
    config: dict[str, Any]
    completion: int
    micro_batch: int
    overrides: tuple[str, ...] = ()
    prompt: int = 16


def qwen(
    hidden: int, intermediate: int, layers: int, heads: int, keys: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


WIDE, DEEP, WORDY, NARROW = (
    qwen(512, 1536, 2, 8, 2, 2_000, False),
    qwen(128, 384, 12, 4, 4, 500, True),
    qwen(192, 512, 3, 4, 2, 50_000, True),
    qwen(96, 256, 4, 4, 2, 1_000, True),
)
CASES = (
    Case("wide", WIDE, 112, 16),
    Case("deep", DEEP, 240, 8),
    Case("large vocabulary", WORDY, 64, 32),
    Case("wide, one micro-batch", WIDE, 112, 32),
    Case("deep, checkpointing", DEEP, 240, 8, ("policy.gradient_checkpointing=true",)),
    Case("deep, LoRA", DEEP, 240, 8, ("adapter=lora",)),
    Case("deep, eager attention", DEEP, 240, 8, ("policy.attention=eager",)),
    Case("large vocabulary, eight micro-batches", WORDY, 64, 4),
    Case("narrow, bf16-mixed", NARROW, 112, 4, ("trainer.precision=bf16-mixed",)),
    Case("narrow, bfloat16 weights", NARROW, 112, 4, ("policy.dtype=bfloat16",)),
    *(
        Case(
            f"wide, two ranks of {strategy}",
            WIDE,
            112,
            16,
            ("batch.prompts=8", f"strategy={strategy}", "trainer.devices=2"),
        )
        for strategy in ("ddp", "fsdp", "fsdp2")
    ),
    Case("deep, prompts computed once per group", DEEP, 64, 8, prompt=192),
)
COMMON = (
    "data.validation=null",
    "sampler._target_=tools.bench_plan.FullLength",
    "sampler.completions_per_prompt=8",
    "reward._target_=tools.bench_plan.every_other",
    "~reward.pattern",
    "~reward.correct",
    "~reward.incorrect",
    "batch.prompts=4",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "optimizer.lr=1e-3",
    "callbacks.completions.every=0",
)


@dataclass(frozen=True, kw_only=True)
class FullLength(HF):
    """Random tokens up to the limit. By turns a row's prompt and its completion are a token shorter, so that every micro-batch is as
    long as can be and has padding."""

    prompt_tokens: int

    def __call__(self, policy: Any, prompts: Prompts, seed: int, finished: object = None) -> Rollouts:
        group = torch.arange(len(prompts)).repeat_interleave(self.completions_per_prompt)
        rows = len(group)
        completions = torch.randint(3, 90, (rows, self.max_new_tokens), generator=torch.Generator().manual_seed(seed))
        prompt_mask = torch.ones(rows, self.prompt_tokens, dtype=torch.bool)
        prompt_mask[1::2, 0] = False
        mask = torch.ones_like(completions, dtype=torch.bool)
        mask[::2, -1] = False
        return build_rollouts(
            prompt_ids=torch.full((rows, self.prompt_tokens), 5),
            prompt_mask=prompt_mask,
            completion_ids=completions,
            mask=mask,
            group=group,
            truncated=torch.zeros(rows, dtype=torch.bool),
        )


def every_other(texts: Texts) -> list[float]:
    return [float(row % 4 > 1) for row in range(len(texts))]


class Peak(L.Callback):
    """Writes the peak of training into ``file``, in bytes.

    From the first step on: the profiler takes no notice of memory that is set free but was handed out before it began.
    """

    def __init__(self, *, file: str) -> None:
        self.file = Path(file)
        self.profiler, self.before = profile(profile_memory=True, use_kineto=True), 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 0 and batch_idx == 0:
            self.before = alive()
            self.profiler.__enter__()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.profiler.__exit__(None, None, None)
        results: Any = self.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
        held = highest = self.before
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        if trainer.is_global_zero:
            self.file.write_text(str(highest))


def alive() -> int:
    """Bytes of all tensors that Python knows."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def make_policy(folder: Path, config: dict[str, Any]) -> None:
    """Random weights, and the tokenizer of the tiny policy."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    transformers_logging.disable_progress_bar()
    AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "rlmod" / "model" / "policies" / "tiny").save_pretrained(folder)


def overrides(case: Case, folder: Path) -> list[str]:
    return [
        *COMMON,
        f"policy.path={folder / 'policy'}",
        f"sampler.max_new_tokens={case.completion}",
        f"+sampler.prompt_tokens={case.prompt}",
        f"batch.micro_batch={case.micro_batch}",
        *case.overrides,
    ]


def planned(case: Case, folder: Path) -> float:
    """The highest of training and update, in bytes."""
    extra = ["hardware=cpu", f"plan.prompt_tokens={case.prompt}"]
    with initialize_config_dir(str(cli.config_folder()), version_base="1.3"):
        run = run_from_config(compose("plan", overrides=[*overrides(case, folder), *extra]))
    return max(phase.total for phase in memory.phases(run) if phase.name in ("training", "update"))


def measured(case: Case, folder: Path) -> float:
    """In a process of its own, in bytes."""
    file = folder / "peak"
    words = [
        f"output={folder / 'run'}",
        "+callbacks.peak._target_=tools.bench_plan.Peak",
        f"+callbacks.peak.file={file}",
    ]
    command = [sys.executable, "-m", "rlmod.train", *overrides(case, folder), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr}")
    return float(file.read_text())


def compared(case: Case) -> tuple[float, float]:
    """Planned and measured, in bytes."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_policy(folder / "policy", case.config)
        return planned(case, folder), measured(case, folder)


def main() -> None:
    print("| policy | layers | hidden | vocabulary | rows x tokens | planned MiB | measured MiB | planned / measured |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        c = case.config
        foretold, taken = (value / 2**20 for value in compared(case))
        print(
            f"| {case.name} | {c['num_hidden_layers']} | {c['hidden_size']} | {c['vocab_size']} "
            f"| {case.micro_batch} x {case.prompt + case.completion} | {foretold:.0f} | {taken:.0f} | {foretold / taken:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
