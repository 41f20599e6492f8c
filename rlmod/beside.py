"""Rewards worked out beside sampling: in a thread, for prompts whose completions have ended, while the others' are being drawn."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from inspect import signature
from queue import SimpleQueue
from threading import Thread

import torch
from jaxtyping import Int
from torch import Tensor

from rlmod.groups import read, texts_of
from rlmod.interfaces import Reward, Sampler, function_of
from rlmod.scoring import RewardError, Scores, score
from rlmod.types import Problem, Rollouts, Texts


def possible(sampler: Sampler, reward: Reward) -> bool:
    """Whether the sampler says which prompts are done, and the reward may be asked prompt by prompt, in a thread."""
    takes = "finished" in signature(sampler.__call__).parameters  # pyright: ignore[reportFunctionMemberAccess]
    return takes and getattr(function_of(reward), "beside_sampling", False)


class Beside:
    """The rewards of one batch: ``take`` what is done, then ask for ``scores`` of everything. Close it, also where sampling failed."""

    def __init__(self, reward: Reward, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> None:
        self.reward, self.problems, self.decode = reward, problems, decode
        self.asked: list[tuple[Int[Tensor, " groups"], Future[Scores]]] = []
        self.questions: SimpleQueue[tuple[Texts, Future[Scores]] | None] = SimpleQueue()
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # No pool: its thread would be waited for when the process ends, and a judge that hangs never ends.
        Thread(target=self._answer, daemon=True, name="reward").start()

    def take(self, rows: Rollouts) -> None:
        """All rows of some prompts, in the order that they have among all rows."""
        assert rows.group is not None
        texts = read(rows, self.problems, self.decode)
        self.asked.append((rows.group.unique(), Future()))
        self.questions.put((texts, self.asked[-1][1]))

    def scores(self, rollouts: Rollouts, texts: Texts) -> Scores:
        """Of all rows; those that were not taken before are asked for now. RewardError where answers name different terms."""
        assert rollouts.group is not None
        places = [torch.isin(rollouts.group, groups).cpu() for groups, _ in self.asked]
        answers = [answer.result() for _, answer in self.asked]
        left = ~torch.stack([torch.zeros(len(rollouts), dtype=torch.bool), *places]).any(0)
        if left.any():
            places.append(left)
            answers.append(score(self.reward, texts_of([texts], left)))
        names = {tuple(sorted(answer.terms)) for answer in answers}
        if len(names) > 1:
            raise RewardError(f"the reward returned different terms for different prompts: {sorted(names)}")

        def together(values: Sequence[Tensor]) -> Tensor:
            whole = torch.empty(len(rollouts), dtype=torch.float32)  # under bf16-true torch would make it 16 bits
            for rows, part in zip(places, values, strict=True):
                whole[rows] = part
            return whole

        return Scores(
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
                    answer.set_result(score(self.reward, texts))
                except BaseException as error:
                    answer.set_exception(error)
