"""The door for Python: light to import, the same results as the commands, and settings that cannot be right are refused."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from transformers import AutoModelForCausalLM

import rlmod
from rlmod.regularizer.kl import KL
from rlmod.reward.exact_match import ExactMatch
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.training.callbacks.throughput import Throughput
from tests.command_line import SHORT, run_eval, run_train
from tests.config.composing import composed
from tests.plain_trainer import SETTINGS, build_components, module_and_data, plain_trainer


def test_importing_it_is_light():
    """It takes about 0.01 s, because it imports nothing but the standard library."""
    code = "import sys; before = set(sys.modules); import rlmod; print(*(set(sys.modules) - before), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages = {name.split(".")[0] for name in done.stdout.split()}
    assert packages - set(sys.stdlib_module_names) == {"rlmod"}


def test_every_public_name_is_there_and_an_unknown_one_is_told():
    for name in rlmod.__all__:
        assert getattr(rlmod, name) is not None
    assert set(rlmod.__all__) <= set(dir(rlmod))
    with pytest.raises(AttributeError, match="'rlmod' has no attribute 'trian'"):
        rlmod.trian  # noqa: B018


def command_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return AutoModelForCausalLM.from_pretrained(newest / "policy").state_dict()


def test_a_plain_trainer_trains_what_the_command_trains_bit_for_bit(tmp_path, monkeypatch):
    run_train(monkeypatch, *SETTINGS, f"output={tmp_path / 'run'}")
    module, data = module_and_data(build_components())
    trainer = plain_trainer()
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4  # two iterations of two optimizer steps, not one per micro-batch
    assert data.micro_batches(1) == 4
    for name, weight in command_weights(tmp_path / "run").items():
        assert torch.equal(module.policy.state_dict()[name], weight), name


def test_sanity_validation_changes_no_weight():
    components = build_components()
    weights = []
    for sanity in (0, 2):
        module, data = module_and_data(components)
        data.held_out = replace(data.train, problems=data.train.problems[:8], ids=data.train.ids[:8])
        plain_trainer(max_epochs=1, num_sanity_val_steps=sanity).fit(module, datamodule=data)
        weights.append(module.policy.state_dict())
        assert module.held_out["problems"] == 8
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_values_of_a_gradient_are_clipped_and_a_step_without_signal_is_none_to_clip():
    components = replace(build_components(), reward=lambda texts: [0.0] * len(texts))
    module, data = module_and_data(components)
    before = {name: weight.clone() for name, weight in module.policy.state_dict().items()}
    plain_trainer(max_epochs=1, gradient_clip_algorithm="value").fit(module, datamodule=data)
    assert all(torch.equal(weight, before[name]) for name, weight in module.policy.state_dict().items())


class SlowValidation(L.Callback):
    def on_validation_batch_start(self, *args, **kwargs):
        time.sleep(3)


def test_validation_counts_neither_as_training_nor_in_tokens_per_second():
    module, data = module_and_data(build_components())
    data.held_out = replace(data.train, problems=data.train.problems[:8], ids=data.train.ids[:8])
    trainer = plain_trainer(max_epochs=1, callbacks=[Throughput(), SlowValidation()])
    trainer.fit(module, datamodule=data)
    measured = {name: float(value) for name, value in trainer.callback_metrics.items()}
    seconds = measured["time/collect"] + measured["time/train"]
    assert 0 < measured["time/train"] < 3
    assert measured["speed/tokens_per_second"] == pytest.approx(measured["completions/tokens"] / seconds, rel=1e-3)


WRONG = {
    "accumulate_grad_batches": (3, "an optimizer step has 4 micro-batches"),
    "limit_train_batches": (1, "would cut an iteration"),
    "overfit_batches": (1, "would cut an iteration"),
    "fast_dev_run": (True, "would cut an iteration"),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_of_a_trainer_that_cannot_be_right_are_refused(name):
    value, message = WRONG[name]
    module, data = module_and_data(build_components())
    with pytest.raises(ValueError, match=rf"trainer\.{name}={value}.*{message}"):
        plain_trainer(**{name: value}).fit(module, datamodule=data)


@pytest.mark.parametrize("name", WRONG)
def test_so_are_they_on_the_command_line(name, tmp_path, monkeypatch):
    value, message = WRONG[name]
    with pytest.raises(SystemExit) as stopped:
        run_train(monkeypatch, *SETTINGS, f"+trainer.{name}={value}", f"output={tmp_path / 'run'}")
    assert message in str(stopped.value)


def test_a_schedule_of_accumulation_is_refused():
    module, data = module_and_data(build_components())
    with pytest.raises(ValueError, match="GradientAccumulationScheduler"):
        plain_trainer(callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})]).fit(module, datamodule=data)


def test_a_run_without_an_end_is_refused():
    module, data = module_and_data(build_components())
    with pytest.raises(ValueError, match=r"trainer\.max_epochs=-1: give the number of iterations"):
        plain_trainer(max_epochs=-1, max_time={"seconds": 1}).fit(module, datamodule=data)


def test_a_trainer_can_train_another_module_afterwards():
    trainer = plain_trainer(max_epochs=1)
    for override, micro_batches in (("batch.micro_batch=4", 4), ("batch.micro_batch=8", 2)):
        module, data = module_and_data(build_components(override))
        trainer.fit(module, datamodule=data)
        assert data.micro_batches(1) == micro_batches
        assert (trainer.accumulate_grad_batches, trainer.limit_val_batches) == (1, 1.0)


def test_components_that_do_not_fit_are_refused_without_the_command_too():
    module, data = module_and_data(
        build_components("sampler.completions_per_prompt=1", "batch.prompts=16", "shaper=uniform")
    )
    with pytest.raises(ValueError, match="compares the completions of a prompt with each other"):
        plain_trainer().fit(module, datamodule=data)
    module, data = module_and_data(build_components())
    module.regularizer = {"kl": KL(weight=0.1)}
    with pytest.raises(ValueError, match=r"regularizer\.kl reads reference_logprobs, and there is no reference"):
        plain_trainer().fit(module, datamodule=data)
    module, data = module_and_data(build_components())
    module.zero_reward = ZeroReward(weight=0.5)
    with pytest.raises(ValueError, match="without a guide"):
        plain_trainer().fit(module, datamodule=data)


def test_components_are_prepared_without_the_command_too():
    seen: list[int] = []

    class Preparing(ExactMatch):
        def prepare(self, problems, tokenizer):
            seen.append(len(problems))

    module, data = module_and_data(build_components())
    module.reward = Preparing(pattern="(.)$")
    module.validation = replace(module.validation, reward=module.reward)
    plain_trainer(max_epochs=1).fit(module, datamodule=data)
    assert seen == [len(data.train), 0]  # once, for training and for validation


@pytest.mark.parametrize("step", [1, 2])
def test_a_plain_trainer_resumes_only_from_the_end_of_an_iteration(step, tmp_path):
    checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    module, data = module_and_data(build_components())
    plain_trainer(enable_checkpointing=True, callbacks=[checkpoints]).fit(module, datamodule=data)
    again, data = module_and_data(build_components())
    resume = partial(plain_trainer().fit, again, datamodule=data, ckpt_path=tmp_path / f"step={step}.ckpt")
    if step == 1:
        with pytest.raises(ValueError, match="step 1 is from the middle of an iteration"):
            resume()
        return
    resume()
    for name, weight in module.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], weight), name


def test_only_four_arguments_of_the_module_and_one_of_the_data_are_required():
    components = build_components()
    tokenizer = components.policy.tokenizer()
    module = rlmod.RLModule(
        policy=components.policy.model(tokenizer),
        tokenizer=tokenizer,
        sampler=components.sampler,
        reward=components.reward,
    )
    assert module.batch == rlmod.Batch()
    rlmod.RLData(train=components.encoder.encode(components.train()[:4], tokenizer))


def test_train_and_evaluate_from_python_are_the_commands(tmp_path, monkeypatch):
    """And the policy of a run's checkpoint has one number: its own validation's."""
    short = (*SHORT, "trainer.max_epochs=2", "validation.sampler.completions_per_prompt=2")
    run_train(monkeypatch, *short, f"output={tmp_path / 'command'}")
    result = rlmod.train([*short, f"output={tmp_path / 'python'}"])
    ours, theirs = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("python", "command"))
    assert ours["held_out"] == theirs["held_out"] == result["held_out"]
    assert result["folder"] == str(tmp_path / "python")
    first, second = command_weights(tmp_path / "python"), command_weights(tmp_path / "command")
    assert all(torch.equal(value, second[name]) for name, value in first.items())

    policy = sorted((tmp_path / "python" / "checkpoints").glob("step-*"))[-1] / "policy"
    evaluation = [
        "policy=hf", f"policy.path={policy}", "data.validation.size=64", "prompts_per_batch=64",
        "sampler.completions_per_prompt=2", "sampler.max_new_tokens=40", "device=cpu", f"output={tmp_path / 'eval'}",
    ]  # fmt: skip
    summary = rlmod.evaluate(evaluation)
    assert summary["mean@2"]["value"] == pytest.approx(ours["held_out"]["after"], abs=1e-12)
    run_eval(monkeypatch, *evaluation[:-1], f"output={tmp_path / 'again'}")
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["mean@2"] == summary["mean@2"]


@pytest.mark.parametrize(
    ("call", "overrides", "message"),
    [
        (rlmod.train, ["shapr=uniform"], "did you mean shaper"),
        (rlmod.train, "experiment=quickstart", "overrides must be a list"),
        (rlmod.train, ["output=null"], "output is missing"),
        (rlmod.train, ["loss.clip_low=-1", "output=unused"], "clip_low"),
        (rlmod.train, ["policy._target_=no.such.Policy", "output=unused"], "cannot import 'no.such.Policy'"),
        (rlmod.evaluate, ["data.validation=null", "output=unused"], "data.validation=null"),
        (rlmod.evaluate, ["reward=null"], "a group got null: give one of its options"),
    ],
)
def test_a_mistake_is_a_value_error_in_python(call, overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(overrides)


def test_a_composed_config_writes_into_its_own_folder(tmp_path):
    """Hydra's settings belong to the process: an earlier run, or the program around, must not decide where this one writes."""
    HydraConfig.instance().cfg = None
    for name in ("first", "second"):
        cfg = composed(*SHORT, "data.validation=null", "trainer.max_epochs=1", f"output={tmp_path / name}")
        rlmod.train(cfg)
    assert HydraConfig.instance().cfg is None
    files = [sorted(file.name for file in (tmp_path / name).glob("*.csv")) for name in ("first", "second")]
    assert files == [["metrics.csv"], ["metrics.csv"]]
    assert len(list((tmp_path / "first" / "checkpoints").glob("step-*"))) == 1


TWO_RANKS = """
import sys, torch
from lightning.pytorch.strategies import DDPStrategy
from tests.plain_trainer import module_and_data, build_components, plain_trainer
module, data = module_and_data(build_components())
trainer = plain_trainer(devices=2, strategy=DDPStrategy(process_group_backend="gloo"))
trainer.fit(module, datamodule=data)
if trainer.is_global_zero:
    torch.save(module.policy.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_ranks_of_a_plain_trainer_train_what_two_ranks_of_the_command_train(tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "two.py").write_text(TWO_RANKS)
    environment = {**__import__("os").environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = partial(subprocess.run, cwd=root, env=environment, check=True, timeout=900, capture_output=True)
    run([sys.executable, str(tmp_path / "two.py"), str(tmp_path / "plain.pt")])
    run([sys.executable, "-m", "rlmod.train", *SETTINGS, "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu",
         f"output={tmp_path / 'run'}"])  # fmt: skip
    plain = torch.load(tmp_path / "plain.pt")
    for name, weight in command_weights(tmp_path / "run").items():
        assert torch.equal(plain[name], weight), name
