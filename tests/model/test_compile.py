"""policy.compile: the same numbers from layers that torch.compile has made, and nothing made anew for every length."""

import copy

import pytest
import torch
from torch._dynamo import config as dynamo

from rlmod.model import policy, shared_prompts
from rlmod.model.logprobs import logprobs_and_entropy
from rlmod.model.policy import HFPolicy
from rlmod.sampler.hf import HF
from rlmod.types import Problem, Prompts, Rollouts, build_rollouts
from tests.processes import ended, started
from tests.strategy.scripted import SETTINGS, folder_of_runs, measured


def rows(number: int, prompt: int, length: int) -> Rollouts:
    draw = torch.Generator().manual_seed(number)
    return build_rollouts(
        prompt_ids=torch.randint(3, 90, (number, prompt), generator=draw),
        prompt_mask=torch.ones(number, prompt, dtype=torch.bool),
        completion_ids=torch.randint(3, 90, (number, length), generator=draw),
        mask=torch.arange(length) < torch.randint(1, length + 1, (number, 1), generator=draw),
        group=torch.arange(number) // 4,
        truncated=torch.zeros(number, dtype=torch.bool),
    )


def scores_and_gradients(model, rollouts):
    model.zero_grad()
    logprobs, entropy = logprobs_and_entropy(model, rollouts, 0.9)
    (logprobs.mean() + entropy.mean()).backward()
    return [logprobs.detach(), entropy.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.slow
@dynamo.patch(recompile_limit=4, fail_on_recompile_limit_hit=True)  # trained and asked, with and without a mask
def test_the_numbers_are_the_same_whatever_the_sizes():
    specification = HFPolicy(path="tiny", compile=True)
    compiled = specification.model(specification.tokenizer()).double()
    plain = copy.deepcopy(compiled)
    assert all(layer._compiled_call_impl is not None for layer in shared_prompts.layers(compiled))
    assert all(module._compiled_call_impl is None for module in plain.modules())
    for sizes in ((8, 3, 20), (7, 4, 31), (16, 2, 9), (5, 12, 40)):
        rollouts = rows(*sizes)
        assert shared_prompts.find_shared_prompts(compiled, rollouts) is None
        for mine, theirs in zip(*(scores_and_gradients(m, rollouts) for m in (compiled, plain)), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            mine, theirs = (logprobs_and_entropy(m, rollouts, 1.0)[0] for m in (compiled, plain))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    shared = rows(8, 40, 6)
    shared = build_rollouts(**{**vars(shared), "prompt_ids": shared.prompt_ids[torch.arange(8) // 4 * 4]})
    assert shared_prompts.find_shared_prompts(compiled, shared) is not None
    for mine, theirs in zip(*(scores_and_gradients(m, shared) for m in (compiled, plain)), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)
    prompts = Prompts(
        ids=torch.randint(3, 90, (2, 5)),
        mask=torch.ones(2, 5, dtype=torch.bool),
        problems=(Problem(prompt="", answer="", source=""),) * 2,
    )
    mine, theirs = (HF(completions_per_prompt=2, max_new_tokens=24)(m.eval(), prompts, 0) for m in (compiled, plain))
    assert torch.equal(mine.completion_ids, theirs.completion_ids)


@pytest.mark.slow
def test_sharded_layers_take_the_same_steps(tmp_path):
    folder_of_runs(tmp_path)
    sharded = (*SETTINGS, "strategy=fsdp2", "trainer.devices=2")
    for compiled in ("true", "false"):
        ended(started(*sharded, f"policy.compile={compiled}", f"output=run_{compiled}", cwd=tmp_path), seconds=600)
    for mine, theirs in zip(measured(tmp_path / "run_true"), measured(tmp_path / "run_false"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1e-4)
        assert mine != theirs  # other kernels round otherwise


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(policy.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match=r"policy.compile=true: torch.compile needs a C\+\+ compiler"):
        HFPolicy(path="tiny", compile=True)
