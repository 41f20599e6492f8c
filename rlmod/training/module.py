"""One iteration of post-training, in the order of the data.

prompts -> sampler -> guide -> reward -> filter -> logprob pass -> reference
        -> shaper -> correction -> aggregation -> loss -> regularizer -> optimizer

collect        prompts to shaped rollouts      once an epoch, without gradients
training_step  a micro-batch to its loss       many times an epoch; the aggregation has made its weights span the step
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from numpy.random import SeedSequence
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from rlmod import ops
from rlmod.config.sizes import Batch, Validation
from rlmod.interfaces import (
    Correction,
    Guide,
    Loss,
    MovingReference,
    Optimizer,
    Reference,
    Regularizer,
    Reward,
    Sampler,
    Schedule,
    Shaper,
    WeightSyncedSampler,
    sleep,
    sync,
)
from rlmod.model.logprob_pass import iter_micro_batches, logprob_pass
from rlmod.model.logprobs import find_logit_transform, logprobs_and_entropy
from rlmod.model.policy import completion_texts
from rlmod.model.shared_prompts import has_dropout
from rlmod.reward._compute import compute_rewards
from rlmod.rollout.collect import Filter, RolloutBatch, Stages, ZeroReward, collect
from rlmod.rollout.groups import texts_for_reward
from rlmod.rollout.metrics import agreement, check_agreement, mean_entropy, reduce_across_ranks
from rlmod.strategy._sharding import Sharding, full_precision_policy, gather_full_parameters, gradient_norm
from rlmod.training.checkpoint import check_collections, check_same_policy
from rlmod.training.metrics import MeanAtK, PassAtK
from rlmod.training.optimizer import apply_new_hyperparameters, build_optimizer
from rlmod.training.step_metrics import StepMetrics
from rlmod.types import Prompts, Rollouts, concatenate


class RLModule(L.LightningModule):
    def __init__(
        self,
        *,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        guide: Guide | None,
        reward: Reward,
        filter: Filter,
        zero_reward: ZeroReward,
        reference: Reference | None,
        shaper: Shaper,
        correction: Mapping[str, Correction],
        loss: Loss,
        regularizer: Mapping[str, Regularizer],
        optimizer: Optimizer,
        schedule: Schedule | None,
        validation: Validation,
        batch: Batch,
        seed: int,
    ) -> None:
        super().__init__()
        self.policy, self.tokenizer = policy, tokenizer
        self.sampler, self.guide, self.reward, self.filter = sampler, guide, reward, filter
        self.zero_reward, self.reference = zero_reward, reference
        self.shaper, self.correction, self.loss, self.regularizer = shaper, correction, loss, regularizer
        self.optimizer, self.schedule = optimizer, schedule
        self.validation, self.batch, self.seed = validation, batch, seed
        self.validation_metrics = MetricCollection(
            {validation.objective: MeanAtK(), **{f"val/pass@{k}": PassAtK(k) for k in validation.pass_at}},
            compute_groups=False,
        )
        self.collected: RolloutBatch | None = None
        """The current epoch's collection, advantages filled in; for callbacks to watch."""
        self.validated: list[RolloutBatch] = []
        """What the current or last validation sampled, batch by batch; for callbacks to watch."""
        self.held_out: dict[str, Any] = {"step": None, "problems": 0, "accuracy": None}
        """What the last validation found, and the optimizer step after which that was."""
        self.own_checkpoint = False
        """Whether what it goes on from was made in its folder with its settings, so that this still holds."""
        self.tokens_sampled = 0
        self.step_metrics = StepMetrics()
        """Of what the collection's training steps measure."""
        self.history: dict[str, float | None] = {"before": None, "seconds": 0.0}
        """Held-out accuracy before training, and seconds of training in earlier parts of a run that is gone on with."""
        self.fit_started = time.perf_counter()

    @torch.no_grad()
    def collect(self, draw: Callable[[int], Prompts], prompts: int) -> Rollouts:
        """``prompts`` groups, sampled by the current policy, rewarded, filtered and shaped."""
        with self.evaluating() as policy:
            sync(self.sampler, policy)
            find_logit_transform(policy)
            stages = Stages(
                policy=policy,
                decode=lambda rollouts: completion_texts(self.tokenizer, rollouts),
                logprob_pass=lambda rows: self.logprob_pass(policy, rows),
                draw=lambda n: draw(n).to(self.device),
                sampler=self.sampler,
                guide=self.guide,
                reward=self.reward,
                filter=self.filter,
                zero_reward=self.zero_reward,
                seed=lambda *place: self.derived_seed(self.current_epoch, *place),
            )
            room = self.zero_reward.room(prompts, self.trainer.world_size, self.global_rank)
            collected = collect(stages, prompts=prompts, room=room)
            sleep(self.sampler)
            rollouts = self.logprob_pass(
                policy, collected.rollouts, pi_old=not self.logprobs_can_wait, reference=self.reference
            )
            agreed = self.agreed(policy, rollouts)
        rollouts = self.shaped(rollouts)
        metrics = reduce_across_ranks({**mean_entropy(rollouts), **collected.metrics, **agreed})
        check_agreement(self.sampler, metrics)
        self.collected = replace(collected, rollouts=rollouts, metrics=metrics)
        self.tokens_sampled += int(metrics["completions/tokens"] + metrics.get("guide/tokens", 0))
        return rollouts

    def setup(self, stage: str) -> None:
        # Precision plugins would round what a batch holds (advantages, log-probabilities), and cannot take a frozen record.
        vars(self.trainer.precision_plugin)["convert_input"] = lambda batch: batch

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharding):
            self.policy = self.trainer.strategy.shard(self.policy)

    def training_step(self, batch: Rollouts, batch_idx: int) -> Float[Tensor, ""]:
        # An optimizer step has always as many micro-batches, not all of which are needed; the last one is.
        if not len(batch):
            return torch.zeros((), device=self.device, requires_grad=True)
        assert batch.completion_ids is not None
        entropy = any(getattr(regularizer, "needs_policy_entropy", False) for regularizer in self.regularizer.values())
        logprobs, policy_entropy = logprobs_and_entropy(self.policy, batch, self.sampler.temperature, entropy=entropy)
        old = logprobs.detach() if batch.logprobs is None else batch.logprobs  # None: this very policy sampled them
        batch = replace(batch, logprobs=old, policy_entropy=policy_entropy)
        per_token, metrics = self.loss(logprobs, batch)
        for regularizer in self.regularizer.values():
            added, measured = regularizer(logprobs, batch)
            per_token = per_token + added
            metrics |= measured
        assert batch.weights is not None and batch.mask is not None
        loss = (per_token * batch.weights).sum()
        self.step_metrics.add("loss", loss)
        for name, value in metrics.items():
            self.step_metrics.add(name, value, batch.mask)
        # The weights already span the optimizer step over all ranks, so what Lightning and DDP divide by is undone here: the number of
        # accumulated micro-batches, and the number of ranks.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def logprob_pass(self, policy: nn.Module, rollouts: Rollouts, **what: Any) -> Rollouts:
        size = {"rows": self.batch.micro_batch, "tokens": self.batch.micro_batch_tokens}
        return logprob_pass(policy, rollouts, self.sampler.temperature, **size, **what)

    def agreed(self, policy: nn.Module, rollouts: Rollouts) -> dict[str, float]:
        """What the sampling engine, where there is one, and the policy say of the same tokens; of some rows, if none are scored yet."""
        if not isinstance(self.sampler, WeightSyncedSampler) or rollouts.sampler_logprobs is None:
            return {}
        if rollouts.logprobs is None:
            rollouts = self.logprob_pass(
                policy, next(iter_micro_batches(rollouts, self.batch.micro_batch, self.batch.micro_batch_tokens))[1]
            )
        return agreement(rollouts)

    @property
    def logprobs_can_wait(self) -> bool:
        """Whether pi_old is the policy of the only training step on its rows, and nothing asks for its scores before."""
        parts = (self.shaper, *self.correction.values(), self.loss, *self.regularizer.values())
        return (
            self.batch.logprob_pass == "needed"
            and self.batch.minibatches * self.batch.epochs == 1
            and self.guide is None
            and not any(getattr(part, "needs_scores", True) for part in parts)
            and not has_dropout(self.policy)
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Without dropout, with all its weights, in the precision of training: pi_old is the policy that the ratios are taken with."""
        before = self.policy.training
        self.policy.eval()
        try:
            with (
                gather_full_parameters(self.trainer.strategy, self.policy) as policy,
                self.trainer.precision_plugin.forward_context(),
            ):
                yield policy
        finally:
            self.policy.train(before)

    def shaped(self, rollouts: Rollouts) -> Rollouts:
        """With advantages, corrected. The zero-reward batch is shaped by itself, or its rows would enter the others' statistics."""
        if rollouts.zero_reward is not None:
            main, extra = rollouts.rows(~rollouts.zero_reward), rollouts.rows(rollouts.zero_reward)
            return concatenate([self._shaped(main), self._shaped(extra)])
        return self._shaped(rollouts)

    def _shaped(self, rollouts: Rollouts) -> Rollouts:
        rollouts = replace(rollouts, advantages=self.shaper(rollouts))
        for correct in self.correction.values():
            rollouts = correct(rollouts)
        return rollouts

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the gradient's norm; a step whose gradient is 0 everywhere is left out, momentum and weight decay included."""
        norm = gradient_norm(self.trainer.strategy, self.policy)
        self.step_metrics.add("grad_norm", norm)
        if ops.all_max(norm) == 0:
            optimizer.zero_grad(set_to_none=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        policy = self.policy
        if isinstance(policy, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm != "value":
            policy.clip_grad_norm_(gradient_clip_val)  # each rank has a share of the gradient; Lightning refuses
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        assert self.collected is not None
        measured = self.step_metrics.over_ranks()
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        loss, _ = measured.pop("loss")  # of micro-batches and ranks, which add up to their step's
        means = {f"train/{name}": total / count for name, (total, count) in measured.items() if count}
        self.log_dict({**self.collected.metrics, "train/loss": loss / steps, **means}, batch_size=1)
        if isinstance(self.reference, MovingReference):
            self.reference.update(full_precision_policy(self.trainer.strategy, self.policy))

    def on_validation_epoch_start(self) -> None:
        self.validated = []
        with self.evaluating() as policy:
            sync(self.validation.sampler, policy)

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        settings = self.validation
        with self.evaluating() as policy:
            rollouts = settings.sampler(policy, batch, self.derived_seed(settings.seed, batch_idx))
        texts = texts_for_reward(rollouts, batch.problems, lambda rows: completion_texts(self.tokenizer, rows))
        rewards, _, outcomes = compute_rewards(settings.reward, texts)
        self.validation_metrics.update((outcomes > settings.threshold).view(len(batch), -1).to(self.device))
        rollouts = replace(rollouts, rewards=rewards.to(self.device))
        self.validated.append(RolloutBatch(rollouts=rollouts, texts=texts, metrics={}))

    def on_validation_epoch_end(self) -> None:
        found = self.validation_metrics.compute()
        self.log_dict(found, batch_size=1)
        self.validation_metrics.reset()
        sleep(self.validation.sampler)
        rows = torch.tensor(sum(len(batch.texts) for batch in self.validated), device=self.device)
        problems = int(ops.all_sum(rows)) // self.validation.sampler.completions_per_prompt
        accuracy = float(found[self.validation.objective])
        self.held_out = {"step": self.global_step, "problems": problems, "accuracy": accuracy}

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer, schedule = self.optimizing(weights)
        return optimizer if schedule is None else ([optimizer], [{"scheduler": schedule, "interval": "step"}])

    def optimizing(self, weights: list[nn.Parameter]) -> tuple[Any, Any | None]:
        return build_optimizer(self.optimizer, self.schedule, weights, int(self.trainer.estimated_stepping_batches))

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path and not self.own_checkpoint:
            apply_new_hyperparameters(self.trainer, *self.optimizing([nn.Parameter(torch.zeros(1))]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_sampled"] = self.tokens_sampled
        checkpoint["history"] = {"before": self.history["before"], "seconds": self.training_seconds()}
        checkpoint["held_out"] = self.held_out
        if isinstance(self.reference, MovingReference):
            checkpoint["reference"] = dict(self.reference.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_policy(checkpoint.get("state_dict", {}), self.state_dict())
        check_collections(checkpoint["epoch"] + 1, self.trainer.max_epochs)
        self.tokens_sampled = checkpoint["tokens_sampled"]
        self.history = checkpoint["history"]
        self.held_out = checkpoint.get("held_out", self.held_out) if self.own_checkpoint else self.held_out
        if isinstance(self.reference, MovingReference):
            if "reference" not in checkpoint:
                raise ValueError("resume: the checkpoint holds no moving reference; it was made with another reference")
            self.reference.load_state_dict(checkpoint["reference"])

    def training_seconds(self) -> float:
        return (self.history["seconds"] or 0.0) + time.perf_counter() - self.fit_started

    def derived_seed(self, *position: int) -> int:
        """A seed for this place in the run alone: a resumed run draws what an uninterrupted one would have drawn."""
        return int(SeedSequence([self.seed, self.global_rank, *position]).generate_state(1)[0])
