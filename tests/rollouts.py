"""Small rollouts that several tests look at: random and ragged, one group, given ratios."""

import torch

from rlmod.types import Rollouts, build_rollouts

NORMALIZATIONS = ["zero_inclusive", "joint", "own_class"]
SEEDS = range(4)


def ragged(seed: int = 0, groups: int = 4, g: int = 6, length: int = 9, binary: bool = True) -> Rollouts:
    """Lengths from 1 to ``length``; every group has both classes; float64; NaN where nothing may look."""
    draw = torch.Generator().manual_seed(seed)
    rows = groups * g
    lengths = torch.randint(1, length + 1, (rows,), generator=draw)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    rewards = (torch.rand(rows, generator=draw) > 0.5).double()
    rewards[::g], rewards[1::g] = 1.0, 0.0
    if not binary:
        rewards = rewards * 0.4 + 0.35 * torch.rand(rows, generator=draw).double()
    entropy = 3 * torch.rand(rows, length, generator=draw).double() + 0.01
    logprobs = -3 * torch.rand(rows, length, generator=draw).double()
    return build_rollouts(
        mask=mask,
        group=torch.arange(groups).repeat_interleave(g),
        rewards=rewards,
        entropy=entropy.masked_fill(~mask, torch.nan),
        logprobs=logprobs.masked_fill(~mask, torch.nan),
    )


def measured(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The values of the counted tokens that have one; a single number stands for every token, NaN for none."""
    counted = values.expand_as(mask)[mask]
    return counted[~counted.isnan()]


def group_of_four(rewards: list[float]) -> Rollouts:
    return build_rollouts(
        mask=torch.ones(4, 2, dtype=torch.bool),
        group=torch.zeros(4, dtype=torch.long),
        rewards=torch.tensor(rewards).float(),
    )


def one_group(rewards: list[float], entropy: list[list[float]]) -> Rollouts:
    return build_rollouts(
        mask=torch.ones(len(rewards), len(entropy[0]), dtype=torch.bool),
        group=torch.zeros(len(rewards), dtype=torch.long),
        rewards=torch.tensor(rewards).double(),
        entropy=torch.tensor(entropy).double(),
    )


def rows_with(
    ratios: list[list[float]], advantages: list[list[float]], mask: list[list[int]]
) -> tuple[torch.Tensor, Rollouts]:
    lp = torch.tensor(ratios).double().log().requires_grad_()
    kept = torch.tensor(mask).bool()
    old = torch.zeros_like(lp).masked_fill(~kept, torch.nan)
    return lp, build_rollouts(mask=kept, logprobs=old.detach(), advantages=torch.tensor(advantages).double())
