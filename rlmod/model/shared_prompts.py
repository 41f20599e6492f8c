"""Forward pass of a policy over rollouts that computes the prompt shared by a group's rows only once.

rows of a micro-batch            each prompt once           each row's completion
[q1 o11] [q1 o12] [q2 o21]  ->   [q1] [q2]  -> keys,   ->   [o11] [o12] [o21], attending to the keys and values
                                               values       of their prompt, which are copied to each row
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlmod.model import noise
from rlmod.types import Rollouts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIN_SHARE_SAVED = 0.2
"""The share of a micro-batch's tokens that sharing must save. Below it, the second forward pass costs more than it saves."""


def logits(policy: nn.Module, rollouts: Rollouts) -> Float[Tensor, "R places V"]:
    """Return the logits at the last prompt token and at every completion token. Sharing the prompt does not change them.

    Completions need no attention mask: they are padded on the right, and no counted token attends to what follows it.

    Source: Prefix Grouper, arXiv:2506.05433, sec. 3.
    Differs: uses the key-value cache, with gradients; every model of transformers with full attention has one.
    """
    prompts, mask, completions = rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completion_ids
    assert prompts is not None and mask is not None and completions is not None
    attention = torch.cat([mask, torch.ones_like(completions, dtype=torch.bool)], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache, cached = None, 0
    if (shared := find_shared_prompts(policy, rollouts)) is not None:
        from transformers import DynamicCache

        first, prompt_of_row = shared
        cached = prompts.shape[1] - 1  # the last prompt token goes with each completion: it predicts the first token
        cache = DynamicCache(config=cast("PreTrainedModel", policy).config)
        with uncompiled(policy):
            policy(
                input_ids=prompts[first, :cached],
                attention_mask=attention[first, :cached].long(),
                position_ids=positions[first, :cached],
                past_key_values=cache,
                logits_to_keep=1,
                use_cache=True,
            )
        cache.batch_select_indices(prompt_of_row)
    with nullcontext() if cache is None else uncompiled(policy):
        return policy(
            input_ids=torch.cat([prompts, completions], 1)[:, cached:],
            attention_mask=attention.long(),
            position_ids=positions[:, cached:],
            past_key_values=cache,
            logits_to_keep=completions.shape[1] + 1,
            use_cache=cache is not None,
        ).logits


def find_shared_prompts(policy: nn.Module, rollouts: Rollouts) -> tuple[Int[Tensor, " n"], Int[Tensor, " R"]] | None:
    """Return the first row of each prompt, and for each row the index of its prompt. None if sharing saves too little or is not exact."""
    if not can_share(policy):
        return None
    rows, width = rollouts.prompt_ids.shape
    groups, prompt_of_row = rollouts.group.unique(return_inverse=True)
    saved = (rows - len(groups)) * (width - 1)
    if saved == 0 or saved < MIN_SHARE_SAVED * rows * (width + rollouts.completion_ids.shape[1]):
        return None
    places = torch.arange(rows, device=prompt_of_row.device)
    first = places.new_full((len(groups),), rows).scatter_reduce_(0, prompt_of_row, places, "amin")
    return first, prompt_of_row


def can_share(policy: nn.Module) -> bool:
    """Return True if the key-value cache holds everything that later tokens depend on, and gradients can flow through it.

    Excluded are recurrent states and sliding windows, whose cache drops tokens; gradient checkpointing, which keeps no cache; noise, which
    would be drawn once for all rows of a group; and sharded policies, which expect one forward pass per backward pass.
    """
    config: Any = getattr(policy, "config", None)
    slides = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if slides else "full_attention"])
    return (
        kinds == {"full_attention"}
        and not getattr(policy, "_is_stateful", False)
        and getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
        and not getattr(policy, "is_gradient_checkpointing", False)
        and not (policy.training and noise.rates(policy))
        and not {kind.__name__ for kind in type(policy).__mro__} & {"FSDPModule", "FullyShardedDataParallel"}
    )


def layers(policy: nn.Module) -> list[nn.Module]:
    """Return the transformer layers: the modules that transformers lists in ``_no_split_modules``."""
    names = set(getattr(policy, "_no_split_modules", None) or ())
    return [module for module in policy.modules() if type(module).__name__ in names]


def compile_layers(policy: nn.Module) -> None:
    """Compile each layer separately, for any number of rows and tokens. All layers share the code compiled for the first."""
    for layer in layers(policy):
        layer.compile(dynamic=True)


def uncompiled(policy: nn.Module) -> AbstractContextManager[object]:
    """Switch compilation off for passes with a key-value cache, which would be recompiled for every length and layer."""
    compiled = any(module._compiled_call_impl is not None for module in policy.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
