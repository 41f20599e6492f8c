from dataclasses import replace

import pytest
import torch

from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.shaper.entropy_advantage import EntropyAdvantage
from rlmod.shaper.uniform import Uniform
from tests.agreed import agreed, value_and_norm
from tests.rollouts import SEEDS, one_group, ragged


def test_by_hand():
    # Two rewards of 1 and 0: A = 1/2 and -1/2 over the std 1/sqrt(2). Twice sqrt(2) times the rewards gives A = 1 and -1 after scaling.
    rows = one_group([1, 0], [[0.5, 2.0], [0.5, 2.0]])
    a = 0.5**0.5
    torch.testing.assert_close(
        EntropyAdvantage(eps=1e-12)(rows),
        torch.tensor([[a + 0.2, a + a / 2], [-a + 0.2, -a + a / 2]], dtype=torch.float64),
    )
    three = one_group([1, 0, -1], [[0.5, 2.0]] * 3)  # std 1: A = 1, 0, -1
    expected = torch.tensor([[1.2, 1.5], [0, 0], [-0.8, -0.5]], dtype=torch.float64)
    torch.testing.assert_close(EntropyAdvantage(eps=1e-12)(three), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_keeps_signs_and_is_uniform_without_entropy(seed):
    rows = ragged(seed, binary=False)
    plain = Uniform()(rows)
    assert torch.equal(EntropyAdvantage(alpha=0.0)(rows), plain)
    for shaper in (EntropyAdvantage(), EntropyAdvantage(alpha=50.0, kappa=1.01)):
        shaped = shaper(rows)
        assert torch.equal(shaped.sign(), plain.sign())
        assert (shaped >= plain).all()
        assert (shaped[~rows.mask] == 0).all()


def test_the_step_on_the_shared_data():
    lp, rows = agreed()
    rows = replace(rows, advantages=EntropyAdvantage()(rows))
    found = value_and_norm(ClippedSurrogate(clip_low=0.2, clip_high=0.28), lp, rows)
    assert found == pytest.approx((-0.41543739, 0.10497751), abs=1e-8)


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("kappa", 1.0), ("eps", 0.0)])
def test_bad_numbers_are_named(field, value):
    with pytest.raises(ValueError, match=rf"shaper\.{field} must"):
        EntropyAdvantage(**{field: value})
