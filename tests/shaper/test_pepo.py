import math
from dataclasses import replace

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.pepo import Pepo
from rlmod.shaper.uniform import Uniform
from rlmod.types import build_rollouts
from tests.agreed import agreed, value_and_norm
from tests.rollouts import SEEDS, one_group, ragged


@pytest.mark.parametrize(
    ("window", "expected"), [(2, [6 / 7, 9 / 7, 6 / 7]), (3, [6 / 7, 9 / 7, 6 / 7]), (5, [0.75, 1.5, 0.75])]
)
def test_by_hand(window, expected):
    # exp H = 1, 2, 1. Windows of 3 tokens: e = 1/3, 2/4, 1/3.
    rows = one_group([1, 0], [[0, math.log(2), 0]] * 2)
    weights = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(Pepo(window=window).weigh_tokens(rows)[0], weights)
    plain = Uniform()(rows)
    shaped = Pepo(window=window)(rows)
    torch.testing.assert_close(shaped[0], plain[0] * weights)
    assert torch.equal(shaped[1], plain[1])  # incorrect


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("window", [1, 2, 4, 101])
def test_equals_the_equations_in_plain_loops(seed, window):
    rows = ragged(seed)
    weights = Pepo(window=window).weigh_tokens(rows)
    for row, (entropies, mask) in enumerate(zip(rows.entropy.tolist(), rows.mask.tolist(), strict=True)):
        h = [value for value, counted in zip(entropies, mask, strict=True) if counted]
        near = [[math.exp(h[k]) for k in range(len(h)) if abs(k - t) <= window / 2] for t in range(len(h))]
        e = [math.exp(value) / sum(others) for value, others in zip(h, near, strict=True)]
        expected = [len(h) * each / sum(e) for each in e]
        assert weights[row, : len(h)].tolist() == pytest.approx(expected)
        assert (weights[row, len(h) :] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_changes_nothing(seed):
    """A constant added to a completion's entropies; with a wide window, equal entropies; the sum over a completion always."""
    rows = ragged(seed)
    weights = Pepo(window=4).weigh_tokens(rows)
    torch.testing.assert_close(Pepo(window=4).weigh_tokens(replace(rows, entropy=rows.entropy + 9)), weights)
    torch.testing.assert_close(weights.sum(1), rows.mask.sum(1).double())
    equal = replace(rows, entropy=torch.full_like(rows.entropy, 0.3))
    torch.testing.assert_close(Pepo()(equal), Uniform()(rows))


def test_a_long_completion_with_one_large_entropy_keeps_its_precision():
    entropy = torch.zeros(1, 20_000)
    entropy[0, 0] = 11.0
    rows = build_rollouts(mask=torch.ones(1, 20_000, dtype=torch.bool), entropy=entropy)
    weights = Pepo().weigh_tokens(rows)
    assert weights[0, 10_000].item() == pytest.approx(weights[0, 19_000].item(), rel=1e-6)


@pytest.mark.parametrize(("window", "value", "norm"), [(5, -0.11629430, 0.10153321), (101, -0.11778989, 0.10404227)])
def test_the_step_on_the_shared_data(window, value, norm):
    lp, rows = agreed()
    rows = replace(rows, advantages=Pepo(window=window)(rows))
    assert value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows) == pytest.approx(
        (value, norm), abs=1e-8
    )


def test_a_window_of_nothing_is_named():
    with pytest.raises(ValueError, match=r"shaper\.window must be at least 1, got 0"):
        Pepo(window=0)
