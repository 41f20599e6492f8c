"""Asynchronous rewards: a thread computes those of finished completions while the others are being sampled."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from inspect import signature
from queue import SimpleQueue
from threading import Thread

import torch
from jaxtyping import Int
from torch import Tensor

from rlmod.interfaces import Reward, Sampler, declared
from rlmod.reward._compute import compute_rewards
from rlmod.reward._failures import FailedRows, RewardError, RewardResult, has_value
from rlmod.rollout.groups import select_texts, texts_for_reward
from rlmod.types import Problem, Rollouts, Texts


def supports_async_rewards(sampler: Sampler, reward: Reward) -> bool:
    """Return True if the sampler reports finished completions (``StreamingSampler``) and the reward is pointwise (``PointwiseReward``)."""
    streams = "on_finished" in signature(sampler.__call__).parameters  # pyright: ignore[reportFunctionMemberAccess]
    return streams and bool(declared(reward, "pointwise"))


class AsyncRewards:
    """The rewards of one batch of prompts: ``submit`` finished completions, then request the ``result`` of all.

    Call ``close`` afterwards, even if sampling failed.
    """

    def __init__(self, reward: Reward, problems: Sequence[Problem], decode: Callable[[Rollouts], list[str]]) -> None:
        self.reward, self.problems, self.decode = reward, problems, decode
        self.submitted: list[tuple[Int[Tensor, " n"], Future[RewardResult]]] = []
        self.queue: SimpleQueue[tuple[Texts, Future[RewardResult]] | None] = SimpleQueue()
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # Not a thread pool: at exit the process would wait for its threads, and a reward that hangs never returns.
        Thread(target=self._compute_submitted, daemon=True, name="reward").start()

    def submit(self, rows: Rollouts, index: Int[Tensor, " n"]) -> None:
        """Queue finished completions, with their indices in the final batch."""
        texts = texts_for_reward(rows, self.problems, self.decode)
        self.submitted.append((index.cpu(), Future()))
        self.queue.put((texts, self.submitted[-1][1]))

    def result(self, rollouts: Rollouts, texts: Texts) -> RewardResult:
        """Return the rewards of all rows, the guide's included. Those that were not submitted are computed now.

        RewardError if the reward failed, or returned different terms for different completions.
        """
        sampled = torch.arange(len(rollouts))
        if rollouts.from_guide is not None:  # the guide's rows lie between the sampled ones, which keep their order
            sampled = sampled[~rollouts.from_guide.cpu()]
        missing = torch.ones(len(rollouts), dtype=torch.bool)
        rows = [sampled[index] for index, _ in self.submitted]
        results = [each.result() for _, each in self.submitted]
        for index in rows:
            missing[index] = False
        if missing.any():
            rows.append(missing.nonzero()[:, 0])
            results.append(compute_rewards(self.reward, select_texts([texts], missing)))
        # A computation without any value, because it failed or abstained, has no terms either.
        names = {tuple(sorted(each.terms)) for each in results if each.terms or bool(has_value(each).any())}
        if len(names) > 1:
            raise RewardError(f"the reward returned different terms for different completions: {sorted(names)}")

        def scatter(values: Sequence[Tensor | None], dtype: torch.dtype = torch.float32) -> Tensor:
            combined = torch.zeros(len(rollouts), dtype=dtype)  # under bf16-true the default would be 16 bits
            for index, value in zip(rows, values, strict=True):
                if value is not None:
                    combined[index] = value
            return combined

        def scatter_failed(name: str) -> FailedRows:
            found = [each.failed.get(name) for each in results]
            return FailedRows(
                scatter([each and each.timeouts for each in found], torch.bool),
                scatter([each and each.errors for each in found], torch.bool),
                next(each.max_share for each in found if each),
            )

        return RewardResult(
            rewards=scatter([each.rewards for each in results]),
            terms={
                name: scatter([each.terms.get(name) for each in results])
                for name in (next(iter(names)) if names else ())
            },
            outcomes=scatter([each.outcomes for each in results]),
            abstained=scatter([each.abstained for each in results], torch.bool),
            failed={name: scatter_failed(name) for name in dict.fromkeys(n for each in results for n in each.failed)},
        )

    def close(self) -> None:
        """Cancel pending computations and end the thread."""
        for _, pending in self.submitted:
            pending.cancel()
        self.queue.put(None)

    @torch.no_grad()  # gradient mode is set per thread
    def _compute_submitted(self) -> None:
        if self.device is not None:  # the current device is set per thread, too
            torch.cuda.set_device(self.device)
        while (item := self.queue.get()) is not None:
            texts, pending = item
            if pending.set_running_or_notify_cancel():
                try:
                    pending.set_result(compute_rewards(self.reward, texts))
                except BaseException as error:
                    pending.set_exception(error)
