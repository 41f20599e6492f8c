"""The benchmarks' tools at tiny sizes: both sides do the same work, tables are whole, memory is what was held."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rlmod.data.arithmetic import Arithmetic
from rlmod.model.policy import SHIPPED, HFPolicy
from rlmod.rollout.prompts import PromptEncoder
from rlmod.sampler.hf import HF
from tools import bench_gpu
from tools.bench import against_trl, components, frame, growth, head, peak, savings, scaling, shaping
from tools.bench.__main__ import PAGE, put, tables
from tools.bench.workload import G, Lengths, Workload

ROOT = Path(__file__).parents[2]


def cells(lines: list[str]) -> list[list[str]]:
    """The rows of the tables among these lines, without their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert all(len(row) == len(rows[0]) for row in rows[:2])
    return rows


def test_both_workloads_have_as_many_tokens_and_half_of_the_ragged_groups_have_signal():
    ragged, even = (Workload.of(name, 16, 32) for name in ("ragged", "even"))
    assert (min(ragged.lengths), max(ragged.lengths)) == (8, 256)
    assert set(even.lengths) == {132}
    assert sum(ragged.lengths) == sum(even.lengths) == 128 * 132
    for workload, with_signal in ((ragged, 8), (even, 16)):
        groups = [set(workload.rewards[start : start + G]) for start in range(0, 128, G)]
        assert sum(len(group) == 2 for group in groups) == with_signal


def test_rows_end_where_they_are_told_to_whether_generation_is_interrupted_or_not():
    specification = HFPolicy(path="tiny")
    tokenizer = specification.tokenizer()
    prompts = PromptEncoder().encode(Arithmetic(split="held_out", size=2)(), tokenizer).batch(range(2))
    policy = specification.model(tokenizer).eval()
    wanted = (5, 30, 9, 1, 17, 30, 2, 12)
    lengths = Lengths(wanted, tokenizer.eos_token_id)
    generate, calls = cast(Any, policy).generate, []

    def prescribed(*arguments, logits_processor=(), **settings):
        calls.append(len(settings["input_ids"]))
        return generate(*arguments, logits_processor=[*logits_processor, lengths], **settings)

    cast(Any, policy).generate = prescribed
    rollouts = HF(completions_per_prompt=4, max_new_tokens=30)(policy, prompts, 0)
    assert rollouts.mask.sum(1).tolist() == list(wanted)
    assert len(calls) > 2
    assert rollouts.logprobs[rollouts.mask].isfinite().all()
    assert (rollouts.logprobs[rollouts.mask] < 0).any()  # the policy's own, not those of what it was made to do
    lengths.start()
    ids, mask = (x.repeat_interleave(4, 0) for x in (prompts.ids, prompts.mask))
    whole = cast(Any, policy).generate(
        input_ids=ids, attention_mask=mask.long(), do_sample=True, top_k=0, max_new_tokens=30
    )
    ended = whole[:, ids.shape[1] :] == tokenizer.eos_token_id
    assert (ended.int().argmax(1) + 1).tolist() == list(wanted)


@pytest.mark.slow
def test_our_side_takes_a_step_when_it_is_told_and_answers_by_stage():
    arguments = [str(SHIPPED / "tiny"), "ragged", "2", "8", "24"]
    side = against_trl.Side(sys.executable, "our_side", arguments, ["1+1=", "2*3+4="])
    try:
        answers = [side.step() for _ in range(2)]
    finally:
        side.close()
    assert [answer["tokens"] for answer in answers] == [sum(Workload.of("ragged", 2, 8, 24).lengths)] * 2
    for answer in answers:
        stages = against_trl.stages(answer)
        assert min(stages.values()) > 0
        assert sum(stages.values()) == pytest.approx(answer["whole"])
    assert len(against_trl.compared(answers, answers, 0.6).split("|")) == 8
    assert "**1.000**" in against_trl.compared(answers, answers, 0.6)


@pytest.mark.slow
def test_a_side_that_fails_says_why():
    with pytest.raises(SystemExit, match="nowhere"):
        against_trl.Side(sys.executable, "our_side", ["/nowhere", "ragged", "2", "8", "24"], ["1+1="])


def test_peak_memory_is_that_of_the_tensors_held_at_once():
    peak.own_pages()
    peak.of(lambda: torch.ones(2**18))
    mebibytes = [peak.of(lambda n=n: torch.ones(n * 2**18) + 1)[1] / 2**20 for n in (8, 32)]
    peak.recycled_pages()
    assert mebibytes == pytest.approx([16, 64], abs=4)  # both operands of a sum


def test_every_component_is_measured():
    rows = cells(components.table(1, rows=16, length=8))[1:]
    measured = {(stage, option.strip("`")) for stage, option, *_ in rows}
    assert measured == {
        (stage, file.stem)
        for stage in ("shaper", "correction", "aggregation", "loss", "regularizer")
        for file in (ROOT / "conf" / stage).glob("*.yaml")
        if file.stem != "none"
    }
    # shaper=zero makes a tensor of zeros, in less than the table's hundredths of a millisecond.
    assert all(float(row[2]) > 0 for row in rows if row[1] != "`zero`")


def test_a_collection_of_ready_rollouts_keeps_the_groups_with_signal():
    assert growth.collection(components.ready(64, 10), growth.no_text) == 32
    assert [row[0] for row in cells(growth.table(1, (200, 2_000)))[1:]] == ["200", "2,000"]


def test_gtpo_and_grpo_take_turns():
    turns = shaping.turns("0.3 M", 1, prompts=2)
    assert len(turns.seconds) == len(turns.bytes) == 2 * (1 + shaping.WARM_UP)
    assert [len(side) for side in turns.pairs(turns.seconds)] == [1, 1]
    assert shaping.interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (2.0, 6.0)


def through_a_policy(work) -> int:
    """Tokens that are embedded while it works."""
    seen = []
    count = lambda module, inputs: seen.append(inputs[0].numel()) if isinstance(module, torch.nn.Embedding) else None  # noqa: E731
    hook = torch.nn.modules.module.register_module_forward_pre_hook(count)
    work()
    hook.remove()
    return sum(seen)


@pytest.mark.weekly
def test_each_saving_spares_tokens_does_the_same_work_and_is_switched_off(monkeypatch):
    found = list(savings.savings("0.3 M", prompts=4, shrink=8))
    for saving in found:  # the first time, a policy is asked for two tokens more: what its head hands over
        saving.with_it()
        saving.without()
    tokens = [(through_a_policy(saving.with_it), through_a_policy(saving.without)) for saving in found]
    # Two groups: 2 x (31 + 8 x 9) against 16 x 40; 2 x (7 + 8 x 17) against 16 x 24.
    assert tokens[:4] == [(206, 640)] * 2 + [(286, 384)] * 2
    # Lengths 8 to 32 behind prompts of 2. The longest of packs of 8 rows: 32, 26, 20, 13; of packs within 8 x 34 tokens, of 8, 9, 12 and
    # 3 rows: 32, 26, 19, 10.
    by_rows, by_tokens = 8 * (34 + 28 + 22 + 15), 8 * 34 + 9 * 28 + 12 * 21 + 3 * 12
    scores, order, budget, signal, sweep, ended, copied, *rewards, compiled = tokens[4:]
    assert scores == (by_rows, 2 * by_rows)
    assert order[0] == by_rows < 0.9 * order[1]
    assert budget == (by_tokens, by_rows)
    assert signal[0] < 0.6 * signal[1] == 0.6 * by_rows
    assert sweep == (2 * by_rows, 2 * by_rows)
    assert ended[0] < 0.9 * ended[1] == 0.9 * 32 * (2 + 31)
    assert [copied, *rewards] == [(ended[0], ended[0])] * 3
    assert compiled == (by_rows, by_rows)
    monkeypatch.setattr(savings, "savings", lambda *_: found)
    rows = cells(savings.table(1))[1:]
    assert [row[0] for row in rows] == [saving.name for saving in found]
    assert all(float(row[2]) > 0 and row[-1] == "1" for row in rows)


def test_a_saving_that_changes_the_result_is_no_saving():
    one, other = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.01])
    with pytest.raises(ValueError, match="made up: with and without differ by 5e-03"):
        savings.Saving("made up", "anywhere", lambda: other, lambda: one).row(1)


def test_the_frame_the_head_and_the_rows_have_their_tables():
    assert float(cells([frame.against_bare("0.3 M", 1, prompts=2)])[0][2]) > 0
    alone, both = cells(head.table(1, ((512, 16, 64),)))[1:3]
    assert (alone[1], both[1]) == ("log-probabilities", "log-probabilities, entropies")
    assert float(alone[-1]) < 1e-5 > float(both[-1])
    assert len(scaling.seconds(2, 1)) == 1


@pytest.mark.slow
def test_two_processes_share_a_step():
    assert len(scaling.of_ranks(2, 4, 1)) == 1


def test_every_table_has_its_place_in_the_page():
    page = PAGE.read_text()
    for name in [*tables("python", 1), "versions"]:
        replaced = put(page, name, ["| new |"])
        assert f"<!-- begin {name} -->\n\n| new |\n\n<!-- end {name} -->" in replaced
        assert put(replaced, name, ["| new |"]) == replaced
    with pytest.raises(ValueError, match="begin elsewhere"):
        put(page, "elsewhere", [])


@pytest.mark.slow
def test_without_a_gpu_bench_gpu_says_so_and_smoke_prints_its_table():
    command = [sys.executable, "-m", "tools.bench_gpu", "--repetitions", "1"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert refused.returncode != 0
    assert refused.stderr.strip().splitlines()[-1].startswith("there is no GPU here")
    done = subprocess.run(
        [*command, "--smoke", "--peak-tflops", "1"], cwd=ROOT, env=hidden, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(cells(done.stdout.splitlines()))
    assert found["parameters, rows, completion tokens"].endswith("16, 256")
    stages = [float(found[f"{stage}, s"]) for stage in ("sampling", "rest of the rollout batch", "training")]
    assert float(found["step, s"]) == pytest.approx(sum(stages), abs=2e-3)
    assert found["MFU of training"].endswith("% of 1 TFLOP/s")


def test_the_operations_of_training_are_those_counted_by_hand():
    size = bench_gpu.Size(
        layers=2, width=4, heads=2, key_value_heads=2, inner=8, vocabulary=10, prompts=1, prompt=3, completion=5,
        micro_batch=8,
    )  # fmt: skip
    # 100 parameters, 40 of them the head's: 8 rows x (8 tokens x (6 x 60 + 12 x 2 layers x 4 wide x 8 / 2 places) + 5 x 6 x 40).
    assert size.training_flops(100) == 8 * (8 * (360 + 384) + 1200)


def test_the_full_size_is_half_a_billion_parameters():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in bench_gpu.FULL.policy(torch.device("meta")).parameters())
    assert parameters == pytest.approx(494e6, rel=0.01)
