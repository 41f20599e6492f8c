import pytest
import torch

from rlmod.training.step_metrics import StepMetrics

MASK = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("values", "total", "count"),
    [
        (torch.tensor([[1.0, torch.nan, 3.0], [5.0, 7.0, torch.nan]]), 9, 3),  # padding and what has no value stay out
        (torch.tensor(2.0), 8, 4),  # one number stands for every token
        (torch.tensor(torch.nan), 0, 0),
    ],
)
def test_values_of_tokens(values, total, count):
    means = StepMetrics()
    means.add("ratio", values, MASK)
    assert means.reduce_and_reset() == {"ratio": (total, count)}


def test_the_mean_does_not_depend_on_the_cut():
    values = torch.arange(6.0).view(2, 3)
    whole, cut = StepMetrics(), StepMetrics()
    whole.add("x", values, MASK)
    for row in range(2):
        cut.add("x", values[row : row + 1], MASK[row : row + 1])
    assert whole.reduce_and_reset() == cut.reduce_and_reset() == {"x": (6, 4)}


def test_a_number_without_a_mask_is_kept_whatever_it_is_and_reading_begins_anew():
    means = StepMetrics()
    means.add("loss", torch.tensor(torch.nan))
    total, count = means.reduce_and_reset()["loss"]
    assert total != total  # a loss that is NaN is to show
    assert count == 1
    means.add("loss", torch.tensor(0.5, requires_grad=True))
    assert means.reduce_and_reset() == {"loss": (0.5, 1)}
