"""Each shipped loss: rows do not touch each other, masked positions are never read, extreme values stay finite."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate

from rlmod.interfaces import Loss
from rlmod.types import Rollouts
from tests.agreed import agreed
from tests.config.composing import composed
from tests.rollouts import measured

CONF = Path(__file__).parents[2] / "conf"
LOSSES = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


@cache
def build(option: str) -> Loss:
    return instantiate(composed(f"loss={option}").loss, _convert_="all")


def shaped(*, hidden: bool = False) -> tuple[torch.Tensor, Rollouts]:
    """The agreed data with one advantage per row, the last row without one; ``hidden``: with NaN where the mask is False."""
    lp, rows = agreed()
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.5, -2.0, 1.5, 0.0]).double()[:, None] * rows.mask
    if hidden:
        values = {name: getattr(rows, name) for name in ("logprobs", "sampler_logprobs", "entropy")}
        rows = replace(rows, **{name: value.masked_fill(~rows.mask, torch.nan) for name, value in values.items()})
        lp = lp.detach().masked_fill(~rows.mask, torch.nan).requires_grad_()
    return lp, replace(rows, advantages=advantages)


def value_and_gradient(loss: Loss, lp: torch.Tensor, rows: Rollouts) -> tuple[torch.Tensor, torch.Tensor]:
    per_token = torch.where(rows.mask, loss(lp, rows)[0], 0)
    return per_token.detach(), torch.autograd.grad(per_token.sum(), lp)[0]


@pytest.mark.parametrize("option", LOSSES)
def test_a_row_alone_has_the_values_that_it_has_among_others(option):
    loss, (lp, rows) = build(option), shaped()
    values, gradient = value_and_gradient(loss, lp, rows)
    for row in range(len(rows)):
        one = rows.rows(slice(row, row + 1)).trimmed()
        alone = lp.detach()[row : row + 1, : one.mask.shape[1]].requires_grad_()
        found = value_and_gradient(loss, alone, one)
        length = int(rows.mask[row].sum())
        torch.testing.assert_close(found[0][0], values[row, :length], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found[1][0], gradient[row, :length], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("option", LOSSES)
def test_masked_positions_are_never_read(option):
    loss = build(option)
    values, gradient = value_and_gradient(loss, *shaped())
    lp, rows = shaped(hidden=True)
    found = value_and_gradient(loss, lp, rows)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], gradient)
    per_token, metrics = loss(lp, rows)
    assert per_token.isfinite().all()
    assert all(not torch.as_tensor(value).requires_grad for value in metrics.values())


@pytest.mark.parametrize("option", LOSSES)
def test_without_an_advantage_there_is_neither_value_nor_gradient(option):
    values, gradient = value_and_gradient(build(option), *shaped())
    assert (values[-1] == 0).all()
    assert (gradient[-1] == 0).all()
    assert (values[:-1] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("option", LOSSES)
def test_extreme_log_probabilities_stay_finite(option, dtype):
    lp, rows = shaped()
    far = torch.tensor([-1e4, 0.0, -0.5, -1e-9, -88.0, -1e4]).to(dtype).repeat(len(rows), 2)
    old = far.roll(1, 1)
    rows = replace(rows, logprobs=old, sampler_logprobs=old, advantages=rows.advantages.to(dtype))
    lp = far.requires_grad_()
    values, gradient = value_and_gradient(build(option), lp, rows)
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    assert values.dtype == dtype
    assert all(measured(value, rows.mask).isfinite().all() for value in build(option)(lp, rows)[1].values())
