"""A small RLModule with a stand-in for its Trainer, so that a single hook is tested without a run."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from rlmod.config.sizes import Batch
from rlmod.model.policy import HFPolicy
from rlmod.rollout.prompts import EncodedProblems
from rlmod.sampler.hf import HF
from rlmod.training.module import RLModule
from rlmod.types import Problem, Prompts, Rollouts, build_rollouts

TINY = HFPolicy(path="tiny")


def module(rank: int = 0, ranks: int = 1, epoch: int = 0, **components: Any) -> RLModule:
    """Return a module of the policy ``tiny`` on one of several ranks, in the middle of ``fit``."""
    tokenizer = TINY.tokenizer()
    defaults: dict[str, Any] = {
        "policy": TINY.model(tokenizer),
        "tokenizer": tokenizer,
        "sampler": HF(completions_per_prompt=2, max_new_tokens=4),
        "reward": lambda texts: [float(len(text) % 2) for text in texts.completions],
        "batch": Batch(prompts=2, micro_batch=4),
    }
    made = RLModule(**{**defaults, **components})
    progress = SimpleNamespace(is_last_batch=True, current=SimpleNamespace(ready=4))
    made.__dict__["_trainer"] = SimpleNamespace(
        world_size=ranks, global_rank=rank, current_epoch=epoch, strategy=None, accumulate_grad_batches=1,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )  # fmt: skip
    return made


def encoded(*ids: int) -> EncodedProblems:
    """Problems whose prompt is a single token; ``p.jsonl:i`` is the source of the i-th."""
    problems = tuple(Problem(prompt=str(i), answer="", source=f"p.jsonl:{i}") for i in range(len(ids)))
    return EncodedProblems(problems=problems, ids=tuple((each,) for each in ids), pad_id=0, dropped=0)


def prompts(number: int) -> Prompts:
    return encoded(*range(20, 20 + number)).batch(range(number))


def training_rows() -> Rollouts:
    """Two groups of two completions of three tokens, with everything that a training step needs."""
    return build_rollouts(
        prompt_ids=torch.full((4, 1), 20),
        completion_ids=torch.full((4, 3), 21),
        group=torch.arange(4) // 2,
        rewards=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        outcomes=torch.tensor([1.0, 0.0, 0.0, 1.0]),
        advantages=torch.tensor([[1.0], [-1.0], [-1.0], [1.0]]).repeat(1, 3),
        weights=torch.full((4, 3), 1 / 12),
    )
