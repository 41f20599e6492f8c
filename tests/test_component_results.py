"""A result of a user's own component that does not fit is refused by name, in every stage; so is an error that it raises."""

import re
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from rlmod.config.sizes import Batch
from rlmod.training.datamodule import RolloutLoader
from rlmod.types import Rollouts, require
from tests.command_line import SHORT, answer, run_train
from tests.rollout.scripted import run
from tests.training.modules import module, training_rows

HERE = "tests.test_component_results"


def per_token(logprobs: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    return -require(rollouts.advantages, "advantages") * logprobs


def mean_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts).mean(), {}


def flat_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts)[rollouts.mask], {}


def bare_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts)


def reserved_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts), {"grad_norm": 100.0}


def list_metric_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts), {"mine": [1.0, 2.0]}


def no_metrics_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts), None


def switch_metric_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts), {"mine": True}


def triple_loss(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return per_token(logprobs, rollouts), {}, None


class Unread:
    """A loss that reads a field that it does not declare."""

    reads = frozenset({"advantages"})

    def __call__(self, logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
        return per_token(logprobs, rollouts) * cast(torch.Tensor, rollouts.reference_logprobs).exp(), {}


def mean_regularizer(logprobs: torch.Tensor, rollouts: Rollouts) -> Any:
    return logprobs.mean(), {}


def column_shaper(rollouts: Rollouts) -> Any:
    return require(rollouts.rewards, "rewards")[:, None]


def integer_shaper(rollouts: Rollouts) -> Any:
    return rollouts.mask.long()


def tensor_correction(rollouts: Rollouts) -> Any:
    return rollouts.advantages


def row_aggregation(rollouts: Rollouts) -> Any:
    return rollouts.mask.float().sum(1)


def float_filter(rollouts: Rollouts) -> Any:
    return torch.ones(int(rollouts.group.max()) + 1)


def number_shaper(rollouts: Rollouts) -> Any:
    return 1.0


def list_filter(rollouts: Rollouts) -> Any:
    return [True] * (int(rollouts.group.max()) + 1)


def row_filter(rollouts: Rollouts) -> Any:
    return torch.ones(len(rollouts), dtype=torch.bool)


def broken(*given: Any) -> Any:
    raise KeyError("nothing")


def act(stage: str, component: Callable[..., Any]) -> None:
    """Call the component as its stage does."""
    rows = training_rows()
    if stage == "filter":
        run([1, 2], 2, filter=component)
    elif stage == "aggregation":
        RolloutLoader(lambda: rows, component, Batch(), 1).weigh(rows)
    elif stage in ("shaper", "correction.mine"):
        module(**given(stage, component)).shape(rows)
    else:
        module(**given(stage, component)).training_step(rows, 0)


def given(stage: str, component: Callable[..., Any]) -> dict[str, Any]:
    group, _, name = stage.partition(".")
    return {group: {name: component} if name else component}


@pytest.mark.parametrize(
    ("stage", "function", "message"),
    [
        ("loss", mean_loss, r"loss: mean_loss returned torch.float32 [], expected one number per token"),
        ("loss", flat_loss, r"loss: flat_loss returned torch.float32 ["),
        ("loss", bare_loss, "loss: bare_loss returned Tensor, expected (value per token, metrics)"),
        ("loss", triple_loss, "loss: triple_loss returned tuple, expected (value per token, metrics)"),
        ("loss", no_metrics_loss, "loss: no_metrics_loss returned metrics of type NoneType, expected a dict"),
        ("loss", switch_metric_loss, "loss: switch_metric_loss returned bool as the metric 'mine'"),
        (
            "loss",
            reserved_loss,
            "loss: reserved_loss returned a metric named 'grad_norm', which is the framework's own",
        ),
        ("loss", list_metric_loss, "loss: list_metric_loss returned list as the metric 'mine'"),
        ("regularizer.mine", mean_regularizer, "regularizer.mine: mean_regularizer returned torch.float32 []"),
        ("shaper", column_shaper, "shaper: column_shaper returned torch.float32 ["),
        ("shaper", integer_shaper, "shaper: integer_shaper returned torch.int64 ["),
        ("shaper", number_shaper, "shaper: number_shaper returned float, expected one number per token"),
        ("correction.mine", tensor_correction, "correction.mine: tensor_correction returned Tensor, expected Rollouts"),
        ("aggregation", row_aggregation, "aggregation: row_aggregation returned torch.float32 ["),
        ("filter", float_filter, "filter: float_filter returned torch.float32 [2]; expected a boolean tensor"),
        ("filter", list_filter, "filter: list_filter returned list; expected a boolean tensor"),
        ("filter", row_filter, "filter: row_filter returned torch.bool [6]; expected a boolean tensor"),
    ],
)
def test_a_result_that_does_not_fit_names_the_component(stage, function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        act(stage, function)


@pytest.mark.parametrize("stage", ["filter", "shaper", "correction.mine", "aggregation", "loss", "regularizer.mine"])
def test_an_error_inside_a_component_carries_its_name_and_stage(stage):
    with pytest.raises(KeyError) as caught:
        act(stage, broken)
    assert caught.value.__notes__ == [f"raised in the component {HERE}.broken, which is {stage}"]


def test_an_error_of_a_component_that_reads_more_than_it_declares_tells_what_it_declares():
    with pytest.raises(AttributeError) as caught:
        act("loss", Unread())
    (note,) = caught.value.__notes__
    assert note.endswith("which is loss; it declares reads = ['advantages'], other fields may be None")


def test_the_command_answers_with_the_message(tmp_path, monkeypatch):
    node = f"{{_target_: {HERE}.mean_loss, _partial_: true}}"
    words = ("trainer.max_epochs=1", "data.validation=null", "~loss", f"+loss={node}", f"output={tmp_path / 'a'}")
    assert "loss: mean_loss returned torch.float32 []" in answer(lambda: run_train(monkeypatch, *SHORT, *words))
