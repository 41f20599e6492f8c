"""Completions to read: a table on the console at intervals, and samples.jsonl for the report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlmod.rollout.collect import RolloutBatch
from rlmod.training.module import RLModule
from rlmod.types import Rollouts, accepted_answers

TOKENS_SHOWN = 512
"""Maximum number of tokens of a completion that are recorded one by one."""


class Completions(L.Callback):
    """Shows ``rows`` completions of a rollout batch every ``every`` iterations (0: never), and records ``recorded`` of each validation
    set."""

    def __init__(self, *, folder: str, every: int = 20, rows: int = 4, recorded: int = 16) -> None:
        if every < 0 or rows < 1 or recorded < 1:
            raise ValueError(
                "callbacks.completions.every must be at least 0, .rows and .recorded at least 1, "
                f"got {every}, {rows}, {recorded}"
            )
        self.file, self.every, self.rows, self.recorded = Path(folder) / "samples.jsonl", every, rows, recorded

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule) and pl_module.rollout_batch is not None
        done = trainer.current_epoch + 1
        if not trainer.is_global_zero or not (
            done in (1, trainer.max_epochs) or (self.every and done % self.every == 0)
        ):
            return
        samples = list(sample_records(pl_module.rollout_batch, self.rows, pl_module, trainer.global_step, "train"))
        self._append(samples)
        if self.every and done % self.every == 0:
            Console().print(_build_table(samples, f"completions of iteration {done}"))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RLModule)
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        for name, batches in pl_module.validated.items():
            of_set = {"benchmark": name} if name else {}
            for batch in batches[:1]:
                records = sample_records(batch, self.recorded, pl_module, trainer.global_step, "validation")
                self._append([record | of_set for record in records])

    def _append(self, samples: list[dict[str, Any]]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)


def sample_records(
    batch: RolloutBatch, number: int, module: RLModule, step: int, when: str
) -> Iterator[dict[str, Any]]:
    """Yield a record of the first completion of each of the first ``number`` groups.

    A record of a training completion also has its tokens, with their entropy in nats and their advantage.
    """
    texts, rollouts = batch.texts, batch.rollouts
    assert texts.group is not None and texts.problems is not None and texts.lengths is not None
    assert rollouts.rewards is not None
    firsts = {group: row for row, group in reversed(list(enumerate(texts.group)))}
    for row in sorted(firsts.values())[:number]:
        prompt = texts.problems[row].prompt
        sample = {
            "step": step,
            "when": when,
            "prompt": prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt),
            "answer": texts.answers[row],
            "completion": texts.completions[row],
            "reward": None if has_no_reward(rollouts, row) else float(rollouts.rewards[row]),
            "truncated": bool(rollouts.truncated[row]),
            "length": texts.lengths[row],
        }
        if rollouts.advantages is not None and rollouts.entropy is not None:
            shown = min(texts.lengths[row], TOKENS_SHOWN)
            ids = rollouts.completion_ids[row, :shown].tolist()
            sample["tokens"] = [module.tokenizer.decode([token]) for token in ids]
            sample["entropy"] = rollouts.entropy[row, :shown].tolist()
            sample["advantages"] = rollouts.advantages[row, :shown].tolist()
        yield sample


def has_no_reward(rollouts: Rollouts, row: int) -> bool:
    """Return True if the reward abstained from the row."""
    return rollouts.abstained is not None and bool(rollouts.abstained[row])


def _build_table(samples: list[dict[str, Any]], title: str) -> Table:
    table = Table("prompt", "completion", "answer", "reward", title=title, title_justify="left", show_lines=True)
    for sample in samples:
        table.add_row(
            Text(_last_characters(sample["prompt"])),
            Text(_last_characters(sample["completion"])),
            Text(_last_characters(" | ".join(accepted_answers(sample["answer"])))),
            "" if sample["reward"] is None else f"{sample['reward']:.2f}",
        )
    return table


def _last_characters(text: str, characters: int = 300) -> str:
    """Shorten a long text to its end, which holds the answer."""
    return text if len(text) <= characters else "…" + text[-characters:]
