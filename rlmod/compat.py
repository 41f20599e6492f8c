"""Rules that span components, checked before any data or weights are loaded. Each says why."""

import warnings

from rlmod.parts import Parts


def check(parts: Parts) -> None:
    """ValueError for parts that cannot work together; a warning for those that work but not as one may think."""
    g = parts.sampler.completions_per_prompt
    if g == 1 and parts.guide is None and getattr(parts.shaper, "compares_within_group", False):
        raise ValueError(
            f"sampler.completions_per_prompt=1 with shaper {type(parts.shaper).__name__}: it compares the completions of a prompt "
            "with each other, so every advantage would be 0; give at least 2"
        )
    if getattr(parts.loss, "needs_constant_advantage", False) and getattr(parts.shaper, "varies_over_tokens", False):
        raise ValueError(
            f"loss {type(parts.loss).__name__} with shaper {type(parts.shaper).__name__}: the loss has one ratio for a whole completion, "
            "so the shaper's differences between its tokens would weigh nothing but their mean; use loss=clipped_surrogate, or "
            "shaper=sequence_entropy"
        )
    parts.batch.micro_batches(g)
    top_p, top_k = getattr(parts.sampler, "top_p", 1.0), getattr(parts.sampler, "top_k", 0)
    if top_p < 1 or top_k > 0:
        warnings.warn(
            f"sampler.top_p={top_p}, sampler.top_k={top_k}: completions are drawn from a cut distribution, while log-probabilities, "
            "entropies and ratios are those of the whole one, so the gradient is biased towards tokens the cut favours; "
            "train with top_p=1 top_k=0",
            stacklevel=2,
        )
