"""How far advantages differ within completions and between them, and the warning that a token-level shaper shapes nothing."""

from dataclasses import replace

import pytest
import torch

from rlmod.rollout.metrics import advantage_spread, shapes_no_token
from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.shaper.uniform import Uniform
from rlmod.training.module import FLAT_BATCHES
from rlmod.types import Rollouts, build_rollouts
from tests.ranks import on_ranks
from tests.rollouts import one_group, ragged
from tests.training.modules import module


def rows(advantages: list[list[float]], mask: list[list[int]]) -> Rollouts:
    counted = torch.tensor(mask).bool()
    return build_rollouts(mask=counted, advantages=torch.tensor(advantages).where(counted, torch.nan).double())


def test_by_hand():
    # Means 2, -1, -3: their variance is 38/3 / 3 = 38/9. Stds within: 1 and 0; the third has one token, the last no advantage.
    record = rows([[1, 3, 9], [-1, -1, -1], [-3, 9, 9], [0, 0, 0]], [[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]])
    found = advantage_spread([record])
    assert found["shaper/spread_within"] == pytest.approx(0.5)
    assert found["shaper/spread_between"] == pytest.approx((14 / 3 - (2 / 3) ** 2) ** 0.5)
    assert advantage_spread([record.rows(slice(0, 2)), record.rows(slice(2, 4))]) == pytest.approx(found)
    assert advantage_spread([record.rows(slice(3, 4))]) == {}


def test_two_ranks_have_the_spread_of_one():
    record = ragged(1)
    record = replace(record, advantages=TokenEntropy()(record))
    halves = [record.rows(slice(0, 9)), record.rows(slice(9, None))]
    whole = advantage_spread([record])
    assert on_ranks(lambda rank: advantage_spread([halves[rank]])) == [pytest.approx(whole)] * 2


@pytest.mark.parametrize(
    ("shaper", "flat"),
    [
        (TokenEntropy(), False),
        (TokenEntropy(entropy_clip=[0.2, 0.28]), True),
        (TokenEntropy(alpha2=0.0), True),
        (Uniform(), False),
    ],
    ids=["unclipped", "clipped", "without entropy", "sequence-level"],
)
def test_entropies_on_one_bound_shape_no_token_and_the_module_says_so_once(shaper, flat, caplog):
    record = one_group([1, 1, 0, 0], [[1.0, 2.0], [2.0, 1.0], [0.5, 1.0], [3.0, 0.4]])
    spread = advantage_spread([replace(record, advantages=shaper(record))])
    assert shapes_no_token(shaper, spread) == flat
    made = module(shaper=shaper)
    said = []
    for _ in range(FLAT_BATCHES + 2):
        made.shape(record)
        made._warn_if_flat()
        said.append(caplog.text.count("one advantage for all of its tokens"))
    assert made.advantage_spread == pytest.approx(spread)
    assert said == [0] * (FLAT_BATCHES - 1) + [int(flat)] * 3
    # Only a cause that is possible is named.
    assert ("shaper.entropy_clip=null" in caplog.text) == (flat and shaper.entropy_clip is not None)


def test_a_batch_with_a_difference_between_tokens_starts_the_count_anew(caplog):
    made = module(shaper=TokenEntropy())
    for within in (0.0, 0.0, 1.0, 0.0, 0.0):
        made.advantage_spread = {"shaper/spread_within": within, "shaper/spread_between": 1.0}
        made._warn_if_flat()
    assert "one advantage" not in caplog.text
    made._warn_if_flat()
    assert "3 rollout batches in a row" in caplog.text
