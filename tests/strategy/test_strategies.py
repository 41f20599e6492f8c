"""One process, two by DDP, two by FSDP2: the same steps on the same global batch. Real processes, over gloo."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

PARTS = '''
import torch
from rlmod.sampler.hf import HF
from rlmod.types import Rollouts

class Scripted(HF):
    """Completions that depend on the prompt alone, so that it does not matter which rank has it."""
    def __call__(self, policy, prompts, seed):
        g, t = self.completions_per_prompt, self.max_new_tokens
        ids, lengths = [], []
        for problem in prompts.problems:
            draw = torch.Generator().manual_seed(sum(map(ord, problem.source)))
            ids.append(torch.randint(3, 99, (g, t), generator=draw))
            lengths.append(torch.randint(1, t + 1, (g,), generator=draw))
        group = torch.arange(len(prompts)).repeat_interleave(g)
        mask = torch.arange(t) < torch.cat(lengths)[:, None]
        return Rollouts(prompt_ids=prompts.ids[group], prompt_mask=prompts.mask[group], completion_ids=torch.cat(ids),
                        mask=mask, group=group, truncated=torch.zeros(len(group)).bool())

def parity(texts):
    return [float(len(completion) % 2) for completion in texts.completions]
'''
SETTINGS = (
    "debug=short", "sampler._target_=parts.Scripted", "sampler.max_new_tokens=12", "reward._target_=parts.parity",
    "~reward.pattern", "~reward.right", "~reward.wrong", "data.validation=null", "shaper=token_entropy",
    "trainer.max_epochs=3", "optimizer.lr=1e-3", "batch.updates=1", "callbacks.completions.every=0",
    "trainer.accelerator=cpu", "callbacks.checkpoints.every=1", "reference=frozen", "penalty=[kl]", "penalty.kl.weight=0.1",
)  # fmt: skip
STRATEGIES = {
    "ddp": ("strategy=ddp", "trainer.devices=2"),
    "fsdp": ("strategy=fsdp", "trainer.devices=2"),
    "fsdp2": ("strategy=fsdp2", "trainer.devices=2"),
    "fsdp2, sharded": ("strategy=fsdp2", "trainer.devices=2", "trainer.strategy.sharded_checkpoints=true"),
}


def command(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    (folder / "parts.py").write_text(PARTS)
    words = [Path(sys.executable).with_name("rlmod-train"), *SETTINGS, *overrides]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)


def finished(folder: Path, *overrides: str) -> str:
    process = command(folder, *overrides)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def measured(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reward/mean"]]
    return [{k: float(v) for k, v in row.items() if v and not k.startswith(("time/", "speed/"))} for row in rows]


def weights(run: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{step:06d}" / "policy").state_dict()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    finished(folder, "output=run")
    return folder / "run"


@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_take_the_steps_of_one_and_go_on_after_a_kill(name, one, tmp_path):
    overrides = (*STRATEGIES[name], "output=run")
    process = command(tmp_path, *overrides)
    try:  # killed after its first checkpoint, both ranks, in the middle of whatever they do
        deadline = time.time() + 180
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert process.poll() is None, process.communicate()[0]
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        subprocess.run(["pkill", "-KILL", "-P", str(process.pid)], check=False)
        process.kill()
        process.communicate(timeout=60)
    output = finished(tmp_path, *overrides)
    assert "going on from" in output or "has come to its end" in output
    for mine, single in zip(measured(tmp_path / "run"), measured(one), strict=True):
        assert mine.keys() == single.keys()
        assert mine == pytest.approx(single, abs=1e-5, rel=1e-4)
        for column in ("train/loss", "train/grad_norm", "train/kl"):
            assert mine[column] == pytest.approx(single[column], abs=1e-5), column
    expected = weights(one)
    for key, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)
    tokens = [json.loads((run / "result.json").read_text())["tokens"] for run in (tmp_path / "run", one)]
    assert tokens[0] == tokens[1]
    assert "Traceback" not in output
    assert "recommended to use" not in output


def test_another_number_of_ranks_cannot_go_on(one, tmp_path):
    (tmp_path / "parts.py").write_text(PARTS)
    process = command(tmp_path, *STRATEGIES["ddp"], f"resume={one}", "output=run")
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "the checkpoint was made by 1 ranks, this run has 2" in output


def test_a_number_of_ranks_that_does_not_divide_the_prompts_is_refused(tmp_path):
    process = command(tmp_path, *STRATEGIES["ddp"], "batch.prompts=7", "batch.micro_batch=28", "output=run")
    output, _ = process.communicate(timeout=180)
    assert process.returncode != 0
    assert "batch.prompts=7 cannot be shared out among 2 ranks" in output
    assert "Traceback" not in output


def test_a_rank_that_dies_ends_the_others(tmp_path):
    (tmp_path / "dying.py").write_text(
        "import os, signal\n"
        "def reward(texts):\n"
        "    if os.environ.get('LOCAL_RANK') == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [float(len(c) % 2) for c in texts.completions]\n"
    )
    process = command(tmp_path, *STRATEGIES["ddp"], "reward._target_=dying.reward", "output=run")
    started = time.time()
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.time() - started < 100, output
    assert not os.path.exists(tmp_path / "run" / "result.json")
