"""On-policy distillation: a teacher scores the policy's tokens, alone or beside the reward."""

from dataclasses import replace

import pytest
import torch

from rlmod.correction.distillation import Distillation
from rlmod.loss.clipped_surrogate import ClippedSurrogate
from rlmod.model.policy import HFPolicy
from rlmod.reference.teacher import Teacher
from rlmod.shaper.uniform import Uniform
from rlmod.shaper.zero import Zero
from rlmod.types import build_rollouts
from tests.agreed import agreed, value_and_norm
from tests.command_line import SHORT, refused
from tests.rollouts import SEEDS, ragged
from tests.runs import finished, metrics


def test_by_hand():
    # pi_old 0.4, the teacher 0.8 and 0.1: log 2 and -2 log 2, beside an advantage of 0.5 with half the weight.
    rows = build_rollouts(
        mask=torch.ones(1, 2, dtype=torch.bool),
        logprobs=torch.tensor([[0.4, 0.4]]).log(),
        reference_logprobs=torch.tensor([[0.8, 0.1]]).log(),
    )
    alone = Distillation()(replace(rows, advantages=Zero()(rows)))
    torch.testing.assert_close(alone.advantages, torch.tensor([[0.693147, -1.386294]]), atol=1e-6, rtol=0)
    beside = Distillation(weight=0.5)(replace(rows, advantages=torch.tensor([[0.5, 0.5]])))
    torch.testing.assert_close(beside.advantages, torch.tensor([[0.846574, -0.193147]]), atol=1e-6, rtol=0)


def test_the_step_on_the_shared_data():
    lp, rows = agreed()
    loss = ClippedSurrogate(clip_low=0.2, clip_high=0.28)
    alone = Distillation()(replace(rows, advantages=Zero()(rows).double()))
    assert value_and_norm(loss, lp, alone) == pytest.approx((-0.05640460, 0.02268556), abs=1e-8)
    beside = Distillation(weight=0.5)(replace(rows, advantages=Uniform()(rows)))
    assert value_and_norm(loss, lp, beside) == pytest.approx((-0.15932975, 0.09441033), abs=1e-8)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_teacher_that_equals_the_policy_adds_nothing_and_a_guides_tokens_are_left_alone(seed):
    rows = ragged(seed)
    rows = replace(rows, advantages=Uniform()(rows), reference_logprobs=rows.logprobs)
    assert torch.equal(Distillation()(rows).advantages, rows.advantages)
    other = replace(rows, reference_logprobs=rows.logprobs - 1)
    assert torch.equal(Distillation(weight=0)(other).advantages, rows.advantages)
    from_guide = torch.arange(len(rows)) % 2 == 0
    found = Distillation()(replace(other, from_guide=from_guide)).advantages
    torch.testing.assert_close(found, rows.advantages - (rows.mask & ~from_guide[:, None]).double())


def test_a_teacher_with_another_vocabulary_is_refused():
    teacher = HFPolicy(path="strong")
    tokenizer = teacher.tokenizer()
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(
        ValueError, match=r"reference\.policy\.path=strong.*for example '<think>'.*scores the policy's token ids"
    ):
        Teacher(policy=teacher).prepare([], tokenizer)


def test_a_teacher_that_does_not_exist_is_named_by_its_key(monkeypatch, tmp_path):
    said = refused(monkeypatch, tmp_path, "experiment=distill", "reference=teacher", "reference.policy.path=nowhere")
    assert "reference.policy.path=nowhere: the tokenizer cannot be loaded" in said


def test_without_an_advantage_from_anywhere_nothing_would_train(monkeypatch, tmp_path):
    said = refused(monkeypatch, tmp_path, "experiment=distill", "correction=[]", "reference=none")
    assert "shaper=zero without a correction or a regularizer" in said


def test_it_needs_a_reference_and_a_teacher_needs_a_path(monkeypatch, tmp_path):
    said = refused(monkeypatch, tmp_path, "correction=[distillation]")
    assert "correction.distillation reads reference_logprobs, and there is no reference" in said
    assert "reference.policy.path is missing" in refused(
        monkeypatch, tmp_path, "experiment=distill", "reference=teacher"
    )
    with pytest.raises(ValueError, match=r"correction\.distillation\.weight must be finite and not negative, got -1"):
        Distillation(weight=-1)


def test_without_a_reward_that_trains_no_warning_speaks_of_signal(tmp_path):
    """No completion is ever correct, so every group is without signal; the teacher trains the policy all the same."""
    impossible = ("experiment=distill", *SHORT, "reward.correct=0", "trainer.max_epochs=2", "batch.minibatches=1")
    run = finished(tmp_path / "run", *impossible)
    assert "has signal" not in (run / "train.log").read_text(encoding="utf-8")
    other = finished(tmp_path / "other", *SHORT, "reward.correct=0", "trainer.max_epochs=1")
    assert "has signal" in (other / "train.log").read_text(encoding="utf-8")
    assert all(float(row["train/grad_norm"]) > 0 for row in metrics(run) if row.get("train/grad_norm"))
