"""Rules that involve several components, checked before data and weights are loaded. Each message says why."""

import warnings

from rlmod.config.build import Components
from rlmod.filter.keep_all import KeepAll
from rlmod.interfaces import LOSS_GRANULARITY, MovingReference, WeightSyncedSampler, declared, unwrap
from rlmod.reference.base import Base


def check(components: Components, ranks: int = 1, strategy: str | None = None) -> None:
    """Raise ValueError if the components cannot work together on this number of ranks. Warn of settings that may not do what you expect."""
    g, shaper, loss = components.rows_per_prompt, components.shaper, components.loss
    if g < (least := declared(shaper, "min_group_size")):
        raise ValueError(
            f"sampler.completions_per_prompt={g} with shaper {_name(shaper)}: the shaper compares the completions of a prompt with each "
            f"other, so every advantage would be 0; give at least {least}"
        )
    token_level = [c for c in (shaper, *components.correction.values()) if declared(c, "granularity") == "token"]
    if getattr(unwrap(loss), "granularity", LOSS_GRANULARITY) == "sequence" and token_level:
        raise ValueError(
            f"loss {_name(loss)} with {_name(token_level[0])}: the loss has one ratio per completion, so only the mean of its tokens' "
            "advantages would count; use loss=clipped_surrogate, shaper=sequence_entropy, or correction.truncated_importance.level=sequence"
        )
    if components.policy.compile and strategy == "rlmod.strategy.fsdp.FSDP":
        raise ValueError(
            "policy.compile=true with strategy=fsdp: the compiler cannot handle its sharded weights; use strategy=fsdp2"
        )
    extra = components.zero_reward.max_rows(components.batch.prompts // ranks, ranks, g)
    components.batch.micro_batches(g, ranks, extra)
    _check_guide(components)
    _check_reference(components)
    if truncation := _truncation_settings(components.sampler, "sampler"):
        warnings.warn(
            f"{truncation}: completions are sampled from a truncated distribution, while log-probabilities, entropies and ratios are those "
            "of the full one, so the gradient is biased towards tokens that truncation favours; train with top_p=1 top_k=0 greedy=false",
            stacklevel=2,
        )


def _name(component: object) -> str:
    target = unwrap(component)
    return getattr(target, "__name__", type(target).__name__)


def _check_guide(components: Components) -> None:
    guide, zero_reward, keep, g = (
        components.guide,
        components.zero_reward,
        components.filter,
        components.sampler.completions_per_prompt,
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
    if isinstance(getattr(guide, "sampler", None), WeightSyncedSampler):
        raise ValueError(
            f"guide.sampler must be rlmod.sampler.hf.HF, got {type(getattr(guide, 'sampler', None)).__name__}: an engine samples with the "
            "policy's weights, not with the guide's"
        )
    if guide.completions_per_prompt == 0 and not zero_reward.active:
        warnings.warn("guide.completions_per_prompt=0 and zero_reward.weight=0: the guide is unused", stacklevel=3)
    if getattr(components.shaper, "pool", "union") == "own" and g == 1:
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


def _check_reference(components: Components) -> None:
    stages = {"shaper": components.shaper, "aggregation": components.aggregation, "loss": components.loss}
    stages |= {f"correction.{name}": component for name, component in components.correction.items()}
    stages |= {f"regularizer.{name}": component for name, component in components.regularizer.items()}
    declares = [key for key, component in stages.items() if "reads" in dir(unwrap(component))]
    readers = [key for key in stages if "reference_logprobs" in declared(stages[key], "reads")]
    for key in readers:
        if key in declares and components.reference is None:
            raise ValueError(
                f"{key} reads reference_logprobs, and there is no reference: give reference=frozen, reference=ema or, with an adapter, "
                "reference=base"
            )
    adapted = components.policy.adapter is not None or components.policy.is_adapter
    if isinstance(components.reference, Base) and not adapted:
        raise ValueError(
            "reference=base without an adapter: the policy has no separate base model; give adapter=lora, or reference=frozen"
        )
    if isinstance(components.reference, MovingReference) and adapted:
        raise ValueError(
            "reference=ema with an adapter: only the adapter is trained, and the reference has no adapter to average it into; "
            "give reference=base"
        )
    if components.reference is not None and not readers:
        warnings.warn(
            "reference is unused: no component reads reference_logprobs, and every iteration pays for its forward pass; "
            "set reference=none",
            stacklevel=3,
        )
