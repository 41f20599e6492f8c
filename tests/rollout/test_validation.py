"""Validation: what counts as correct, and the seeds of its batches."""

from itertools import product

import pytest
import torch

from rlmod.config.sizes import Validation
from rlmod.rollout.validation import sample_and_grade, validation_seed
from rlmod.types import Problem, Prompts, Texts
from tests.rollout.scripted import Scripted


def test_only_a_score_above_the_threshold_is_correct_and_an_abstention_is_neither():
    class Reward:
        excluded_terms = ("length",)

        def __call__(self, texts: Texts) -> dict[str, list[float | None]]:
            assert not torch.is_grad_enabled()
            return {"answer": [0.5, 0.75, None], "length": [1.0, -1.0, 1.0]}

    one = Problem(prompt="1", answer="1", source="")
    prompts = Prompts(ids=torch.zeros(1, 1).long(), mask=torch.ones(1, 1).bool(), problems=(one,))
    settings = Validation(sampler=Scripted(), reward=Reward(), threshold=0.5)
    with torch.enable_grad():
        graded = sample_and_grade(torch.nn.Identity(), prompts, settings, decode=lambda rows: [""] * len(rows), seed=0)
    assert graded.correct.tolist() == [False, True, False]
    assert graded.abstained.tolist() == [False, False, True]
    assert graded.rewards.tolist() == [1.5, -0.25, 0.0]
    # A score that no threshold below it excludes is not made correct by an abstention either.
    below = Validation(sampler=Scripted(), reward=Reward(), threshold=-1.0)
    graded = sample_and_grade(torch.nn.Identity(), prompts, below, decode=lambda rows: [""] * len(rows), seed=0)
    assert graded.correct.tolist() == [True, True, False]


@pytest.mark.parametrize("what", ["run_seed", "validation_seed", "batch", "rank"])
def test_every_run_rank_batch_and_validation_seed_has_a_seed_of_its_own(what):
    given = {"run_seed": 3, "validation_seed": 5, "batch": 7, "rank": 9}
    assert len({validation_seed(**{**given, what: value}) for value in range(20)}) == 20


def test_the_seeds_of_a_run_do_not_meet():
    assert len({validation_seed(0, 0, batch, rank) for batch, rank in product(range(16), range(16))}) == 256
