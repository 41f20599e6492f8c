"""Errors in a user's own component: name the component, and check that its advantages fit the loss."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from rlmod.interfaces import Correction, Loss, Shaper, declared, unwrap
from rlmod.types import Rollouts, require


def component_name(component: object) -> str:
    """Return the name of the component's class or function."""
    target = unwrap(component)
    return getattr(target, "__qualname__", type(target).__qualname__)


@contextmanager
def name_component_on_error(stage: str, component: object) -> Iterator[None]:
    """Add the stage and the component's name as a note to any exception that a user's own component raises."""
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
    """ValueError if advantages differ over the tokens of a completion: a loss with one ratio per completion keeps only their mean."""
    advantages = require(rollouts.advantages, "advantages")
    highest = advantages.masked_fill(~rollouts.mask, -torch.inf).amax(1)
    lowest = advantages.masked_fill(~rollouts.mask, torch.inf).amin(1)
    if bool((highest > lowest).any()):
        token = [each for each in (shaper, *correction.values()) if declared(each, "granularity") == "token"]
        culprit = component_name(token[0] if token else shaper)
        raise ValueError(
            f"loss {component_name(loss)} with {culprit}: the loss has one ratio per completion, but the advantages differ over the tokens "
            "of a completion, and only their mean would be used; use loss=clipped_surrogate, or a shaper that gives each completion one "
            "advantage"
        )
