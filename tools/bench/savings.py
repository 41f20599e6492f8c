"""The gain of each saving of a step: the same work with and without it, in turn, on random tokens; both must give the same numbers."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast
from unittest.mock import patch

import torch
from jaxtyping import Float
from torch import Tensor

from rlmod.filter.keep_all import KeepAll
from rlmod.model import shared_prompts as prompt_sharing
from rlmod.model.logprobs import completion_logprobs
from rlmod.model.packing import pack_by_length
from rlmod.model.policy import completion_texts
from rlmod.reward._failures import Rewards
from rlmod.reward.math_verify import MathVerify
from rlmod.rollout import async_rewards
from rlmod.rollout.collect import Stages, collect
from rlmod.rollout.zero_reward import ZeroReward
from rlmod.sampler import _cache, _recorder
from rlmod.sampler.hf import HF
from rlmod.training import datamodule
from rlmod.types import Problem, Prompts, Rollouts, Texts, build_rollouts
from tools.bench.frame import MODELS, built, compared
from tools.bench.growth import Ready, taken
from tools.bench.setting import trainer_of
from tools.bench.workload import LONGEST, G, Lengths, Workload, prescribe

Work = Callable[[], Float[Tensor, " n"]]
TOLERANCE = 1e-4
"""How far apart the results may be, against their own size: float32 added up in another order."""
JUDGE_SECONDS = 0.05


@dataclass(frozen=True)
class Saving:
    name: str
    setting: str
    with_it: Work
    without: Work
    clock: Callable[[], float] = time.process_time

    def row(self, repetitions: int) -> str:
        results: list[Tensor] = []
        sides = [lambda w=work: results.append(w()) for work in (self.with_it, self.without)]
        seconds = [[taken(side, self.clock) for side in sides] for _ in range(repetitions + 1)][
            1:
        ]  # without the warm-up
        apart = float((results[0] - results[1]).norm() / results[1].norm())
        if not apart <= TOLERANCE:
            raise ValueError(f"{self.name}: with and without differ by {apart:.0e}: this is not the same work")
        return f"| {self.name} | {self.setting} | {compared(*zip(*seconds, strict=True))} |"


def off(work: Work, owner: object, name: str, value: object) -> Work:
    """The work while ``owner.name`` is another: the saving is switched off."""

    def without() -> Tensor:
        with patch.object(owner, name, value):
            return work()

    return without


class Step:
    """A step on rollouts that are there already and come unscored, as from an engine. No optimizer: each time the policy is the same."""

    def __init__(self, workload: Workload, model: str, prompt: int) -> None:
        self.module, self.data = built(model, workload.prompts, f"batch.micro_batch={workload.micro_batch}")
        self.module.trainer = self.data.trainer = trainer_of(self.data, 1)
        self.module.trainer.strategy.connect(self.module)
        self.module.reward = lambda texts: list(workload.rewards)
        self.rollouts = rollouts_of(workload, prompt, self.module.policy)

    def __call__(self) -> Float[Tensor, " parameters"]:
        """Collection but for sampling, forward and backward passes; the gradient."""
        self.module.zero_grad()
        self.module.sampler = Ready(self.rollouts)
        for place, batch in enumerate(self.data.train_dataloader()):
            if (loss := self.module.training_step(batch, place)) is not None:
                loss.backward()
        return torch.cat([p.grad.flatten() for p in self.module.policy.parameters() if p.grad is not None])

    def scored(self, *sweeps: dict[str, Any]) -> Float[Tensor, " scores"]:
        """Sweeps over the rollouts, one behind the other; all scores."""
        rollouts = self.rollouts
        with torch.no_grad(), self.module.evaluating() as policy:
            for sweep in sweeps:
                rollouts = self.module.logprob_pass(policy, rollouts, **sweep)
        scores = (rollouts.logprobs, rollouts.entropy, rollouts.reference_logprobs)
        return torch.cat([score.flatten() for score in scores if score is not None])


def rollouts_of(workload: Workload, prompt: int, policy: Any) -> Rollouts:
    draw, vocabulary = torch.Generator().manual_seed(0), policy.config.vocab_size
    lengths = torch.tensor(workload.lengths)
    rows, longest = len(lengths), int(lengths.max())
    group = torch.arange(rows) // G
    return build_rollouts(
        prompt_ids=torch.randint(vocabulary, (workload.prompts, prompt), generator=draw)[group],
        prompt_mask=torch.ones(rows, prompt, dtype=torch.bool), group=group,
        completion_ids=torch.randint(vocabulary, (rows, longest), generator=draw),
        mask=torch.arange(longest) < lengths[:, None], truncated=torch.zeros(rows, dtype=torch.bool),
    )  # fmt: skip


def even(prompts: int, length: int) -> Workload:
    rewards = tuple(float(row % 2) for row in range(prompts * G))
    return Workload(name="even", lengths=(length,) * len(rewards), rewards=rewards, micro_batch=G)


def shared_prompts(model: str, prompts: int, shrink: int) -> Iterator[Saving]:
    for prompt, completion in ((256, 64), (64, 128)):
        prompt, completion = prompt // shrink, completion // shrink
        step = Step(even(prompts // 2, completion), model, prompt)
        setting = f"prompts {prompt}, completions {completion}"
        for what, work in (("training", step), ("scoring", partial(step.scored, {}))):
            alone = off(work, prompt_sharing, "can_share", lambda policy: False)
            yield Saving("prompt gone through once a group", f"{what}; {setting}", work, alone)


def shuffled(rollouts: Rollouts, rows: int, tokens: int | None = None) -> tuple[Tensor, ...]:
    return torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(0)).split(rows)


def of_a_step(model: str, prompts: int, longest: int, prompt: int) -> Iterator[Saving]:
    half = Workload.of("ragged", prompts, G, longest)
    step = Step(replace(half, rewards=even(prompts, 1).rewards), model, prompt)
    ragged = f"completions {min(half.lengths)} to {longest}"
    always = replace(step.module.batch, logprob_pass="always")
    scoring = off(step, step.module, "batch", always)
    yield Saving("pi_old's scores not taken", f"rollout batch and training; {ragged}", step, scoring)
    yield Saving(
        "rows sorted by length", f"training; {ragged}", step, off(step, datamodule, "pack_by_length", shuffled)
    )
    lengths = torch.tensor(half.lengths)
    largest = max(len(pack) * (prompt + int(lengths[pack].max())) for pack in pack_by_length(step.rollouts, G))
    numbers = [len(list(pack_by_length(step.rollouts, *limits))) for limits in ((G * prompts, largest), (G,))]
    by_tokens = replace(step.module.batch, micro_batch=G * prompts, micro_batch_tokens=largest)
    cut = f"training; {ragged}, {numbers[0]} packs of at most {largest} tokens against {numbers[1]} of {G} rows"
    yield Saving("packs by tokens", cut, off(step, step.module, "batch", by_tokens), step)
    step = Step(half, model, prompt)
    setting = f"training; {ragged}, half of the groups without"
    yield Saving("rows without signal left out", setting, step, off(step, type(step.module), "every_row_trains", True))


def compiled(model: str, prompts: int, longest: int, prompt: int) -> Saving:
    workload = Workload.of("ragged", prompts, G, longest)
    step = Step(replace(workload, rewards=even(prompts, 1).rewards), model, prompt)
    prompt_sharing.compile_layers(step.module.policy)

    def plain() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return step()

    return Saving("layers compiled", f"training; completions {min(workload.lengths)} to {longest}", step, plain)


def one_sweep(model: str, prompts: int, longest: int, prompt: int) -> Saving:
    workload = Workload.of("ragged", prompts, G, longest)
    step = Step(workload, model, prompt)
    frozen = copy.deepcopy(step.module.policy).eval()

    def reference(policy: object, rollouts: Rollouts, temperature: float) -> Tensor:
        return completion_logprobs(frozen, rollouts, temperature)

    return Saving(
        "policy and reference in one sweep",
        f"scoring; completions {min(workload.lengths)} to {longest}",
        partial(step.scored, {"reference": reference}),
        partial(step.scored, {}, {"pi_old": False, "reference": reference}),
    )


class UntilTheLast(_recorder.Recorder):
    """Never interrupts ``generate``, which ends by itself when all rows have."""

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros_like(super().__call__(input_ids, scores))


class Verified(MathVerify):
    """And a row's length, by which rows that were mixed up would show: random tokens answer nothing."""

    def __call__(self, texts: Texts) -> Rewards:
        assert texts.lengths is not None
        result = super().__call__(texts).result
        return Rewards(result._replace(rewards=result.rewards + torch.tensor(texts.lengths, dtype=torch.float32)))


class Judge(Verified):
    """And what a judge on another machine takes for each text, in which this machine does nothing."""

    def __call__(self, texts: Texts) -> Rewards:
        time.sleep(JUDGE_SECONDS * len(texts.completions))
        return super().__call__(texts)


def sampling(model: str, prompts: int, longest: int, prompt: int) -> Iterator[Saving]:
    """Yield the savings of sampling. In the first, only lengths are the same on both sides: a row's tokens depend on the other rows."""
    workload = Workload.of("ragged", prompts, G, longest)
    module, _ = built(model, 1)
    policy: Any = module.policy.eval()
    eos: Any = module.tokenizer.eos_token_id
    policy.generation_config.eos_token_id = [eos]
    lengths = Lengths(workload.lengths, eos)
    prescribe(policy, lengths)
    ids = torch.randint(policy.config.vocab_size, (prompts, prompt), generator=torch.Generator().manual_seed(0))
    problems = (Problem(prompt="", answer="7", source="random tokens"),) * prompts
    stages = Stages(
        policy=policy, decode=partial(completion_texts, module.tokenizer), logprob_pass=lambda rows: rows, guide=None,
        next_prompts=lambda _: Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), problems=problems),
        sampler=cast(Any, HF(completions_per_prompt=G, max_new_tokens=longest)), reward=Verified(), filter=KeepAll(),
        zero_reward=ZeroReward(), seed=lambda *_: 0,
    )  # fmt: skip

    def sampled() -> Tensor:
        lengths.start()
        mask: Any = stages.sampler(policy, stages.next_prompts(prompts), 0).mask
        return mask.sum(1).float()

    def rewarded(reward: MathVerify) -> Tensor:
        lengths.start()
        rewards: Any = collect(replace(stages, reward=reward), num_groups=prompts).rollouts.rewards
        return rewards

    setting = f"completions {min(workload.lengths)} to {longest}"
    until_the_last = off(sampled, _recorder, "Recorder", UntilTheLast)
    yield Saving("ended rows left out", f"sampling; {setting}", sampled, until_the_last)
    copied = off(sampled, _cache, "preallocate", lambda cache: cache)
    yield Saving("keys and values copied seldom", f"sampling; {setting}", sampled, copied)
    judge = f"`math_verify` and a judge of {JUDGE_SECONDS * 1000:.0f} ms a text"
    for what, reward in (("`math_verify`", stages.reward), (judge, Judge())):
        at_once = partial(rewarded, cast(Any, reward))
        afterwards = off(at_once, async_rewards, "supports_async_rewards", lambda *_: False)
        timed = f"sampling, {what}, by the clock; {setting}"
        yield Saving("reward beside sampling", timed, at_once, afterwards, time.perf_counter)


def savings(model: str, prompts: int, shrink: int) -> Iterator[Saving]:
    longest, prompt = LONGEST // shrink, 16 // shrink
    yield from shared_prompts(model, prompts, shrink)
    yield from of_a_step(model, prompts, longest, prompt)
    yield one_sweep(model, prompts, longest, prompt)
    yield from sampling(model, prompts, longest, prompt)
    yield compiled(model, prompts, longest, prompt)


def table(repetitions: int, model: str = MODELS[1], prompts: int = 4, shrink: int = 1) -> list[str]:
    return [
        "| saving | setting | with, ms | without, ms | ratio, median | range | pairs |",
        "|---|---|---|---|---|---|---|",
        *(saving.row(repetitions) for saving in savings(model, prompts, shrink)),
        "",
        f"A policy of {model} parameters, float32. {prompts} groups of {G}, prompts of {16 // shrink} tokens; {prompts // 2} groups where "
        f"others are named. Packs of {G} rows.",
    ]
