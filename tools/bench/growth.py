"""How the time of an iteration grows with its size: aggregation, shaping, and sampling with a scripted sampler."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from rlmod.aggregation.rollout_mean import RolloutMean
from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.model.policy import HFPolicy, completion_texts
from rlmod.rollout.collect import Stages, collect
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.shaper.token_entropy import TokenEntropy
from rlmod.types import Problem, Prompts, Rollouts, Texts
from tools.bench import peak
from tools.bench.components import G, ready

LENGTH = 1250
TOKENS = (10**4, 10**5, 10**6, 10**7)


class Ready:
    """A sampler that hands over the next groups of rollouts that are there already."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts, self.next = rollouts, 0
        self.completions_per_prompt, self.temperature = G, 1.0

    def __call__(self, policy: nn.Module, prompts: Prompts, seed: int) -> Rollouts:
        first, self.next = self.next, self.next + G * len(prompts)
        rows = self.rollouts.rows(slice(first, self.next))
        return replace(rows, group=rows.group - first // G, rewards=None, outcomes=None)


def collection(rollouts: Rollouts, decode: Callable[[Rollouts], list[str]]) -> int:
    """Dynamic sampling keeps the half of the groups that has signal: rewards, filter, refill, joining, counting."""
    groups = len(rollouts) // G
    problem = Problem(prompt="1+1=", answer="2", source="ready")
    width = rollouts.rows(slice(0, 1)).prompt_ids

    def draw(number: int) -> Prompts:
        assert width is not None
        ids = width.expand(number, -1)
        return Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), problems=(problem,) * number)

    def reward(texts: Texts) -> list[float]:
        assert texts.group is not None
        return [float(row % 2 and group % 2 == 0) for row, group in enumerate(texts.group)]

    stages = Stages(
        policy=nn.Identity(), decode=decode, logprob_pass=lambda rows: rows, next_prompts=draw, sampler=Ready(rollouts), guide=None,
        reward=reward, filter=DynamicSampling(), zero_reward=ZeroReward(), seed=lambda *_: 0,
    )  # fmt: skip
    return len(collect(stages, num_groups=groups // 2).rollouts)


def no_text(rollouts: Rollouts) -> list[str]:
    return [""] * len(rollouts)


def table(repetitions: int, tokens: tuple[int, ...] = TOKENS) -> list[str]:
    tokenizer = HFPolicy(path="tiny").tokenizer()
    peak.kept_pages()
    names = ("shaper `token_entropy`", "aggregation `rollout_mean`", "rollout batch after sampling", "decoding to text")
    lines = ["| tokens | " + " | ".join(f"{name}, s | ns a token" for name in names) + " |", "|---" * 9 + "|"]
    for number in tokens:
        rows = max(number // LENGTH // (2 * G), 1) * 2 * G  # at least two groups: one of them has signal
        rollouts = ready(rows, max(number // rows, 2))
        held = rows * max(number // rows, 2)
        works: tuple[Callable[[], object], ...] = (
            lambda rollouts=rollouts: TokenEntropy()(rollouts),
            lambda rollouts=rollouts: RolloutMean()(rollouts),
            lambda rollouts=rollouts: collection(rollouts, no_text),
            lambda rollouts=rollouts: completion_texts(tokenizer, rollouts),
        )
        cells = []
        for work in works:
            seconds = statistics.median([taken(work) for _ in range(repetitions + 1)][1:])
            cells.append(f"{seconds:.4f} | {1e9 * seconds / held:.0f}")
        lines.append(f"| {number:,} | {' | '.join(cells)} |")
    peak.recycled_pages()
    return [
        *lines,
        "",
        f"Tokens with padding; completions of up to {LENGTH:,} tokens, groups of {G}, half of them without signal.",
    ]


def taken(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    started = clock()
    work()
    return clock() - started
