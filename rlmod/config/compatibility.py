"""Rules that span components, checked before any data or weights are loaded. Each says why."""

import warnings

from rlmod.config.build import Components
from rlmod.interfaces import MovingReference, WeightSyncedSampler
from rlmod.reference.base import Base


def check(parts: Components, ranks: int = 1, strategy: str | None = None) -> None:
    """ValueError for parts that cannot work together on so many ranks; a warning for those that work but not as one may think."""
    g = parts.rows_per_prompt
    if g == 1 and getattr(parts.shaper, "compares_within_group", False):
        raise ValueError(
            f"sampler.completions_per_prompt=1 with shaper {type(parts.shaper).__name__}: it compares the completions of a prompt "
            "with each other, so every advantage would be 0; give at least 2"
        )
    varying = [
        part for part in (parts.shaper, *parts.correction.values()) if getattr(part, "varies_over_tokens", False)
    ]
    if getattr(parts.loss, "needs_constant_advantage", False) and varying:
        raise ValueError(
            f"loss {type(parts.loss).__name__} with {type(varying[0]).__name__}: the loss has one ratio for a whole completion, "
            "so differences between the advantages of its tokens would weigh nothing but their mean; use loss=clipped_surrogate, "
            "shaper=sequence_entropy, or correction.truncated_importance.level=sequence"
        )
    if parts.policy.compile and strategy == "rlmod.strategy.fsdp.FSDP":
        raise ValueError(
            "policy.compile=true with strategy=fsdp: the compiler stumbles over its sharded weights; use strategy=fsdp2"
        )
    parts.batch.micro_batches(g, ranks, parts.zero_reward.rows(parts.batch.prompts // ranks, ranks, g))
    _check_guide(parts)
    _check_reference(parts)
    if cuts := _cuts(parts.sampler, "sampler"):
        warnings.warn(
            f"{cuts}: completions are drawn from a cut distribution, while log-probabilities, "
            "entropies and ratios are those of the whole one, so the gradient is biased towards tokens the cut favours; "
            "train with top_p=1 top_k=0 greedy=false",
            stacklevel=2,
        )


def _check_guide(parts: Components) -> None:
    if parts.zero_reward.active and parts.guide is None:
        raise ValueError(
            f"zero_reward.weight={parts.zero_reward.weight} without a guide: prompts on which the policy alone fails have nothing to "
            "learn from; give guide=policy or guide=demonstrations, or set zero_reward.weight=0"
        )
    if parts.zero_reward.active and not parts.filter.dynamic_sampling:
        raise ValueError(
            f"zero_reward.weight={parts.zero_reward.weight} with filter.dynamic_sampling=false: the zero-reward batch is made of the "
            "prompts that dynamic sampling drops; set filter.dynamic_sampling=true"
        )
    if parts.guide is None:
        return
    if isinstance(getattr(parts.guide, "sampler", None), WeightSyncedSampler):
        raise ValueError(
            "guide.sampler must be rlmod.sampler.hf.HF: an engine is given the weights of the policy, not those of the guide"
        )
    if parts.guide.completions_per_prompt == 0 and not parts.zero_reward.active:
        warnings.warn(
            "guide.completions_per_prompt=0 and zero_reward.weight=0: the guide is never asked for anything",
            stacklevel=3,
        )
    if getattr(parts.shaper, "pool", "union") == "own" and parts.sampler.completions_per_prompt == 1:
        raise ValueError(
            "shaper.pool=own with sampler.completions_per_prompt=1: one own completion has no spread to judge the guide's by; "
            "give at least 2, or shaper.pool=union"
        )
    if parts.filter.dynamic_sampling and parts.filter.over == "own" and parts.sampler.completions_per_prompt == 1:
        raise ValueError(
            "filter.over=own with sampler.completions_per_prompt=1: one own completion is all right or all wrong, so every group "
            "would be dropped; give at least 2, or filter.over=union"
        )
    cuts = _cuts(getattr(parts.guide, "sampler", None), "guide.sampler")
    if cuts and getattr(parts.guide, "ratio", "guide") == "guide":
        warnings.warn(
            f"{cuts} with guide.ratio=guide: the ratio divides by the guide's whole distribution, while its completions are drawn "
            "from a cut one, so their ratios are too large; set guide.sampler.top_p=1 top_k=0 greedy=false",
            stacklevel=3,
        )


def _cuts(sampler: object, key: str) -> str:
    """The settings by which completions are not drawn from the whole distribution."""
    whole = {"top_p": 1.0, "top_k": 0, "greedy": False}
    given = {name: getattr(sampler, name, value) for name, value in whole.items()}
    return ", ".join(f"{key}.{name}={value}" for name, value in given.items() if value != whole[name])


def _check_reference(parts: Components) -> None:
    for name, regularizer in parts.regularizer.items():
        if getattr(regularizer, "needs_reference", False) and parts.reference is None:
            raise ValueError(
                f"regularizer.{name} without a reference: there is nothing to stay close to; give reference=frozen, reference=ema, or, "
                "for a policy with an adapter, reference=base"
            )
    adapted = parts.policy.adapter is not None or parts.policy.is_adapter
    if isinstance(parts.reference, Base) and not adapted:
        raise ValueError(
            "reference=base without an adapter: there is no base under the policy; give adapter=lora, or reference=frozen"
        )
    if isinstance(parts.reference, MovingReference) and adapted:
        raise ValueError(
            "reference=ema with an adapter: only the adapter changes, and it has no place in the reference's weights; "
            "give reference=base"
        )
    if parts.reference is not None and not any(
        getattr(regularizer, "needs_reference", False) for regularizer in parts.regularizer.values()
    ):
        warnings.warn(
            "reference without a regularizer that uses it: every step pays for a forward pass in vain", stacklevel=3
        )
