"""One iteration of post-training, in the order of the data.

prompts -> sampler -> guide -> reward -> filter -> logprob pass -> reference
        -> shaper -> correction -> aggregation -> loss -> regularizer -> optimizer

collect        prompts to shaped rollouts      once per epoch, without gradients
training_step  a micro-batch to its loss       many times per epoch; the aggregation's weights span the optimizer step
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
import torch
from jaxtyping import Bool, Float
from numpy.random import SeedSequence
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedTokenizerBase

from rlmod import ops
from rlmod.aggregation.token_mean import TokenMean
from rlmod.config.sizes import Batch, Guard, Validation
from rlmod.contracts import (
    check_constant_per_completion,
    check_correction,
    check_loss_result,
    check_per_token,
    name_component_on_error,
)
from rlmod.distributed import is_rank_zero
from rlmod.filter.keep_all import KeepAll
from rlmod.interfaces import (
    LOSS_GRANULARITY,
    AdaptiveRegularizer,
    Aggregation,
    Correction,
    Filter,
    Guide,
    Loss,
    MovingReference,
    Optimizer,
    PromptGuide,
    Reference,
    Regularizer,
    Reward,
    Sampler,
    Schedule,
    Shaper,
    WeightSyncedSampler,
    component_name,
    declared,
    sleep,
    sync,
    unwrap,
)
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.model import noise
from rlmod.model.logprob_pass import iter_micro_batches, logprob_pass
from rlmod.model.logprobs import find_logit_transform, logprobs_and_entropy
from rlmod.model.policy import attach_tokenizer, completion_texts
from rlmod.reward._failures import agree_on_reward_errors
from rlmod.rollout.collect import RolloutBatch, Stages, collect
from rlmod.rollout.metrics import (
    RECOMPUTED,
    advantage_spread,
    check_agreement,
    mean_entropy,
    reduce_across_ranks,
    sampler_agreement,
    shapes_no_token,
)
from rlmod.rollout.validation import one_per_engine, sample_and_grade, validation_seed
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.shaper.uniform import Uniform
from rlmod.strategy._sharding import Sharding, full_precision_policy, gather_full_parameters, gradient_norm
from rlmod.training.checkpoint import check_iterations, check_same_policy
from rlmod.training.held_out import SetMetrics
from rlmod.training.optimizer import apply_new_hyperparameters, build_optimizer, check_learning_rate
from rlmod.training.step_metrics import StepMetrics
from rlmod.types import Prompts, Rollouts, concatenate, require

KEEP_ALL, UNIFORM, TOKEN_MEAN, CLIPPED_SURROGATE = KeepAll(), Uniform(), TokenMean(), ClippedSurrogate()
ADAMW = partial(torch.optim.AdamW, lr=1e-6)
FLAT_BATCHES = 3
"""Rollout batches in a row without a difference between tokens after which a warning says so."""
log = logging.getLogger(__name__)


class RLModule(L.LightningModule):
    """One iteration of post-training, composed of swappable components.

    With ``RLData`` and a plain ``lightning.Trainer`` it trains exactly what ``rlmod-train`` trains. Only the policy, its tokenizer, the
    sampler and the reward have no default.

    Shapes: R rows (one completion each), P prompt tokens, T completion tokens, as in ``Rollouts``.
    """

    def __init__(
        self,
        *,
        policy: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampler: Sampler,
        guide: Guide | PromptGuide | None = None,
        reward: Reward,
        filter: Filter = KEEP_ALL,
        zero_reward: ZeroReward | None = None,
        reference: Reference | None = None,
        shaper: Shaper = UNIFORM,
        correction: Mapping[str, Correction] | None = None,
        aggregation: Aggregation = TOKEN_MEAN,
        loss: Loss = CLIPPED_SURROGATE,
        regularizer: Mapping[str, Regularizer] | None = None,
        optimizer: Optimizer = ADAMW,
        schedule: Schedule | None = None,
        validation: Validation | None = None,
        benchmark: Mapping[str, Validation] | None = None,
        batch: Batch | None = None,
        threshold: float = 0.5,
        guard: Guard | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy, self.tokenizer = policy, tokenizer
        attach_tokenizer(policy, tokenizer)
        self.sampler, self.guide, self.reward, self.filter = sampler, guide, reward, filter
        self.zero_reward, self.reference = zero_reward or ZeroReward(), reference
        self.shaper, self.correction, self.aggregation = shaper, correction or {}, aggregation
        self.loss, self.regularizer = loss, regularizer or {}
        self.optimizer, self.schedule = optimizer, schedule
        self.validation = validation or Validation(sampler=sampler, reward=reward, threshold=threshold)
        self.batch, self.guard, self.threshold, self.seed = batch or Batch(), guard or Guard(), threshold, seed
        self.benchmark = {name: replace(each, benchmark=name) for name, each in (benchmark or {}).items()}
        self.set_metrics = nn.ModuleList(map(SetMetrics, (self.validation, *self.benchmark.values())))
        self.validation_sets: tuple[str, ...] = ("", *self.benchmark)
        """Names of the validation sets with problems, in the order of their loaders; "" is the held-out set. ``RLData`` sets it."""
        self._reset()

    def _reset(self) -> None:
        """Set the state that a run changes to that before the first iteration."""
        self.rollout_batch: RolloutBatch | None = None
        """The current iteration's rollout batch, with advantages, for callbacks to read."""
        self.validated: dict[str, list[RolloutBatch]] = {}
        """Samples of the current or last validation by the name of the set, one entry per batch, for callbacks to read."""
        self.held_out: dict[str, Any] = {
            "step": None,
            "problems": 0,
            "accuracy": None,
            "interval": None,
            "benchmarks": {},
        }
        """Result of the last validation, and the optimizer step after which it ran. ``benchmarks`` has problems and accuracy of each."""
        self.own_checkpoint = False
        """True if this run resumes from a checkpoint in its own folder, with the same settings, so that ``held_out`` is still valid."""
        self.tokens_sampled, self.skipped_in_a_row = 0, 0
        self.sampler_checked = False
        """True once the sampler's log-probabilities have been compared with those of a forward pass."""
        self.advantage_spread: dict[str, float] = {}
        """Spread of the current rollout batch's advantages, before the corrections."""
        self.flat_warned, self.flat_batches = False, 0
        self.step_micro_batches: list[tuple[Rollouts, Float[Tensor, ""]]] = []
        """The micro-batches of this optimizer step, with their losses."""
        self.suspects: list[Rollouts] = []
        """The micro-batches of the step that was not finite and stopped the run: those with such a loss, or all of them."""
        self.checkpoint_changes: dict[str, Any] | None = None
        """Entries of a checkpoint that replace the current state, after an iteration that failed."""
        self.step_metrics = StepMetrics()
        """Metrics of this iteration's training steps."""
        self.adaptive = {name: each for name, each in self.regularizer.items() if isinstance(each, AdaptiveRegularizer)}
        self.adaptive_metrics = {name: StepMetrics() for name in self.adaptive}
        """Metrics of the adaptive regularizers in the current optimizer step."""
        self.history: dict[str, Any] = {"before": None, "benchmarks": {}, "intervals": {}, "seconds": 0.0}
        """Accuracy before training on the held-out problems and on each benchmark, and seconds of training before the run was resumed."""
        self.fit_started = time.perf_counter()

    @property
    def completions_per_prompt(self) -> int:
        """Completions per prompt: on-policy ones and the guide's."""
        return self.sampler.completions_per_prompt + (self.guide.completions_per_prompt if self.guide else 0)

    @property
    def objective(self) -> str:
        """The metric that a sweep maximizes and best/ follows: of the held-out set or, without one, of the first benchmark."""
        return self._settings(self.validation_sets[0] if self.validation_sets else "").objective

    def _settings(self, name: str) -> Validation:
        return self.benchmark[name] if name else self.validation

    @property
    def every_row_trains(self) -> bool:
        """True if completions with advantage 0 have a gradient too."""
        return bool(self.regularizer) or not declared(self.loss, "proportional_to_advantage")

    @torch.no_grad()
    def collect(self, next_prompts: Callable[[int], Prompts], prompts: int) -> Rollouts:
        """Return ``prompts`` groups, sampled by the current policy, rewarded, filtered and shaped; behind them the zero-reward batch.

        The completions are on this rank. ``advantages`` [R T] are filled; ``logprobs`` [R T] may be None if ``logprobs_can_wait``.
        ``next_prompts(n)`` must return the next n prompts.

        RewardError if the reward fails. ValueError if the sampling engine disagrees with the policy, or if a component returns
        something that does not fit.
        """
        with self.evaluating() as policy:
            sync(self.sampler, policy)
            find_logit_transform(policy)
            stages = Stages(
                policy=policy,
                decode=self._decoder(self.reward, self.sampler),
                logprob_pass=lambda rows: self.logprob_pass(policy, rows),
                next_prompts=lambda n: next_prompts(n).to(self.device),
                sampler=self.sampler,
                guide=self.guide,
                reward=self.reward,
                filter=self.filter,
                zero_reward=self.zero_reward,
                threshold=self.threshold,
                rewards_train=bool(declared(self.shaper, "reads") & {"rewards", "outcomes", "terms"}),
                seed=lambda *position: self.derived_seed(self.current_epoch, *position),
            )
            max_guided_groups = self.zero_reward.max_groups(prompts, self.trainer.world_size, self.global_rank)
            with agree_on_reward_errors():
                batch = collect(stages, num_groups=prompts, max_guided_groups=max_guided_groups)
            sleep(self.sampler)
            rollouts = self.logprob_pass(
                policy, batch.rollouts, pi_old=not self.logprobs_can_wait, reference=self.reference
            )
            agreement = self.sampler_agreement(policy, rollouts)
            if batch.rollouts.logprobs is not None and not self.sampler_checked:
                agreement |= self._recompute_logprobs(policy, rollouts)
        rollouts = self.shape(rollouts)
        metrics = reduce_across_ranks({**mean_entropy(rollouts), **batch.metrics, **agreement, **self.advantage_spread})
        self._warn_if_flat()
        check_agreement(self.sampler, metrics)
        metrics.pop(RECOMPUTED, None)  # logged, it would tell a resumed run from one that was not
        self.sampler_checked = True
        self.rollout_batch = replace(batch, rollouts=rollouts, metrics=metrics)
        self.tokens_sampled += int(metrics["completions/tokens"] + metrics.get("guide/tokens", 0))
        return rollouts

    def _decoder(self, reward: Reward, sampler: Sampler) -> Callable[[Rollouts], list[str]]:
        skip, stop = bool(declared(reward, "skip_special_tokens")), getattr(sampler, "stop", ())
        return partial(completion_texts, self.tokenizer, skip_special_tokens=skip, stop=stop)

    def setup(self, stage: str) -> None:
        # Precision plugins would round a batch's advantages and log-probabilities, and they do not support a frozen record.
        vars(self.trainer.precision_plugin)["convert_input"] = lambda batch: batch

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, Sharding):
            self.policy = self.trainer.strategy.shard(self.policy)

    def training_step(self, batch: Rollouts, batch_idx: int) -> Float[Tensor, ""]:
        """Return the loss of a micro-batch: sum over [R T] of weights * (loss + regularizers), scaled for Lightning's averaging.

        The weights must be filled by the aggregation. An empty micro-batch has the loss 0.
        """
        # Every optimizer step has the same number of micro-batches. An empty one means that no rank has rows left for it.
        if not len(batch):
            return torch.zeros((), device=self.device, requires_grad=True)
        terms = (self.loss, *self.regularizer.values())
        entropy = any("policy_entropy" in declared(term, "reads") for term in terms)
        logprobs, policy_entropy = logprobs_and_entropy(self.policy, batch, self.sampler.temperature, entropy=entropy)
        # None: this is the first update on the rollout batch, so pi_old is the policy in training and the ratio is 1.
        old = logprobs.detach() if batch.logprobs is None else batch.logprobs
        batch = replace(batch, logprobs=old, policy_entropy=policy_entropy)
        with name_component_on_error("loss", self.loss):
            per_token, metrics = check_loss_result(self.loss(logprobs, batch), batch, "loss", self.loss)
        for name, regularizer in self.regularizer.items():
            stage = f"regularizer.{name}"
            with name_component_on_error(stage, regularizer):
                added, measured = check_loss_result(regularizer(logprobs, batch), batch, stage, regularizer)
            per_token = per_token + added
            metrics = {**metrics, **measured}
            if name in self.adaptive:
                self._add_metrics(self.adaptive_metrics[name], measured, batch.mask)
        loss = (per_token * require(batch.weights, "weights")).sum()
        self.step_micro_batches.append((replace(batch, policy_entropy=None), loss.detach()))
        self.step_metrics.add("loss", loss)
        self._add_metrics(self.step_metrics, metrics, batch.mask)
        # The weights span the optimizer step over all ranks. Lightning divides by the number of accumulated micro-batches, and DDP and
        # FSDP average over the ranks: both are undone here.
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def _add_metrics(self, to: StepMetrics, metrics: Mapping[str, Any], mask: Bool[Tensor, "R T"]) -> None:
        for name, value in metrics.items():
            values = value if isinstance(value, Tensor) else torch.tensor(float(value), device=self.device)
            to.add(name.removeprefix("train/"), values, mask)

    def logprob_pass(
        self, policy: nn.Module, rollouts: Rollouts, *, pi_old: bool = True, reference: Reference | None = None
    ) -> Rollouts:
        """Fill pi_old's log-probabilities and entropy [R T], in nats, if they are missing, and the reference's log-probabilities.

        With ``pi_old=False`` only the reference's are computed.
        """
        rows, tokens, temperature = self.batch.micro_batch, self.batch.micro_batch_tokens, self.sampler.temperature
        return logprob_pass(policy, rollouts, temperature, rows=rows, tokens=tokens, pi_old=pi_old, reference=reference)

    def sampler_agreement(self, policy: nn.Module, rollouts: Rollouts) -> dict[str, float]:
        """Compare the sampling engine's log-probabilities with the policy's: differences in nats, and ratios.

        Empty without an engine. If the policy's are not computed yet, the comparison covers one micro-batch.
        """
        if not isinstance(self.sampler, WeightSyncedSampler) or rollouts.sampler_logprobs is None:
            return {}
        if rollouts.logprobs is None:
            micro_batches = iter_micro_batches(rollouts, self.batch.micro_batch, self.batch.micro_batch_tokens)
            rollouts = self.logprob_pass(policy, next(micro_batches)[1])
        return sampler_agreement(rollouts)

    def _recompute_logprobs(self, policy: nn.Module, rollouts: Rollouts) -> dict[str, float]:
        """Compare the log-probabilities of a sampler that computes pi_old's with those of a forward pass, on one micro-batch."""
        _, rows = next(iter_micro_batches(rollouts, self.batch.micro_batch, self.batch.micro_batch_tokens))
        again = self.logprob_pass(policy, replace(rows, logprobs=None, entropy=None))
        measured = sampler_agreement(replace(again, sampler_logprobs=rows.logprobs))
        return {RECOMPUTED: measured["sampler/difference"]} if measured else {}

    @property
    def logprobs_can_wait(self) -> bool:
        """True if the training step itself yields pi_old's log-probabilities, and no component reads them or the entropy before.

        This requires one optimizer step per rollout batch, because pi_old is then the policy in training.
        """
        before = (self.shaper, *self.correction.values(), self.aggregation)
        during = (self.loss, *self.regularizer.values())
        return (
            self.batch.logprob_pass == "needed"
            and self.batch.minibatches * self.batch.epochs == 1
            and self.guide is None
            and not any(declared(component, "reads") & {"logprobs", "entropy"} for component in before)
            and not any("entropy" in declared(component, "reads") for component in during)
            and not noise.rates(self.policy)
        )

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Yield the policy without dropout, with its full parameters, in the precision of training.

        The ratios compare the policy in training with pi_old, so both must be computed in the same way.
        """
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

    def shape(self, rollouts: Rollouts) -> Rollouts:
        """Fill the advantages [R T] and apply the corrections, separately for each sub-batch, so that statistics do not mix.

        ValueError if advantages vary over the tokens of a completion and the loss takes one per completion.
        """
        sub_batches = range(len(self.zero_reward.sub_batch_weights))
        whole = rollouts.sub_batch is None
        parts = [rollouts] if whole else [rollouts.rows(rollouts.sub_batch == index) for index in sub_batches]
        shaped = [self._shape(part) for part in parts]
        self.advantage_spread = advantage_spread(shaped)
        corrected = [self._correct(part) for part in shaped]
        return corrected[0] if whole else concatenate(corrected)

    def _shape(self, rollouts: Rollouts) -> Rollouts:
        with name_component_on_error("shaper", self.shaper):
            advantages = check_per_token(self.shaper(rollouts), rollouts, "shaper", self.shaper)
        return replace(rollouts, advantages=advantages)

    def _warn_if_flat(self) -> None:
        """Say once that the token-level shaper has done nothing on several rollout batches."""
        flat = shapes_no_token(self.shaper, self.advantage_spread)
        self.flat_batches = self.flat_batches + 1 if flat else 0
        if self.flat_warned or self.flat_batches < FLAT_BATCHES:
            return
        self.flat_warned = True
        if is_rank_zero():
            clipped = getattr(self.shaper, "entropy_clip", None) is not None
            log.warning(
                "the shaper %s gave every completion of %d rollout batches in a row one advantage for all of its tokens "
                "(shaper/spread_within is about 0), so it works like a sequence-level one: %sentropies may be equal at each position, or "
                "each completion is the only one of its class, as in groups that are nearly all correct",
                component_name(self.shaper),
                FLAT_BATCHES,
                "all entropies of a class may be on one bound (shaper.entropy_clip=null has none), or "
                if clipped
                else "",
            )

    def _correct(self, rollouts: Rollouts) -> Rollouts:
        for name, correct in self.correction.items():
            with name_component_on_error(f"correction.{name}", correct):
                rollouts = check_correction(correct(rollouts), correct, f"correction.{name}")
        if getattr(unwrap(self.loss), "granularity", LOSS_GRANULARITY) == "sequence":
            check_constant_per_completion(rollouts, self.shaper, self.correction, self.loss)
        return rollouts

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm. Skip a step whose gradient is 0 on all ranks, or not finite on any, momentum and weight decay included.

        ValueError after ``guard.max_skipped`` steps in a row that were not finite: the weights are those of the last good step.
        """
        norm = gradient_norm(self.trainer.strategy, self.policy)
        self.step_metrics.add("grad_norm", norm)
        # One exchange tells all ranks the same: the maximum of a NaN would depend on the order of the ranks.
        finite = norm.isfinite()
        not_finite, largest = ops.all_max(
            torch.stack([(~finite).to(norm.dtype), torch.where(finite, norm, 1)])
        ).tolist()
        self.step_metrics.add("skipped_steps", torch.tensor(not_finite, device=self.device))
        self._adapt(step_counts=not not_finite)
        if not_finite or largest == 0:
            optimizer.zero_grad(set_to_none=True)
        # In float16 the first steps may overflow until the loss scale has halved often enough; that is no fault of the run.
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scaling_down = scaler is not None and scaler.get_scale() > 1
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if not_finite and not scaling_down else 0
        if not_finite:
            step, sums = self.trainer.global_step + 1, self.step_metrics.sums
            loss = "the loss is finite" if bool(sums["loss"].isfinite().all()) else "the loss is not finite either"
            if self.global_rank == 0:
                log.warning(
                    "step %d is skipped: the norm of its gradient is not finite (%s); %s", step, norm.item(), loss
                )
            if self.skipped_in_a_row >= self.guard.max_skipped:
                rows = self.step_micro_batches
                self.suspects = [each for each, loss in rows if not loss.isfinite()] or [each for each, _ in rows]
                raise ValueError(
                    f"step {step}: the gradient was not finite in {self.skipped_in_a_row} steps in a row (guard.max_skipped); the weights "
                    "are those of the last good step. Lower the learning rate, or look for a reward or a loss that is not finite"
                )

        self.step_micro_batches.clear()

    def _adapt(self, *, step_counts: bool) -> None:
        """Tell the adaptive regularizers the means of their metrics over this optimizer step, if the step counts."""
        for name, regularizer in self.adaptive.items():
            totals = self.adaptive_metrics[name].reduce_and_reset()
            means = {key: total / count for key, (total, count) in totals.items() if count}
            if step_counts and means:  # none: no token of the step counts
                regularizer.after_step(means)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        policy = self.policy
        if all(p.grad is None for p in policy.parameters()):
            return  # the step was skipped, and PyTorch does not clip the values of an empty list
        if isinstance(policy, FullyShardedDataParallel) and gradient_clip_val and gradient_clip_algorithm != "value":
            # Each rank has a shard of the gradient, which Lightning does not support.
            policy.clip_grad_norm_(gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_epoch_end(self) -> None:
        assert self.rollout_batch is not None
        totals = self.step_metrics.reduce_and_reset()
        steps = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        loss, _ = totals.pop("loss")  # summed over all optimizer steps, micro-batches and ranks
        skipped = totals.pop("skipped_steps")[0] / self.trainer.world_size
        means = {f"train/{name}": total / count for name, (total, count) in totals.items() if count}
        self.log_dict(
            {**self.rollout_batch.metrics, "train/loss": loss / steps, "train/skipped_steps": skipped, **means},
            batch_size=1,
        )
        if isinstance(self.reference, MovingReference):
            self.reference.update(full_precision_policy(self.trainer.strategy, self.policy))

    def on_validation_epoch_start(self) -> None:
        self.validated = {name: [] for name in self.validation_sets}
        with self.evaluating() as policy:
            for sampler in self._validation_engines():
                sync(sampler, policy)

    def _validation_engines(self) -> list[Sampler]:
        return one_per_engine(self._settings(name).sampler for name in self.validation_sets)

    def metrics_of(self, name: str) -> SetMetrics:
        """Return the metrics of a validation set; "" is the held-out one."""
        metrics = self.set_metrics[["", *self.benchmark].index(name)]
        assert isinstance(metrics, SetMetrics)
        return metrics

    def validation_step(self, batch: Prompts, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = self.validation_sets[dataloader_idx]
        settings = self._settings(name)
        with self.evaluating() as policy:
            graded = sample_and_grade(
                policy,
                batch,
                settings,
                decode=self._decoder(settings.reward, settings.sampler),
                seed=validation_seed(self.seed, settings.seed, batch_idx, rank=self.global_rank),
            )
        self.metrics_of(name).update(graded, padding=batch.padding)
        if not batch.padding:
            samples = RolloutBatch(rollouts=graded.rollouts, texts=graded.texts, metrics={})
            self.validated.setdefault(name, []).append(samples)

    def on_validation_epoch_end(self) -> None:
        for sampler in self._validation_engines():
            sleep(sampler)
        results: dict[str, dict[str, Any]] = {}
        for name in self.validation_sets:
            metrics = self.metrics_of(name)
            computed = metrics.compute()
            self.log_dict(computed, batch_size=1)
            problems = int(ops.all_sum(torch.tensor(metrics.problems, device=self.device)))
            results[name] = {
                "problems": problems,
                "accuracy": float(computed[self._settings(name).objective]),
                "interval": metrics.compute_interval(),
            }
            metrics.reset()
        benchmarks = {name: result for name, result in results.items() if name}
        self.held_out = {"step": self.global_step, **results[self.validation_sets[0]], "benchmarks": benchmarks}

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer, schedule = self._build_optimizer(weights)
        if not self.guard.large_lr:
            check_learning_rate(optimizer, self.policy)
        return optimizer if schedule is None else ([optimizer], [{"scheduler": schedule, "interval": "step"}])

    def _build_optimizer(self, weights: list[nn.Parameter]) -> tuple[Any, Any | None]:
        return build_optimizer(self.optimizer, self.schedule, weights, int(self.trainer.estimated_stepping_batches))

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path and not self.own_checkpoint:
            apply_new_hyperparameters(self.trainer, *self._build_optimizer([nn.Parameter(torch.zeros(1))]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens_sampled"] = self.tokens_sampled
        checkpoint["history"] = {**self.history, "seconds": self.training_seconds()}
        checkpoint["held_out"] = self.held_out
        batches = self.trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["iteration_complete"] = batches.is_last_batch or batches.current.ready == 0
        checkpoint |= self.checkpoint_changes or {}
        if isinstance(self.reference, MovingReference):
            checkpoint["reference"] = dict(self.reference.state_dict())
        if self.adaptive:
            checkpoint["regularizer"] = {name: dict(each.state_dict()) for name, each in self.adaptive.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_policy(checkpoint.get("state_dict", {}), self.state_dict())
        check_iterations(checkpoint["epoch"] + 1, self.trainer.max_epochs)
        if not checkpoint.get("iteration_complete", True):
            raise ValueError(
                f"resume: the checkpoint of step {checkpoint['global_step']} is from the middle of an iteration, without its rollout "
                "batch; resume from one that was written at the end of an iteration. ModelCheckpoint writes those with every_n_epochs, "
                "without every_n_train_steps"
            )
        self.tokens_sampled = checkpoint["tokens_sampled"]
        self.history = {"benchmarks": {}, "intervals": {}, **checkpoint["history"]}
        self.held_out = {**self.held_out, **checkpoint.get("held_out", {})} if self.own_checkpoint else self.held_out
        if isinstance(self.reference, MovingReference):
            if "reference" not in checkpoint:
                raise ValueError(
                    "resume: the checkpoint holds no moving reference; use the reference of the run that wrote it"
                )
            self.reference.load_state_dict(checkpoint["reference"])
        for name, regularizer in self.adaptive.items():
            if name not in checkpoint.get("regularizer", {}):
                raise ValueError(
                    f"resume: the checkpoint holds no state of regularizer.{name}; use the regularizers of the run that wrote it"
                )
            regularizer.load_state_dict(checkpoint["regularizer"][name])

    def training_seconds(self) -> float:
        """Return the seconds of training so far, including those before the run was resumed."""
        return (self.history["seconds"] or 0.0) + time.perf_counter() - self.fit_started

    def derived_seed(self, *position: int) -> int:
        """Return the seed of this position in the run on this rank, so that a resumed run samples the same completions."""
        return int(SeedSequence([self.seed, self.global_rank, *position]).generate_state(1)[0])
