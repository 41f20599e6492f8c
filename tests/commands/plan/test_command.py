"""rlmod-plan as a user calls it: the overrides of a run work unchanged, and what is wrong is named by its key."""

import json
import subprocess
import sys

import pytest

from rlmod.commands.plan import memory, plan
from rlmod.commands.plan.read import run_from_config
from rlmod.commands.plan.run import Adapter
from tests.command_line import answer, run_command
from tests.config.composing import ROOT, composed

FILES = ("data.path=train.jsonl", "data.validation_path=test.jsonl")
PLAIN = (
    "experiment=gtpo", "size=paper_7b", "sampler=hf", "batch.minibatches=1", "policy.gradient_checkpointing=false",
    "validation.prompts_per_batch=8", "trainer.num_nodes=1", *FILES,
)  # fmt: skip
"""The paper's size without what makes it fit."""
PAPER = (*PLAIN, "policy.path=Qwen/Qwen2.5-7B", "strategy=fsdp2", "trainer.devices=64")
SINGLE = (*PLAIN, "strategy=single", "trainer.devices=1")


def planned(*overrides):
    return run_from_config(composed(*overrides, name="plan"))


def command(monkeypatch, *overrides):
    run_command(monkeypatch, plan, "plan", overrides)


def test_the_paper_s_setting_on_64_gpus(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, *PAPER, "policy.gradient_checkpointing=true", "plan.held_out_problems=30")
    printed = capsys.readouterr().out
    for expected in (
        "7.62 B weights",
        "fsdp2 on 64 x H100",
        "32 completions per rollout batch",
        "fits: ",
        "activations",
        "KV cache",
        "sampling",
    ):
        assert expected in printed
    assert list(tmp_path.iterdir()) == []  # a plan leaves nothing behind


def test_what_does_not_fit_says_what_would(monkeypatch, capsys):
    command(monkeypatch, "experiment=gsm8k", *FILES, "policy.path=Qwen/Qwen2.5-7B", "policy.dtype=float32")
    printed = capsys.readouterr().out
    assert "does not fit: " in printed
    assert "more ranks, an adapter, or a smaller policy" in printed  # 16 bytes per weight are 114 GiB on one rank
    command(monkeypatch, *SINGLE, "policy.path=Qwen/Qwen2.5-0.5B", "data.validation=null")
    advised = capsys.readouterr().out.split("the cheapest change that makes it fit: ")[1].splitlines()[0]
    command(monkeypatch, *SINGLE, "policy.path=Qwen/Qwen2.5-0.5B", "data.validation=null", *advised.split())
    assert "\nfits: " in capsys.readouterr().out


def test_overrides_of_a_run_reach_the_plan():
    run = planned(*PAPER, "trainer.strategy.reduced_precision=bfloat16", "policy.dtype=float32", "trainer.num_nodes=2")
    assert (run.ranks, run.weight_width, run.gathered_width, run.compute_width, run.casts_weights) == (
        128,
        4,
        2,
        2,
        False,
    )
    assert (run.prompt, run.completion, run.on_policy_rows, run.micro_batch) == (2048, 4096, 16, 4)
    assert planned(*PAPER, "policy.dtype=float32").casts_weights
    assert planned(*PAPER, "trainer.precision=bf16-true", "policy.dtype=float32").weight_width == 2
    lora = planned(*PAPER, "adapter=lora", "policy.adapter.rank=8", "policy.adapter.targets=[q_proj,v_proj]")
    assert lora.adapter == Adapter(rank=8, targets=("q_proj", "v_proj"))
    # 2 prompts a rank, 16 completions and 2 of the guide each; all may come again in the zero-reward batch, with 2 more
    guided = planned(
        *PAPER,
        "guide=policy",
        "guide.policy.path=Qwen/Qwen2.5-32B",
        "zero_reward.weight=1",
        "reference=ema",
        "plan.held_out_problems=30",
    )
    assert (guided.on_policy_rows, guided.guide_rows, guided.rollout_rows) == (32, 8, 2 * 18 + 2 * 20)
    assert guided.guide is not None
    assert guided.reference is not None
    assert (guided.guide.shape.layers, guided.guide.width, guided.reference.width) == (64, 4, 4)
    assert guided.validation_rows == 32
    assert memory.needs_logprob_pass(guided)
    assert (
        planned("plan.prompt_tokens=9", "optimizer._target_=torch.optim.SGD", *gone("betas", "eps")).optimizer_states
        == 0
    )
    states = planned(
        "plan.prompt_tokens=9",
        "optimizer._target_=transformers.Adafactor",
        "+optimizer.relative_step=false",
        *gone("betas", "eps"),
    )
    assert states.optimizer_states == 1  # of no vector but a matrix it keeps less: found by a step, not known
    assert planned("plan.prompt_tokens=9", "trainer.devices=2").strategy == "ddp"  # as Lightning chooses


def gone(*names):
    return [f"~optimizer.{name}" for name in names]


def test_an_adapter_that_a_run_saved_names_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-0.5B", "r": 4, "target_modules": ["q_proj"]})
    )
    run = planned(*SINGLE, f"policy.path={tmp_path}")
    assert run.shape.hidden == 896
    assert run.adapter == Adapter(rank=4, targets=("q_proj",))


VLLM = ("sampler=vllm",)
ENGINES = {
    "as it is": (("sampler=vllm",), 0.5, False),
    "a share": (("sampler=vllm", "sampler.gpu_memory_utilization=0.4"), 0.4, False),
    "sleeping": (
        ("sampler=vllm", "sampler.gpu_memory_utilization=0.4", "sampler.sleep_while_training=true"),
        0.4,
        True,
    ),
    "elsewhere": (("sampler=vllm_server",), 0.0, False),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_of_its_own_is_told_by_its_fields(name):
    overrides, share, sleeps = ENGINES[name]
    sampling = planned(*PAPER, *overrides).sampling
    assert (sampling.engine, sampling.share, sampling.sleeps) == (True, share, sleeps)


REFUSED = {
    "no such folder": (["policy.path=/nowhere"], ["policy.path=/nowhere", "no such folder"]),
    "a folder without a config": (["policy.path=EMPTY"], ["policy.path=", "has no config.json"]),
    "a broken config": (["policy.path=BROKEN"], ["policy.path=", "config.json is not valid JSON"]),
    "half a config": (["policy.path=HALF"], ["policy.path=", "has no 'num_attention_heads'"]),
    "another architecture": (["policy.path=OTHER"], ["policy.path=", "llama, qwen3", "'gpt2'"]),
    "unknown model": (["policy=hf", "policy.path=nobody/nothing-7B"], ["policy.path=nobody/nothing-7B", "Qwen2.5-7B"]),
    "unknown guide": (["guide=policy", "guide.policy.path=nobody/x"], ["guide.policy.path=nobody/x"]),
    "no policy": (["policy=hf"], ["policy.path is missing"]),
    "devices": (["trainer.devices=many"], ["trainer.devices must be a whole number", "'many'"]),
    "devices, auto": (["trainer.devices=auto"], ["trainer.devices must be a whole number", "trainer.devices=8"]),
    "no devices": (["trainer.devices=0"], ["trainer.devices must be a whole number", "0"]),
    "nodes": (["trainer.num_nodes=1.5"], ["trainer.num_nodes must be a whole number", "1.5"]),
    "ranks": (["trainer.devices=5"], ["batch.prompts=32 cannot be divided among 5 ranks"]),
    "minibatches": (["batch.minibatches=33"], ["batch.minibatches=33", "256 completions", "32, 64"]),
    "strategy": (["trainer.strategy=deepspeed"], ["trainer.strategy=deepspeed", "ddp, fsdp and fsdp2"]),
    "precision": (["trainer.precision=8-bit"], ["trainer.precision=8-bit", "bf16-mixed"]),
    "machine": (["hardware=abacus"], ["hardware/abacus", "h100"]),
    "memory": (["hardware.memory_gib=0"], ["hardware.memory_gib must be above 0"]),
    "share": (["hardware.mfu=40"], ["hardware.mfu must be a share above 0 and at most 1, got 40"]),
    "reserve": (["hardware.reserve_gib=90"], ["hardware.reserve_gib=90 must be below hardware.memory_gib=79.1"]),
    "text for a rate": (["hardware.bf16_tflops=fast"], ["hardware.bf16_tflops must be a number", "'fast'"]),
    "draws": (["plan.draws=0.5"], ["plan.draws must be at least 1"]),
    "lengths": (["plan.mean_completion_tokens=0"], ["plan.mean_completion_tokens must be null or at least 1"]),
    "any length": (["plan.prompt_tokens=null"], ["data.encoder.max_tokens is null", "plan.prompt_tokens=N"]),
    "limit": (["sampler.max_new_tokens=long"], ["sampler.max_new_tokens must be a whole number", "'long'"]),
    "engine's share": (
        [*VLLM, "sampler.gpu_memory_utilization=2"],
        ["sampler.gpu_memory_utilization must be at least 0 and below 1, got 2"],
    ),
    "targets": (
        ["adapter=lora", "policy.adapter.targets=[query]"],
        ["policy.adapter.targets holds 'query'", "q_proj"],
    ),
    "zero-reward without a guide": (["zero_reward.weight=1"], ["zero_reward.weight=1", "guide=policy"]),
    "unknown key": (["batch.micro=1"], ["unknown key batch.micro", "micro_batch"]),
    "optimizer's argument": (["+optimizer.lrr=1"], ["optimizer.lrr", "AdamW"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_by_its_key(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for folder, text in {
        "EMPTY": None,
        "BROKEN": "{",
        "HALF": '{"model_type": "qwen2"}',
        "OTHER": '{"model_type": "gpt2"}',
    }.items():
        (tmp_path / folder).mkdir()
        if text is not None:
            (tmp_path / folder / "config.json").write_text(text)
    overrides, expected = REFUSED[name]
    placed = [
        o.replace("policy.path=", f"policy.path={tmp_path}/") if o.rpartition("=")[2].isupper() else o
        for o in overrides
    ]
    message = answer(lambda: command(monkeypatch, "plan.prompt_tokens=16", *placed))
    missing = [part for part in expected if part not in message]
    assert not missing, message


def test_it_imports_neither_transformers_nor_lightning_which_take_seconds():
    program = (
        "import sys\n"
        "from rlmod.commands.plan import main\n"
        "main()\n"
        "print('heavy:', [m for m in ('lightning', 'transformers', 'torch._dynamo') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *PAPER, "adapter=lora", "reference=base"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=False,
    )
    assert "heavy: []" in done.stdout, done.stdout + done.stderr


def test_the_rows_of_a_validation_are_those_of_the_set_with_most_completions():
    """Thirty problems on 64 ranks are one per rank: 32 completions of each for AIME, one for GSM8K."""
    words = (*PAPER, "plan.held_out_problems=30")
    assert planned(*words, "benchmark=[gsm8k,aime24]").validation_rows == 32
    assert planned(*words, "benchmark=[gsm8k,aime24]", "data.validation=null").validation_rows == 32
    assert planned(*words, "benchmark=gsm8k", "data.validation=null").validation_rows == 1
    assert planned(*words, "data.validation=null").validation_rows == 0
    with pytest.raises(
        ValueError, match=r"benchmark\.aime24\.completions_per_prompt must be a whole number, at least 1"
    ):
        planned(*words, "benchmark=aime24", "benchmark.aime24.completions_per_prompt=0")
