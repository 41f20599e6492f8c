"""Rewards worked out beside sampling: in a thread, of completions that have ended, while others are being drawn."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from inspect import signature
from queue import SimpleQueue
from threading import Thread

import torch
from jaxtyping import Int
from torch import Tensor

from rlmod.interfaces import Reward, Sampler, function_of
from rlmod.reward._compute import RewardError, RewardResult, compute_rewards
from rlmod.rollout.groups import select_texts, texts_for_reward
from rlmod.types import Problem, Rollouts, Texts


def supports_async_rewards(sampler: Sampler, reward: Reward) -> bool:
    """Whether the sampler says which rows have ended, and the reward may be asked about some of them, in a thread."""
    takes = "on_finished" in signature(sampler.__call__).parameters  # pyright: ignore[reportFunctionMemberAccess]
    return takes and getattr(function_of(reward), "pointwise", False)


class AsyncRewards:
    """The rewards of one batch: ``take`` what has ended, then ask for ``scores`` of everything. Close it, also where sampling failed."""

    def __init__(self, reward: Reward, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> None:
        self.reward, self.problems, self.decode = reward, problems, decode
        self.asked: list[tuple[Int[Tensor, " n"], Future[RewardResult]]] = []
        self.questions: SimpleQueue[tuple[Texts, Future[RewardResult]] | None] = SimpleQueue()
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # No pool: its thread would be waited for when the process ends, and a judge that hangs never ends.
        Thread(target=self._answer, daemon=True, name="reward").start()

    def submit(self, rows: Rollouts, places: Int[Tensor, " n"]) -> None:
        """Some rows, and their places among all that are sampled."""
        texts = texts_for_reward(rows, self.problems, self.decode)
        self.asked.append((places.cpu(), Future()))
        self.questions.put((texts, self.asked[-1][1]))

    def result(self, rollouts: Rollouts, texts: Texts) -> RewardResult:
        """Of all rows, a guide's among them; those that were not taken before are asked for now.

        RewardError where answers name different terms.
        """
        sampled = torch.arange(len(rollouts))
        if rollouts.from_guide is not None:  # whose rows stand between those that were sampled, in their order
            sampled = sampled[~rollouts.from_guide.cpu()]
        left = torch.ones(len(rollouts), dtype=torch.bool)
        rows, answers = [sampled[places] for places, _ in self.asked], [answer.result() for _, answer in self.asked]
        for taken in rows:
            left[taken] = False
        if left.any():
            rows.append(left.nonzero()[:, 0])
            answers.append(compute_rewards(self.reward, select_texts([texts], left)))
        names = {tuple(sorted(answer.terms)) for answer in answers}
        if len(names) > 1:
            raise RewardError(f"the reward returned different terms for different completions: {sorted(names)}")

        def together(values: Sequence[Tensor]) -> Tensor:
            whole = torch.empty(len(rollouts), dtype=torch.float32)  # under bf16-true torch would make it 16 bits
            for of, part in zip(rows, values, strict=True):
                whole[of] = part
            return whole

        return RewardResult(
            rewards=together([answer.rewards for answer in answers]),
            terms={name: together([answer.terms[name] for answer in answers]) for name in answers[0].terms},
            outcomes=together([answer.outcomes for answer in answers]),
        )

    def close(self) -> None:
        for _, answer in self.asked:
            answer.cancel()
        self.questions.put(None)

    @torch.no_grad()  # which is each thread's own
    def _answer(self) -> None:
        if self.device is not None:  # each thread's own, too
            torch.cuda.set_device(self.device)
        while (question := self.questions.get()) is not None:
            texts, answer = question
            if answer.set_running_or_notify_cancel():
                try:
                    answer.set_result(compute_rewards(self.reward, texts))
                except BaseException as error:
                    answer.set_exception(error)
