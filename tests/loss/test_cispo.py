import pytest
import torch

from rlmod.loss.cispo import Cispo
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from tests.rollouts import measured, rows_with


def test_by_hand():
    # Ratios 6 (held at 5), 0.1, 2 with advantages 2, -1, 3: gradient -A min(w, 5), and no token is lost.
    lp, rows = rows_with([[6.0, 0.1, 2.0, 9.0]], [[2, -1, 3, 0]], [[1, 1, 1, 0]])
    per_token, metrics = Cispo()(lp, rows)
    expected = -torch.tensor([5.0, 0.1, 2.0]).double() * torch.tensor([2, -1, 3]) * lp[0, :3].detach()
    torch.testing.assert_close(per_token[0, :3], expected)
    per_token.sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([-10, 0.1, -6, 0])
    assert measured(metrics["clip_fraction"], rows.mask).mean().item() == pytest.approx(1 / 3)
    assert measured(metrics["ratio"], rows.mask).mean().item() == pytest.approx(8.1 / 3)


def test_with_a_lower_bound_the_weight_is_held_from_below():
    lp, rows = rows_with([[0.1, 1.5]], [[1, 1]], [[1, 1]])
    Cispo(clip_low=0.2, clip_high=0.2)(lp, rows)[0].sum().backward()
    assert lp.grad[0].tolist() == pytest.approx([-0.8, -1.2])


def test_on_policy_the_gradient_is_the_clipped_surrogates():
    gradients = []
    for loss in (Cispo(), ClippedSurrogate()):
        lp, rows = rows_with([[1, 1], [1, 1]], [[2, -1], [0.5, 0]], [[1, 1], [1, 0]])
        (loss(lp, rows)[0] * rows.mask).sum().backward()
        gradients.append(lp.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("field", "value"), [("clip_low", -0.1), ("clip_low", 1.1), ("clip_high", 0.0)])
def test_bad_bounds_are_named(field, value):
    with pytest.raises(ValueError, match=rf"loss\.{field}"):
        Cispo(**{field: value})
