"""Whole runs with a guide, a reference, corrections and regularizers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlmod.guide.policy import Policy
from rlmod.model.policy import SHIPPED
from tests.command_line import SHORT, refused, run_train
from tests.runs import metrics, weights

GUIDE = ("guide=policy", "guide.policy.path=strong", "loss=mixed_surrogate", "optimizer.lr=1e-4")


def trained(run: Path) -> list[dict[str, str]]:
    return [row for row in metrics(run) if row["reward/mean"]]


@pytest.mark.slow
def test_with_weight_0_the_zero_reward_recipe_is_dapo_bit_for_bit(tmp_path, monkeypatch):
    shared = (*SHORT, "optimizer.lr=1e-3", "filter.max_generation_batches=3")
    run_train(monkeypatch, "experiment=dapo", *shared, f"output={tmp_path / 'dapo'}")
    off = ("experiment=mixed_zero_reward", "zero_reward.weight=0")
    run_train(monkeypatch, *off, *shared, f"output={tmp_path / 'off'}")
    ours, theirs = weights(tmp_path / "off"), weights(tmp_path / "dapo")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert len(trained(tmp_path / "off")) == 20
    assert any(float(row["train/grad_norm"]) > 0 for row in trained(tmp_path / "off"))


def test_recorded_demonstrations_train_as_the_same_completions_sampled_live(tmp_path, monkeypatch):
    file = tmp_path / "demonstrations.jsonl"
    live = Policy.__call__

    def recording(self, prompts, completions_per_prompt, seed):
        rows = live(self, prompts, completions_per_prompt, seed)
        with file.open("a") as out:
            for row, n in enumerate(rows.mask.sum(1).tolist()):
                record = {
                    "prompt": prompts.problems[int(rows.group[row])].prompt,
                    "completion_ids": rows.completion_ids[row, :n].tolist(),
                    "logprobs": rows.logprobs[row, :n].tolist(),
                    "truncated": bool(rows.truncated[row]),
                }
                out.write(json.dumps(record) + "\n")
        return rows

    monkeypatch.setattr(Policy, "__call__", recording)
    # Every problem is used once: 4 iterations of 8 prompts.
    quick = (*SHORT, *GUIDE, "trainer.max_epochs=4", "data.train.size=32", "data.validation=null")
    run_train(monkeypatch, *quick, f"output={tmp_path / 'live'}")
    demonstrations = ("guide=demonstrations", f"guide.path={file}", "loss=mixed_surrogate", *quick[len(SHORT) + 2 :])
    run_train(monkeypatch, *SHORT, *demonstrations, f"output={tmp_path / 'recorded'}")
    ours = weights(tmp_path / "recorded")
    for name, value in weights(tmp_path / "live").items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=0)
    for a, b in zip(trained(tmp_path / "live"), trained(tmp_path / "recorded"), strict=True):
        assert float(a["guide/reward"]) == float(b["guide/reward"])
        assert float(a["train/loss"]) == pytest.approx(float(b["train/loss"]), abs=1e-6)


@pytest.fixture(scope="module")
def with_everything(tmp_path_factory) -> Path:
    """Guide, zero-reward batch, moving reference, corrections and regularizers at once, two updates a rollout batch."""
    folder = tmp_path_factory.mktemp("run") / "a"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_train(monkeypatch, *EVERYTHING, "trainer.max_epochs=4", f"output={folder}")
    return folder


EVERYTHING = (
    *SHORT, *GUIDE, "guide.completions_per_prompt=1", "filter=dynamic_sampling", "filter.over=own",
    "filter.max_generation_batches=2", "zero_reward.weight=0.5", "reference=ema", "reference.decay=0.5",
    "correction=[overlong_filtering,forking_tokens,truncated_importance]", "regularizer=[kl,entropy_bonus]",
    "batch.minibatches=2", "shaper.pool=own", "sampler.completions_per_prompt=2",
)  # fmt: skip


def test_all_of_it_is_measured(with_everything):
    rows = trained(with_everything)
    assert len(rows) == 4
    for name in ("guide/reward", "guide/tokens", "prompts/rescued", "zero_reward/prompts", "train/guide_ratio"):
        assert all(row[name] for row in rows), name
    assert any(float(row["prompts/rescued"]) > 0 for row in rows)
    for row in rows:
        assert float(row["train/policy_entropy"]) > 0
        assert float(row["train/kl"]) >= 0
        assert float(row["train/guide_ratio"]) > 0
    result = json.loads((with_everything / "result.json").read_text())
    tokens = sum(float(row["completions/tokens"]) + float(row["guide/tokens"]) for row in rows)
    assert result["tokens"] == tokens


def test_guide_and_reference_stay_out_of_policy_and_optimizer(with_everything):
    checkpoint = torch.load(with_everything / "checkpoints" / "step-000008" / "trainer.ckpt", weights_only=False)
    assert all(name.startswith("policy.") for name in checkpoint["state_dict"])
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(list(weights(with_everything))) - 1  # tied head
    # The moving reference is in the checkpoint: neither the start nor the policy.
    reference, policy = checkpoint["reference"], weights(with_everything)
    assert any(not torch.equal(value, policy[name]) for name, value in reference.items())
    folder = with_everything / "checkpoints" / "step-000008" / "policy"
    assert (folder / "model.safetensors").stat().st_size < 1.1 * (SHIPPED / "tiny" / "model.safetensors").stat().st_size


def test_stopped_and_resumed_with_all_of_it_equals_uninterrupted(with_everything, tmp_path, monkeypatch):
    run_train(monkeypatch, *EVERYTHING, "trainer.max_epochs=2", f"output={tmp_path / 'half'}")
    run_train(
        monkeypatch, *EVERYTHING, "trainer.max_epochs=4", f"output={tmp_path / 'rest'}", f"resume={tmp_path / 'half'}"
    )
    resumed = weights(tmp_path / "rest")
    assert all(torch.equal(value, resumed[name]) for name, value in weights(with_everything).items())


@pytest.mark.slow
def test_before_the_first_update_the_policy_is_its_reference(tmp_path, monkeypatch):
    for reference in ("reference=frozen", "reference=base", "reference=ema"):
        folder = tmp_path / reference.split("=")[1]
        adapter = ["adapter=lora"] if reference == "reference=base" else []
        quick = (*SHORT, reference, *adapter, "regularizer=[kl]", "regularizer.kl.weight=0.1", "optimizer.lr=1e-3")
        run_train(monkeypatch, *quick, "trainer.max_epochs=2", f"output={folder}")
        first, second = (float(row["train/kl"]) for row in trained(folder))
        assert abs(first) < 1e-6
        assert second > 1e-5


def test_a_guide_that_fails_everywhere_is_counted_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "__call__", _always_wrong(Policy.__call__))
    quick = (
        "filter=dynamic_sampling", "zero_reward.weight=1", "guide.completions_per_prompt=0",
        "sampler.completions_per_prompt=2",
    )  # fmt: skip
    run_train(monkeypatch, *SHORT, *GUIDE, *quick, "trainer.max_epochs=2", f"output={tmp_path / 'a'}")
    rows = trained(tmp_path / "a")
    failed = [row for row in rows if float(row["zero_reward/prompts"])]
    assert failed
    assert all(float(row["zero_reward/guide_failed"]) == 1 and float(row["prompts/rescued"]) == 0 for row in failed)
    assert all(float(row["train/grad_norm"]) > 0 for row in rows)


def _always_wrong(call):
    def wrong(self, prompts, completions_per_prompt, seed):
        rows = call(self, prompts, completions_per_prompt, seed)
        return replace(rows, completion_ids=torch.where(rows.mask, rows.completion_ids[0, 0], 0))

    return wrong


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reference=base", "regularizer=[kl]"], ["reference=base without an adapter", "adapter=lora"]),
        (["reference=ema", "adapter=lora", "regularizer=[kl]"], ["reference=ema with an adapter", "reference=base"]),
        (["guide=policy", "guide.policy.path=strong", "filter.over=own", "filter=dynamic_sampling",
          "sampler.completions_per_prompt=1", "batch.micro_batch=8"], ["filter.over=own", "at least 2"]),
        (["loss=sequence_surrogate", "correction=[truncated_importance]"], ["TruncatedImportance", "level=sequence"]),
        (["correction=[truncated_importance,masked_importance]"], ["sampler_logprobs", "corrected twice"]),
        (["adapter=lora", "policy.adapter.targets=[nowhere]"], ["policy.adapter.targets", "nowhere"]),
        (["guide=policy", "guide.policy.path=strong", "shaper.pool=own", "sampler.completions_per_prompt=1",
          "batch.micro_batch=8"], ["shaper.pool=own", "at least 2"]),
    ],
)  # fmt: skip
def test_components_that_cannot_work_together_are_refused(overrides, words, tmp_path, monkeypatch):
    message = refused(monkeypatch, tmp_path, *SHORT, *overrides)
    assert all(part in message for part in words), message


def test_settings_that_may_not_do_what_one_expects_are_warned_of(tmp_path, monkeypatch):
    quick = (*SHORT, *GUIDE, "guide.sampler.top_p=0.9", "reference=frozen", "trainer.max_epochs=1")
    with (
        pytest.warns(UserWarning, match=r"guide\.sampler\.top_p=0\.9 with guide\.ratio=guide"),
        pytest.warns(UserWarning, match="reference is unused"),
    ):
        run_train(monkeypatch, *quick, f"output={tmp_path / 'a'}")
    assert (tmp_path / "a" / "result.json").is_file()  # warned of, and done


def test_what_is_logged_of_the_ratios_does_not_depend_on_the_micro_batches(tmp_path, monkeypatch):
    """A micro-batch of guide tokens alone has no ratio of own ones: it counts for nothing, not for 0."""
    quick = (*SHORT, *GUIDE, "trainer.max_epochs=1", "batch.minibatches=1", "guide.ratio=one")
    for size in (48, 2):
        run_train(monkeypatch, *quick, f"batch.micro_batch={size}", f"output={tmp_path / str(size)}")
    whole, cut = (next(row for row in metrics(tmp_path / str(size)) if row["train/ratio"]) for size in (48, 2))
    for name in ("train/ratio", "train/guide_ratio", "train/clip_fraction", "train/guide_clip_fraction"):
        assert float(cut[name]) == pytest.approx(float(whole[name]), abs=1e-5), name
    assert float(whole["train/ratio"]) == pytest.approx(1, abs=1e-4)
    assert 0 < float(whole["train/guide_ratio"]) < 1
