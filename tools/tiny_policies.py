"""Trains the two tiny policies that rlmod ships, from scratch: ``python tools/tiny_policies.py``.

Both have the Qwen2 architecture (3 layers, width 96, 0.3 M parameters) and a tokenizer of single characters, and learn
from solutions of the arithmetic task's train set, by next-token prediction on the completion.

    tiny    40 % worked solutions (a tenth of their steps wrong), 60 % direct answers: it holds a good way and a bad way
            and takes the bad one more often, so reinforcement learning has a choice to teach.
    strong  worked solutions only, without mistakes, for longer: the guide.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlmod.data.arithmetic import Arithmetic, solve
from rlmod.model.policy import SHIPPED

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
RECIPES = {
    "tiny": (1800, {"worked": 0.4, "wrong": 0.1}),
    "strong": (3000, {"worked": 1.0, "wrong": 0.0}),
}
"""Updates, and what the solutions are like."""


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Every printable ASCII character and the newline is a token of its own."""
    characters = "\n" + "".join(chr(c) for c in range(32, 127))
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, UNKNOWN, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(tokenizer: Any, heads: int = 3) -> Qwen2ForCausalLM:
    """Heads of 32: vLLM's attention on a CPU has no smaller ones."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@dataclass(frozen=True, kw_only=True)
class Lesson:
    completion: str
    first_token: bool = True
    """True if the first token counts. Without it, a way is taught without teaching to choose it."""


def solution(text: str, draw: random.Random, worked: float, wrong: float, modulus: int = 10) -> Lesson:
    """A worked solution with probability ``worked``, each of its steps wrong with probability ``wrong``; else the answer."""
    if draw.random() < worked:
        steps, value = solve(text, modulus, wrong, draw)
        return Lesson(completion=",".join(steps) + f"#{value}")
    return Lesson(completion=f"#{solve(text, modulus)[1]}")


def batch_of(tokenizer: Any, prompts: list[str], lessons: list[Lesson]) -> dict[str, torch.Tensor]:
    """Right-padded rows; the loss counts the completion and its EOS only."""
    rows = [
        (tokenizer(p)["input_ids"], tokenizer(lesson.completion)["input_ids"] + [tokenizer.eos_token_id])
        for p, lesson in zip(prompts, lessons, strict=True)
    ]
    width = max(len(p) + len(c) for p, c in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (p, c) in enumerate(rows):
        ids[i, : len(p) + len(c)] = torch.tensor(p + c)
        labels[i, len(p) : len(p) + len(c)] = torch.tensor(c)
        if not lessons[i].first_token:
            labels[i, len(p)] = -100
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Any,
    problems: Arithmetic,
    minibatches: int,
    lesson: Callable[[str, random.Random], Lesson],
    seed: int,
    lr: float = 2e-3,
) -> None:
    """Next-token prediction on what ``lesson`` says of these problems, 96 of them an update."""
    draw = random.Random(seed)
    texts = [str(problem.prompt) for problem in problems()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=updates, pct_start=0.1)
    started = time.time()
    for update in track(range(updates)):
        prompts = draw.sample(texts, 96)
        loss = model(**batch_of(tokenizer, prompts, [lesson(p.removesuffix(":"), draw) for p in prompts])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if update % 200 == 0 or update == updates - 1:
            print(f"update {update}, loss {loss.item():.4f}, {time.time() - started:.0f} s", flush=True)


def save(model: Qwen2ForCausalLM, tokenizer: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "names", nargs="*", default=list(RECIPES), help="which to train: tiny, strong (default: both)"
    )
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    for name in options.names:
        torch.manual_seed(options.seed)
        tokenizer = character_tokenizer()
        model = tiny_model(tokenizer)
        updates, mixture = RECIPES[name]
        train(
            model,
            tokenizer,
            Arithmetic(split="train", size=50_000),
            updates,
            partial(solution, **mixture),
            options.seed,
        )
        save(model, tokenizer, SHIPPED / name)
