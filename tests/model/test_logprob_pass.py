"""When pi_old's log-probabilities and entropies are computed, and when the training step has them for nothing."""

import csv

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlmod.data.arithmetic import Arithmetic
from rlmod.model import logprob_pass
from rlmod.model.logprobs import completion_logprobs
from rlmod.model.policy import HFPolicy
from rlmod.reference.frozen import Frozen
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from tests.command_line import SHORT, run_train
from tests.silent import Silent

TINY = HFPolicy(path="tiny")


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The rows of each forward pass for pi_old's scores."""
    rows: list[int] = []

    def counting(policy, rollouts, *more, **settings):
        rows.append(len(rollouts))
        return real(policy, rollouts, *more, **settings)

    real = logprob_pass.logprobs_and_entropy
    monkeypatch.setattr(logprob_pass, "logprobs_and_entropy", counting)
    return rows


def trained(monkeypatch, folder, *overrides):
    run_train(monkeypatch, *SHORT, "trainer.max_epochs=2", "sampler._target_=tests.silent.Silent",
              "validation.sampler._target_=rlmod.sampler.hf.HF", *overrides, f"output={folder}")  # fmt: skip
    policy = max(folder.glob("checkpoints/step-*/policy"))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return AutoModelForCausalLM.from_pretrained(policy).state_dict(), rows


@pytest.mark.parametrize("loss", ["clipped_surrogate", "sequence_surrogate"])
def test_the_only_training_step_needs_no_scores_before_it(counted, monkeypatch, tmp_path, loss):
    # With a small eps, gradients that are nothing but rounding make steps as long as any other.
    quick = (f"loss={loss}", "aggregation=rollout_mean", "optimizer.lr=1e-3", "optimizer.eps=1e-2")
    waited, rows = trained(monkeypatch, tmp_path / "needed", *quick)
    assert not counted
    assert "completions/entropy" not in rows[0]
    scored, scored_rows = trained(monkeypatch, tmp_path / "always", *quick, "batch.logprob_pass=always")
    assert counted
    assert float(scored_rows[0]["completions/entropy"]) > 0
    for name, weight in waited.items():
        torch.testing.assert_close(weight, scored[name], rtol=0, atol=1e-6, msg=name)
    assert float(rows[0]["train/ratio"]) == 1
    assert float(rows[1]["train/loss"]) == pytest.approx(float(scored_rows[1]["train/loss"]), abs=1e-5)


@pytest.mark.parametrize(
    "reason",
    [
        ["shaper=token_entropy", "loss=clipped_surrogate"],
        ["batch.minibatches=2"],
        ["batch.epochs=2"],
        ["correction=[forking_tokens]"],
        ["policy.path=DROPOUT", "policy.dropout=true"],
        ["guide=policy", "guide.policy.path=strong"],
        [
            "shaper._target_=tests.model.test_logprob_pass.Unknown",
            "~shaper.divide_by_std",
            "~shaper.pool",
            "~shaper.eps",
        ],
    ],
)
def test_scores_are_computed_where_something_reads_them(counted, monkeypatch, tmp_path, reason):
    if reason[0] == "policy.path=DROPOUT":
        model = TINY.model(TINY.tokenizer())
        model.config.attention_dropout = 0.1
        model.save_pretrained(tmp_path / "dropout")
        TINY.tokenizer().save_pretrained(tmp_path / "dropout")
        reason = [f"policy.path={tmp_path / 'dropout'}", *reason[1:]]
    trained(monkeypatch, tmp_path / "run", *reason)
    assert counted


class Unknown:
    """A shaper that does not say what it reads."""

    def __call__(self, rollouts):
        assert rollouts.entropy is not None
        return rollouts.rewards[:, None] * rollouts.mask


def test_the_policy_and_its_reference_are_asked_in_one_sweep():
    prompts = PromptEncoder().encode(Arithmetic(split="held_out", size=6)(), TINY.tokenizer()).batch(range(6))
    policy = TINY.model(TINY.tokenizer()).eval()
    settings = {"completions_per_prompt": 2, "max_new_tokens": 24}
    rollouts, known = Silent(**settings)(policy, prompts, 0), HF(**settings)(policy, prompts, 0)
    reference = Frozen(policy=HFPolicy(path="strong"))
    reference.prepare([], TINY.tokenizer())
    with torch.no_grad():
        found = logprob_pass.logprob_pass(policy, rollouts, 1.0, rows=5, reference=reference)
        torch.testing.assert_close(found.logprobs, known.logprobs, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.entropy, known.entropy, atol=1e-4, rtol=0)
        expected = completion_logprobs(HFPolicy(path="strong").frozen(), rollouts, 1.0)
        torch.testing.assert_close(found.reference_logprobs, expected, atol=1e-5, rtol=0)
        assert logprob_pass.logprob_pass(policy, known, 1.0, rows=64) is known
        waiting = logprob_pass.logprob_pass(policy, rollouts, 1.0, rows=64, pi_old=False, reference=reference)
    assert waiting.logprobs is None
    torch.testing.assert_close(waiting.reference_logprobs, expected, atol=1e-5, rtol=0)
