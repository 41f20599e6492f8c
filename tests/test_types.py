import pytest
import torch

from rlmod.types import Rollouts, build_rollouts, concatenate


def rows(length: int, width: int, first: int) -> Rollouts:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, length - 1] = False
    prompt_mask = torch.ones(2, width, dtype=torch.bool)
    prompt_mask[0, 0] = False
    return build_rollouts(
        prompt_ids=torch.full((2, width), first + 1),
        prompt_mask=prompt_mask,
        completion_ids=torch.full((2, length), first + 2),
        mask=mask,
        group=torch.tensor([first, first]),
        logprobs=torch.full((2, length), -1.0),
    )


def test_concatenate_pads_prompts_left_and_completions_right():
    both = concatenate([rows(2, 3, 0), rows(4, 2, 5)])
    assert both.prompt_ids.tolist() == [[1, 1, 1], [1, 1, 1], [0, 6, 6], [0, 6, 6]]
    assert both.prompt_mask.tolist()[2] == [False, False, True]
    assert both.completion_ids.tolist()[0] == [2, 2, 0, 0]
    assert both.mask.sum(1).tolist() == [2, 1, 4, 3]
    assert both.group.tolist() == [0, 0, 5, 5]
    assert both.rewards is None
    assert len(both) == 4


def test_rows_and_trimmed_keep_what_counts():
    both = concatenate([rows(2, 3, 0), rows(4, 2, 5)])
    short = both.rows(slice(0, 2)).trimmed()
    assert short.mask.shape == (2, 2)
    assert short.prompt_ids.shape == (2, 3)
    long = both.rows(torch.tensor([2])).trimmed()
    assert long.completion_ids.tolist() == [[7, 7, 7, 7]]
    assert long.prompt_mask.tolist() == [[True]]
    assert long.prompt_ids.tolist() == [[6]]


def test_trimmed_of_rows_that_are_masked_out_whole_keeps_a_column():
    nothing = rows(3, 2, 0)
    empty = build_rollouts(mask=torch.zeros_like(nothing.mask), logprobs=nothing.logprobs).trimmed()
    assert empty.mask.shape == (2, 1)


def test_to_moves_every_field():
    assert rows(2, 2, 0).to("meta").logprobs.device.type == "meta"


def test_shapes_are_checked():
    with pytest.raises(Exception, match="rewards"):
        build_rollouts(mask=torch.ones(2, 3, dtype=torch.bool), rewards=torch.zeros(3))
