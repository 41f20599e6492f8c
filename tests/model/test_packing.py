"""Rows in packs: within the budget, with little padding, and without those that can change nothing."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlmod.model.packing import pack_by_length, rows_that_train
from rlmod.types import Rollouts, build_rollouts
from tests.rollouts import ragged


def rows_of(prompts: list[int], completions: list[int]) -> Rollouts:
    p, c = torch.tensor(prompts)[:, None], torch.tensor(completions)[:, None]
    prompt_mask = torch.arange(int(p.max())) >= int(p.max()) - p
    return build_rollouts(prompt_ids=prompt_mask.long(), prompt_mask=prompt_mask, mask=torch.arange(int(c.max())) < c)


def test_by_hand():
    rows = rows_of([2, 2, 1, 3], [5, 1, 5, 4])
    # Totals 7, 3, 6, 7: longest first, and of equal ones the earlier.
    assert [pack.tolist() for pack in pack_by_length(rows, 3)] == [[0, 3, 2], [1]]
    # Two rows of at most 3 + 5 tokens are 16; with the third they would be 24.
    assert [pack.tolist() for pack in pack_by_length(rows, 3, 16)] == [[0, 3], [2, 1]]
    assert [pack.tolist() for pack in pack_by_length(rows, 3, 1)] == [[0], [3], [2], [1]]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=40),
    most=st.integers(1, 12),
    tokens=st.none() | st.integers(1, 200),
)
def test_every_row_is_in_one_pack_within_the_budget(sizes, most, tokens):
    rows = rows_of([p for p, _ in sizes], [c for _, c in sizes])
    found = [pack.tolist() for pack in pack_by_length(rows, most, tokens)]
    assert sorted(i for pack in found for i in pack) == list(range(len(sizes)))
    for pack in found:
        cost = len(pack) * (max(sizes[i][0] for i in pack) + max(sizes[i][1] for i in pack))
        assert len(pack) <= most
        assert tokens is None or cost <= tokens or len(pack) == 1
    totals = [sum(sizes[i]) for pack in found for i in pack]
    assert totals == sorted(totals, reverse=True)


def test_a_mask_with_holes_is_as_long_as_its_last_token():
    rows = rows_of([1, 1], [4, 4])
    rows = replace(rows, mask=torch.tensor([[True, False, False, False], [False, False, True, False]]))
    assert [pack.tolist() for pack in pack_by_length(rows, 1)] == [[1], [0]]


@pytest.mark.parametrize("every_row", [False, True])
def test_rows_without_weight_or_advantage_change_nothing(every_row):
    rows = ragged(0).rows(slice(0, 4))
    weights = torch.ones(rows.mask.shape)
    weights[1] = 0
    advantages = torch.ones(rows.mask.shape)
    advantages[2] = 0
    advantages[3, 1:] = 0
    found = rows_that_train(replace(rows, weights=weights, advantages=advantages), every_row=every_row)
    assert found.tolist() == [True, False, every_row, True]
