"""The cost of each shaper, aggregation, correction, loss and regularizer at one size: CPU time of a call, and the most memory it holds."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlmod.config import cli
from rlmod.types import Rollouts, build_rollouts
from tools.bench import peak
from tools.bench.setting import parts_of

G = 8
STAGES = ("shaper", "correction", "aggregation", "loss", "regularizer")


def ready(rows: int, length: int, seed: int = 0) -> Rollouts:
    """Rewarded and scored rollouts of random lengths, groups of 8, every other group without signal."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=draw)
    mask = torch.arange(length) < lengths[:, None]
    logprobs = -3 * torch.rand(rows, length, generator=draw)
    rewards = (torch.arange(rows) % 2).float()
    rewards[torch.arange(rows) // G % 2 == 1] = 0.0
    return build_rollouts(
        prompt_ids=torch.full((rows, 16), 5), prompt_mask=torch.ones(rows, 16, dtype=torch.bool),
        completion_ids=torch.full((rows, length), 5), mask=mask, group=torch.arange(rows) // G, rewards=rewards,
        outcomes=rewards, logprobs=logprobs * mask, sampler_logprobs=logprobs * mask,
        reference_logprobs=logprobs * mask, entropy=3 * torch.rand(rows, length, generator=draw) * mask,
        truncated=lengths == length, extra={"kl_cov": mask}, terms={"answer": rewards, "length": -lengths.float()},
    )  # fmt: skip


def options(stage: str) -> list[str]:
    return sorted(file.stem for file in Path(cli.config_folder(), stage).glob("*.yaml"))


def component(stage: str, option: str) -> Any:
    listed = stage in ("correction", "regularizer")
    parts = parts_of(f"{stage}=[{option}]" if listed else f"{stage}={option}")
    return next(iter(getattr(parts, stage).values())) if listed else getattr(parts, stage)


def call(stage: str, made: Any, rollouts: Rollouts) -> Callable[[], object]:
    """Return a function that calls the component as a step does, for a loss or a regularizer with the backward pass."""
    if stage in ("shaper", "aggregation", "correction"):
        return lambda: made(rollouts)
    assert rollouts.logprobs is not None and rollouts.weights is not None
    logprobs = rollouts.logprobs.clone().requires_grad_()
    entropy = torch.zeros_like(logprobs).requires_grad_()

    def forward_and_backward() -> Tensor:
        logprobs.grad = entropy.grad = None
        per_token, _ = made(logprobs, replace(rollouts, policy_entropy=entropy))
        (per_token * rollouts.weights).sum().backward()
        return per_token

    return forward_and_backward


def table(repetitions: int, rows: int = 512, length: int = 1024) -> list[str]:
    rollouts = ready(rows, length)
    assert rollouts.rewards is not None
    advantages = (rollouts.rewards - 0.5)[:, None] * rollouts.mask
    rollouts = replace(rollouts, advantages=advantages, weights=rollouts.mask / rollouts.mask.sum())
    lines = ["| stage | option | ms of CPU | range | peak MiB |", "|---|---|---|---|---|"]
    for stage in STAGES:
        for option in options(stage):
            function = call(stage, component(stage, option), rollouts)
            milliseconds, held = measured(function, repetitions)
            lines.append(
                f"| {stage} | `{option}` | {statistics.median(milliseconds):.1f} "
                f"| {min(milliseconds):.1f} to {max(milliseconds):.1f} | {held / 2**20:.1f} |"
            )
    mebibytes = rows * length * 4 / 2**20
    return [
        *lines,
        "",
        f"{rows} rows of up to {length} tokens: a float32 for each is {mebibytes:.1f} MiB. Losses and penalties: with the backward pass.",
    ]


def measured(function: Callable[[], object], repetitions: int) -> tuple[list[float], int]:
    """Milliseconds of each call, and the peak of the last one in bytes."""
    function()
    times = []
    for _ in range(repetitions):
        started = time.process_time()
        function()
        times.append(1000 * (time.process_time() - started))
    peak.own_pages()
    function()
    _, held = peak.of(function)
    peak.recycled_pages()
    return times, held
