"""A result of a user's own component that does not fit is refused by name, in every stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlmod.types import Rollouts
from tests.command_line import SHORT, answer, run_train

QUICK = (*SHORT, "trainer.max_epochs=1", "data.validation=null")
HERE = "tests.test_component_results"


def mean_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return (-rollouts.advantages * logprobs).mean(), {}  # type: ignore[operator]


def flat_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return (-rollouts.advantages * logprobs)[rollouts.mask], {}  # type: ignore[operator]


def bare_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return -rollouts.advantages * logprobs  # type: ignore[operator]


def reserved_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return -rollouts.advantages * logprobs, {"grad_norm": 100.0}  # type: ignore[operator]


def list_metric_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return -rollouts.advantages * logprobs, {"mine": [1.0, 2.0]}  # type: ignore[operator]


def unread_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return -rollouts.advantages * logprobs * rollouts.reference_logprobs.exp(), {}  # type: ignore[operator, union-attr]


unread_loss.reads = frozenset({"advantages"})  # type: ignore[attr-defined]


def mean_regularizer(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return logprobs.mean(), {}


def column_shaper(rollouts: Rollouts) -> Any:
    return rollouts.rewards[:, None]  # type: ignore[index]


def integer_shaper(rollouts: Rollouts) -> Any:
    return rollouts.mask.long()


def tensor_correction(rollouts: Rollouts) -> Any:
    return rollouts.advantages


def row_aggregation(rollouts: Rollouts) -> Any:
    return rollouts.mask.float().sum(1)


def float_filter(rollouts: Rollouts) -> Any:
    return torch.ones(int(rollouts.group.max()) + 1)


def broken_filter(rollouts: Rollouts) -> Any:
    raise KeyError("nothing")


def broken_aggregation(rollouts: Rollouts) -> Any:
    raise KeyError("nothing")


def given(stage: str, function: Callable[..., Any]) -> tuple[str, ...]:
    node = f"{{_target_: {HERE}.{function.__name__}, _partial_: true}}"
    if stage in ("regularizer", "correction"):
        return (f"+{stage}.mine={node}",)
    return (f"~{stage}", f"+{stage}={node}")


@pytest.mark.parametrize(
    ("stage", "function", "message"),
    [
        ("loss", mean_loss, r"loss: mean_loss returned torch.float32 [], expected one number per token"),
        ("loss", flat_loss, r"loss: flat_loss returned torch.float32 ["),
        ("loss", bare_loss, "loss: bare_loss returned Tensor, expected (value per token, metrics)"),
        (
            "loss",
            reserved_loss,
            "loss: reserved_loss returned a metric named 'grad_norm', which is the framework's own",
        ),
        ("loss", list_metric_loss, "loss: list_metric_loss returned list as the metric 'mine'"),
        ("regularizer", mean_regularizer, "regularizer.mine: mean_regularizer returned torch.float32 []"),
        ("shaper", column_shaper, "shaper: column_shaper returned torch.float32 ["),
        ("shaper", integer_shaper, "shaper: integer_shaper returned torch.int64 ["),
        ("correction", tensor_correction, "correction.mine: tensor_correction returned Tensor, expected Rollouts"),
        ("aggregation", row_aggregation, "aggregation: row_aggregation returned torch.float32 ["),
        ("filter", float_filter, "filter: float_filter returned torch.float32 ["),
    ],
)
def test_a_result_that_does_not_fit_names_the_component(stage, function, message, tmp_path, monkeypatch):
    words = (*QUICK, *given(stage, function), f"output={tmp_path / 'a'}")
    assert message in answer(lambda: run_train(monkeypatch, *words))


@pytest.mark.parametrize(
    ("stage", "function", "error"),
    [
        ("filter", broken_filter, KeyError),
        ("aggregation", broken_aggregation, KeyError),
        ("loss", unread_loss, AttributeError),
    ],
)
def test_an_error_inside_a_component_carries_its_name_and_stage(stage, function, error, tmp_path, monkeypatch):
    with pytest.raises(error) as caught:
        run_train(monkeypatch, *QUICK, *given(stage, function), f"output={tmp_path / 'a'}")
    (note,) = caught.value.__notes__
    assert f"raised in the component {HERE}.{function.__name__}, which is {stage}" in note
    assert ("it declares reads = ['advantages'], other fields may be None" in note) == (function is unread_loss)
