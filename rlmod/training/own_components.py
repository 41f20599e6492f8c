"""Errors inside a component of one's own: which component it was, and what it returned that does not fit."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from rlmod.interfaces import Correction, Loss, Shaper, declared, unwrap
from rlmod.types import Rollouts, require


def component_name(component: object) -> str:
    target = unwrap(component)
    return getattr(target, "__qualname__", type(target).__qualname__)


@contextmanager
def names_component(stage: str, component: object) -> Iterator[None]:
    """Add the stage and the component's name to whatever a component of one's own raises."""
    try:
        yield
    except Exception as error:
        target = unwrap(component)
        module = getattr(target, "__module__", "") or ""
        if not module.startswith("rlmod."):
            error.add_note(f"raised in the component {module}.{component_name(component)}, which is {stage}")
        raise


def check_constant_per_completion(
    rollouts: Rollouts, shaper: Shaper, correction: Mapping[str, Correction], loss: Loss
) -> None:
    """ValueError if advantages vary over the tokens of a completion, which a loss with one ratio per completion would average away."""
    advantages = require(rollouts.advantages, "advantages")
    highest = advantages.masked_fill(~rollouts.mask, -torch.inf).amax(1)
    lowest = advantages.masked_fill(~rollouts.mask, torch.inf).amin(1)
    if bool((highest > lowest).any()):
        token = [each for each in (shaper, *correction.values()) if declared(each, "granularity") == "token"]
        culprit = component_name(token[0] if token else shaper)
        raise ValueError(
            f"loss {component_name(loss)} with {culprit}: the loss has one ratio per completion, but the advantages differ over the tokens "
            "of a completion, so all but their mean would be lost; use loss=clipped_surrogate, or a shaper that gives each completion one "
            "advantage"
        )
