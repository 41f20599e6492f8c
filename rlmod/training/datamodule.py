"""How a collection becomes optimizer steps: one Lightning epoch is one collection and the steps taken on it."""

import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from rlmod import ops
from rlmod.config.sizes import Batch
from rlmod.interfaces import Aggregation
from rlmod.model.packing import pack_by_length, rows_that_train
from rlmod.rollout.collect import ZeroReward
from rlmod.rollout.prompts import EncodedProblems
from rlmod.types import Prompts, Rollouts, concatenate

log = logging.getLogger(__name__)


class RolloutLoader:
    """Collects when the epoch's first micro-batch is asked for, and hands the collection over in micro-batches.

    It is sized, or Lightning would fetch one batch ahead and train on samples that are one update stale; and ``__iter__``
    is a generator, or Lightning would collect twice in the first epoch.
    """

    def __init__(
        self,
        collect: Callable[[], Rollouts],
        aggregation: Aggregation,
        batch: Batch,
        micro_batches: int,
        zero_reward_weight: float = 0.0,
        every_row: bool = False,
    ) -> None:
        self.collect, self.aggregation, self.batch, self.micro_batches = collect, aggregation, batch, micro_batches
        self.zero_reward_weight, self.every_row = zero_reward_weight, every_row

    def __len__(self) -> int:
        return self.batch.epochs * self.batch.minibatches * self.micro_batches

    def __iter__(self) -> Iterator[Rollouts]:
        rollouts = self.collect()
        for _ in range(self.batch.epochs):
            for step in self.steps(rollouts):
                yield from self.cut(replace(step, weights=self.weights(step)))

    def cut(self, step: Rollouts) -> Iterator[Rollouts]:
        """The micro-batches of an optimizer step: always as many, and on every rank as many with rows. The others come first, empty."""
        rows = rows_that_train(step, every_row=self.every_row).nonzero()[:, 0]
        found = [
            rows[pack]
            for pack in pack_by_length(step.rows(rows), self.batch.micro_batch, self.batch.micro_batch_tokens)
        ]
        needed = max(int(ops.all_max(torch.tensor(float(len(found)), device=step.device))), 1)
        yield from (step.rows(slice(0, 0)) for _ in range(self.micro_batches - needed))
        yield from (_masked_out(step.rows(slice(0, 1))).trimmed() for _ in range(needed - len(found)))
        yield from (step.rows(pack).trimmed() for pack in found)

    def steps(self, rollouts: Rollouts) -> Iterator[Rollouts]:
        """The rows of each optimizer step: of the zero-reward batch, where there is one, a share goes into each."""
        if rollouts.zero_reward is None:
            yield from parts(rollouts, self.batch.minibatches)
            return
        main, extra = rollouts.rows(~rollouts.zero_reward), rollouts.rows(rollouts.zero_reward)
        for pair in zip(parts(main, self.batch.minibatches), parts(extra, self.batch.minibatches), strict=True):
            yield concatenate(pair)

    def weights(self, step: Rollouts) -> Float[Tensor, "R T"]:
        """J = J_1 + lambda J_0: the zero-reward batch has a normaliser of its own."""
        if step.zero_reward is None:
            return self.aggregation(step)
        assert step.mask is not None
        extra = step.zero_reward[:, None]
        main = self.aggregation(replace(step, mask=step.mask & ~extra))
        return main + self.zero_reward_weight * self.aggregation(replace(step, mask=step.mask & extra))


def parts(rollouts: Rollouts, number: int) -> Iterator[Rollouts]:
    """``number`` slices, as equal as can be. Where there are fewer rows than slices, some hold one row that is masked out."""
    bounds = [len(rollouts) * i // number for i in range(number + 1)]
    for start, stop in pairwise(bounds):
        yield rollouts.rows(slice(start, stop)) if start < stop else _masked_out(rollouts.rows(slice(0, 1)))


def _masked_out(rollouts: Rollouts) -> Rollouts:
    assert rollouts.mask is not None
    weights = None if rollouts.weights is None else torch.zeros_like(rollouts.weights)
    return replace(rollouts, mask=torch.zeros_like(rollouts.mask), weights=weights)


class PromptLoader:
    """Some problems of a set in batches, always in the same order."""

    def __init__(self, problems: EncodedProblems, indices: Sequence[int], size: int) -> None:
        self.problems, self.indices, self.size = problems, indices, size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.size)

    def __iter__(self) -> Iterator[Prompts]:
        for start in range(0, len(self.indices), self.size):
            yield self.problems.batch(self.indices[start : start + self.size])


class RLData(L.LightningDataModule):
    """Prompts for the collections, shuffled anew each time they are gone through, and held-out prompts for validation.

    Each rank has problems of its own: every world_size-th of the shuffled order. The position of each rank is in the checkpoint.
    """

    def __init__(
        self,
        *,
        train: EncodedProblems,
        held_out: EncodedProblems | None,
        batch: Batch,
        aggregation: Aggregation,
        rows_per_prompt: int,
        zero_reward: ZeroReward,
        every_row: bool,
        validation_prompts: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.held_out = train, held_out
        self.batch, self.aggregation = batch, aggregation
        self.rows_per_prompt, self.zero_reward, self.every_row = rows_per_prompt, zero_reward, every_row
        self.validation_prompts, self.seed = validation_prompts, seed
        self.prompts_seen = 0
        """Prompts that this rank has drawn so far."""
        self.random: dict[str, Any] | None = None
        """The random states that a checkpoint left, until the first collection takes them up."""

    def draw(self, number: int) -> Prompts:
        """The next prompts of this rank."""
        assert self.trainer is not None
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        places = [(self.prompts_seen + i) * ranks + rank for i in range(number)]
        self.prompts_seen += number
        rounds = {place // len(self.train.problems) for place in places}
        order = {r: self._order(r) for r in rounds}
        size = len(self.train.problems)
        return self.train.batch([order[place // size][place % size] for place in places])

    def _order(self, round: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round)
        return torch.randperm(len(self.train.problems), generator=generator).tolist()

    def train_dataloader(self) -> RolloutLoader:
        assert self.trainer is not None
        ranks = self.trainer.world_size
        module: Any = self.trainer.lightning_module
        if self.random is not None:
            set_random_states(self.random)
            self.random = None
        return RolloutLoader(
            lambda: module.collect(self.draw, self.batch.prompts // ranks),
            self.aggregation,
            self.batch,
            self.micro_batches(ranks),
            self.zero_reward.weight,
            self.every_row,
        )

    def micro_batches(self, ranks: int) -> int:
        """Of one optimizer step on one rank; the zero-reward batch counts at its largest."""
        extra = self.zero_reward.rows(self.batch.prompts // ranks, ranks, self.rows_per_prompt)
        return self.batch.micro_batches(self.rows_per_prompt, ranks, extra)

    def val_dataloader(self) -> "PromptLoader":
        assert self.trainer is not None and self.held_out is not None
        mine = range(self.trainer.global_rank, len(self.held_out.problems), self.trainer.world_size)
        return PromptLoader(self.held_out, mine, self.validation_prompts)

    def state_dict(self) -> dict[str, Any]:
        """Every rank calls this when a checkpoint is made; what rank 0 returns is saved."""
        mine = {"prompts_seen": self.prompts_seen, "random": random_states()}
        ranks: list[Any] = [mine]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, mine)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """With another number of ranks, all go on behind the furthest one: no prompt comes twice, and a few may be left out."""
        assert self.trainer is not None
        saved, ranks, rank = state_dict["ranks"], self.trainer.world_size, self.trainer.global_rank
        self.prompts_seen = saved[rank]["prompts_seen"] if len(saved) == ranks else furthest(saved, ranks)
        self.random = saved[rank]["random"] if rank < len(saved) else None
        if len(saved) != ranks and rank == 0:
            log.warning(
                "the checkpoint was made by %d ranks, this run has %d: it goes on with the same weights and with the prompts that come "
                "next, but samples other completions than the earlier ranks would have",
                len(saved),
                ranks,
            )


def furthest(saved: Sequence[dict[str, Any]], ranks: int) -> int:
    """The prompts that each of ``ranks`` ranks leaves behind so that none of the saved ones has drawn those that follow."""
    return math.ceil(max(state["prompts_seen"] for state in saved) * len(saved) / ranks)


def random_states() -> dict[str, Any]:
    """Of the generators that dropout, or a component of one's own, may draw from. Sampling has seeds of its own."""
    name, key, *rest = cast(Any, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(key.tolist()), *rest),  # no array: a checkpoint is to load with weights_only
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
