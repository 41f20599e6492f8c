"""Runs whose completions depend on the prompt alone, so that one rank and several take the same steps; and what they left."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

PARTS = '''
import os
import torch
from rlmod.sampler.hf import HF
from rlmod.types import Rollouts, build_rollouts

class Scripted(HF):
    """Completions that depend on the prompt alone, so that it does not matter which rank has it."""
    def __call__(self, policy, prompts, seed):
        g, t = self.completions_per_prompt, self.max_new_tokens
        ids, lengths = [], []
        for problem in prompts.problems:
            draw = torch.Generator().manual_seed(sum(map(ord, problem.source)))
            ids.append(torch.randint(3, 99, (g, t), generator=draw))
            lengths.append(torch.randint(1, t + 1, (g,), generator=draw))
        group = torch.arange(len(prompts)).repeat_interleave(g)
        mask = torch.arange(t) < torch.cat(lengths)[:, None]
        return build_rollouts(prompt_ids=prompts.ids[group], prompt_mask=prompts.mask[group], completion_ids=torch.cat(ids),
                        mask=mask, group=group, truncated=torch.zeros(len(group)).bool())

def parity(texts):
    return [float(len(completion) % 2) for completion in texts.completions]

def parity_of_some(texts):
    """Half of the prompts earn nothing."""
    some = [sum(map(ord, problem.source)) % 2 for problem in texts.problems]
    return [float(counts and n % 2) for counts, n in zip(some, map(len, texts.completions))]

def nothing_on_the_first_rank(texts):
    return [float(os.environ.get("LOCAL_RANK", "0") == "1" and i % 2) for i in range(len(texts.completions))]
'''
# Adam's eps is large, or it would make steps as long as any other of gradients that are no more than rounding.
SETTINGS = (
    "debug=short", "sampler._target_=parts.Scripted", "sampler.max_new_tokens=12", "reward._target_=parts.parity",
    "~reward.pattern", "~reward.correct", "~reward.incorrect", "data.validation=null", "shaper=token_entropy",
    "trainer.max_epochs=3", "optimizer.lr=1e-3", "optimizer.eps=1e-2", "batch.minibatches=1", "callbacks.completions.every=0",
    "trainer.accelerator=cpu", "callbacks.checkpoints.every=1", "reference=frozen", "regularizer=[kl]", "regularizer.kl.weight=0.1",
)  # fmt: skip


def folder_of_runs(folder: Path) -> Path:
    (folder / "parts.py").write_text(PARTS)
    return folder


def measured(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    return [{k: float(v) for k, v in row.items() if v and not k.startswith(("time/", "speed/"))} for row in rows]


def weights(run: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step:06d}" / "policy").state_dict()


def assert_same_steps(run: Path, other: Path, steps: int = 3) -> None:
    """Metrics, loss, gradient norm and weights, to 1e-5: of the gradient norm, which is about 5, a share of so much."""
    mine_alone = measured(run)  # a run that has begun from another's checkpoint has the last steps alone
    for mine, theirs in zip(mine_alone, measured(other)[-len(mine_alone) :], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-4)
        for column in theirs.keys() & {"train/loss", "train/grad_norm", "train/kl"}:
            assert mine[column] == pytest.approx(theirs[column], abs=1e-5, rel=1e-5), column
    expected = weights(other, steps)
    for key, value in weights(run, steps).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)
