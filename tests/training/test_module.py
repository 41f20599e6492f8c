"""Single hooks of RLModule and RLData: which rows train, what samples with which seed, what validation counts."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlmod.config.sizes import Validation
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.regularizer.entropy_bonus import EntropyBonus
from rlmod.sampler.hf import HF
from rlmod.training.datamodule import RLData
from rlmod.types import Prompts, Rollouts
from tests.training.modules import encoded, module, prompts


def undeclared_loss(logprobs: torch.Tensor, rollouts: Rollouts):
    return -logprobs, {}


@pytest.mark.parametrize(
    ("loss", "regularizer", "every_row"),
    [
        (ClippedSurrogate(), {}, False),
        (ClippedSurrogate(), {"bonus": EntropyBonus()}, True),
        (undeclared_loss, {}, True),
    ],
)
def test_rows_without_advantage_train_if_something_else_moves_them(loss, regularizer, every_row):
    made = module(loss=loss, regularizer=regularizer)
    assert made.every_row_trains is every_row
    data = RLData(train=encoded(20, 21))
    data.trainer = SimpleNamespace(lightning_module=made, world_size=1)  # pyright: ignore[reportAttributeAccessIssue]
    assert data.train_dataloader().every_row is every_row


class Noting:
    """The sampler ``hf``, which notes its seeds and whether the policy was in training mode."""

    completions_per_prompt, temperature = 2, 1.0

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.training: list[bool] = []

    def __call__(self, policy, prompts: Prompts, seed: int) -> Rollouts:
        self.seeds.append(seed)
        self.training.append(policy.training)
        return HF(completions_per_prompt=2, max_new_tokens=4)(policy, prompts, seed)


class NotingGuide(Noting):
    def __call__(self, prompts: Prompts, completions_per_prompt: int, seed: int) -> Rollouts:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(module().policy, prompts, seed)


def test_sampler_and_guide_have_other_seeds_on_every_rank_and_in_every_iteration():
    sampler, guide = Noting(), NotingGuide()
    for rank in range(2):
        for epoch in range(2):
            module(rank, 2, epoch, sampler=sampler, guide=guide).collect(prompts, 2)
    seeds = sampler.seeds + guide.seeds
    assert len(seeds) == len(set(seeds)) == 8


def test_the_policy_samples_without_dropout_and_is_then_as_it_was():
    made = module(sampler=(sampler := Noting()))
    made.policy.train()
    made.collect(prompts, 2)
    assert sampler.training == [False]
    assert made.policy.training
    with pytest.raises(KeyError), made.evaluating():
        raise KeyError
    assert made.policy.training
    made.policy.eval()
    with made.evaluating():
        pass
    assert not made.policy.training


def validating(rank: int = 0, reward=lambda texts: [1.0, None], **settings):
    sampler = Noting()
    made = module(rank, 2, validation=Validation(sampler=sampler, reward=reward, **settings))
    made.eval()
    return made, sampler


def test_ranks_and_batches_of_validation_are_sampled_with_seeds_of_their_own():
    seeds = []
    for rank in range(2):
        made, sampler = validating(rank)
        for batch in range(2):
            made.validation_step(prompts(1), batch)
        seeds += sampler.seeds
    assert len(set(seeds)) == 4


def test_validation_counts_neither_abstentions_nor_a_batch_of_padding():
    rewards = [[1.0, None], [0.0, 0.0]]
    made, _ = validating(reward=lambda texts: rewards.pop(0), pass_at=(1, 2))
    made.validation_step(prompts(1), 0)
    padding = prompts(1)
    made.validation_step(replace(padding, padding=True), 1)
    measured = {name: float(value) for name, value in made.metrics_of("").compute().items()}
    # One completion has a reward and is correct; the other one has none, so pass@2 has no problem.
    assert measured["val/mean@2"] == measured["val/pass@1"] == 1
    assert math.isnan(measured["val/pass@2"])
    assert [len(batch.texts) for batch in made.validated[""]] == [2]


@pytest.mark.parametrize("which", ["train", "held_out"])
def test_a_token_id_without_an_embedding_is_refused_before_training(which):
    made = module()
    problems = {"train": encoded(20), "held_out": encoded(20)} | {which: encoded(20, 10**6)}
    data = RLData(**problems)
    data.trainer = SimpleNamespace(lightning_module=made, limit_val_batches=1.0)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"p\.jsonl:1: the prompt has the token id 1000000, but the policy has only"):
        data.setup("fit")


def test_a_checkpoint_of_a_failed_iteration_has_the_state_before_it():
    made, saved = module(), {}
    made.tokens_sampled = 70
    made.checkpoint_changes = {"tokens_sampled": 40, "global_step": 3}
    made.on_save_checkpoint(saved)
    assert (saved["tokens_sampled"], saved["global_step"]) == (40, 3)
    made.checkpoint_changes = None
    made.on_save_checkpoint(saved)
    assert saved["tokens_sampled"] == 70
