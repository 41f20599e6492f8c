"""Rules that involve several components, checked before data and weights are loaded. Each message says why."""

import warnings
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from rlmod.config.build import Components
from rlmod.config.sizes import Batch, Validation
from rlmod.correction.kl_cov import KLCov
from rlmod.filter.keep_all import KeepAll
from rlmod.interfaces import (
    LOSS_GRANULARITY,
    Aggregation,
    Correction,
    Filter,
    Guide,
    Loss,
    MovingReference,
    PromptGuide,
    Reference,
    Regularizer,
    Reward,
    Sampler,
    Shaper,
    WeightSyncedSampler,
    check_declarations,
    component_name,
    declared,
    unwrap,
)
from rlmod.reference.base import Base
from rlmod.regularizer.kl_cov import KLCov as KLCovPenalty
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.shaper.zero import Zero


@runtime_checkable
class Algorithm(Protocol):
    """The components and sizes of a run, as ``Components`` and ``RLModule`` hold them."""

    @property
    def sampler(self) -> Sampler: ...
    @property
    def guide(self) -> Guide | PromptGuide | None: ...
    @property
    def reward(self) -> Reward: ...
    @property
    def filter(self) -> Filter: ...
    @property
    def zero_reward(self) -> ZeroReward: ...
    @property
    def reference(self) -> Reference | None: ...
    @property
    def shaper(self) -> Shaper: ...
    @property
    def correction(self) -> Mapping[str, Correction]: ...
    @property
    def aggregation(self) -> Aggregation: ...
    @property
    def loss(self) -> Loss: ...
    @property
    def regularizer(self) -> Mapping[str, Regularizer]: ...
    @property
    def batch(self) -> Batch: ...
    @property
    def validation(self) -> Validation: ...
    @property
    def benchmark(self) -> Mapping[str, Validation]: ...
    @property
    def completions_per_prompt(self) -> int: ...


def check(algorithm: Algorithm, ranks: int = 1) -> None:
    """Raise ValueError if the components cannot work together on this number of ranks. Warn of settings that may not do what you expect."""
    for key, component in _stages(algorithm).items():
        check_declarations(component, key)
    g, shaper, loss = algorithm.completions_per_prompt, algorithm.shaper, algorithm.loss
    if g < (least := declared(shaper, "min_group_size")):
        raise ValueError(
            f"sampler.completions_per_prompt={g} with shaper {component_name(shaper)}: the shaper compares the completions of a prompt "
            f"with each other, so every advantage would be 0; give at least {least}"
        )
    token_level = [c for c in (shaper, *algorithm.correction.values()) if declared(c, "granularity") == "token"]
    if getattr(unwrap(loss), "granularity", LOSS_GRANULARITY) == "sequence" and token_level:
        raise ValueError(
            f"loss {component_name(loss)} with {component_name(token_level[0])}: the loss has one ratio per completion, so only the "
            "mean of its tokens' advantages would count; use loss=clipped_surrogate, shaper=sequence_entropy, or "
            "correction.truncated_importance.level=sequence"
        )
    _check_penalties(algorithm)
    if isinstance(algorithm.shaper, Zero) and not algorithm.correction and not algorithm.regularizer:
        raise ValueError(
            "shaper=zero without a correction or a regularizer: no step would have a gradient; give correction=[distillation] with "
            "reference=teacher, or another shaper"
        )
    _check_corrected_once(algorithm)
    extra = algorithm.zero_reward.max_rows(algorithm.batch.prompts // ranks, ranks, g)
    algorithm.batch.micro_batches(g, ranks, extra)
    _check_filter(algorithm.filter)
    _check_guide(algorithm)
    _check_reference(algorithm)
    _check_corrections(algorithm)
    _check_kl_cov(algorithm)
    if not declared(algorithm.reward, "counts_for_correctness"):
        warnings.warn(
            f"the only reward, {component_name(algorithm.reward)}, does not tell correct from incorrect completions "
            "(counts_for_correctness=False), so accuracies mean nothing; combine it with one that does: reward=weighted",
            stacklevel=2,
        )
    if truncation := _truncation_settings(algorithm.sampler, "sampler"):
        warnings.warn(
            f"{truncation}: completions are sampled from a truncated distribution, while log-probabilities, entropies and ratios are those "
            "of the full one, so the gradient is biased towards tokens that truncation favours; train with top_p=1 top_k=0 greedy=false",
            stacklevel=2,
        )


def check_policy(components: Components, strategy: str | None) -> None:
    """Raise ValueError if the policy's settings do not fit the strategy, whose import path this is, or the reference."""
    policy, reference = components.policy, components.reference
    if policy.compile and strategy == "rlmod.strategy.fsdp.FSDP":
        raise ValueError(
            "policy.compile=true with strategy=fsdp: the compiler cannot handle its sharded weights; use strategy=fsdp2"
        )
    adapted = policy.adapter is not None or policy.is_adapter
    if isinstance(reference, Base) and not adapted:
        raise ValueError(
            "reference=base without an adapter: the policy has no separate base model; give adapter=lora, or reference=frozen"
        )
    if isinstance(reference, MovingReference) and adapted:
        raise ValueError(
            "reference=ema with an adapter: only the adapter is trained, and the reference has no adapter to average it into; "
            "give reference=base"
        )


def _stages(algorithm: Algorithm) -> dict[str, object]:
    """Return the components that have declarations, by config key."""
    names = ("reward", "filter", "shaper", "aggregation", "loss")
    stages: dict[str, object] = {name: getattr(algorithm, name) for name in names}
    stages |= {f"correction.{name}": component for name, component in algorithm.correction.items()}
    return stages | {f"regularizer.{name}": component for name, component in algorithm.regularizer.items()}


def _check_penalties(algorithm: Algorithm) -> None:
    penalties = tuple(getattr(unwrap(algorithm.reward), "excluded_terms", ()))
    if penalties and not declared(algorithm.shaper, "accepts_penalties"):
        name = component_name(algorithm.shaper)
        raise ValueError(
            f"shaper {name} with a reward that holds a penalty ({', '.join(penalties)}): {name} divides by the success rate, which a "
            "penalty is not part of; give reward=exact_match or reward=math_verify, or another shaper"
        )


def _check_corrected_once(algorithm: Algorithm) -> None:
    """Raise ValueError if the loss and a correction both compare with the sampler's probabilities, as their ``reads`` say."""
    loss = algorithm.loss
    readers = [
        (key, component)
        for key, component in (("loss", loss), *algorithm.correction.items())
        # A component without `reads` counts as reading everything, which says nothing here.
        if "reads" in dir(unwrap(component)) and "sampler_logprobs" in declared(component, "reads")
    ]
    if len(readers) > 1 and readers[0][0] == "loss":
        hint = ", or set loss.anchor=pi_old" if hasattr(unwrap(loss), "anchor") else ""
        raise ValueError(
            f"loss {component_name(loss)} with correction.{readers[1][0]}: both read sampler_logprobs, so the difference between the "
            f"sampler and the trainer would be corrected twice; remove the correction{hint}"
        )


AFTER_FILTER = frozenset({"logprobs", "entropy", "reference_logprobs", "advantages", "weights", "policy_entropy"})
"""The fields of Rollouts that are filled after the filter."""


def _check_filter(keep: Filter) -> None:
    if "reads" in dir(unwrap(keep)) and (later := sorted(AFTER_FILTER & set(declared(keep, "reads")))):
        raise ValueError(
            f"filter: {component_name(keep)}.reads names {later[0]!r}, which is computed only after the filter, for groups that it keeps"
        )


def _check_guide(algorithm: Algorithm) -> None:
    guide, zero_reward, keep, g = (
        algorithm.guide,
        algorithm.zero_reward,
        algorithm.filter,
        algorithm.sampler.completions_per_prompt,
    )
    if zero_reward.active and guide is None:
        raise ValueError(
            f"zero_reward.weight={zero_reward.weight} without a guide: prompts on which the policy always fails have no correct completion "
            "to learn from; give guide=policy or guide=demonstrations, or set zero_reward.weight=0"
        )
    if zero_reward.active and isinstance(keep, KeepAll):
        raise ValueError(
            f"zero_reward.weight={zero_reward.weight} with filter=keep_all: the zero-reward batch consists of prompts that the filter "
            "drops; set filter=dynamic_sampling"
        )
    if guide is None:
        return
    if isinstance(guide, PromptGuide) and zero_reward.keep_if_guide_fails:
        raise ValueError(
            f"zero_reward.keep_if_guide_fails=true with guide {component_name(guide)}: a guided prompt without a correct completion has no "
            "advantage; set zero_reward.keep_if_guide_fails=false"
        )
    if isinstance(getattr(guide, "sampler", None), WeightSyncedSampler):
        raise ValueError(
            f"guide.sampler must be rlmod.sampler.hf.HF, got {type(getattr(guide, 'sampler', None)).__name__}: an engine samples with the "
            "policy's weights, not with the guide's"
        )
    if guide.completions_per_prompt == 0 and not zero_reward.active:
        warnings.warn("guide.completions_per_prompt=0 and zero_reward.weight=0: the guide is unused", stacklevel=3)
    if getattr(algorithm.shaper, "pool", "union") == "own" and g == 1:
        raise ValueError(
            "shaper.pool=own with sampler.completions_per_prompt=1: one on-policy completion has no std to standardize the guide's rewards "
            "with; give at least 2, or shaper.pool=union"
        )
    if getattr(keep, "over", "union") == "own" and g == 1:
        raise ValueError(
            "filter.over=own with sampler.completions_per_prompt=1: one on-policy completion is all correct or all incorrect, so every "
            "group would be dropped; give at least 2, or filter.over=union"
        )
    truncation = _truncation_settings(getattr(guide, "sampler", None), "guide.sampler")
    if truncation and getattr(guide, "ratio", "guide") == "guide":
        warnings.warn(
            f"{truncation} with guide.ratio=guide: the ratio divides by the guide's full distribution, while its completions are sampled "
            "from a truncated one, so their ratios are too large; set guide.sampler.top_p=1 top_k=0 greedy=false",
            stacklevel=3,
        )


def _truncation_settings(sampler: object, key: str) -> str:
    """Return the settings that truncate the sampling distribution, as ``key.top_p=0.9``; empty if there are none."""
    full = {"top_p": 1.0, "top_k": 0, "greedy": False}
    settings = {name: getattr(sampler, name, value) for name, value in full.items()}
    return ", ".join(f"{key}.{name}={value}" for name, value in settings.items() if value != full[name])


def _check_reference(algorithm: Algorithm) -> None:
    stages = _stages(algorithm)
    declares = [key for key, component in stages.items() if "reads" in dir(unwrap(component))]
    readers = [
        key
        for key in stages
        if "reference_logprobs" in declared(stages[key], "reads") and key not in ("reward", "filter")
    ]
    for key in readers:
        if key in declares and algorithm.reference is None:
            raise ValueError(
                f"{key} reads reference_logprobs, and there is no reference: give reference=frozen, reference=ema or, with an adapter, "
                "reference=base"
            )
    if algorithm.reference is not None and not readers:
        warnings.warn(
            "reference is unused: no component reads reference_logprobs, and every iteration pays for its forward pass; "
            "set reference=none",
            stacklevel=3,
        )


def _check_kl_cov(algorithm: Algorithm) -> None:
    """Raise ValueError if only one half of KL-Cov is there."""
    selects = [key for key, component in algorithm.correction.items() if isinstance(component, KLCov)]
    penalizes = [key for key, component in algorithm.regularizer.items() if isinstance(component, KLCovPenalty)]
    if penalizes and not selects:
        raise ValueError(
            f"regularizer.{penalizes[0]} penalizes tokens that no correction selects: give correction=[kl_cov] too"
        )
    if selects and not penalizes:
        raise ValueError(
            f"correction.{selects[0]} selects tokens that no regularizer penalizes: give regularizer=[kl_cov] too"
        )


def _check_corrections(algorithm: Algorithm) -> None:
    importance = [
        key
        for key, component in algorithm.correction.items()
        if "reads" in dir(unwrap(component)) and "sampler_logprobs" in declared(component, "reads")
    ]
    if len(importance) > 1:
        raise ValueError(
            f"correction=[{','.join(importance)}]: each of them reads sampler_logprobs, so the difference between the sampler and the "
            "trainer would be corrected twice; give one of them"
        )
