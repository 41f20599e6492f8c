"""Checks of what a component returns; its name is added to its errors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlmod.interfaces import ALL_FIELDS, Correction, Loss, Shaper, component_name, declared, unwrap
from rlmod.types import Rollouts, require

RESERVED_METRICS = frozenset({"loss", "grad_norm", "skipped_steps"})
"""Names of metrics of the training step that no component may return."""


@contextmanager
def name_component_on_error(stage: str, component: object) -> Iterator[None]:
    """Add the stage and the component's name as a note to any exception that a user's own component raises."""
    try:
        yield
    except Exception as error:
        target = unwrap(component)
        module = getattr(target, "__module__", "") or ""
        if not module.startswith("rlmod."):
            reads = declared(component, "reads")
            hint = "" if reads == ALL_FIELDS else f"; it declares reads = {sorted(reads)}, other fields may be None"
            error.add_note(f"raised in the component {module}.{component_name(component)}, which is {stage}{hint}")
        raise


def check_per_token(value: Any, rollouts: Rollouts, stage: str, component: object) -> Tensor:
    """Return the value. ValueError that names the component unless it is a tensor with one number per token, [R T]."""
    expected = list(rollouts.mask.shape)
    if not isinstance(value, Tensor) or list(value.shape) != expected or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{stage}: {component_name(component)} returned {found}, expected one number per token: a floating-point tensor "
            f"[R T] = {expected}"
        )
    return value


def check_loss_result(
    result: Any, rollouts: Rollouts, stage: str, component: object
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the value per token and the metrics. ValueError that names the component unless a loss or regularizer returned these two."""
    name = component_name(component)
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{stage}: {name} returned {type(result).__name__}, expected (value per token, metrics)")
    per_token, metrics = result
    check_per_token(per_token, rollouts, stage, component)
    if not isinstance(metrics, Mapping):
        raise ValueError(
            f"{stage}: {name} returned metrics of type {type(metrics).__name__}, expected a dict of numbers or tensors"
        )
    for key, value in metrics.items():
        if key.removeprefix("train/") in RESERVED_METRICS:
            raise ValueError(
                f"{stage}: {name} returned a metric named {key!r}, which is the framework's own; give it another name"
            )
        fits = isinstance(value, Tensor) and (value.ndim == 0 or value.shape == rollouts.mask.shape)
        if not fits and (isinstance(value, bool) or not isinstance(value, int | float)):
            found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{stage}: {name} returned {found} as the metric {key!r}, expected a number or a tensor [] or [R T]"
            )
    return per_token, metrics


def check_correction(result: Any, component: object, stage: str) -> Rollouts:
    """Return the rollouts. ValueError that names the component if a correction returned something else."""
    if not isinstance(result, Rollouts):
        raise ValueError(
            f"{stage}: {component_name(component)} returned {type(result).__name__}, expected Rollouts: return "
            "dataclasses.replace(rollouts, advantages=...)"
        )
    return result


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
