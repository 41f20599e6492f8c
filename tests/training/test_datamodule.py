"""RLData: the sizes of an iteration, its micro-batches, the order of the prompts, and resuming in it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from rlmod.aggregation.token_mean import TokenMean
from rlmod.config.sizes import Batch
from rlmod.model.policy import HFPolicy
from rlmod.rollout.prompts import EncodedProblems
from rlmod.training.datamodule import PromptLoader, RLData, RolloutLoader, split
from rlmod.types import Problem, Rollouts
from tests.command_line import SHORT, refused
from tests.rollouts import ragged


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (Batch(prompts=4, minibatches=3), "batch.minibatches=3 does not divide the 16 completions"),
        (Batch(prompts=3), "batch.prompts=3 cannot be divided among 2 ranks"),
    ],
)
def test_sizes_that_do_not_come_out_even(batch, message):
    with pytest.raises(ValueError, match=message):
        batch.micro_batches(4, ranks=2 if batch.prompts == 3 else 1)


@pytest.mark.parametrize("field", ["prompts", "minibatches", "epochs", "micro_batch"])
def test_sizes_must_be_positive(field):
    with pytest.raises(ValueError, match=rf"batch\.{field}"):
        Batch(**{field: 0})


def test_micro_batches_by_hand():
    # 8 prompts x 4 / 2 updates = 16 rows a step, 8 at once
    assert Batch(prompts=8, minibatches=2, micro_batch=8).micro_batches(4) == 2
    assert Batch(prompts=8, minibatches=2, micro_batch=8).micro_batches(4, ranks=2) == 1
    assert Batch(prompts=2, micro_batch=64).micro_batches(4) == 1
    assert Batch(prompts=4, micro_batch=5).micro_batches(4) == 4  # of 5, 5, 5 and 1


def shaped(rows: Rollouts) -> Rollouts:
    """Return the rows with prompts and advantages, as the module passes them on."""
    prompts = torch.ones(len(rows), 2).bool()
    return replace(rows, prompt_ids=prompts.long(), prompt_mask=prompts, advantages=rows.mask.double())


def test_a_rollout_batch_is_sampled_on_request_and_iterated_completely():
    made: list[Rollouts] = []

    def collect() -> Rollouts:
        made.append(shaped(ragged(len(made))))
        return made[-1]

    batch = Batch(prompts=4, minibatches=2, epochs=3, micro_batch=4)
    loader = RolloutLoader(collect, TokenMean(), batch, batch.micro_batches(6))
    assert len(loader) == 3 * 2 * 3
    assert made == []
    batches = list(loader)
    assert len(made) == 1
    assert len(batches) == len(loader)
    first_pass = batches[: 2 * 3]
    for step in range(2):
        of_step = torch.cat([b.rewards for b in first_pass[3 * step : 3 * step + 3]])
        assert of_step.sort().values.tolist() == made[0].rewards[12 * step : 12 * step + 12].sort().values.tolist()
        # The long with the long: there is no more padding than the spread within a micro-batch.
        widths = [b.mask.shape[1] for b in first_pass[3 * step : 3 * step + 3]]
        assert widths == sorted(widths, reverse=True)
        # The weights span the optimizer step, not the micro-batch.
        total = sum(float(b.weights.sum()) for b in first_pass[3 * step : 3 * step + 3])
        assert total == pytest.approx(1, abs=1e-6)


def test_parts_are_equal_and_in_order():
    rows = ragged(0)
    pieces = list(split(rows, 4))
    assert [len(piece) for piece in pieces] == [6] * 4
    assert torch.equal(torch.cat([piece.mask for piece in pieces]), rows.mask)


def test_fewer_rows_than_parts_leave_masked_out_rows_that_weigh_nothing():
    rows = replace(ragged(0).rows(slice(0, 3)), weights=torch.ones(3, 9))
    pieces = list(split(rows, 5))
    assert [len(piece) for piece in pieces] == [1] * 5
    counted = [piece for piece in pieces if piece.mask.any()]
    assert torch.equal(torch.cat([piece.mask for piece in counted]), rows.mask)
    assert all((piece.weights == 0).all() for piece in pieces if not piece.mask.any())


def test_the_zero_reward_batch_has_a_normaliser_of_its_own_and_a_share_in_every_step():
    rows = ragged(0, groups=4, g=6)
    rows = shaped(replace(rows, sub_batch=(rows.group >= 2).long()))
    batch = Batch(prompts=2, minibatches=2, micro_batch=4)
    loader = RolloutLoader(lambda: rows, TokenMean(), batch, batch.micro_batches(6, extra_rows=24), (1.0, 0.25))
    batches = list(loader)
    assert len(batches) == len(loader) == 2 * 5  # (6 + 12 rows a step) / 4, rounded up
    for step in range(2):
        of_step = batches[5 * step : 5 * step + 5]
        for extra, total in ((False, 1.0), (True, 0.25)):
            weights = [float(b.weights[b.sub_batch == extra].sum()) for b in of_step]
            assert sum(weights) == pytest.approx(total, abs=1e-6)
    seen = [int(b.group[row]) for b in batches for row in range(len(b)) if b.mask[row].any()]
    assert sorted(seen) == sorted(rows.group.tolist())


def test_rows_that_can_change_nothing_are_left_out_and_the_rest_is_packed_closely():
    rows = shaped(ragged(0))
    advantages = rows.advantages.clone()
    advantages[:18] = 0  # three of four groups without signal
    rows = replace(rows, advantages=advantages)
    batch = Batch(prompts=4, micro_batch=4)
    loader = RolloutLoader(lambda: rows, TokenMean(), batch, batch.micro_batches(6))
    batches = list(loader)
    assert [len(b) for b in batches] == [0, 0, 0, 0, 4, 2]  # always six of them: the Trainer counts
    assert all(int(g) == 3 for b in batches for g in b.group)
    # The weights are still those of the whole step: what is left out counts in the normaliser.
    assert sum(float(b.weights.sum()) for b in batches) == pytest.approx(float(TokenMean()(rows)[18:].sum()))
    every = RolloutLoader(lambda: rows, TokenMean(), batch, batch.micro_batches(6), every_row=True)
    assert sum(len(b) for b in every) == 24
    nothing = replace(rows, advantages=torch.zeros_like(advantages))
    batches = list(RolloutLoader(lambda: nothing, TokenMean(), batch, batch.micro_batches(6)))
    assert [len(b) for b in batches] == [0] * 5 + [1]
    assert not batches[-1].mask.any()


def test_micro_batches_by_tokens():
    rows = shaped(ragged(0))
    batch = Batch(prompts=4, micro_batch=24, micro_batch_tokens=30)
    batches = [b for b in RolloutLoader(lambda: rows, TokenMean(), batch, batch.micro_batches(6)) if len(b)]
    assert sum(len(b) for b in batches) == 24
    assert all(len(b) * (2 + b.mask.shape[1]) <= 30 for b in batches)
    assert len(batches) < 24


def data(rank: int = 0, ranks: int = 1, size: int = 6) -> RLData:
    problems = tuple(Problem(prompt=str(i), answer="", source="") for i in range(size))
    encoded = EncodedProblems(problems=problems, ids=tuple((i,) for i in range(size)), pad_id=0, dropped=0)
    made = RLData(train=encoded, held_out=encoded)
    module = SimpleNamespace(seed=0, validation=SimpleNamespace(prompts_per_batch=4))
    made.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, lightning_module=module)  # pyright: ignore
    return made


def names(prompts) -> list[str]:
    return [problem.prompt for problem in prompts.problems]


def test_each_round_holds_every_problem_once_in_a_new_order():
    one = data()
    rounds = [names(one.next_prompts(4)) + names(one.next_prompts(2)) for _ in range(3)]
    assert all(sorted(r) == [str(i) for i in range(6)] for r in rounds)
    assert rounds[0] != rounds[1]
    assert names(data().next_prompts(6)) == rounds[0]
    assert sorted(names(data().next_prompts(12))) == sorted(rounds[0] + rounds[1])


def test_the_order_of_a_pass_is_shuffled_once(monkeypatch):
    shuffled = []
    original = RLData._shuffle
    monkeypatch.setattr(RLData, "_shuffle", lambda self, index: shuffled.append(index) or original(self, index))
    one = data()
    received = [name for _ in range(9) for name in names(one.next_prompts(4))]
    assert shuffled == [0, 1, 2, 3, 4, 5]
    assert len(one.orders) <= 2
    generators = [torch.Generator().manual_seed(index) for index in range(6)]
    assert received == [str(i) for generator in generators for i in torch.randperm(6, generator=generator).tolist()]
    one.module.seed = 1  # another module
    assert names(one.next_prompts(6)) == [
        str(i) for i in torch.randperm(6, generator=torch.Generator().manual_seed(1_000_003 + 6)).tolist()
    ]


def test_ranks_get_different_problems():
    received = [names(data(rank, ranks=2).next_prompts(3)) for rank in range(2)]
    assert sorted(received[0] + received[1]) == [str(i) for i in range(6)]


def test_the_position_survives_a_checkpoint():
    whole, first, second = data(), data(), data()
    expected = names(whole.next_prompts(4)) + names(whole.next_prompts(7))
    start = names(first.next_prompts(4))
    second.load_state_dict(first.state_dict())
    assert start + names(second.next_prompts(7)) == expected


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_another_number_of_ranks_goes_on_behind_the_furthest(ranks):
    """One of two ranks has seen 2 prompts, the other 1: the first 4 positions are skipped, whichever rank had them."""
    first, second = data(0, 2), data(1, 2)
    first.next_prompts(2)
    second.next_prompts(1)
    saved = {"ranks": [first.state_dict()["ranks"][0], second.state_dict()["ranks"][0]]}
    order = names(data().next_prompts(24))
    received = []
    for rank in range(ranks):
        now = data(rank, ranks)
        now.load_state_dict(saved)
        received.append(names(now.next_prompts(2)))
    if ranks == 2:  # as many as before: each where it was
        assert received == [[order[4], order[6]], [order[3], order[5]]]
    else:
        start = {1: 4, 3: 6}[ranks]  # 4 places are 2 rounds of three ranks
        assert received == [[order[start + rank + ranks * i] for i in range(2)] for rank in range(ranks)]


def test_printing_the_data_samples_nothing():
    """Lightning's own form iterates over the loaders, and the loader for training samples a rollout batch."""
    assert str(data()) == "RLData: 6 problems, 6 held-out problems"


def test_held_out_problems_come_whole_in_order_over_ranks():
    (loader,) = data().val_dataloader()
    assert [names(batch) for batch in loader] == [["0", "1", "2", "3"], ["4", "5"]]
    assert len(loader) == 2
    shared = [name for rank in range(2) for batch in data(rank, 2).val_dataloader()[0] for name in names(batch)]
    assert sorted(shared) == [str(i) for i in range(6)]


def test_every_rank_has_as_many_validation_batches_and_fills_them_with_padding():
    """Five problems in batches of one: rank 1 of two has two, and a batch of padding."""
    loaders = [PromptLoader(data(size=5).held_out, rank, 2, 1) for rank in range(2)]
    assert [[names(batch) for batch in loader] for loader in loaders] == [[["0"], ["2"], ["4"]], [["1"], ["3"], ["0"]]]
    assert [[batch.padding for batch in loader] for loader in loaders] == [[False] * 3, [False, False, True]]
    assert [len(loader) for loader in loaders] == [3, 3]
    short = list(PromptLoader(data(size=3).held_out, 1, 2, 2))
    assert [(names(batch), batch.padding) for batch in short] == [(["1"], False)]


@pytest.mark.parametrize("two", [("trainer.devices=2",), ("trainer.devices=[0,1]",), ("trainer.num_nodes=2",)])
def test_the_ranks_that_the_config_names_are_reckoned_with_before_anything_is_loaded(two, tmp_path, monkeypatch):
    two = ("strategy=ddp", *two)
    monkeypatch.setattr(HFPolicy, "tokenizer", lambda *_: pytest.fail("something was loaded"))
    message = refused(monkeypatch, tmp_path, *SHORT, *two, "batch.prompts=7")
    assert "batch.prompts=7 cannot be divided among 2 ranks" in message
    # 8 prompts x 4 completions: 32 rows on one rank, in which 32 minibatches have one row each; 16 on each of two.
    with pytest.raises(pytest.fail.Exception, match="something was loaded"):
        refused(monkeypatch, tmp_path, *SHORT, "batch.minibatches=32")
    assert "batch.minibatches=32 does not divide" in refused(
        monkeypatch, tmp_path / "two", *SHORT, *two, "batch.minibatches=32"
    )
