"""The worker pool of rewards against two libraries, pebble and loky, on the same items.

``pip install pebble loky``, then ``python -m tools.bench_pools PROBLEMS.jsonl`` prints two tables. The file has one problem per line, with
the field ``answer``.

1. Wall-clock time of grading completions with math_verify's grader on two workers. Each pool has graded a few before.
2. What happens to 200 items of which some hang, raise, or end their process: the replies that are wrong, and the time.

pebble: ``ProcessPool.schedule`` with a timeout per item. loky has no timeout per item: its executor is killed with all its workers when
an item is late, and what was in flight is sent again.
"""

import argparse
import contextlib
import importlib
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as LateError
from pathlib import Path
from typing import Any

from rlmod.reward._pool import Pool, PoolSettings
from tools.bench_rewards import SPELLINGS, read_answers

WORKERS = 2
TIME_LIMIT = 2.0
Items = Sequence[tuple[Any, ...]]


def misbehave(word: str) -> str:
    """Do what the word says; else return it."""
    if word == "hang":
        time.sleep(600)
    if word == "raise":
        raise KeyError(word)
    if word == "exit":
        os._exit(0)
    return word


class OwnPool:
    """The pool of rlmod/reward/_pool.py, without its sandbox, which the libraries do not have."""

    def __init__(self, function: Callable[..., Any]) -> None:
        name = f"{function.__module__}:{function.__name__}"
        self.pool = Pool(
            PoolSettings(function=name, workers=WORKERS, seconds=TIME_LIMIT, memory_gib=64, sandboxed=False)
        )

    def map(self, items: Items) -> list[Any]:
        return [reply.value if reply.status == "ok" else None for reply in self.pool.map(items, "the bench")]

    def stop(self) -> None:
        self.pool.stop()


class PebblePool:
    def __init__(self, function: Callable[..., Any], start: str) -> None:
        import multiprocessing

        from pebble import ProcessPool  # pyright: ignore[reportMissingImports]

        self.pool = ProcessPool(max_workers=WORKERS, context=multiprocessing.get_context(start))
        self.function = function

    def map(self, items: Items) -> list[Any]:
        futures = [self.pool.schedule(self.function, args=item, timeout=TIME_LIMIT) for item in items]
        return [self._result(future) for future in futures]

    @staticmethod
    def _result(future: Any) -> Any:
        try:
            return future.result()
        except Exception:  # the item's own, ProcessExpired, TimeoutError
            return None

    def stop(self) -> None:
        self.pool.stop()
        self.pool.join()


class LokyPool:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.alone = function, set[int]()
        self.executor = self._start()

    def _start(self) -> Any:
        """Start workers and let them import the function, which must not count against an item's clock."""
        from loky import ProcessPoolExecutor  # pyright: ignore[reportMissingImports]

        executor = ProcessPoolExecutor(max_workers=WORKERS, timeout=None)
        for future in [executor.submit(importlib.import_module, self.function.__module__) for _ in range(2 * WORKERS)]:
            with contextlib.suppress(TypeError):  # a module cannot be pickled
                future.result()
        return executor

    def map(self, items: Items) -> list[Any]:
        """Keep as many items in flight as there are workers, so that the clock of each begins when it does."""
        results: list[Any] = [None] * len(items)
        waiting, flying = list(range(len(items)))[::-1], dict[int, tuple[Any, float]]()
        while waiting or flying:
            while waiting and len(flying) < WORKERS and not (flying and self.alone & {waiting[-1], *flying}):
                index = waiting.pop()
                flying[index] = (self.executor.submit(self.function, *items[index]), time.monotonic())
            self._collect(results, waiting, flying)
        return results

    def _collect(self, results: list[Any], waiting: list[int], flying: dict[int, tuple[Any, float]]) -> None:
        from loky.process_executor import BrokenProcessPool  # pyright: ignore[reportMissingImports]

        index, (future, since) = next(iter(flying.items()))
        try:
            results[index] = future.result(timeout=max(since + TIME_LIMIT - time.monotonic(), 0.0))
        except (LateError, BrokenProcessPool) as error:
            others = [other for other in flying if other != index]
            waiting.extend(others)
            flying.clear()
            if others and isinstance(error, BrokenProcessPool):
                self.alone.update([index, *others])  # either may have ended its process
                waiting.append(index)
            self.executor.shutdown(kill_workers=True)
            self.executor = self._start()
            return
        except Exception:
            results[index] = None
        del flying[index]

    def stop(self) -> None:
        self.executor.shutdown(kill_workers=True)


POOLS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "rlmod": OwnPool,
    "pebble, fork": lambda function: PebblePool(function, "fork"),
    "pebble, forkserver": lambda function: PebblePool(function, "forkserver"),
    "loky": LokyPool,
}


def grade_answers(answers: Sequence[str], rounds: int) -> None:
    from rlmod.reward._math_grader import grade

    completions = [SPELLINGS[i % len(SPELLINGS)].format(answer) for i, answer in enumerate(answers)]
    items = [(completion, (answer,)) for completion, answer in zip(completions, answers, strict=True)]
    pools = {name: make(grade) for name, make in POOLS.items()}
    verdicts = {name: pool.map(items[:50]) for name, pool in pools.items()}
    seconds: dict[str, list[float]] = {name: [] for name in pools}
    for _ in range(rounds):
        for name, pool in pools.items():
            started = time.perf_counter()
            verdicts[name] = pool.map(items)
            seconds[name].append(time.perf_counter() - started)
    assert all(each == verdicts["rlmod"] for each in verdicts.values()), "the verdicts depend on the pool"
    print(
        f"| pool, {WORKERS} workers | {len(items)} answers, median s | lowest | highest | rounds |\n|---|---|---|---|---|"
    )
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} | {rounds} |")
        pools[name].stop()


def plant_failures() -> None:
    from tools.bench_pools import misbehave  # this file is __main__, which workers cannot import

    words = [str(i) for i in range(200)]
    for word, number in (("hang", 4), ("raise", 4), ("exit", 4)):
        for place in random.Random(word).sample(range(200), number):
            words[place] = word
    bad = ("hang", "raise", "exit")
    expected = [None if word in bad else word for word in words]
    bound = words.count("hang") * TIME_LIMIT / WORKERS
    print(f"\n| pool | wrong replies of {len(words)} | s; the time limits alone are {bound:.1f} s |\n|---|---|---|")
    for name, make in POOLS.items():
        pool = make(misbehave)
        pool.map([("0",)] * WORKERS)
        started = time.perf_counter()
        replies = pool.map([(word,) for word in words])
        took = time.perf_counter() - started
        wrong = sum(reply != right for reply, right in zip(replies, expected, strict=True))
        print(f"| {name} | {wrong} | {took:.1f} |")
        pool.stop()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("problems", type=Path)
    options.add_argument("--answers", type=int, default=1500)
    options.add_argument("--rounds", type=int, default=5)
    arguments = options.parse_args()
    grade_answers(read_answers(arguments.problems)[: arguments.answers], arguments.rounds)
    plant_failures()


if __name__ == "__main__":
    main()
