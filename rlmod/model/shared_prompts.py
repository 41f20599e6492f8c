"""A policy's forward pass over rollouts, in which the prompt that a group's rows share is gone through once.

rows of a micro-batch            each prompt once           each row's completion
[q1 o11] [q1 o12] [q2 o21]  ->   [q1] [q2]  -> keys,   ->   [o11] [o12] [o21], attending to the keys and values
                                               values       of their prompt, which were copied for each row
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

WORTHWHILE = 0.2
"""The share of a micro-batch's tokens that must be spared; for less, two passes for one cost more than they save."""


def logits(policy: nn.Module, rollouts: Rollouts) -> Float[Tensor, "R places V"]:
    """Return the logits at the last prompt token and at every completion token: the same whether the prompt is shared or not.

    Completions need no attention mask: they are padded on the right, where no counted position looks.

    Source: Prefix Grouper, arXiv:2506.05433, sec. 3.
    Differs: by way of the key-value cache, which every model of transformers with plain attention has, with gradients.
    """
    prompts, mask, completions = rollouts.prompt_ids, rollouts.prompt_mask, rollouts.completion_ids
    assert prompts is not None and mask is not None and completions is not None
    attention = torch.cat([mask, torch.ones_like(completions, dtype=torch.bool)], 1)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    cache, done = None, 0
    if (shared := shared_prompts(policy, rollouts)) is not None:
        from transformers import DynamicCache

        first, prompt_of_row = shared
        done = prompts.shape[1] - 1  # the last prompt token goes with each completion, whose first token it predicts
        cache = DynamicCache(config=cast("PreTrainedModel", policy).config)
        with uncompiled(policy):
            policy(
                input_ids=prompts[first, :done],
                attention_mask=attention[first, :done].long(),
                position_ids=positions[first, :done],
                past_key_values=cache,
                logits_to_keep=1,
                use_cache=True,
            )
        cache.batch_select_indices(prompt_of_row)
    with nullcontext() if cache is None else uncompiled(policy):
        return policy(
            input_ids=torch.cat([prompts, completions], 1)[:, done:],
            attention_mask=attention.long(),
            position_ids=positions[:, done:],
            past_key_values=cache,
            logits_to_keep=completions.shape[1] + 1,
            use_cache=cache is not None,
        ).logits


def shared_prompts(policy: nn.Module, rollouts: Rollouts) -> tuple[Int[Tensor, " n"], Int[Tensor, " R"]] | None:
    """A row of each prompt, and the number of each row's prompt among them; None where sharing is of no use, or not exact."""
    if not can_share(policy):
        return None
    rows, width = rollouts.prompt_ids.shape
    groups, prompt_of_row = rollouts.group.unique(return_inverse=True)
    spared = (rows - len(groups)) * (width - 1)
    if spared == 0 or spared < WORTHWHILE * rows * (width + rollouts.completion_ids.shape[1]):
        return None
    places = torch.arange(rows, device=prompt_of_row.device)
    first = places.new_full((len(groups),), rows).scatter_reduce_(0, prompt_of_row, places, "amin")
    return first, prompt_of_row


def can_share(policy: nn.Module) -> bool:
    """Return True if keys and values hold all that later tokens see, and a gradient may flow through them.

    Not with a recurrent state or a sliding window, whose cache forgets; not with recomputation, which keeps no cache; dropout would be
    drawn once for all rows of a group; and a sharded policy reckons with one forward pass for each backward pass.
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
    """The blocks that transformers says must not be split."""
    names = set(getattr(policy, "_no_split_modules", None) or ())
    return [module for module in policy.modules() if type(module).__name__ in names]


def compile_layers(policy: nn.Module) -> None:
    """Each layer by itself, for any number of rows and tokens: all layers share what is compiled for the first."""
    for layer in layers(policy):
        layer.compile(dynamic=True)


def uncompiled(policy: nn.Module) -> AbstractContextManager[object]:
    """Switch compilation off for passes with a key-value cache: every length and layer would be compiled again."""
    compiled = any(module._compiled_call_impl is not None for module in policy.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
