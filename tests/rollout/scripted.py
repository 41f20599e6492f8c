"""A scripted sampler and a rollout batch made with it."""

from dataclasses import dataclass

import torch

from rlmod.filter.dynamic_sampling import DynamicSampling
from rlmod.filter.keep_all import KeepAll
from rlmod.rollout.collect import Stages, collect
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.types import Problem, Prompts, Rollouts, build_rollouts

G = 3


@dataclass(frozen=True, kw_only=True)
class Scripted:
    """The completion of row j of a prompt says how many of its G are right: ``prompt`` is that number."""

    completions_per_prompt: int = G
    temperature: float = 1.0
    truncated: bool = False

    def __call__(self, policy: object, prompts: Prompts, seed: int) -> Rollouts:
        right = torch.tensor([int(problem.prompt) for problem in prompts.problems])
        group = torch.arange(len(prompts)).repeat_interleave(G)
        place = torch.arange(G).repeat(len(prompts))
        ids = (place < right[group]).long()[:, None].repeat(1, 2)
        mask = torch.ones_like(ids, dtype=torch.bool)
        return build_rollouts(
            prompt_ids=prompts.ids[group], prompt_mask=prompts.mask[group], completion_ids=ids, mask=mask, group=group,
            logprobs=torch.zeros(len(ids), 2), entropy=torch.ones(len(ids), 2),
            truncated=torch.full((len(ids),), self.truncated),
        )  # fmt: skip


def exact(texts):
    return [float(c == a) for c, a in zip(texts.completions, texts.answers, strict=True)]


def run(
    rights: list[int],
    prompts: int,
    sampler: Scripted | None = None,
    reward=exact,
    guide=None,
    dynamic_sampling=False,
    filter=None,
    **settings,
):
    requested: list[int] = []

    def next_prompts(n: int) -> Prompts:
        requested.append(n)
        start = sum(requested[:-1])
        chosen = [rights[(start + i) % len(rights)] for i in range(n)]
        problems = tuple(Problem(prompt=str(r), answer="1", source=f"p{start + i}") for i, r in enumerate(chosen))
        return Prompts(
            ids=torch.zeros(n, 1, dtype=torch.long), mask=torch.ones(n, 1, dtype=torch.bool), problems=problems
        )

    stages = Stages(
        policy=torch.nn.Identity(),
        decode=lambda rollouts: [str(int(row[0])) for row in rollouts.completion_ids],
        logprob_pass=lambda rollouts: rollouts, next_prompts=next_prompts, sampler=sampler or Scripted(), guide=guide,
        reward=reward,
        filter=DynamicSampling(**settings) if dynamic_sampling else filter or KeepAll(),
        zero_reward=ZeroReward(), seed=lambda *place: sum(place),
    )  # fmt: skip
    return collect(stages, num_groups=prompts), requested
