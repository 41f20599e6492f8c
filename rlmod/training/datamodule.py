"""Data loading: one Lightning epoch is one iteration, which samples a rollout batch and then takes the optimizer steps on it."""

import logging
import math
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlmod import ops
from rlmod.config import compatibility
from rlmod.config.build import check_completion_prefix, find_unreadable
from rlmod.config.compatibility import Algorithm
from rlmod.config.sizes import Batch
from rlmod.contracts import check_per_token, name_component_on_error
from rlmod.data._store import sources_of
from rlmod.interfaces import Aggregation, prepare
from rlmod.model.packing import pack_by_length, rows_that_train
from rlmod.model.policy import embedding_rows, positions
from rlmod.rollout.prompts import EncodedProblems
from rlmod.types import Prompts, Rollouts, concatenate

if TYPE_CHECKING:
    from rlmod.training.module import RLModule

log = logging.getLogger(__name__)


class RolloutLoader:
    """Samples a rollout batch when the epoch's first micro-batch is requested, and yields it in micro-batches.

    The loader is sized, otherwise Lightning would prefetch one batch and train on samples that are one update stale. ``__iter__`` is a
    generator, otherwise Lightning would sample twice in the first epoch.
    """

    def __init__(
        self,
        collect: Callable[[], Rollouts],
        aggregation: Aggregation,
        batch: Batch,
        micro_batches: int,
        sub_batch_weights: Sequence[float] = (1.0,),
        every_row: bool = False,
    ) -> None:
        self.collect, self.aggregation, self.batch, self.micro_batches = collect, aggregation, batch, micro_batches
        self.sub_batch_weights, self.every_row = sub_batch_weights, every_row

    def __len__(self) -> int:
        return self.batch.epochs * self.batch.minibatches * self.micro_batches

    def __iter__(self) -> Iterator[Rollouts]:
        rollouts = self.collect()
        for _ in range(self.batch.epochs):
            for minibatch in self.split_into_minibatches(rollouts):
                yield from self.split_into_micro_batches(replace(minibatch, weights=self.weigh(minibatch)))

    def split_into_micro_batches(self, minibatch: Rollouts) -> Iterator[Rollouts]:
        """Yield the same number of micro-batches on every rank, because DDP waits for all of them.

        Empty ones come first: no rank has rows for them. Then masked-out rows, where only another rank has some: this one must run the
        forward and backward pass too. The last one always has rows.
        """
        rows = rows_that_train(minibatch, every_row=self.every_row).nonzero()[:, 0]
        packs = pack_by_length(minibatch.rows(rows), self.batch.micro_batch, self.batch.micro_batch_tokens)
        found = [rows[pack] for pack in packs]
        needed = max(int(ops.all_max(torch.tensor(float(len(found)), device=minibatch.device))), 1)
        yield from (minibatch.rows(slice(0, 0)) for _ in range(self.micro_batches - needed))
        yield from (_mask_out(minibatch.rows(slice(0, 1))).trimmed() for _ in range(needed - len(found)))
        yield from (minibatch.rows(pack).trimmed() for pack in found)

    def split_into_minibatches(self, rollouts: Rollouts) -> Iterator[Rollouts]:
        """Yield the rows of each optimizer step. Each step gets a share of every sub-batch."""
        if rollouts.sub_batch is None:
            yield from split(rollouts, self.batch.minibatches)
            return
        sub_batches = [rollouts.rows(rollouts.sub_batch == index) for index in range(len(self.sub_batch_weights))]
        for shares in zip(*(split(each, self.batch.minibatches) for each in sub_batches), strict=True):
            yield concatenate(shares)

    def weigh(self, minibatch: Rollouts) -> Float[Tensor, "R T"]:
        """J = sum_k weight_k J_k: the aggregation normalizes each sub-batch separately."""
        if minibatch.sub_batch is None:
            return self._aggregate(minibatch)
        weights = torch.zeros_like(minibatch.mask, dtype=torch.float32)
        for index, weight in enumerate(self.sub_batch_weights):
            inside = (minibatch.sub_batch == index)[:, None]
            weights = weights + weight * self._aggregate(replace(minibatch, mask=minibatch.mask & inside))
        return weights

    def _aggregate(self, rollouts: Rollouts) -> Float[Tensor, "R T"]:
        with name_component_on_error("aggregation", self.aggregation):
            return check_per_token(self.aggregation(rollouts), rollouts, "aggregation", self.aggregation)


def split(rollouts: Rollouts, number: int) -> Iterator[Rollouts]:
    """Yield ``number`` slices of nearly equal size. With fewer rows than slices, some hold one masked-out row."""
    bounds = [len(rollouts) * i // number for i in range(number + 1)]
    for start, stop in pairwise(bounds):
        yield rollouts.rows(slice(start, stop)) if start < stop else _mask_out(rollouts.rows(slice(0, 1)))


def _mask_out(rollouts: Rollouts) -> Rollouts:
    weights = None if rollouts.weights is None else torch.zeros_like(rollouts.weights)
    return replace(rollouts, mask=torch.zeros_like(rollouts.mask), weights=weights)


class PromptLoader:
    """Batches of a rank's problems, every world_size-th one, always in the same order.

    All ranks have the same number of batches, because a sharded policy is gathered by all of them for each batch. A rank without
    problems for a batch samples the first problem, and ``Prompts.padding`` is True.
    """

    def __init__(self, problems: EncodedProblems, rank: int, ranks: int, size: int) -> None:
        total = len(problems.problems)
        self.problems, self.size = problems, size
        self.indices = list(range(rank, total, ranks))
        self.batches = math.ceil(math.ceil(total / ranks) / size)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Prompts]:
        for start in range(0, self.batches * self.size, self.size):
            indices = self.indices[start : start + self.size]
            yield replace(self.problems.batch(indices or [0]), padding=not indices)


class RLData(L.LightningDataModule):
    """Prompts for the rollout batches, reshuffled after each pass over the problems, and prompts for validation: held-out ones, benchmarks.

    Each rank gets its own prompts: every world_size-th of the shuffled order. A checkpoint holds the position of each rank. Components,
    sizes and seed are ``RLModule``'s. ``setup`` checks them, sets ``Trainer.accumulate_grad_batches``, which follows from the sizes, and
    refuses settings of the Trainer that would train something else.
    """

    def __init__(
        self,
        *,
        train: EncodedProblems,
        held_out: EncodedProblems | None = None,
        benchmark: Mapping[str, EncodedProblems] | None = None,
    ) -> None:
        super().__init__()
        self.train, self.held_out, self.benchmark = train, held_out, dict(benchmark or {})
        self.components_ready = False
        """True if the components have been checked and prepared. The command does so before it loads the policy."""
        self.trainer_settings: dict[str, Any] = {}
        """The Trainer's settings before ``setup`` changed them, so that the Trainer can be used again."""
        self.prompts_seen = 0
        """Prompts that this rank has seen so far."""
        self.orders: dict[tuple[int, int, int], np.ndarray] = {}
        """The last shuffled orders, by seed, number of problems and pass."""
        self.random: dict[str, Any] | None = None
        """Random states from a checkpoint, until they are restored before the first rollout batch."""

    def __str__(self) -> str:
        """Return the numbers of problems. Lightning's own form asks each loader for its data, which would sample a rollout batch."""
        held_out = 0 if self.held_out is None else len(self.held_out.problems)
        benchmarks = "".join(f", {len(each.problems)} of {name}" for name, each in self.benchmark.items())
        return f"{type(self).__name__}: {len(self.train.problems)} problems, {held_out} held-out problems{benchmarks}"

    @property
    def validation_sets(self) -> dict[str, EncodedProblems]:
        """The sets to validate on by name, the held-out one first, under the name ""."""
        return ({} if self.held_out is None else {"": self.held_out}) | self.benchmark

    @property
    def module(self) -> "RLModule":
        assert self.trainer is not None
        return cast("RLModule", self.trainer.lightning_module)

    def setup(self, stage: str) -> None:
        """Check and prepare the components, and set ``accumulate_grad_batches`` on the Trainer. Lightning calls this before ``fit``.

        ValueError if the components cannot work together, or if a setting of the Trainer would cut an optimizer step.
        """
        trainer, module = self.trainer, self.module
        assert trainer is not None
        if unknown := set(self.benchmark) - set(module.benchmark):
            raise ValueError(
                f"RLData has the benchmark {min(unknown)!r}, but RLModule has no settings for it: give it as "
                f"benchmark={{{min(unknown)!r}: Validation(...)}}"
            )
        module.validation_sets = tuple(self.validation_sets)
        for problems in (self.train, *self.validation_sets.values()):
            problems.check_token_ids(embedding_rows(module.policy))
            _check_same_on_all_ranks(problems)
        if not self.components_ready:
            compatibility.check(module, trainer.world_size)
            self.train.without_unreadable(find_unreadable(self.train, module.reward), "error")
            self.prepare_components(module, module.tokenizer, positions(getattr(module.policy, "config", None)))
        if not self.validation_sets:
            self._change(trainer, "limit_val_batches", 0)
        if stage == "fit":
            needed = self.micro_batches(trainer.world_size)
            check_trainer(trainer, needed)
            self._change(trainer, "accumulate_grad_batches", needed)

    def prepare_components(
        self, algorithm: Algorithm, tokenizer: PreTrainedTokenizerBase, positions: int | None
    ) -> None:
        """Let the components check the problems or load weights of their own, once. ValueError for a prompt that is too long.

        ``positions`` is the longest sequence that the policy was made for, in tokens; None: any.
        """
        for problems, key, sampler in (
            (self.train, "sampler", algorithm.sampler),
            *((each, "validation.sampler", algorithm.validation.sampler) for each in self.validation_sets.values()),
        ):
            problems.check_positions(positions, sampler, key)
        prepare(
            [algorithm.sampler, algorithm.guide, algorithm.reward, algorithm.reference], self.train.problems, tokenizer
        )
        self.train.check_max_model_len(algorithm.sampler, "sampler")
        check_completion_prefix(algorithm.reward, self.train, tokenizer)
        validation = algorithm.validation
        # A benchmark's sampler and reward are those of the validation, with another number of completions.
        everything = [problem for each in self.validation_sets.values() for problem in each.problems]
        prepare([validation.sampler, validation.reward], everything, tokenizer)
        for name, problems in self.validation_sets.items():
            settings = algorithm.benchmark[name] if name else validation
            if settings.reward is not validation.reward:
                prepare([settings.reward], problems.problems, tokenizer)
            problems.check_max_model_len(settings.sampler, "validation.sampler")
            check_completion_prefix(settings.reward, problems, tokenizer)
        self.components_ready = True

    def _change(self, trainer: L.Trainer, name: str, value: Any) -> None:
        self.trainer_settings.setdefault(name, getattr(trainer, name))
        setattr(trainer, name, value)

    def teardown(self, stage: str) -> None:
        """Restore the Trainer's settings, so that it can train another module."""
        while self.trainer_settings:
            name, value = self.trainer_settings.popitem()
            setattr(self.trainer, name, value)

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    def next_prompts(self, number: int) -> Prompts:
        """Return the next ``number`` prompts of this rank, token ids [number P] padded on the left, and advance the position."""
        assert self.trainer is not None
        ranks, rank, size = self.trainer.world_size, self.trainer.global_rank, len(self.train.problems)
        positions = [(self.prompts_seen + i) * ranks + rank for i in range(number)]
        self.prompts_seen += number
        order = {index: self._order(index) for index in sorted({position // size for position in positions})}
        return self.train.batch([int(order[position // size][position % size]) for position in positions])

    def _order(self, index: int) -> np.ndarray:
        """Return the order of pass ``index``. It is kept, with the pass before, because a shuffle of many problems takes long."""
        key = (self.module.seed, len(self.train.problems), index)
        if key not in self.orders:
            self.orders = {k: order for k, order in self.orders.items() if k[2] == index - 1} | {
                key: self._shuffle(index)
            }
        return self.orders[key]

    def _shuffle(self, index: int) -> np.ndarray:
        """Return the order of the problems in pass ``index`` over them."""
        generator = torch.Generator().manual_seed(self.module.seed * 1_000_003 + index)
        return torch.randperm(len(self.train.problems), generator=generator).numpy()

    def train_dataloader(self) -> RolloutLoader:
        """Build the loader that samples rollout batches. Restore the random states of a checkpoint first."""
        assert self.trainer is not None
        ranks, module = self.trainer.world_size, self.module
        if self.random is not None:
            set_random_states(self.random)
            self.random = None
        return RolloutLoader(
            lambda: module.collect(self.next_prompts, module.batch.prompts // ranks),
            module.aggregation,
            module.batch,
            self.micro_batches(ranks),
            module.zero_reward.sub_batch_weights,
            module.every_row_trains,
        )

    def micro_batches(self, ranks: int) -> int:
        """Return the number of micro-batches per optimizer step and rank, for the largest possible zero-reward batch.

        ValueError if the sizes do not divide evenly.
        """
        batch, rows_per_prompt = self.module.batch, self.module.completions_per_prompt
        extra = self.module.zero_reward.max_rows(batch.prompts // ranks, ranks, rows_per_prompt)
        return batch.micro_batches(rows_per_prompt, ranks, extra)

    def val_dataloader(self) -> "list[PromptLoader]":
        """Build the loaders of this rank's prompts, one per validation set."""
        assert self.trainer is not None
        rank, ranks, module = self.trainer.global_rank, self.trainer.world_size, self.module
        return [
            PromptLoader(
                problems, rank, ranks, (module.benchmark[name] if name else module.validation).prompts_per_batch
            )
            for name, problems in self.validation_sets.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the random states of all ranks. Every rank must call this; Lightning saves rank 0's result."""
        state = {"prompts_seen": self.prompts_seen, "random": random_states()}
        ranks: list[Any] = [state]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, state)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore each rank's position. With another number of ranks, all continue after the furthest one, so no prompt is seen twice."""
        assert self.trainer is not None
        saved, ranks, rank = state_dict["ranks"], self.trainer.world_size, self.trainer.global_rank
        self.prompts_seen = saved[rank]["prompts_seen"] if len(saved) == ranks else furthest_position(saved, ranks)
        self.random = saved[rank]["random"] if rank < len(saved) else None
        if len(saved) != ranks and rank == 0:
            log.warning(
                "the checkpoint was written by %d ranks, this run has %d: it resumes with the same weights and the next prompts, but "
                "samples other completions than the earlier ranks would have sampled",
                len(saved),
                ranks,
            )


def check_trainer(trainer: L.Trainer, micro_batches: int) -> None:
    """ValueError if a setting of the Trainer would cut an optimizer step of so many micro-batches, or has no end."""
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in vars(trainer)["callbacks"]):
        raise ValueError(
            "the callback GradientAccumulationScheduler would change the optimizer step in the middle of a run: remove it; "
            "batch.prompts and batch.minibatches set the size of a step"
        )
    check_limits(trainer)
    if trainer.accumulate_grad_batches not in (1, micro_batches):
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: an optimizer step has {micro_batches} micro-batches, "
            "which follow from batch.prompts, batch.minibatches and batch.micro_batch; leave it at 1, and change batch.micro_batch instead"
        )
    if trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise ValueError(
            "trainer.max_epochs=-1: give the number of iterations, also with trainer.max_time, which may end the run earlier"
        )


def check_limits(trainer: L.Trainer) -> None:
    """Raise ValueError for a setting of the Trainer that would cut an iteration in the middle of an optimizer step."""
    if fast := getattr(trainer, "fast_dev_run", False):
        raise ValueError(
            f"trainer.fast_dev_run={fast} would cut an iteration in the middle of an optimizer step, and turns checkpoints off: "
            "leave it false; with rlmod-train, debug=short makes any run short"
        )
    if overfit := getattr(trainer, "overfit_batches", 0):
        raise ValueError(
            f"trainer.overfit_batches={overfit} would cut an iteration in the middle of an optimizer step: leave it at "
            "0; to train on few problems, pass only those to RLData"
        )
    limit = trainer.limit_train_batches
    # The integer 1 is one batch, and equals 1.0, which is all of them.
    if limit not in (1.0, None) or isinstance(limit, int):
        raise ValueError(
            f"trainer.limit_train_batches={limit} would cut an iteration in the middle of an optimizer step: "
            "leave it at 1.0; lower trainer.max_epochs for fewer iterations, or batch.prompts for smaller ones"
        )


def _check_same_on_all_ranks(problems: EncodedProblems) -> None:
    """Raise ValueError if the ranks have different problems: they would not divide them, but train on some twice and on others never."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    checksum = 0
    for sources in sources_of(problems.problems):
        checksum = zlib.crc32("\n".join([*sources, ""]).encode(), checksum)
    mine = len(problems), checksum
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if len(set(ranks)) > 1:
        raise ValueError(
            f"the ranks have different problems ({', '.join(str(number) for number, _ in ranks)} of them): their files differ, or "
            "an answer could be read on some ranks only, because of reward.timeout_seconds"
        )


def furthest_position(saved: Sequence[dict[str, Any]], ranks: int) -> int:
    """Return the position from which ``ranks`` ranks continue so that no prompt is seen twice."""
    return math.ceil(max(state["prompts_seen"] for state in saved) * len(saved) / ranks)


def random_states() -> dict[str, Any]:
    """Return the states of the generators that dropout or a user's own component may use. Sampling does not: it has separate seeds."""
    name, key, *rest = cast(Any, np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(key.tolist()), *rest),  # not an array: a checkpoint must load with weights_only
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that ``random_states`` returned. CUDA's are skipped if the number of devices differs."""
    random.setstate(states["python"])
    name, key, *rest = states["numpy"]
    np.random.set_state((name, key.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
